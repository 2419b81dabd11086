"""CUDA graphs: on the CPU all that is around a capture (on_graphs.py), on a GPU equality to the bit."""

import copy
import functools
import json
import os
import random
import socket
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conftest import Golden, load, log_of, on_cpu, same, weights_of
from forks import ended, forked
from on_digits import SMALL

cifar10, imagenet = load("cifar10"), load("imagenet")
graph, UserError = cifar10.graph, cifar10.config.UserError
MODELS = {  # folder, file, function, shape of a batch
    "cifar10": ("cifar10", "model", "QKFormer", (4, 3, 8, 8)),
    "ms": ("cifar10", "ms", "MSQKFormer", (4, 3, 8, 8)),
    "imagenet": ("imagenet", "model", "QKFormer_10_384", (2, 3, 32, 32)),
    "events": ("dvs128-gesture", "model", "QKFormer", (2, 2, 2, 16, 16)),
}
CASES = [
    ("cifar10", {"depths": 3, "cross_sample_lif": True}),
    ("ms", {"depths": 3, "drop_path": 0.5}),
    ("imagenet", {"depths": 4, "num_classes": 7, "drop_path": 0.5}),
    ("events", {"backend": "spikingjelly", "fused": False}),
]
CASES_LONG = [
    pytest.param("cifar10", options, marks=pytest.mark.long)
    for options in ({"depths": 3, "memory": "small"}, {"depths": 3, "fused": False})
]


def make(name, options):
    """(Graph, model whose neurons fire, batches)."""
    folder, file, function, shape = MODELS[name]
    build = getattr(getattr(load(folder), file), function)
    options = {"fused": torch.cuda.is_available(), **options}  # see on_graphs.py
    model = Golden.fill(build(embed_dims=32, num_heads=2, T=2, **options)).float()
    generator = torch.Generator().manual_seed(0)
    batches = [2 * torch.rand(shape, generator=generator) for _ in range(3)]
    return load(folder).graph.Graph, model, batches


