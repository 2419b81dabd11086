"""Layers, neurons and products in one call each (layer.cpp): the bits of the path on which Python
calls each kernel. Here a CPU's kernels stand in for a GPU's; on a GPU its own run.
"""

import ctypes

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from conftest import Golden, load
from fakecuda import CTYPES, parameters_of
from test_layer import compiled, gpu

cifar10 = load("cifar10")
kernels, layer, native = cifar10.compiler, cifar10.layer, cifar10.native
QKFormer, MSQKFormer = cifar10.model.QKFormer, cifar10.ms.MSQKFormer


class Source:
    """A build as `parameters_of` reads it."""

    def __init__(self, build):
        self.code = build.source()
        self.defines = dict(word[2:].split("=", 1) for word in build.defines(kernels.HOST_CTYPES))


def forget():
    for function in (native.plan_of, native.plan_of_neuron):
        function.cache_clear()


@pytest.fixture
def stand_in(monkeypatch):
    """A CPU in the place of a GPU. Returns [{of launches by Python}, {by layer.cpp}]: name, type,
    steps, neuron, rows and channels.
    """
    known, launches = [], [set(), set()]

    def described(name, dtype, T, neuron, rows, channels):
        sizes = () if name in kernels.OF_COLUMNS else (rows, channels)
        return name, dtype, T, neuron, sizes

    def kernel_at(name, dtype, T, neuron, rows, channels, large, device):
        build = kernels.Build(dtype, T, neuron)
        kinds = [
            ctypes.c_longlong if pointer else getattr(ctypes, CTYPES[kind])
            for kind, _, pointer in parameters_of(Source(build), name)
        ]
        function = getattr(kernels.host_library(build), name)
        known.append((described(name, dtype, T, neuron, rows, channels), function, kinds))
        return len(known), (1, kernels.HOST_PARTS), (1, 1)

    pointer, number = ctypes.c_void_p, ctypes.c_uint

    @ctypes.CFUNCTYPE(ctypes.c_int, pointer, *[number] * 7, pointer, pointer, pointer)
    def driver(address, *how):
        what, function, kinds = known[address - 1]
        launches[1].add(what)
        places = ctypes.cast(how[8], ctypes.POINTER(pointer))
        function(*(kind.from_address(places[i]) for i, kind in enumerate(kinds)))
        return 0

    def launch(name, y, *args, T=1, neuron="MULTIPLY sigmoid"):
        launches[0].add(described(name, y.dtype, T, neuron, *args[:2]))
        kernels.launch(name, y, *args, T=T, neuron=neuron)

    assert native.error() is None
    forget()
    monkeypatch.setattr(native, "kernel_at", kernel_at)
    monkeypatch.setattr(kernels, "driver", lambda: driver)
    monkeypatch.setattr(cifar10.ops, "launch", launch)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)
    monkeypatch.setattr(layer, "takes_product", lambda x, layer: layer.pointwise)
    monkeypatch.setattr(cifar10.neuron, "resolve_backend", lambda *args: "cupy")
    monkeypatch.setattr(cifar10.neuron.MultiStep, "runs_fused", lambda neuron, x: False)
    yield launches
    forget()


MODELS = {
    "QKFormer": {},
    "T of 1": {"T": 1},
    "PLIF": {"neuron": "plif", "surrogate": "atan"},
    "IF": {"neuron": "if"},
    "DIVIDE": {"tau": 3.7, "v_threshold": 0.8},
    "small": {"memory": "small"},
    "over samples": {"cross_sample_lif": True},
    "plain": {"fused": False},
    "MS": {"make": MSQKFormer},
}


def run(options, dtype, device):
    """Logits, gradients and running statistics of two steps and an evaluation."""
    make = options.get("make", QKFormer)
    options = {"T": 2, "events": False} | {k: v for k, v in options.items() if k != "make"}
    model = make(embed_dims=48, num_heads=2, depths=3, **options)
    Golden.fill(model)
    model.float().to(device)
    x = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)).to(device)
    logits = []
    for train in (True, True, False):
        mixed = torch.autocast(device, dtype, enabled=dtype != torch.float32)
        with torch.set_grad_enabled(train), mixed:
            logits.append(model.train(train)(x))
        if train:
            logits[-1].float().square().sum().backward()
    return [*logits, *model.buffers(), *(parameter.grad for parameter in model.parameters())]


