"""The fused layers against the plain ones: alone, on the CPU and on a GPU."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import surrogate
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from conftest import load
from on_gpus import stand_in

cifar10 = load("cifar10")
lif, kernels, layer = cifar10.neuron, cifar10.compiler, cifar10.layer
native = cifar10.native
models = cifar10.model
__all__ = ["stand_in"]  # a fixture
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
compiled = pytest.mark.skipif(
    not native.available("cpu", torch.float32, "auto"), reason="needs a C++ compiler"
)

KINDS = {
    "1x1": (nn.Conv2d, (12, 24, 1), {}, False),
    "token": (nn.Conv1d, (12, 12, 1), {"bias": False}, False),
    "3x3": (nn.Conv2d, (12, 9, 3), {"padding": 1, "bias": False}, False),
    "strided": (nn.Conv2d, (12, 24, 1), {"stride": 2, "bias": False}, False),
    "pooled": (nn.Conv2d, (12, 16, 3), {"padding": 1, "bias": False}, True),
}


def make_layer(kind, dtype, device="cpu", **options):
    torch.manual_seed(len(kind))
    convolution, sizes, keywords, pool = KINDS[kind]
    conv = convolution(*sizes, **keywords)
    norm = nn.BatchNorm1d if convolution is nn.Conv1d else nn.BatchNorm2d
    bn = norm(sizes[1])
    nn.init.normal_(bn.weight, 0.3, 1.0)  # negative ones too: max-pooling must know
    nn.init.normal_(bn.bias, 0.7, 1.0)
    nn.init.normal_(bn.running_mean, 0.0, 0.3)
    node = lif.MultiStepLIF(**options)
    return nn.ModuleList([conv, bn, node]).to(device, dtype), pool


def both(kind, x, dtype, device="cpu", autocast=None):
    """(spikes, gradients, buffers, spikes in evaluation) of the fused and of the plain layer, from
    the same start.
    """
    results = []
    grad = None
    for on in (True, False):
        modules, pool = make_layer(kind, dtype, device, fused=on)
        with torch.autocast(device, dtype=autocast) if autocast else nullcontext():
            assert bool(layer.can_fuse(x, *([module] for module in modules))) == on
        leaf = x.detach().requires_grad_()
        with torch.autocast(device, dtype=autocast) if autocast else nullcontext():
            spikes = layer.conv_bn_lif(leaf, *modules, pool=pool)
        grad = torch.randn_like(spikes) if grad is None else grad
        spikes.backward(grad)
        gradients = {name: parameter.grad for name, parameter in modules.named_parameters()}
        modules.eval()
        with torch.no_grad(), torch.autocast(device, dtype=autocast) if autocast else nullcontext():
            tested = layer.conv_bn_lif(x, *modules, pool=pool)
        results.append(
            (spikes.detach(), {**gradients, "x": leaf.grad}, dict(modules.named_buffers()), tested)
        )
    return results


def whole_numbers(dtype, shape=(4, 3, 12, 8, 6)):
    torch.manual_seed(1)
    return torch.randint(0, 4, shape).to(dtype)


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_layer_is_the_plain_one(kind):
    x = whole_numbers(torch.float64)
    ours, plain = both(kind, x, torch.float64)
    assert (
        torch.equal(ours[0], plain[0])
        and torch.equal(ours[3], plain[3])
        and 0 < plain[0].mean() < 1
    )
    for name, want in plain[1].items():
        torch.testing.assert_close(ours[1][name], want, rtol=1e-9, atol=1e-9, msg=name)
    for name, want in plain[2].items():
        torch.testing.assert_close(ours[2][name], want, rtol=1e-12, atol=1e-12, msg=name)
    assert (ours[1].get("0.bias", torch.zeros(1)) == 0).all()  # in front of BatchNorm, exactly


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_as_on_a_gpu(kind, stand_in):
    """Where a convolution of one pixel is a product, of [pixels, channels], and none sums events."""
    test_layer_is_the_plain_one(kind)
    assert {"fire", "fire_backward", "batch_norm"} <= {launch.name for launch in stand_in}
    test_image_shown_T_times(kind)


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_image_shown_T_times(kind):
    """Computed once, with the gradients and running statistics of T copies."""
    torch.manual_seed(2)
    x = torch.randn(3, 12, 8, 6, dtype=torch.float64).expand(4, 3, 12, 8, 6)
    ours, pool = make_layer(kind, torch.float64)
    plain = copy.deepcopy(ours)
    plain[2].fused = False
    spikes, want = (layer.conv_bn_lif(x, *modules, pool=pool) for modules in (ours, plain))
    grad = torch.randn_like(want)
    spikes.backward(grad)
    want.backward(grad)
    assert torch.equal(spikes, want) and 0 < want.mean() < 1
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9, msg=name)
    for (name, a), b in zip(ours.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


@compiled
@pytest.mark.parametrize("number", [int, np.float32, np.int64, torch.tensor])
def test_constants_of_any_type_of_number(number):
    """As a user may set them later: what a kernel gets has the kernel's type."""
    torch.manual_seed(0)
    x, results = torch.randn(4, 3, 12, 8, 6), []
    for on in (True, False):
        (conv, bn, node), _ = make_layer("1x1", torch.float32, fused=on)
        node.v_threshold, node.tau, bn.eps, bn.momentum = map(number, (1, 3, 1, 1))
        node.surrogate_function = surrogate.Sigmoid(alpha=number(4))
        assert bool(layer.can_fuse(x, [conv], [bn], [node])) == on
        leaf = x.clone().requires_grad_()
        spikes = layer.conv_bn_lif(leaf, conv, bn, node)
        (spikes * torch.linspace(-1, 1, spikes.numel()).view_as(spikes)).sum().backward()
        bn.eval()
        with torch.no_grad():
            tested = layer.conv_bn_lif(x, conv, bn, node)
        results.append((spikes, tested, leaf.grad, bn.running_var, bn.weight.grad))
    fast, plain = results
    assert 0.05 < fast[0].mean() < 0.95 and 0.05 < fast[1].mean() < 0.95
    for one, other in zip(fast, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_no_images():
    modules, _ = make_layer("3x3", torch.float32)
    modules.eval()
    with torch.no_grad():
        assert layer.conv_bn_lif(torch.zeros(4, 0, 12, 8, 6), *modules).shape == (4, 0, 9, 8, 6)


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_flips_few_spikes(kind):
    """float32 against float32: sums in another order. Flips are counted, in training and in
    evaluation.
    """
    x = whole_numbers(torch.float32, (4, 8, 12, 32, 24))
    ours, plain = both(kind, x, torch.float32)
    for index in (0, 3):
        flips = (ours[index] != plain[index]).float().mean().item()
        assert flips <= 2e-5, f"{flips:.1e} of the spikes"
    for name, want in plain[1].items():
        if name != "0.bias":  # noise in the plain path
            error = (ours[1][name] - want).norm() / want.norm()
            assert error <= 1e-2, f"{name}: {error:.1e}"


@compiled
def test_float32_gradients_are_those_of_float64():
    """Through a whole model, of most initialisations: now and then rounding flips a spike, in the
    plain path too.
    """
    errors = []
    for seed in range(5):
        torch.manual_seed(seed)
        ours = models.QKFormer(embed_dims=64, num_heads=4, depths=3)
        x, y = torch.rand(16, 3, 16, 16), torch.randint(0, 10, (16,))
        true = copy.deepcopy(ours).double()
        nn.functional.cross_entropy(ours(x), y).backward()
        nn.functional.cross_entropy(true(x.double()), y).backward()
        got, want = (
            torch.cat([p.grad.double().flatten() for p in m.parameters()]) for m in (ours, true)
        )
        errors.append(((got - want).norm() / want.norm()).item())
    assert sorted(errors)[2] <= 1e-5, errors


@compiled
def test_mixed_precision():
    """bfloat16 autocast: the fused layer does not round between BatchNorm and neuron; types are the
    plain path's.
    """
    x = whole_numbers(torch.bfloat16, (4, 8, 12, 32, 24))
    ours, plain = both("1x1", x, torch.float32, autocast=torch.bfloat16)
    assert ours[0].dtype == plain[0].dtype == torch.bfloat16
    assert {name: a.dtype for name, a in ours[1].items()} == {
        name: a.dtype for name, a in plain[1].items()
    }
    assert (ours[0] != plain[0]).float().mean() <= 1e-2
    error = (ours[1]["0.weight"] - plain[1]["0.weight"]).norm() / plain[1]["0.weight"].norm()
    assert error <= 0.1


@compiled
def test_each_joins_parameters_and_leaves_them_apart():
    x = whole_numbers(torch.float64)
    runs = []
    for on in (True, False):
        torch.manual_seed(3)
        layers = [
            nn.ModuleList([nn.Conv1d(12, C, 1), nn.BatchNorm1d(C), lif.MultiStepLIF(fused=on)])
            for C in (8, 12)
        ]
        layers = nn.ModuleList(layers).double()
        spikes = layer.conv_bn_lif_each(x, *layers)
        sum((s * (i + 1)).square().sum() for i, s in enumerate(spikes)).backward()
        runs.append((spikes, layers))
    for a, b in zip(*(spikes for spikes, _ in runs), strict=True):
        assert torch.equal(a, b)
    for which in ("named_parameters", "named_buffers"):
        for (name, a), (_, b) in zip(
            *(getattr(layers, which)() for _, layers in runs), strict=True
        ):
            a, b = (a.grad, b.grad) if which == "named_parameters" else (a, b)
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


@compiled
def test_what_runs_plain(monkeypatch):
    lines = set()
    for module in (native, cifar10.fusible):
        monkeypatch.setattr(module, "say", lines.add)
    native.available.cache_clear()  # so that it is said again
    monkeypatch.setattr(cifar10.fusible, "reasons", {})
    x = whole_numbers(torch.float32)

    def fuses(change=lambda conv, bn, node: None, x=x, **options):
        modules, _ = make_layer("1x1", torch.float32, **options)
        change(*modules)
        return layer.can_fuse(x, *([module] for module in modules))

    assert fuses()
    assert not fuses(fused=False)
    assert not fuses(backend="torch") and not fuses(backend="spikingjelly")
    assert not fuses(lambda conv, bn, node: node.register_forward_hook(print))
    assert not fuses(lambda conv, bn, node: conv.register_forward_pre_hook(print))
    assert not fuses(lambda conv, bn, node: bn.eval())  # frozen, in a backward pass
    with torch.no_grad():
        assert fuses(lambda conv, bn, node: bn.eval())
    assert not fuses(lambda conv, bn, node: setattr(node, "store_v_seq", True))
    assert not fuses(lambda conv, bn, node: setattr(bn, "momentum", None))
    assert not fuses(lambda conv, bn, node: setattr(conv, "groups", 3))
    assert not fuses(x=x.half()) and not fuses(x=x.double()) and not fuses(x=x.to("meta"))
    assert not fuses(lambda conv, bn, node: bn.bfloat16())
    assert not fuses(x=x.expand(4, 3, 12, 8, 6).repeat(17, 1, 1, 1, 1)) and not fuses(x=x[..., 0])
    layers = "Conv2d(12, 24, (1, 1)) and layers like it run module by module: "
    assert {line for line in lines if " has " not in line} == {
        "fused kernels on the CPU",
        "layers run module by module on cpu: T is 68, kernels take 64 steps",
        f"{layers}kernels know no such convolution, BatchNorm or neuron",
    }
    modules, _ = make_layer("1x1", torch.float32)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(modules)
    assert not layer.can_fuse(x, *([module] for module in synchronised))
    assert "layers with SyncBatchNorm run module by module in training" in lines
    for wide in (
        nn.Conv1d(12, 24, 3, padding=1),
        nn.Conv1d(12, 24, 1, stride=2),
        nn.Conv2d(12, 24, 1),
    ):
        assert not layer.can_fuse(x, [wide], [nn.BatchNorm1d(24)], [lif.MultiStepLIF()])


class Own(torch.Tensor):
    pass


def test_tensors_of_other_kinds():
    """What may have no memory of its own runs plain: subclasses, and tensors that have no values."""
    x = whole_numbers(torch.float32)
    modules = [[module] for module in make_layer("1x1", torch.float32)[0]]
    assert not layer.can_fuse(x.as_subclass(Own), *modules)
    modules[0][0].weight = nn.Parameter(modules[0][0].weight.detach().as_subclass(Own))
    assert not layer.can_fuse(x, *modules)
    model = models.QKFormer(embed_dims=32, num_heads=2, depths=3).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.empty(2, 3, 16, 16)
    with torch.no_grad():  # behind the mode
        assert model(fake).shape == (2, 10)


def forget(kernels):
    """What is known of the compiler."""
    for function in (kernels.host_library, kernels.fault, native.available):
        function.cache_clear()


def test_without_a_compiler(monkeypatch):
    lines = []
    monkeypatch.setattr(native, "say", lines.append)
    forget(kernels)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    try:
        modules, _ = make_layer("1x1", torch.float32)
        x = whole_numbers(torch.float32)
        got = layer.conv_bn_lif(x, *modules)
        modules[2].fused = False
        assert torch.equal(got, layer.conv_bn_lif(x, *modules))
        assert len(lines) == 1 and lines[0].startswith(
            "layers run module by module on cpu: no working C++ compiler ("
        )
        assert "/nowhere/c++" in lines[0]
    finally:
        forget(kernels)


@compiled
def test_layers_that_differ_are_not_joined():
    x = whole_numbers(torch.float64)
    layers = [make_layer("token", torch.float64)[0] for _ in range(2)]
    convs, bns, nodes = zip(*layers, strict=True)
    assert layer.can_fuse(x, convs, bns, nodes)
    nodes[1].v_threshold = 0.3
    assert not layer.can_fuse(x, convs, bns, nodes)
    spikes = layer.conv_bn_lif_each(x, *layers)
    assert spikes[1].sum() > spikes[0].sum()


@compiled
def test_a_single_value_has_no_variance():
    modules, _ = make_layer("1x1", torch.float32)
    with pytest.raises(ValueError, match="single value"):
        layer.conv_bn_lif(torch.ones(1, 1, 12, 1, 1), *modules)


# On a GPU -----------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("kind", KINDS)
def test_layer_on_gpu(kind):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    ours, plain = both(
        kind, whole_numbers(torch.float32, (4, 8, 12, 32, 24)).cuda(), torch.float32, device="cuda"
    )
    assert (ours[0] != plain[0]).float().mean() <= 1e-4 and (
        ours[3] != plain[3]
    ).float().mean() <= 1e-4
    for name, want in plain[1].items():
        if name != "0.bias":
            assert (ours[1][name] - want).norm() <= 1e-2 * want.norm(), name
    half = whole_numbers(torch.float16, (4, 8, 12, 32, 24)).cuda()
    ours, plain = both(kind, half, torch.float32, device="cuda", autocast=torch.float16)
    assert (ours[0] != plain[0]).float().mean() <= 1e-2


@compiled
@pytest.mark.parametrize("size", [(56, 56), (31, 57)])
def test_a_narrow_strided_layer(size):
    """1x1 at stride 2, few channels, large images: PyTorch 2.11's own backward pass of it crashes
    here on a CPU. Against float64.
    """
    torch.manual_seed(0)
    x, found = torch.randn(2, 24, 4, *size), []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(1)
        conv = nn.Conv2d(4, 8, 1, 2, bias=False).to(dtype)
        bn, node = nn.BatchNorm2d(8).to(dtype), lif.MultiStepLIF()
        leaf = x.to(dtype, copy=True).requires_grad_()
        spikes = layer.conv_bn_lif(leaf, conv, bn, node)
        (spikes * spikes.mean((0, 1, 3, 4), keepdim=True)).sum().backward()
        found.append([leaf.grad.double(), conv.weight.grad.double(), bn.weight.grad.double()])
    for ours, want in zip(*found, strict=True):
        error = (ours - want).norm() / want.norm()
        assert error < 2e-2  # a spike that flips takes gradients with it
    assert (found[0][0][..., 1::2, :] == 0).all() and (found[0][0][..., 1::2] == 0).all()
