"""Layers, neurons and products in one call each (layer.cpp), as it calls a GPU's kernels: here a CPU's
stand in for them; and how the library comes to be.
"""

import copy
import ctypes
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import on_gpus
from conftest import Golden, load
from on_gpus import stand_in
from test_layer import compiled, gpu

__all__ = ["stand_in"]  # a fixture
cifar10 = load("cifar10")
kernels, layer, native = cifar10.compiler, cifar10.layer, cifar10.native
QKFormer, MSQKFormer = cifar10.model.QKFormer, cifar10.ms.MSQKFormer
MODELS = {
    "QKFormer": {},
    "T of 1": {"T": 1},
    "PLIF": {"neuron": "plif", "surrogate": "atan"},
    "IF": {"neuron": "if"},
    "DIVIDE": {"tau": 3.7, "v_threshold": 0.8},
    "small": {"memory": "small"},
    "over samples": {"cross_sample_lif": True},
    "MS": {"make": MSQKFormer},
}


def make_model(options, **others):
    make = options.get("make", QKFormer)
    options = {"T": 2, "events": False} | {k: v for k, v in options.items() if k != "make"}
    return Golden.fill(make(embed_dims=48, num_heads=2, depths=3, **options, **others))


def run(model, device="cpu"):
    """Logits, gradients and running statistics of two steps and an evaluation."""
    dtype = next(model.parameters()).dtype
    x = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0), dtype=dtype)
    logits = []
    for train in (True, True, False):
        with torch.set_grad_enabled(train):
            logits.append(model.train(train)(x.to(device)))
        if train:
            logits[-1].float().square().sum().backward()
    return [*logits, *model.buffers(), *(parameter.grad for parameter in model.parameters())]


@compiled
@pytest.mark.parametrize("name", MODELS)
def test_models(stand_in, name):
    """Against the plain path, in float64. Every kernel that there is, is launched."""
    plain = run(make_model(MODELS[name], fused=False, backend="torch"))
    stand_in.clear()
    for ours, want in zip(run(make_model(MODELS[name])), plain, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-7, atol=1e-8)
    assert {*native.NAMES} == {launch.name for launch in stand_in}
    none = {launch.name for launch in stand_in if launch.build.neuron == kernels.NO_NEURON}
    assert {"fire", "fire_backward"} & none == (
        {"fire", "fire_backward"} if name == "MS" else set()
    )


@compiled
def test_mixed_precision(stand_in):
    """The kernels get bfloat16, and sum in float32; the loss is that of float32 but for rounding."""
    logits = {}
    for mixed in (False, True):
        stand_in.clear()
        model = make_model({}).float().train()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logits[mixed] = model(torch.rand(2, 3, 16, 24, generator=torch.manual_seed(0)))
        logits[mixed].float().square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
    assert {launch.build.dtype for launch in stand_in} == {torch.bfloat16}
    error = logits[True].float() - logits[False]
    assert error.norm() < 0.2 * logits[False].norm()