def check_bits(monkeypatch, options, dtype, device):
    found = []
    for takes in (False, True):
        monkeypatch.setattr(native, "takes", lambda x, takes=takes: takes)
        found.append(run(options, dtype, device))
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype and one.stride() == other.stride()
        assert torch.equal(one, other)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_bits(stand_in, monkeypatch, name, dtype):
    check_bits(monkeypatch, MODELS[name], dtype, "cpu")
    by_python, by_native = stand_in
    assert by_python == by_native and by_native


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_bits_on_a_gpu(monkeypatch, name, dtype):
    assert native.error() is None
    check_bits(monkeypatch, MODELS[name], dtype, "cuda")


@compiled
def test_layers_of_other_widths(stand_in, monkeypatch):
    """Joined, each with a momentum of its own; from an image that is shown T times."""
    found = []
    for takes in (False, True):
        monkeypatch.setattr(native, "takes", lambda x, takes=takes: takes)
        torch.manual_seed(0)
        layers = torch.nn.ModuleList()
        for width, momentum in ((8, 0.1), (24, 0.5)):
            modules = [torch.nn.Conv1d(12, width, 1), torch.nn.BatchNorm1d(width)]
            layers.append(torch.nn.ModuleList([*modules, cifar10.neuron.MultiStepLIF()]))
            layers[-1][1].momentum = momentum
        x = torch.randn(3, 12, 5, 7, requires_grad=True)
        spikes = layer.conv_bn_lif_each(x.expand(4, 3, 12, 5, 7), *layers)
        sum((part * (i + 1)).square().sum() for i, part in enumerate(spikes)).backward()
        gradients = [parameter.grad for parameter in layers.parameters()]
        found.append([*spikes, x.grad, *gradients, *layers.buffers()])
    assert all(map(torch.equal, *found)) and stand_in[0] == stand_in[1]


@compiled
@pytest.mark.parametrize("last", ["layer", "product", "neuron"])
def test_checkpoint(stand_in, monkeypatch, last):
    """Layers run again within the backward pass of the last one."""
    found = []
    for takes in (False, True):
        monkeypatch.setattr(native, "takes", lambda x, takes=takes: takes)
        torch.manual_seed(0)
        modules = [torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)]
        lif = cifar10.neuron.MultiStepPLIF(events=False)
        x = torch.randn(2, 2, 3, 6, 5, requires_grad=True)

        def block(x, modules=modules, lif=lif):
            spikes = layer.conv_bn_lif(x, *modules, lif)
            if last == "layer":
                return spikes
            out = cifar10.spikes.matmul(spikes, spikes.transpose(-2, -1), lif)
            return out if last == "product" else lif(out)

        checkpoint(block, x, use_reentrant=False).sum().backward()
        parameters = (p for each in (*modules, lif) for p in each.parameters())
        found.append([x.grad, *(parameter.grad for parameter in parameters)])
    assert all(map(torch.equal, *found))


ALONE = {  # layers: shape of x, kernel, stride, padding, max-pool
    "one channel": ((2, 3, 1, 2, 3), 7, 4, 3, False),
    "one sample, padded": ((1, 1, 3, 5, 7), 1, 1, 1, False),
    "pointwise, strided": ((3, 2, 5, 8, 9), 1, 2, 0, True),
}


