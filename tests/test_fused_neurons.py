"""Fused layers with every kind of neuron against the modules one after another, in float64."""

import copy

import pytest
import torch
from torch import nn

from conftest import load
from test_fused import compiled
from test_fused_cuda import cuda_on_host

cifar10 = load("cifar10")
lif, layer, native = cifar10.neuron, cifar10.layer, cifar10.native
__all__ = ["cuda_on_host"]  # a fixture
KINDS = [("lif", 2.0, 4.0), ("lif", 1.5, 2.5), ("if", 2.0, 4.0), ("plif", 2.0, 4.0)]
KINDS += [("plif", 1.3, 1.0)]


def both(make, run, x, tolerance=1e-9):
    """[outputs, gradients of x and all parameters] of make(fused=True) and make(fused=False)."""
    found = []
    for on in (True, False):
        torch.manual_seed(1)
        modules, leaf = make(on).double(), x.clone().requires_grad_()
        out = run(modules, leaf)
        torch.manual_seed(2)
        sum((part * torch.randn(part.shape)).sum() for part in out).backward()
        found.append([*out, leaf.grad, *(p.grad for p in modules.parameters())])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


def layers(kind, tau, alpha, on, channels=(12, 7), inputs=5):
    """Convolution, BatchNorm and neuron, once for each of `channels`; PLIF's rates differ."""
    modules = nn.ModuleList()
    for C in channels:
        node = lif.NEURONS[kind](tau, 0.7, "auto", on, alpha)
        if kind == "plif":
            node.w.data += 0.1 * C
        bn = nn.BatchNorm2d(C)
        nn.init.normal_(bn.weight), nn.init.normal_(bn.bias)
        modules.append(nn.ModuleList([nn.Conv2d(inputs, C, 1, bias=False), bn, node]))
    return modules


@compiled
@pytest.mark.parametrize(("kind", "tau", "alpha"), KINDS)
@pytest.mark.parametrize("T", [1, 4, 7])
def test_layers(kind, tau, alpha, T, monkeypatch):
    """A layer, several joined, max-pooling, a static image, and a neuron alone; in evaluation too."""
    torch.manual_seed(0)
    x = torch.randn(T, 2, 5, 6, 4).double()
    calls, known = [], native.layer
    monkeypatch.setattr(native, "layer", lambda *args: calls.append(1) or known(*args))

    def make(on):
        return layers(kind, tau, alpha, on)

    both(make, lambda modules, x: layer.conv_bn_lif_each(x, *modules), x)
    both(make, lambda modules, x: [layer.conv_bn_lif(x, *modules[0], pool=True)], x)
    both(make, lambda modules, x: [layer.conv_bn_lif(x[:1].expand_as(x), *modules[1])], x)
    assert len(calls) == 3  # of each pair the first
    both(make, lambda modules, x: [modules[0][2](x)], x)
    with torch.no_grad():
        spikes = [
            layer.conv_bn_lif_each(x, *make(on).double().eval())
            for on in (True, False)
            if torch.manual_seed(1)
        ]
    assert all(torch.equal(a, b) for a, b in zip(*spikes, strict=True))


@compiled
@pytest.mark.parametrize(
    ("kind", "tau", "alpha"),
    [pytest.param(*kind, marks=pytest.mark.long) for kind in KINDS[1:4]],
)
def test_cuda_side(cuda_on_host, kind, tau, alpha):
    """The CUDA source of each kind of neuron, run on the host."""
    torch.manual_seed(0)
    x = torch.randn(3, 2, 4, 2, 3).double()

    def run(modules, x):
        return [layer.conv_bn_lif(x, *modules[0])]

    both(lambda on: layers(kind, tau, alpha, on, channels=(10,), inputs=4), run, x, 1e-6)
    assert {"fire", "fire_backward", "batch_norm"} <= {name for name, _ in cuda_on_host}


@compiled
@pytest.mark.parametrize("kind", lif.NEURONS)
def test_model(kind):
    """A whole model in float32: the same spikes and losses, and PLIF's time constants learn."""
    torch.manual_seed(0)
    model = cifar10.model.QKFormer(3, neuron=kind, embed_dims=32, num_heads=2, depths=3).train()
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, lif.MultiStep):
            module.fused = False
    x = torch.rand(4, 3, 16, 16)
    for m in (model, plain):
        m.double()(x.double()).square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        if "conv.bias" not in name:  # of the plain path rounding errors
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10, msg=name)
    learnt = [p for name, p in model.named_parameters() if name.endswith("lif.w")]
    assert bool(learnt) == (kind == "plif")
    assert kind != "plif" or sum(p.grad.abs().item() > 0 for p in learnt) > len(learnt) / 2