@gpu
@pytest.mark.parametrize("name", MODELS)
def test_models_on_a_gpu(name):
    """Against the plain path in float32, where single spikes may flip."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    options = MODELS[name]
    ours = run(make_model(options).float().cuda(), "cuda")
    plain = run(make_model(options, fused=False, backend="torch").float().cuda(), "cuda")
    for one, other in zip(ours, plain, strict=True):
        if other.is_floating_point() and other.norm() > 1e-3:
            assert (one - other).norm() < 0.1 * other.norm()


@compiled
def test_layers_of_other_widths(stand_in):
    """Joined, each with a momentum of its own; from an image that is shown T times."""
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        layers = torch.nn.ModuleList()
        for width, momentum in ((8, 0.1), (24, 0.5)):
            modules = [torch.nn.Conv1d(12, width, 1), torch.nn.BatchNorm1d(width)]
            modules.append(cifar10.neuron.MultiStepLIF(fused=fused, backend="auto"))
            layers.append(torch.nn.ModuleList(modules))
            layers[-1][1].momentum = momentum
        layers.double()
        x = torch.randn(3, 12, 5, 7, requires_grad=True, dtype=torch.float64)
        spikes = layer.conv_bn_lif_each(x.expand(4, 3, 12, 5, 7), *layers)
        sum((part * (i + 1)).square().sum() for i, part in enumerate(spikes)).backward()
        gradients = [parameter.grad for parameter in layers.parameters()]
        found.append([*spikes, x.grad, *gradients, *layers.buffers()])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


@compiled
@pytest.mark.parametrize("events", [True, False])
@pytest.mark.parametrize("last", ["layer", "product", "neuron"])
def test_checkpoint(last, events):
    """Layers run again within the backward pass of the last one."""
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        modules = [torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)]
        lif = cifar10.neuron.MultiStepPLIF(events=events)
        x = torch.randn(2, 2, 3, 6, 5, requires_grad=True)

        def block(x, modules=modules, lif=lif):
            spikes = layer.conv_bn_lif(x, *modules, lif)
            if last == "layer":
                return spikes
            out = cifar10.spikes.matmul(spikes, spikes.transpose(-2, -1), lif)
            return out if last == "product" else lif(out)

        (checkpoint(block, x, use_reentrant=False) if again else block(x)).sum().backward()
        parameters = (p for each in (*modules, lif) for p in each.parameters())
        found.append([x.grad, *(parameter.grad for parameter in parameters)])
    assert all(map(torch.equal, *found))


ALONE = {  # layers: shape of x, kernel, stride, padding, max-pool
    "one channel": ((2, 3, 1, 2, 3), 7, 4, 3, False),
    "one sample, padded": ((1, 1, 3, 5, 7), 1, 1, 1, False),
    "pointwise, pooled": ((2, 2, 3, 6, 5), 1, 1, 0, True),
    "pointwise, strided": ((3, 2, 5, 8, 9), 1, 2, 0, True),
}


@compiled
@pytest.mark.parametrize("fires", [True, False])
@pytest.mark.parametrize("name", ALONE)
def test_a_layer_alone(stand_in, name, fires):
    """In shapes whose strides leave it open whether channels are innermost."""
    (T, B, C, H, W), *sizes, pool = ALONE[name]
    found, function = [], layer.conv_bn_lif if fires else layer.conv_bn
    for fused in (False, True):
        torch.manual_seed(0)
        modules = [torch.nn.Conv2d(C, 6, *sizes).double(), torch.nn.BatchNorm2d(6).double()]
        x = torch.randn(T, B, H, W, C).double().permute(0, 1, 4, 2, 3).requires_grad_()
        out = function(x, *modules, cifar10.neuron.MultiStepLIF(fused=fused), pool)
        out.backward(torch.randn(out.shape).double())
        found.append([out, x.grad, *(p.grad for each in modules for p in each.parameters())])
    assert stand_in
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@compiled
def test_no_gradient_from_behind():
    modules = [torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), cifar10.neuron.MultiStepLIF()]
    x = torch.randn(2, 2, 3, 6, 5, requires_grad=True)
    for function in (layer.conv_bn_lif, layer.conv_bn, lambda x, conv, bn, lif: lif(x)):
        NoGradient.apply(function(x, *modules)).sum().backward()
        assert x.grad is None and modules[0].weight.grad is None


@compiled
def test_no_second_derivative():
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    logits = QKFormer(T=2, embed_dims=32, num_heads=2, depths=3)(x)
    with pytest.raises(RuntimeError, match="no second derivative; fused: false gives one"):
        torch.autograd.grad(logits.sum(), x, create_graph=True)


@compiled
def test_a_refused_launch(stand_in, monkeypatch):
    kinds = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]
    driver = ctypes.CFUNCTYPE(ctypes.c_int, *kinds)(lambda *args: 719)
    address = ctypes.cast(driver, ctypes.c_void_p).value
    monkeypatch.setattr(kernels, "driver", lambda: address)
    with pytest.raises(RuntimeError, match=r"refuses to launch a kernel \(error 719\)"):
        QKFormer(T=2, embed_dims=32, num_heads=2, depths=3)(torch.rand(2, 3, 8, 8))


@compiled
def test_a_neuron_of_a_slice(stand_in):
    """A GPU loads several neighbours at once: rows begin at multiples of what it may load."""
    own = torch.randn(4, 3, 10)[:, 1:].requires_grad_()
    cifar10.neuron.MultiStepLIF()(own).sum().backward()
    assert stand_in and {launch.args[:2] for launch in stand_in} == {(10, 2)}


@compiled
def test_plans_are_not_kept_for_ever():
    modules = [torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), cifar10.neuron.MultiStepLIF()]
    x, most = torch.randn(2, 2, 3, 6, 5), native.plan_of.cache_parameters()["maxsize"]
    on_gpus.forget()
    for i in range(3):
        modules[2].surrogate_function.alpha = 4.0 + i
        layer.conv_bn_lif(x, *modules)
    assert native.plan_of.cache_info().currsize == 3 and most and 2**10 < most < 2**16


# Layouts in memory --------------------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Shapes of activations that are copied into another order of dimensions."""

    counts_kernels = True  # layers may go on running fused

    def __init__(self, model):
        super().__init__()
        self.weights = {tuple(p.shape) for p in model.parameters()}
        self.weights |= {(*shape, 1) for shape in self.weights}
        self.found = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if operator.__name__.startswith(("clone", "copy_", "_to_copy")):
            source = args[-1 if operator.__name__.startswith("copy_") else 0]
            activation = result.dim() >= 4 and tuple(result.shape) not in self.weights
            if activation and result.numel() > 1 and order(source) != order(result):
                self.found.append(tuple(result.shape))
        return result


