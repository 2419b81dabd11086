"""What a GPU that is not there would take (tools/predict.py), against counts by hand."""

import pytest
import torch

import fakecuda
import predict
from conftest import load

pytestmark = pytest.mark.skipif(not fakecuda.POSSIBLE, reason="needs a newer PyTorch for CUDA")


def cost(function, modules=()):
    with fakecuda.Machine(modules) as machine:
        function(machine)
        events = [*machine.events]
    return predict.Cost(event for event in events if not is_made(event))


def is_made(event):
    return isinstance(event, fakecuda.Operation) and event.operator._schema.name == "aten::randn"


def test_operators():
    """A view, a product, a sum that is as short as a launch, a convolution in either layout."""
    found = cost(lambda m: (m.randn(4096, 4096).t(), m.randn(8).sum()))
    assert (found.torch, found.cupy, found.bytes) == (1, 0, 4 * 9) and found.gpu == predict.LAUNCH
    found = cost(
        lambda m: m.randn(4096, 4096, dtype=torch.half) @ m.randn(4096, 4096, dtype=torch.half)
    )
    assert found.flop == 2 * 4096**3 and found.gpu == found.flop / predict.FLOPS
    assert found.kernels == {"mm": [1, found.gpu]} and found.bytes == 3 * 2 * 4096**2

    def convolve(machine, layout):
        x, weight = machine.randn(64, 32, 56, 56), machine.randn(32, 32, 1, 1)
        torch.conv2d(x.to(memory_format=layout), weight.to(memory_format=layout))

    found = cost(lambda m: convolve(m, torch.contiguous_format))
    once = 4 * (2 * 64 * 32 * 56 * 56 + 32 * 32)
    assert (found.torch, found.bytes, found.gpu) == (3, 3 * once, 3 * once / predict.BANDWIDTH)
    found = cost(lambda m: convolve(m, torch.channels_last))
    assert found.kernels["convolution"] == [1, once / predict.BANDWIDTH]


def test_kernels():
    """A kernel of ours: its tensors, each once, and instructions where those take longer."""
    cifar10 = load("cifar10")

    def launch(machine):
        y = machine.randn(4, 32, 28, 28, 64, dtype=torch.half).permute(0, 1, 4, 2, 3)
        affine = torch.empty(2, 64, device="cuda")
        cifar10.ops.fire(y, 4, affine, None, "MULTIPLY sigmoid", 0.5, 1.0, True)

    found, values = cost(launch, vars(cifar10).values()), 4 * 32 * 28 * 28 * 64
    assert (found.torch, found.cupy) == (0, 1) and found.bytes == (2 + 2 + 1) * values + 4 * 2 * 64
    by_memory = found.bytes / predict.BANDWIDTH
    assert by_memory <= found.gpu < 3 * by_memory


@pytest.mark.long
def test_table(capsys):
    rows = predict.table("cifar10", load("cifar10"), torch.empty(16, 3, 32, 32), 4)
    found = {(row["path"], row["part"]): row for row in rows}
    for path in ("fast", "release-like"):
        parts = [
            row for (of, part), row in found.items() if of == path and part[:3] in ("SPE", "sta")
        ]
        step, rest = found[path, predict.TRAIN], {}
        for name in ("launches", "mb", "gflop", "gpu_ms"):
            rest[name] = step[name] - sum(row[name] for row in parts)
            assert 0 <= rest[name] < 0.3 * step[name]  # head, loss and optimizer
        assert all(row["host_ms"] > 0 for row in parts) and step["host_ms"] > 0
        assert 0 < found[path, predict.INFER]["gpu_ms"] < 0.5 * step["gpu_ms"]
    ours, theirs = (found[path, predict.TRAIN] for path in ("fast", "release-like"))
    assert ours["mb"] < theirs["mb"] and ours["gflop"] <= theirs["gflop"]
    predict.print_table(rows)
    text = capsys.readouterr().out
    assert "not measured" in text and "SPEDS-1" in text and "fire_backward" in text