def train(model, forward, batches, dtype=None, micro_steps=1):
    """[logits] of all batches, after each `micro_steps` of which the optimizer takes a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    torch.manual_seed(1)
    forward.train()
    found = []
    for number, x in enumerate(batches, start=1):
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
            logits = forward(x)
        logits.float().square().sum().backward()
        found.append(logits.detach())
        if number % micro_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
    return found


@torch.inference_mode()
def evaluate(forward, batches, dtype=None):
    forward.eval()
    with torch.autocast(batches[0].device.type, dtype=dtype, enabled=dtype is not None):
        return [forward(x) for x in batches]


def check_equal(ones, others):
    for one, other in zip(ones, others, strict=True):
        assert one.isfinite().all() and torch.equal(one, other)


def check_steps(Graph, model, batches, **options):
    """Steps and tests of a model and of its graphs are the same, to the bit; so is what they leave
    in the model.
    """
    other = copy.deepcopy(model)
    trained, tested = Graph(other), Graph(other)
    amp = {key: options[key] for key in ("dtype",) if key in options}
    for turn in (batches, batches[::-1]):  # graphs see what the first turn has changed
        want = train(model, model, turn, **options)
        check_equal(train(other, trained, turn, **options), want)
        assert not any(torch.equal(want[0], later) for later in want[1:])
        check_equal(other.state_dict().values(), model.state_dict().values())
        check_equal(evaluate(tested, turn, **amp), evaluate(model, turn, **amp))
    assert trained.captured and tested.captured


@pytest.mark.parametrize(("name", "options"), [*CASES, *CASES_LONG], ids=str)
def test_steps_by_graphs_are_the_steps(cuda, name, options):
    check_steps(*make(name, options))
    # Forward and backward in training, forward in the test: two turns of three batches.
    assert [graph.replays for graph in cuda.graphs] == [6, 6, 6]


def test_mixed_precision_and_accumulation(cuda):
    """16-bit weights are made anew from those of the step; gradients are summed over replays."""
    check_steps(*make(*CASES[0]), dtype=torch.bfloat16, micro_steps=2)


def test_other_shapes_and_modes_run_kernel_by_kernel(cuda):
    Graph, model, batches = make(*CASES[0])
    forward = Graph(model)
    last = batches[0][:3]
    check_equal(evaluate(forward, [*batches, last]), evaluate(model, [*batches, last]))
    train(model, forward, batches)
    assert [graph.replays for graph in cuda.graphs] == [len(batches)]
    check_equal(
        evaluate(forward, [last, batches[0].double()[:1].float()]),
        evaluate(model, [last, batches[0][:1]]),
    )
    # It was captured in eval(), without gradients: a change of only one is another kind, too.
    assert forward(batches[0]).requires_grad
    with torch.no_grad():
        forward.train()(batches[0])
    assert [graph.replays for graph in cuda.graphs] == [len(batches)]


def test_a_backward_pass_belongs_to_the_last_forward_pass(cuda):
    Graph, model, batches = make(*CASES[0])
    forward = Graph(model.train())
    first, _ = forward(batches[0]), forward(batches[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.sum().backward()


class Idle(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.unused, self.frozen = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1), False)


def test_parameters_without_a_gradient(cuda):
    model, x, seen = Idle(3, 3), torch.ones(2, 3), []
    model.weight.register_hook(seen.append)
    graph.Graph(model)(x).sum().backward()
    assert (model.unused.grad, model.frozen.grad) == (None, None)
    assert len(seen) == 1  # the capture's passes are none of the parameters' own
    check_equal(
        [model.weight.grad, model.bias.grad], [torch.full((3, 3), 2.0), torch.full((3,), 2.0)]
    )


class Asking(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


def test_a_model_that_cannot_be_captured(cuda):
    forward = graph.Graph(Asking(3, 3))
    with pytest.raises(UserError) as error:
        forward(torch.ones(2, 3))
    assert str(error.value) == (
        "cuda_graph: this model can't be captured (_local_scalar_dense is not permitted when stream "
        "is capturing); cuda_graph: false runs without"
    )


class Full(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.last:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return super().forward(x)


@pytest.mark.parametrize("call", [1, 4])  # PyTorch warms up by three
def test_a_model_that_has_no_memory(cuda, call):
    """In the warm-up or in the capture."""
    model = Full(3, 3)
    model.last = call
    with pytest.raises(torch.OutOfMemoryError) as error:
        graph.Graph(model)(torch.ones(2, 3))
    assert "make batch_size smaller" in cifar10.process.explain(error.value)


def test_lines_where_there_is_no_graph(caplog):
    def chosen(training, device="cuda", world_size=1, **keys):
        cfg = SimpleNamespace(**{"cuda_graph": True, **keys})
        ranks = SimpleNamespace(device=torch.device(device), world_size=world_size)
        graph.say.cache_clear()
        caplog.clear()
        got = graph.graphed(model, cfg, ranks, training)
        assert (got is model) == bool(caplog.messages or not cfg.cuda_graph)
        return " ".join(caplog.messages).removeprefix("cuda_graph has no effect: ")

    model = nn.Linear(1, 1)
    with caplog.at_level("INFO", logger="qkformer"):
        assert [chosen(on, "cpu", cuda_graph=False) for on in (True, False)] == ["", ""]
        assert [chosen(on) for on in (True, False)] == ["", ""]
        assert [chosen(on, "cpu") for on in (True, False)] == ["a graph needs a GPU"] * 2
        needs = "in training a graph needs "
        assert chosen(True, sync_bn=True, world_size=2) == f"{needs}sync_bn: false"
        assert chosen(True, sync_bn=True) == chosen(True, world_size=2) == ""
        assert chosen(False, world_size=2, sync_bn=True) == ""


def test_runs_by_graphs_are_the_runs(cuda, monkeypatch, tmp_path):
    """Training with all that is random in it, averaged weights and tests, then test.py."""
    monkeypatch.setattr(graph, "obstacle", lambda *_: None)
    words = [*SMALL, "--img-size", 8, "--time-step", 1, "--epochs", 1, "--warmup-epochs", 0]
    words += ["--batch-size", 400, "--val-batch-size", 150]
    words += ["--mixup", 0.5, "--reprob", 0.5, "--drop-path", 0.2, "--clip-grad", 1]
    words += ["--model-ema", "true", "--model-ema-decay", 0.5]
    found = []
    for on in ("false", "true"):
        place = ["--output", tmp_path, "--cuda_graph", on, "--fused", "false"]
        assert cifar10.train.main(on_cpu([*words, *place, "--experiment", on])) == 0
        run = tmp_path / on
        cifar10.test.main(on_cpu([*place, "--checkpoint", run / "best.pth"]))
        metrics = json.loads((run / "test-best.json").read_text())
        found.append({key: metrics[key] for key in ("loss", "top1", "top5")})
        assert bool(cuda.graphs) == (on == "true")
    one, other = tmp_path / "false", tmp_path / "true"
    assert found[0] == found[1] and log_of(one) == log_of(other)
    assert same(weights_of(one / "last.pth"), weights_of(other / "last.pth"))
    assert len(cuda.graphs) == 2 + 2 + 1  # a step, a test of two models, test.py


@pytest.mark.parametrize("name", ["imagenet", "dvs128-gesture"])
def test_trainers_of_other_data_sets(cuda, trainer, monkeypatch, name):
    """On ImageNet with accumulated gradients, clipping, averaged weights, tet and drop_path."""
    monkeypatch.setattr(load(name).graph, "obstacle", lambda *_: None)
    found = []
    for on in ("false", "true"):
        run = trainer(name, "--cuda_graph", on, "--fused", "false")
        torch.manual_seed(0)
        run.train_epoch()
        averaged = run.ema.module.state_dict() if run.ema else {}
        weights = [*run.model.state_dict().values(), *averaged.values()]
        found.append([*weights, torch.tensor(run.meter.total)])
        assert len(cuda.graphs) == 2 * (on == "true")
    check_equal(*found)


@pytest.mark.parametrize("name", ["imagenet", pytest.param("cifar10", marks=pytest.mark.long)])
def test_two_ranks(cuda, trainer, monkeypatch, tmp_path, name):
    """Each with batches of its own; on ImageNet gradients are exchanged every second batch."""
    monkeypatch.setattr(load(name).graph, "obstacle", lambda *_: None)

    def train(rank, on):
        place = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2"}
        os.environ.update({**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        run = trainer(name, "--cuda_graph", on, "--fused", "false")
        assert isinstance(run.ddp, torch.nn.parallel.DistributedDataParallel)
        before = {key: value.clone() for key, value in run.model.state_dict().items()}
        random.seed(rank)
        run.train_epoch()
        scale = torch.tensor(run.scaler.get_scale())
        state = {**run.model.state_dict(), "loss": torch.tensor(run.meter.total), "scale": scale}
        torch.save([before, state, len(cuda.graphs)], tmp_path / f"{rank}-{on}")
        torch.distributed.destroy_process_group()

    for on in ("false", "true"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        pids = [forked(functools.partial(train, rank, on)) for rank in range(2)]
        assert [ended(pid) for pid in pids] == [0, 0]
    found = {path.name: torch.load(path) for path in tmp_path.glob("?-*")}
    for rank in range(2):
        before, eager, graphs = found[f"{rank}-false"]
        _, graphed, more = found[f"{rank}-true"]
        assert (graphs, more) == (0, 2) and eager.keys() == graphed.keys()  # names of what is saved
        check_equal(eager.values(), graphed.values())
        assert not torch.equal(before["head.weight"], graphed["head.weight"])
    one, other = (found[f"{rank}-true"][1] for rank in range(2))
    differ = {key.rpartition(".")[2] for key in one if not torch.equal(one[key], other[key])}
    assert differ == {"running_mean", "running_var"}  # which are each rank's own


# On a GPU -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_steps_by_graphs_on_gpu(name, options, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    Graph, model, batches = make(name, options)
    check_steps(Graph, model.cuda(), [x.cuda() for x in batches], dtype=dtype, micro_steps=2)
