"""The kernels of the fused layers against autograd, on the CPU and on a GPU."""

import pytest
import torch
from torch import nn

import by_hand as fused
from conftest import load

cifar10 = load("cifar10")
lif, kernels, native = cifar10.neuron, cifar10.compiler, cifar10.native
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
compiled = pytest.mark.skipif(
    not native.available("cpu", torch.float32, "auto"), reason="needs a C++ compiler"
)
CL = torch.channels_last


# The kernels --------------------------------------------------------------------------------------


def reference(y, T, gamma, beta, node, grad):
    """Spikes, the gradients of y, gamma and beta, by autograd through BatchNorm and the plain
    neuron.
    """
    leaves = [leaf.detach().double().requires_grad_() for leaf in (y, gamma, beta)]
    x = leaves[0].flatten(0, 1)
    z = nn.functional.batch_norm(x, None, None, leaves[1], leaves[2], True).unflatten(
        0, y.shape[:2]
    )
    spikes = node(z.expand(T, *z.shape[1:]))
    spikes.backward(grad.double())
    return spikes, *(leaf.grad for leaf in leaves)


def by_kernels(y, T, gamma, beta, node, grad):
    """The same by the kernels."""
    flat, shape = fused.rows(y), (T, *y.shape[1:])
    norm = normed(flat, gamma, beta, T // len(y))
    neuron = fused.constants_of(*node.constants())[:3]
    spikes, small = fused.fire(flat, shape, norm, None, *neuron, True)
    assert small.dtype == torch.uint8 and torch.equal(small.to(spikes), spikes)
    # [pixels, channels] in place of [N, C, H, W]
    pixels = flat.movedim(1, -1).flatten(0, -2)
    assert torch.equal(fused.fire(pixels, shape, norm, None, *neuron, False)[0], spikes)
    grad_y = torch.empty_like(flat)
    partial = fused.fire_backward(grad, flat, grad_y, norm, None, *neuron, node.alpha)
    sums = fused.batch_norm_backward(partial, norm, len(pixels))
    assert (sums[6] == 0).all()
    fused.normalise_backward(grad_y, flat, grad_y, sums)
    return spikes, grad_y.view_as(y), sums[1], sums[0]


def normed(y, gamma, beta, repeats=1):
    """`norm` of all channels."""
    norm = y.new_empty(5, len(gamma), dtype=gamma.dtype)
    rest = (repeats, 1e-5, 0.1, gamma, beta, None, None, None, None)
    fused.batch_norm(y, fused.statistics(y), norm, 0, *rest)
    return norm


def check_kernels(dtype, T, steps, C, device="cpu", tau=2.0, v_threshold=1.0, B=2, size=(5, 3)):
    torch.manual_seed(C + T)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    y = (2 * torch.randn(steps, B, C, *size)).to(device, dtype)
    gamma, beta = torch.randn(C, dtype=real).to(device), torch.randn(C, dtype=real).to(device)
    grad = torch.randn(T, B, C, *size).to(device, dtype)
    node = lif.MultiStepLIF(tau, v_threshold, backend="torch")
    want = reference(y, T, gamma, beta, node, grad)
    for memory in (y, y.flatten(0, 1).contiguous(memory_format=CL).unflatten(0, (steps, B))):
        got = by_kernels(memory, T, gamma, beta, node, grad)
        flips = (got[0].double() != want[0]).double().mean().item()
        assert got[0].dtype == got[1].dtype == dtype and 0 < want[0].mean() < 1
        if dtype == torch.float64:
            assert flips == 0
            for a, b in zip(got[1:], want[1:], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        elif flips == 0:  # a spike that flips takes gradients with it
            tolerance = 5e-2 if dtype.itemsize == 2 else 1e-4
            for a, b in zip(got[1:], want[1:], strict=True):
                torch.testing.assert_close(
                    a.double(), b, rtol=tolerance, atol=tolerance * b.abs().max().item()
                )
        else:
            assert flips <= 2e-3


def check_pooling(dtype, C, size, device="cpu"):
    """Pooling and a BatchNorm without a neuron, against autograd in float64: values, of channels
    with a negative scale too, and gradients to the first of equals.
    """
    torch.manual_seed(C)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    y = (2 * torch.randn(3, C, *size)).to(device, dtype).contiguous(memory_format=CL)
    gamma, beta = torch.randn(C, dtype=real).to(device), torch.randn(C, dtype=real).to(device)
    leaves = [leaf.double().requires_grad_() for leaf in (y, gamma, beta)]
    z = nn.functional.batch_norm(leaves[0], None, None, *leaves[1:], True)
    want = nn.functional.max_pool2d(z, 3, 2, 1)
    grad = torch.randn(want.shape).to(device, dtype).contiguous(memory_format=CL)
    want.backward(grad.double())

    norm = normed(y, gamma, beta)
    pooled, taps = fused.pool(y, norm, True)
    assert torch.equal(fused.pool(y, norm, False)[0], pooled)
    sign = torch.where(gamma < 0, -1, 1).to(y)[:, None, None]
    assert torch.equal(pooled, sign * nn.functional.max_pool2d(sign * y, 3, 2, 1))
    assert taps.dtype == torch.uint8 and (gamma < 0).any()
    partial = fused.gradient_sums(grad, pooled, norm)
    sums = fused.batch_norm_backward(partial, norm, y.numel() // C)
    have = fused.normalise(pooled, norm), fused.pool_backward(grad, taps, y, sums)
    have = (*have, sums[1], sums[0])
    tolerance = {8: 1e-10, 4: 1e-4, 2: 5e-2}[dtype.itemsize]
    for a, b in zip(have, (want, *(leaf.grad for leaf in leaves)), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


SIZES = [(6, 8), (7, 5), (1, 4), (2, 1)]
CASES = [(4, 4, 48), (4, 1, 33), (1, 1, 8), (16, 16, 3), (19, 19, 64), (6, 1, 96)]


FEW = [  # of the slower ones to compile, and of the others' types, the rest are long
    pytest.param(
        dtype,
        case,
        marks=[] if case[0] == 4 or (dtype == torch.float64 and case[0] < 19) else pytest.mark.long,
    )
    for dtype in kernels.HOST_CTYPES
    for case in CASES
]


@compiled
@pytest.mark.parametrize(("dtype", "case"), FEW)
def test_kernels(dtype, case):
    T, steps, C = case
    check_kernels(dtype, T, steps, C)
    if T in (4, 19):  # each tau is compiled
        check_kernels(dtype, T, steps, C, tau=3.7, v_threshold=0.4)


@pytest.mark.long
@compiled
def test_most_steps():
    check_kernels(torch.float32, kernels.MAX_T, kernels.MAX_T, 5)  # compiles for ten seconds


@compiled
@pytest.mark.parametrize("dtype", kernels.HOST_CTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_pooling(dtype, size):
    check_pooling(dtype, 40, size)
    check_pooling(dtype, 3, size)


@compiled
def test_in_place_and_threads():
    torch.manual_seed(0)
    y = torch.randn(12, 7, 5, 40).movedim(-1, 1)
    norm, grad = torch.rand(5, 40), torch.randn(4, 3, 40, 7, 5)
    neuron = (None, "MULTIPLY sigmoid", 0.5, 1.0)
    spikes = fused.fire(y, grad.shape, norm, *neuron, False)[0]

    def backward():
        out = torch.empty_like(y)
        return fused.fire_backward(grad, y, out, norm, *neuron, 4.0), out

    first = backward()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            second = backward()
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    finally:
        torch.set_num_threads(threads)
    fused.fire_(y, 4, norm, *neuron)
    assert torch.equal(y, spikes.flatten(0, 1))


@compiled
@pytest.mark.parametrize("offset", [0.0, 20.0])
def test_statistics_are_those_of_float64(offset):
    """To the last digits of float32: rounding in a mean reaches every neuron of a channel, and
    flips spikes.
    """
    torch.manual_seed(1)
    y = (torch.randn(64, 24, 40, 40) + offset).contiguous(memory_format=CL)
    gamma, beta = torch.rand(24) + 0.5, torch.randn(24)
    mean, var, invstd, scale, shift = normed(y, gamma, beta)
    true_var, true_mean = torch.var_mean(y.double(), (0, 2, 3))
    assert (mean - true_mean).abs().max() <= 1e-6 * max(1, offset)
    assert (var / true_var - 1).abs().max() <= 2e-6
    rows = y[:, 0].numel()
    true_invstd = (true_var * (rows - 1) / rows + 1e-5).rsqrt()
    assert (invstd / true_invstd - 1).abs().max() <= 2e-6
    assert (scale / (gamma * true_invstd) - 1).abs().max() <= 2e-6
    z = scale.double() * true_mean + shift
    assert (z - beta).abs().max() <= 3e-6 * max(1, offset)
    assert (normed(y, gamma, beta, 4)[1] * (1 - 1 / (4 * rows))).allclose(
        (var * (1 - 1 / rows)), rtol=1e-6
    )


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0])
def test_running_statistics(dtype, momentum):
    check_running_statistics(dtype, momentum)


def check_running_statistics(dtype, momentum):
    """`batch_norm` and `running_norm` for two layers joined into one, against nn.BatchNorm2d."""
    torch.manual_seed(2)
    y = torch.randn(3, 12, 5, 4, dtype=dtype).contiguous(memory_format=CL)
    bias, start, partial = torch.randn(12, dtype=dtype), 0, fused.statistics(y)
    norm, running_norm = torch.empty(2, 5, 12, dtype=dtype)
    for C in (8, 4):
        bn, want = (nn.BatchNorm2d(C, momentum=momentum).to(dtype) for _ in range(2))
        part, own = slice(start, start + C), bias[start : start + C].clone()
        with torch.no_grad():
            want.weight.copy_(bn.weight.normal_()), want.bias.copy_(bn.bias.normal_())
            out = want(y[:, part] + own[:, None, None])
        running = bn.running_mean, bn.running_var, bn.num_batches_tracked
        args = (1, bn.eps, momentum, bn.weight, bn.bias, own, *running)
        fused.batch_norm(y, partial, norm, start, *args)
        z = norm[3, part, None, None] * y[:, part] + norm[4, part, None, None]
        torch.testing.assert_close(z, out)
        for name, buffer in bn.named_buffers():
            torch.testing.assert_close(buffer, getattr(want, name))
        args = (bn.running_mean, bn.running_var, own, bn.weight, bn.bias, bn.eps)
        fused.running_norm(running_norm, start, *args)
        z = running_norm[3, part, None, None] * y[:, part] + running_norm[4, part, None, None]
        want.eval()
        torch.testing.assert_close(z, want(y[:, part] + own[:, None, None]).detach())
        start += C


# On a GPU -----------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("dtype", kernels.CTYPES)
@pytest.mark.parametrize(("T", "steps", "C"), [*CASES, (64, 64, 5)])
def test_kernels_on_gpu(dtype, T, steps, C):
    check_kernels(dtype, T, steps, C, device="cuda")
    check_kernels(dtype, T, steps, C, device="cuda", B=7, size=(31, 17))


@gpu
@pytest.mark.parametrize("dtype", kernels.CTYPES)
@pytest.mark.parametrize("size", [*SIZES, (56, 56)])
def test_pooling_on_gpu(dtype, size):
    check_pooling(dtype, 40, size, device="cuda")