@compiled
@pytest.mark.parametrize("fires", [True, False])
@pytest.mark.parametrize("name", ALONE)
def test_a_layer_alone(stand_in, monkeypatch, name, fires):
    """In shapes whose strides leave it open whether channels are innermost."""
    (T, B, C, H, W), *sizes, pool = ALONE[name]
    found, function = [], layer.conv_bn_lif if fires else layer.conv_bn
    for takes in (False, True):
        monkeypatch.setattr(native, "takes", lambda x, takes=takes: takes)
        torch.manual_seed(0)
        modules = [torch.nn.Conv2d(C, 6, *sizes), torch.nn.BatchNorm2d(6)]
        x = torch.randn(T, B, H, W, C).permute(0, 1, 4, 2, 3).requires_grad_()
        out = function(x, *modules, cifar10.neuron.MultiStepLIF(events=False), pool)
        out.backward(torch.randn(out.shape))
        found.append([out, x.grad, *(p.grad for each in modules for p in each.parameters())])
    assert all(map(torch.equal, *found)) and stand_in[0] == stand_in[1]


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@compiled
def test_no_gradient_from_behind(stand_in, monkeypatch):
    monkeypatch.setattr(native, "takes", lambda x: True)
    modules = [torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), cifar10.neuron.MultiStepLIF()]
    x = torch.randn(2, 2, 3, 6, 5, requires_grad=True)
    for function in (layer.conv_bn_lif, layer.conv_bn):
        NoGradient.apply(function(x, *modules)).sum().backward()
        assert x.grad is None and modules[0].weight.grad is None


@compiled
def test_pool_behind_a_pointwise_layer(stand_in, monkeypatch):
    """Its convolution is no product of matrices: the pool needs rows and columns of pixels."""
    torch.manual_seed(0)
    modules = [torch.nn.Conv2d(3, 8, 1), torch.nn.BatchNorm2d(8)]
    x, found = torch.randn(2, 2, 3, 6, 5), []
    for takes, fused in ((False, True), (True, True), (False, False)):
        monkeypatch.setattr(native, "takes", lambda x, takes=takes: takes)
        lif = cifar10.neuron.MultiStepLIF(fused=fused, events=False)
        found.append(layer.conv_bn_lif(x, *modules, lif, pool=True))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@compiled
def test_no_second_derivative(stand_in, monkeypatch):
    monkeypatch.setattr(native, "takes", lambda x: True)
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    logits = QKFormer(T=2, embed_dims=32, num_heads=2, depths=3, events=False)(x)
    with pytest.raises(RuntimeError, match="no second derivative; fused: false gives one"):
        torch.autograd.grad(logits.sum(), x, create_graph=True)


@compiled
def test_a_refused_launch(stand_in, monkeypatch):
    kinds = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]
    driver = ctypes.CFUNCTYPE(ctypes.c_int, *kinds)(lambda *args: 719)
    monkeypatch.setattr(native, "takes", lambda x: True)
    monkeypatch.setattr(kernels, "driver", lambda: driver)
    with pytest.raises(RuntimeError, match=r"refuses to launch a kernel \(error 719\)"):
        QKFormer(T=2, embed_dims=32, num_heads=2, depths=3)(torch.rand(2, 3, 8, 8))


@compiled
def test_a_neuron_of_a_slice(stand_in, monkeypatch):
    """A GPU loads several neighbours at once: rows begin at multiples of what it may load."""
    for takes in (False, True):
        monkeypatch.setattr(native, "takes", lambda x, takes=takes: takes)
        own = torch.randn(4, 3, 10)[:, 1:].requires_grad_()
        cifar10.neuron.MultiStepLIF()(own).sum().backward()
    for launches in stand_in:
        assert launches and {sizes for *_, sizes in launches} == {(10, 2)}


@compiled
def test_plans_are_not_kept_for_ever(stand_in, monkeypatch):
    monkeypatch.setattr(native, "takes", lambda x: True)
    modules = [torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), cifar10.neuron.MultiStepLIF()]
    x, most = torch.randn(2, 2, 3, 6, 5), native.plan_of.cache_parameters()["maxsize"]
    for i in range(3):
        modules[2].surrogate_function.alpha = 4.0 + i
        layer.conv_bn_lif(x, *modules)
    assert native.plan_of.cache_info().currsize == 3 and most and 2**10 < most < 2**16


def test_library(monkeypatch, tmp_path):
    """It is built once for all; where it can't be, a line says why."""
    lines, build = [], native.error.__wrapped__
    monkeypatch.setattr(native, "say", lines.append)
    monkeypatch.setattr(native, "compile_to", lambda path, *args: path.write_bytes(b"no library"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "new"))
    assert "Could not load this library" in build()
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"{native.NAME}.so"]
    build()
    assert len(lines) == 1 and lines[0].startswith("compiling layers")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    assert "File exists" in build()
    monkeypatch.undo()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert "/nowhere/c++" in build()
