"""CUDA graphs on a CPU, as far as what is around them goes: a capture keeps PyTorch's operators with
their tensors and numbers, a replay runs just these on the same memory. PyTorch's own
make_graphed_callables captures and replays them. Models run plain: our kernels are no operators.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import CLASSES, load

# What a capture on a GPU does not allow: a value that the host wants to know, a size that depends on
# values, a tensor made of Python's numbers.
FORBIDDEN = (
    "_local_scalar_dense item is_nonzero equal nonzero masked_select unique _unique2 lift_fresh "
    "lift_fresh_copy repeat_interleave allclose"
).split()


def name_of(operator):
    return operator.name().split("::")[1].split(".")[0]


def tensors(*values):
    return [leaf for leaf in tree_leaves(values) if torch.is_tensor(leaf)]


def places(found):
    return {tensor.untyped_storage().data_ptr() for tensor in found}


class Tape(TorchDispatchMode):
    """The operators that are called within it; RuntimeError for one that can't be captured."""

    def __init__(self, forbidden=FORBIDDEN):
        super().__init__()
        self.forbidden, self.calls = forbidden, []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if (name := name_of(operator)) in self.forbidden:
            raise RuntimeError(f"{name} is not permitted when stream is capturing")
        results = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, results))
        return results


class CUDAGraph:
    def __init__(self):
        self.tape, self.replays = None, 0

    @contextlib.contextmanager
    def capture(self, pool, cuda):
        assert pool is cuda.pools[-1] and torch.is_autocast_cache_enabled() is False
        self.tape, self.pool, self.cuda = Tape(), pool, cuda
        cuda.graphs.append(self)
        try:
            with self.tape:
                yield
        except Exception:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
        assert cuda.warmed >= len(self.tape.calls), "no warm-up came before this capture"
        self.forget()  # nothing has been computed yet

    def forget(self):
        """Whoever uses what the graph gave will see it."""
        for _, args, kwargs, results in self.tape.calls:
            known = places(tensors(args, kwargs))
            for result in tensors(results):
                if result.is_floating_point() and not places([result]) & known:
                    result.data.fill_(float("nan"))  # .data: unknown to autograd

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for later in self.cuda.graphs[self.cuda.graphs.index(self) + 1 :]:
            if later.pool is self.pool:  # it may have taken memory that was free again here
                later.forget()
        for operator, args, kwargs, results in self.tape.calls:
            again = operator(*args, **kwargs)
            for old, new in zip(tensors(results), tensors(again), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.data.copy_(new)  # a view, and what was written in place, are there


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda whose graphs work on a CPU; `graphs` are those that were captured."""
    state = SimpleNamespace(graphs=[], pools=[], warmed=0)

    @contextlib.contextmanager
    def stream(side):
        with Tape(forbidden=()) as tape:
            yield
        state.warmed = len(tape.calls)

    def capture(graph, pool=None, capture_error_mode="global"):
        assert capture_error_mode == "thread_local"
        return graph.capture(pool, state)

    def new_pool():
        state.pools.append(object())
        return state.pools[-1]

    for name, value in {
        "CUDAGraph": CUDAGraph,
        "graph": capture,
        "graphs.graph_pool_handle": new_pool,
        "synchronize": lambda: None,
        "stream": stream,
        "Stream": lambda: None,
        "get_rng_state": lambda device: torch.get_rng_state(),
        "set_rng_state": lambda state, device: torch.set_rng_state(state),
    }.items():
        monkeypatch.setattr(f"torch.cuda.{name}", value)
    for folder in CLASSES:  # as on a GPU: not row by row
        monkeypatch.setattr(load(folder).model, "linear", lambda x, layer: layer(x))
    return state


# Trainers -----------------------------------------------------------------------------------------

RECIPES = {
    "cifar10": "-c quickstart.yml --dim 16 --num-heads 2 --reprob 1 --clip-grad 1 --model-ema true",
    "imagenet": "--model MSQKFormer_10_384 --layer 4 --dim 32 --num_heads 2 --input_size 32 "
    "--batch_size 2 --accum_iter 2 --clip_grad 1 --model_ema true --loss tet --drop_path 0.5",
    "dvs128-gesture": "--dim 32 --num-heads 2 --T 2 --batch-size 2 --fused false",
}
SHAPES = {"cifar10": (3, 16, 16), "imagenet": (3, 32, 32), "dvs128-gesture": (2, 2, 32, 32)}


@pytest.fixture
def trainer(monkeypatch, tmp_path):
    """Makes a Trainer of a RECIPE and some batches, with the optimizer and the scaler of a GPU."""
    return lambda name, *words: make_trainer(monkeypatch, tmp_path, name, words)


def make_trainer(monkeypatch, tmp_path, name, words):
    folder = load(name)
    ranks = folder.process.Ranks("cpu")
    torch.manual_seed(3 + ranks.rank)  # each rank has its own batches, and weights before DDP
    data = folder.data
    flags = [*RECIPES[name].split(), *map(str, words), "--output", str(tmp_path)]
    settings = folder.config.read_settings(folder.options, flags)
    cfg = settings.resolve()
    size, classes = cfg.batch_size, cfg.num_classes or CLASSES[name]
    soft = name == "dvs128-gesture" or data.mixes(cfg)
    targets = torch.full((size, classes), 1 / classes) if soft else torch.arange(size) % classes

    class Samples(list):
        classes = range(CLASSES[name])

    monkeypatch.setattr(
        data, "build_dataset", lambda *_: Samples(range(4 * size * ranks.world_size))
    )
    batches = [(torch.rand(size, *SHAPES[name]), targets) for _ in range(4)]
    monkeypatch.setattr(data, "train_loader", lambda *_: batches)
    scaler = torch.amp.grad_scaler.GradScaler("cpu", init_scale=16.0)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: scaler)
    monkeypatch.setattr(folder.run, "enter", lambda settings: ranks)
    run = folder.train.Trainer(settings, data, folder.options)
    run.stop = False
    run.optimizer._step_supports_amp_scaling = True
    for group in run.optimizer.param_groups:
        group["fused"] = True
    return run
