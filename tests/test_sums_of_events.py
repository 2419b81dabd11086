"""Convolutions as sums of events: equal to dense ones, in bits that no batch and no thread moves."""

import ctypes
import functools
import itertools
import random
import subprocess
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import by_hand
import on_gpus
from conftest import load

cifar10 = load("cifar10")
kernels, native, layer = cifar10.compiler, cifar10.native, cifar10.layer
TYPES = (torch.float32, torch.float64)
LAST = torch.channels_last

pytestmark = pytest.mark.skipif(
    not kernels.events_available("cpu", torch.float32), reason="needs a C++ compiler"
)


def make_input(kind, shape, density, dtype):
    x = (torch.rand(shape) < density).to(dtype)
    if kind == "counts":
        x = x * torch.randint(1, 256, shape)
    if kind == "real":
        x = x * torch.randn(shape)
    return x.to(dtype).contiguous(memory_format=LAST)


def convolve(x, weight, stride, padding):
    """(convolution of x, function of its gradient to the weight's)"""
    known = x.byte() if torch.equal(x, x.byte().to(x.dtype)) else x
    bits, share, values = by_hand.find(known, weight.dtype)
    assert share == (x != 0).double().mean().item()
    assert (values is None) == bool(((x == 0) | (x == 1)).all())
    assert torch.equal(by_hand.unpack(x.shape, bits, values, weight.dtype).to(x.dtype), x)
    args = stride, padding
    y = by_hand.convolve(known, weight, *args)
    return y, lambda grad: by_hand.weight_gradient(x.shape, bits, values, grad, weight, *args)


def differences(x, weight, stride, padding):
    """Largest errors of output and gradient, in units of the sums of absolute values."""
    y, gradient = convolve(x, weight, stride, padding)
    wide = x.double(), weight.double().requires_grad_()
    dense = F.conv2d(*wide, None, stride, padding)
    grad = torch.randn_like(dense).to(x.dtype).contiguous(memory_format=LAST)
    found = gradient(grad)
    (want,) = torch.autograd.grad(dense, wide[1], grad.double())
    sizes = F.conv2d(x.double().abs(), weight.double().abs(), None, stride, padding)
    grads = torch.nn.grad.conv2d_weight(
        x.double().abs(), weight.shape, grad.double().abs(), stride, padding
    )
    return [
        ((a - b).abs() / (scale + 1e-30)).max().item()
        for a, b, scale in ((y, dense, sizes.max()), (found, want, grads.max()))
    ]


