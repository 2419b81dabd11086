"""CUDA graphs on a CPU, as far as what is around them goes: a capture keeps PyTorch's operators with
their tensors and numbers, a replay runs just these on the same memory.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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

    counts_kernels = True  # layers may go on running fused

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
        self.tape = None

    def pool(self):
        assert self.tape is not None, "the pool of a graph before its capture"
        return self

    @contextlib.contextmanager
    def capture(self, pool, cuda):
        assert pool in (None, *cuda.graphs) and torch.is_autocast_cache_enabled() is False
        self.tape = Tape()
        cuda.graphs.append(self)
        try:
            with self.tape:
                yield
        except Exception:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
        assert cuda.warmed >= len(self.tape.calls), "no warm-up came before this capture"
        # Nothing has been computed yet: whoever uses what the capture gave will see it.
        for _, args, kwargs, results in self.tape.calls:
            known = places(tensors(args, kwargs))
            for result in tensors(results):
                if result.is_floating_point() and not places([result]) & known:
                    result.data.fill_(float("nan"))  # .data: unknown to autograd

    @torch.no_grad()
    def replay(self):
        for operator, args, kwargs, results in self.tape.calls:
            again = operator(*args, **kwargs)
            for old, new in zip(tensors(results), tensors(again), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.data.copy_(new)  # a view, and what was written in place, are there


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda whose graphs work on a CPU; `graphs` are those that were captured."""
    state = SimpleNamespace(graphs=[], warmed=0)

    @contextlib.contextmanager
    def stream(side):
        with Tape(forbidden=()) as tape:
            yield
        state.warmed = len(tape.calls)

    def capture(graph, pool=None, capture_error_mode="global"):
        assert capture_error_mode == "thread_local"
        return graph.capture(pool, state)

    for name, value in {
        "CUDAGraph": CUDAGraph,
        "graph": capture,
        "stream": stream,
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "get_rng_state": lambda device: torch.get_rng_state(),
        "set_rng_state": lambda state, device: torch.set_rng_state(state),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return state
