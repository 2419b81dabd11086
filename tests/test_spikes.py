"""Spikes saved as bytes: only what is known to be whole numbers, whatever is done to a tensor."""

import gc

import pytest
import torch

from conftest import load

cifar10 = load("cifar10")
spikes, lif, layer = cifar10.spikes, cifar10.neuron, cifar10.layer


def fire(*shape):
    """Spikes of a neuron whose input requires a gradient."""
    torch.manual_seed(0)
    return lif.MultiStepLIF()((2 * torch.randn(4, *shape)).requires_grad_())


def add_space(s):
    """[4, 3, 6, 6] as [T, B, C, H, W]."""
    return s.unsqueeze(-1)


KEEP = {
    "itself": lambda s: s,
    "views": lambda s: s.transpose(0, 1).flatten(2).unflatten(2, (2, -1))[:, 1:],
    "sum": lambda s: spikes.add(s, spikes.add(s, s)),
    "masked": lambda s: spikes.masked(add_space(s), add_space(s)[:, :, :2, None]),
}
LOSE = {
    "detached": lambda s: s.detach(),
    "scaled": lambda s: s * 0.5,
    "plus": lambda s: s + s,
    "analog sum": lambda s: spikes.add(s, 0.5 * s),
    "analog mask": lambda s: spikes.masked(add_space(s), 0.5 * add_space(s)[:, :, :2, None]),
    "matrix product": lambda s: spikes.matmul(s, s, lif.MultiStepLIF()),
    "in place": lambda s: s.mul_(0.5),
    "a view in place": lambda s: (s.flatten(2).mul_(0.5), s)[1],
    "an element": lambda s: (s[0, 0].fill_(0.5), s)[1],
    "other type": lambda s: s.view(torch.int32).view(torch.int16),
    "copy": lambda s: s.clone(),
    "mean": lambda s: s.mean(0, keepdim=True),
}


@pytest.mark.parametrize("name", KEEP)
def test_known(name):
    x = KEEP[name](fire(3, 6, 6))
    gc.collect()
    assert 1 <= spikes.largest(x) <= 3 and x.max() <= spikes.largest(x)
    assert spikes.save(x).dtype == torch.uint8 and torch.equal(spikes.save(x).to(x.dtype), x)


@pytest.mark.parametrize("name", LOSE)
def test_not_known(name):
    x = LOSE[name](fire(3, 6, 6))
    assert spikes.largest(x) is None and spikes.save(x) is x


def test_large_sums_are_no_bytes():
    s, x = fire(3, 6), fire(3, 6)
    for _ in range(254):
        x = spikes.add(x, s)
    assert spikes.largest(x) == 255 and spikes.save(x).dtype == torch.uint8
    x = spikes.add(x, s)
    assert spikes.largest(x) == 256 and spikes.save(x) is x


def test_nothing_is_marked_where_nothing_is_saved():
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            s = lif.MultiStepLIF()(torch.randn(4, 3))
            assert spikes.largest(spikes.add(s, s)) is None


def test_debug_mode():
    """Autograd does not see a write to .data, nor do we; anomaly detection looks at the values."""
    s = fire(3, 6)
    s.data.mul_(0.5)
    assert spikes.save(s).dtype == torch.uint8
    with (
        torch.autograd.set_detect_anomaly(True),
        pytest.raises(RuntimeError, match="marked as spikes"),
    ):
        spikes.save(s)


@pytest.mark.parametrize("name", ["masked", "matmul", "matmul of one of many", "add"])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.37, 1.0), (1.0, 0.37), (0.37, 0.37)])
def test_product(name, scales):
    """Equal to plain.py's in values and gradients, for spikes and for analog values, broadcast
    too.
    """
    name, _, one = name.partition(" ")
    results, more = [], [lif.MultiStepLIF()] * (name == "matmul")
    for function in (getattr(spikes, name), getattr(cifar10.plain, name)):
        s = fire(3, 8, 5, 5).detach().double()
        a = s.clone().requires_grad_()
        b = s[:, :, :2, None] if name == "masked" else s[0, :1] if one else s
        b = b.clone().requires_grad_()
        x, y = spikes.mark(a.clone()), spikes.mark(b.clone())
        x, y = (z if scale == 1 else z * scale for z, scale in zip((x, y), scales, strict=True))
        out = function(x, y, *more)
        out.square().sum().backward()
        results.append((out, a.grad, b.grad))
    for ours, want in zip(*results, strict=True):
        torch.testing.assert_close(ours, want, rtol=0, atol=1e-12)


def test_bytes_of_the_kernel_that_fired():
    """A view of a fused layer's spikes is saved as a view of the bytes that its kernel wrote."""
    torch.manual_seed(0)
    modules = [torch.nn.Conv2d(3, 24, 1), torch.nn.BatchNorm2d(24), lif.MultiStepLIF()]
    y = layer.conv_bn_lif(torch.randn(4, 2, 3, 5, 6), *modules)
    known = y.spikes[2]
    assert known.dtype == torch.uint8 and torch.equal(known.to(y.dtype), y) and 0 < y.mean() < 1
    for view in (y, y.movedim(2, -1)[..., 5:12], y.flatten(0, 1)[3:], y.unflatten(2, (4, 6))):
        small = spikes.save(view)
        assert torch.equal(small.to(view.dtype), view)
        assert small.untyped_storage().data_ptr() == known.untyped_storage().data_ptr()
    y.mul_(0.5)
    assert spikes.save(y) is y


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("events", [True, False])
@pytest.mark.parametrize("file", ["model", "ms"])
def test_memory_small(file, events, dtype):
    """All gradients and running statistics are the same to the bit; much less is saved."""
    kind = getattr(cifar10, file)
    build = kind.MSQKFormer if file == "ms" else kind.QKFormer
    found, saved = [], []
    for memory in ("fast", "small"):
        torch.manual_seed(0)
        options = {"embed_dims": 32, "num_heads": 2, "depths": 3, "events": events}
        model = build(memory=memory, **options).train()
        x, kept = torch.rand(2, 3, 32, 32), {}
        if dtype == torch.float64:
            model, x = model.double(), x.double()
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(x, kept=kept, parameters=parameters):
            memory = x.untyped_storage()
            if memory.data_ptr() not in parameters:
                kept[memory.data_ptr()] = memory
            return x

        autocast = torch.autocast("cpu", torch.bfloat16, dtype != torch.float64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast:
            loss = model(x).square().sum()
        saved.append(sum(memory.nbytes() for memory in kept.values()))
        loss.backward()
        found.append([*(p.grad for p in model.parameters()), *model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert saved[1] < 0.6 * saved[0]