def random_case(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    inputs = rng.choice([1, 2, 3, 5, 17, 48, 63, 64, 65, 96, 130, 200])
    outputs = rng.choice([1, 3, 7, 8, 15, 31, 48, 96, 97, 128, 200])
    kernel, stride = rng.choice([(1, 1), (3, 3), (3, 1)]), rng.choice([(1, 1), (2, 2), (1, 2)])
    padding = rng.choice([(0, 0), tuple(k // 2 for k in kernel), (1, 4), (6, 5)])
    shape = rng.randint(1, 4), inputs, rng.randint(3, 12), rng.randint(3, 12)
    density = rng.choice([0, 0.01, 0.1, 0.3, 1])
    dtype = rng.choice([torch.float32, torch.float64])
    x = make_input(rng.choice(["ones", "counts", "real"]), shape, density, dtype)
    return x, torch.randn(outputs, inputs, *kernel, dtype=dtype), stride, padding


@pytest.mark.parametrize(
    "seeds", [range(80), pytest.param(range(80, 2000), marks=pytest.mark.long)]
)
def test_dense(seeds):
    for seed in seeds:
        case = random_case(seed)
        limit = 1e-5 if case[0].dtype == torch.float32 else 1e-14
        assert max(differences(*case)) < limit, seed


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("seed", range(12))
def test_product(seed, dtype):
    """Of whole numbers, exactly; for a and b of any layout in memory."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    T, B, heads, rows, depth, columns = (rng.randint(1, n) for n in (3, 3, 3, 70, 140, 70))
    a = make_input("counts", (T * B, rows, heads, depth), rng.choice([0, 0.1, 1]), dtype)
    a = a.unflatten(0, (T, B)).transpose(2, 3)
    b = torch.randint(-9, 9, (T, B, depth, heads, columns)).to(dtype).transpose(2, 3)
    if seed % 2:
        a = a.transpose(3, 4).contiguous().transpose(3, 4)
        b = b.transpose(3, 4).contiguous().transpose(3, 4)
    assert torch.equal(native.product(a, b, a, b, True, True), a @ b)
    expanded = b[:1, :, :1].expand_as(b)
    assert torch.equal(native.product(a, expanded, a, expanded, True, True), a @ expanded)


@pytest.mark.parametrize("density", [0, 0.01, 0.12, 0.5, 1])
def test_shapes_of_the_models(density):
    """Channels, kernels and strides of HST-10-384, at the side of a small image."""
    torch.manual_seed(0)
    for inputs, outputs, kernel, stride in [
        (48, 96, 3, 1), (48, 96, 1, 1), (96, 192, 1, 1), (96, 96, 1, 1), (96, 384, 1, 1),
        (384, 96, 1, 1), (96, 192, 1, 2), (192, 384, 3, 1), (384, 1152, 1, 1), (1536, 384, 1, 1),
    ]:  # fmt: skip
        x = make_input("counts", (2, inputs, 7, 6), density, torch.float64)
        weight = torch.randn(outputs, inputs, kernel, kernel, dtype=torch.float64)
        assert max(differences(x, weight, (stride,) * 2, (kernel // 2,) * 2)) < 1e-14


LONG = (pytest.param(target, marks=pytest.mark.long) for target in ("x86-64-v2", "x86-64-v4"))


@pytest.mark.parametrize("target", ["x86-64-v3", *LONG])
def test_vectors_of_each_length(target, monkeypatch):
    known = subprocess.run(["lscpu"], capture_output=True, text=True).stdout
    if {"x86-64-v3": "avx2", "x86-64-v4": "avx512bw"}.get(target, "sse4_2") not in known:
        pytest.skip(f"this processor is no {target}")
    options = [o for o in kernels.HOST_OPTIONS if "-march" not in o] + [f"-march={target}"]
    monkeypatch.setattr(kernels, "HOST_OPTIONS", options)
    library = {dtype: kernels.events_library.__wrapped__(dtype) for dtype in TYPES}
    monkeypatch.setattr(kernels, "events_library", library.get)
    for seed in range(30):
        case = random_case(seed)
        assert max(differences(*case)) < (1e-5 if case[0].dtype == torch.float32 else 1e-14), seed


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_threads(threads):
    """Every sum has one order: bits do not depend on the threads, nor on the other images."""
    torch.manual_seed(0)
    for kind, kernel in itertools.product(["ones", "real"], [1, 3]):
        x = make_input(kind, (3, 100, 20, 20), 0.2, torch.float32)
        weight = torch.randn(70, 100, kernel, kernel)
        grad = torch.randn(3, 70, 20, 20).contiguous(memory_format=LAST)
        found = []
        for count in (1, 2, 3):
            threads(count)
            y, gradient = convolve(x, weight, (1, 1), (kernel // 2,) * 2)
            found.append((y, gradient(grad)))
        assert all(
            torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True)
        )
        alone = convolve(x[1:2].contiguous(memory_format=LAST), weight, (1, 1), (kernel // 2,) * 2)
        assert torch.equal(found[0][0][1:2], alone[0])


SMALL = {"embed_dims": 64, "num_heads": 4, "num_classes": 7}
MODELS = [
    ("imagenet", "QKFormer_10_384"),
    ("cifar10", "MSQKFormer"),
    ("dvs128-gesture", "QKFormer"),
    *(
        pytest.param(*names, marks=pytest.mark.long)
        for names in (
            ("cifar10", "QKFormer"),
            ("cifar100", "QKFormer"),
            ("cifar10-dvs", "QKFormer"),
            ("imagenet", "MSQKFormer_10_384"),
        )
    ),
]


@pytest.mark.parametrize("folder, name", MODELS)
def test_logits_of_any_batch(folder, name, threads):
    torch.manual_seed(0)
    options = load(folder).options
    model = options.MODELS[name](T=3, **SMALL).train()
    frames = [3] if model.in_channels == 2 else []
    x = torch.rand(5, *frames, model.in_channels, 32, 64)
    x = x.mul(3).floor() if frames else x
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        model(x)  # running statistics of this batch, so that neurons fire
        model.eval()
        want = model(x)
        assert want.std() > 0
        for count, some in [(1, [0]), (2, [1, 4]), (3, [3, 2, 0, 4]), (2, [4]), (1, [2, 0, 1])]:
            threads(count)
            assert torch.equal(model(x[some]), want[some]), some


@pytest.fixture
def calls(monkeypatch):
    """[1 for each gradient of a weight that was a sum of events]"""
    pointer, found, known = ctypes.c_void_p, [], kernels.events_library
    kind = ctypes.CFUNCTYPE(None, *[pointer] * 3, ctypes.c_bool, pointer, pointer, ctypes.c_long)

    @functools.cache
    def library(dtype):
        def weight_gradient(shape, bits, values, is_bytes, grad, out, threads):
            found.append(1)
            pointers = map(pointer, (shape, bits, values))
            rest = ctypes.c_bool(is_bytes), pointer(grad), pointer(out), ctypes.c_long(threads)
            known(dtype).weight_gradient(*pointers, *rest)

        others = {name: getattr(known(dtype), name) for name in (*native.OF_EVENTS, "multiply")}
        return SimpleNamespace(**{**others, "weight_gradient": kind(weight_gradient)})

    monkeypatch.setattr(native, "events_library", library)
    on_gpus.forget()
    yield found
    on_gpus.forget()


def test_a_step(calls):
    """A training step by events is that of dense convolutions, and keeps bits in place of spikes."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    steps, saved, state = {}, {}, None
    kept = []
    for on in (True, False):
        calls.clear()
        kept.clear()
        model = cifar10.model.QKFormer(T=2, events=on, **SMALL).double().train()
        state = state or model.state_dict()
        model.load_state_dict(state)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (kept.append(t), t)[1], lambda t: t
        ):
            logits = model(x)
        logits.square().sum().backward()
        convolutions = [m for m in model.modules() if isinstance(m, torch.nn.modules.conv._ConvNd)]
        joined = 2 * 1 + 2 * 2  # q, k and q, k, v: one for two stages' blocks, two in the third
        assert len(calls) == (0 if not on else len(convolutions) - joined - 1), "but the first"
        steps[on] = [logits.detach(), *(p.grad for p in model.parameters())]
        saved[on] = sum({t.data_ptr(): t.nbytes for t in kept}.values())
    for a, b in zip(*steps.values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    assert saved[True] < saved[False]


def test_dense_gradient_of_dense_inputs(calls):
    """The gradient is dense above 40 % of inputs that are not 0, and the same."""
    for density, sparse in ((0.3, True), (0.5, False)):
        found = []
        for on in (False, True):
            torch.manual_seed(1)
            parts = torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.BatchNorm2d(8)
            lif = cifar10.neuron.MultiStepLIF(events=on)
            x = (torch.rand(2, 3, 8, 9, 9) < density).double().requires_grad_()
            parts = [part.double() for part in parts]
            calls.clear()
            layer.conv_bn_lif(cifar10.spikes.mark(x * 1), *parts, lif).square().sum().backward()
            found.append([parts[0].weight.grad, x.grad])
        assert bool(calls) == sparse
        for a, b in zip(*found, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


MAIN = r"""
#include <cstdio>
#include <cstdlib>
static unsigned state = 1;
static unsigned draw() { return state = state * 1664525 + 1013904223, state >> 8; }
template <class T> static T* exact(long n) { return (T*)malloc(n * sizeof(T)); }
template <class In> static void run(const Shape& s, int percent, bool values) {
    const long pixels = s.images * s.height * s.width, depth = s.channels * s.kernel_height * s.kernel_width;
    const long outs = s.images * s.out_height * s.out_width * s.out_channels;
    In* x = exact<In>(pixels * s.channels);
    for (long i = 0; i < pixels * s.channels; ++i) x[i] = draw() % 100 < percent ? 1 + values * (draw() % 9) : 0;
    word* bits = exact<word>(s.images * s.height * ((s.width * s.channels + 63) / 64));
    real *weight = exact<real>(depth * s.out_channels), *y = exact<real>(outs);
    real* out = exact<real>(depth * s.out_channels);
    for (long i = 0; i < depth * s.out_channels; ++i) weight[i] = draw() % 7;
    const long rows = s.images * s.height, count = find(rows, s.width * s.channels, x, sizeof(In) == 1, bits);
    byte* bytes = exact<byte>(pixels * s.channels);
    unpack(rows, s.width * s.channels, bits, bytes);
    In* known = count < 0 ? x : nullptr;
    convolve(&s, x, sizeof(In) == 1, weight, y, 2);
    weight_gradient(&s, bits, known, sizeof(In) == 1, y, out, 2);
    double sum = 0;
    for (long i = 0; i < depth * s.out_channels; ++i) sum += out[i];
    printf("%g\n", sum);
    for (void* p : {(void*)x, (void*)bits, (void*)bytes, (void*)weight, (void*)y, (void*)out}) free(p);
}
int main() {
    for (long c : {1, 2, 48, 64, 65, 130}) for (long o : {1, 7, 31, 96, 200}) for (long k : {1, 3}) for (long step : {1, 2}) {
        const long h = 5, w = 18, p = k / 2;
        const Shape s{3, h, w, c, (h + 2 * p - k) / step + 1, (w + 2 * p - k) / step + 1, o, k, k, step, step, p, p};
        for (int percent : {0, 10, 100}) { run<real>(s, percent, true); run<byte>(s, percent, false); }
    }
}
"""


@pytest.mark.long
@pytest.mark.parametrize("real", ["float", "double"])
def test_sanitizers(real, tmp_path):
    """No address out of bounds and nothing undefined; arrays end where memory ends."""
    program = tmp_path / "program"
    options = (
        f"-g1 -O1 -march=native -std=c++17 -fopenmp -w -Dscalar_t={real} -x c++ - -o {program}"
    )
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    source = kernels.EVENTS + MAIN
    subprocess.run(["g++", *options.split(), *sanitizers], input=source, text=True, check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.split()) == 720, done.stderr[:2000]