def order(tensor):
    """Dimensions of more than one element, from the outermost in memory to the innermost."""
    sizes = [d for d in range(tensor.dim()) if tensor.shape[d] > 1 and tensor.stride(d)]
    return sorted(sizes, key=lambda d: -tensor.stride(d))


@compiled
@pytest.mark.parametrize("on", ["a GPU", "a CPU"])
@pytest.mark.parametrize("make", [QKFormer, MSQKFormer])
def test_activations_stay_as_they_lie(make, on, request):
    """In channels_last, forward and backward, but where images come in and in products of SSA."""
    if on == "a GPU":
        request.getfixturevalue("stand_in")
    model = make(T=2, embed_dims=48, num_heads=2, depths=3, events=False)
    kinds = [type(module).__name__ for module in model.modules() if hasattr(module, "inputs")]
    products = sum(kind.endswith("SelfAttention") for kind in kinds)
    x = torch.rand(3, 3, 16, 24)
    model(x)
    with Copies(model) as forward:
        loss = model(x).sum()
    with Copies(model) as backward:
        loss.backward()
    assert 0 < len(forward.found) <= 1 + 4 * products
    assert len(backward.found) <= 1 + 5 * products + (len(kinds) - products) + 1


# The library --------------------------------------------------------------------------------------


@compiled
def test_library(monkeypatch, tmp_path):
    """It is built once for all; where it can't be, a line says why."""
    lines, build = [], partial(kernels.fault.__wrapped__, kernels.load_layers)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "other"))
    assert build() is None and not (tmp_path / "other").exists()  # it is there: not loaded again
    monkeypatch.setattr(kernels, "NAME", f"{kernels.NAME}x")  # one that is not there
    monkeypatch.setattr(kernels, "say", lines.append)
    monkeypatch.setattr(kernels, "compile_to", lambda path, *args: path.write_bytes(b"no library"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "new"))
    assert f"{kernels.NAME}.so" in build()
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"{kernels.NAME}.so"]
    build()
    assert len(lines) == 2  # what can't be loaded, such as another system's, is built anew
    assert lines[0].startswith("compiling spiking/layer.cpp")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    assert "File exists" in build()
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "NAME", f"{kernels.NAME}x")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert "/nowhere/c++" in build()


def test_without_the_library(monkeypatch):
    """Layers, neurons and products run plain, with a line."""

    def load_layers():
        raise OSError("no headers")

    for module in (kernels, native, cifar10.spikes):
        monkeypatch.setattr(module, "load_layers", load_layers)
    lines, known = [], (native.available, kernels.events_available)
    for module in (kernels, native):
        monkeypatch.setattr(module, "say", lines.append)
    for function in known:
        function.cache_clear()
    try:
        model = make_model({"events": True})
        plain = copy.deepcopy(model)
        for module in plain.modules():
            if hasattr(module, "fused"):
                module.fused = False
        for one, other in zip(run(model), run(plain), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    finally:
        for function in known:
            function.cache_clear()
    assert lines[0] == "layers run module by module on cpu: no headers"
