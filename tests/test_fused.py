"""The kernels of the fused layers against autograd, as C++ on the CPU and as CUDA source."""

import ctypes
import re
import subprocess

import pytest
import torch
from conftest import load
from torch import nn

cifar10 = load("cifar10")
lif, lif_cuda, fused, layer = cifar10.lif, cifar10.lif_cuda, cifar10.fused, cifar10.layer
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
compiled = pytest.mark.skipif(fused.host_error() is not None, reason="needs a C++ compiler")
CL = torch.channels_last


# The kernels --------------------------------------------------------------------------------------


def reference(y, T, gamma, beta, tau, v_threshold, grad):
    """Spikes, the gradients of y, gamma and beta, by autograd through BatchNorm and the plain
    neuron.
    """
    leaves = [leaf.detach().double().requires_grad_() for leaf in (y, gamma, beta)]
    x = leaves[0].flatten(0, 1)
    z = nn.functional.batch_norm(x, None, None, leaves[1], leaves[2], True).unflatten(
        0, y.shape[:2]
    )
    spikes = lif.torch_lif(z.expand(T, *z.shape[1:]), tau, v_threshold)
    spikes.backward(grad.double())
    return spikes, *(leaf.grad for leaf in leaves)


def kernels(y, T, gamma, beta, tau, v_threshold, grad):
    """The same by the kernels."""
    real = torch.float64 if y.dtype == torch.float64 else torch.float32
    var, mean = torch.var_mean(y.to(real), dim=(0, 1, 3, 4), correction=0)
    invstd = torch.rsqrt(var + 1e-5)
    scale, shift = layer.affine(mean, invstd, gamma, beta)
    spikes = fused.fire(y, T, scale, shift, tau, v_threshold)
    grad_y = fused.empty(len(y), y)
    sums = fused.fire_backward(grad, y, grad_y, mean, scale, shift, tau, v_threshold)
    grad_y = grad_y.flatten(0, 1)
    flat = fused.rows_of_channels(y).flatten(0, 1)
    fused.normalise_backward_(grad_y, flat, mean, invstd, gamma, sums)
    return spikes, grad_y.unflatten(0, y.shape[:2]), sums[1] * invstd, sums[0]


def check_kernels(dtype, T, steps, C, device="cpu", tau=2.0, v_threshold=1.0, B=2, size=(5, 3)):
    torch.manual_seed(C + T)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    y = (2 * torch.randn(steps, B, C, *size)).to(device, dtype)
    gamma, beta = torch.randn(C, dtype=real).to(device), torch.randn(C, dtype=real).to(device)
    grad = torch.randn(T, B, C, *size).to(device, dtype)
    want = reference(y, T, gamma, beta, tau, v_threshold, grad)
    for memory in (y, y.flatten(0, 1).contiguous(memory_format=CL).unflatten(0, (steps, B))):
        got = kernels(memory, T, gamma, beta, tau, v_threshold, grad)
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
    """Against autograd in float64 through BatchNorm and max_pool2d: values, and gradients to the
    first of equals.
    """
    torch.manual_seed(C)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    y = (2 * torch.randn(3, C, *size)).to(device, dtype).contiguous(memory_format=CL)
    gamma = torch.rand(C, dtype=real).to(device)
    leaf = y.double().requires_grad_()
    z = nn.functional.batch_norm(leaf, None, None, gamma.double(), None, True)
    want = nn.functional.max_pool2d(z, 3, 2, 1)
    grad = torch.randn(want.shape).to(device, dtype).contiguous(memory_format=CL)
    want.backward(grad.double())

    pooled, taps = fused.pool(y)
    assert torch.equal(pooled, nn.functional.max_pool2d(y, 3, 2, 1)) and taps.dtype == torch.uint8
    var, mean = torch.var_mean(y.to(real), dim=(0, 2, 3), correction=0)
    sums = torch.stack(
        [
            grad.to(real).sum((0, 2, 3)),
            (grad.to(real) * (pooled - mean[:, None, None])).sum((0, 2, 3)),
        ]
    )
    have = fused.pool_backward(grad, taps, y, mean, torch.rsqrt(var + 1e-5), gamma, sums)
    tolerance = {8: 1e-10, 4: 1e-4, 2: 2e-2}[dtype.itemsize]
    torch.testing.assert_close(have.double(), leaf.grad, rtol=tolerance, atol=tolerance)


SIZES = [(6, 8), (7, 5), (1, 4), (2, 1)]
CASES = [(4, 4, 48), (4, 1, 33), (1, 1, 8), (16, 16, 3), (19, 19, 64), (64, 64, 5), (6, 1, 96)]


@compiled
@pytest.mark.parametrize("dtype", fused.HOST_CTYPES)
@pytest.mark.parametrize(("T", "steps", "C"), CASES)
def test_kernels(dtype, T, steps, C):
    check_kernels(dtype, T, steps, C)
    check_kernels(dtype, T, steps, C, tau=3.7, v_threshold=0.4)


@compiled
@pytest.mark.parametrize("dtype", fused.HOST_CTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_pooling(dtype, size):
    check_pooling(dtype, 40, size)
    check_pooling(dtype, 3, size)


@compiled
def test_in_place_and_threads():
    torch.manual_seed(0)
    y = torch.randn(4, 3, 7, 5, 40).movedim(-1, 2)
    scale, shift, grad = torch.rand(40), torch.rand(40), torch.randn_like(y)
    args = (torch.zeros(40), scale, shift, 2.0, 1.0)
    spikes = fused.fire(y, 4, scale, shift, 2.0, 1.0)

    def backward():
        out = torch.empty_like(y)
        return fused.fire_backward(grad, y, out, *args), out

    first = backward()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            second = backward()
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    finally:
        torch.set_num_threads(threads)
    fused.fire_(y, scale, shift, 2.0, 1.0)
    assert torch.equal(y, spikes)


@compiled
@pytest.mark.parametrize("offset", [0.0, 20.0])
def test_statistics_are_those_of_float64(offset):
    """To the last digits of float32: rounding in a mean reaches every neuron of a channel, and
    flips spikes.
    """
    torch.manual_seed(1)
    y = (torch.randn(64, 24, 40, 40) + offset).contiguous(memory_format=CL)
    mean, var = fused.statistics(y)
    true_var, true_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    assert (mean - true_mean).abs().max() <= 1e-6 * max(1, offset) and (
        var / true_var - 1
    ).abs().max() <= 2e-6


@compiled
def test_operators_are_registered_right():
    y, scale = torch.randn(4, 2, 5, 3, 8).movedim(-1, 2), torch.rand(8)
    torch.library.opcheck(fused.fire, (y, 4, scale, scale, 2.0, 1.0))
    torch.library.opcheck(fused.fire, (y[:1], 4, scale, scale, 2.0, 1.0))
    torch.library.opcheck(fused.fire_, (y.clone(), scale, scale, 2.0, 1.0))
    torch.library.opcheck(
        fused.fire_backward,
        (torch.randn_like(y), y, torch.empty_like(y), scale, scale, scale, 2.0, 1.0),
    )
    flat = y.flatten(0, 1)
    sums = torch.rand(2, 8)
    torch.library.opcheck(fused.statistics, (flat,))
    torch.library.opcheck(fused.statistics, (flat.bfloat16(),))
    torch.library.opcheck(
        fused.normalise_backward_, (flat.clone(), flat, scale, scale, scale, sums)
    )
    torch.library.opcheck(fused.pool, (flat,))
    torch.library.opcheck(fused.pool_backward, (*fused.pool(flat), flat, scale, scale, scale, sums))


# The CUDA side of the source ----------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("T", [1, 4, 16, 64])
def test_nvrtc(arch, T):
    from cuda.bindings import nvrtc
    from cupy._core.core import assemble_cupy_compiler_options

    for dtype in lif_cuda.CTYPES:
        error, program = nvrtc.nvrtcCreateProgram(fused.SOURCE.encode(), b"fused.cu", 0, [], [])
        options = assemble_cupy_compiler_options(
            (*lif_cuda.NVRTC_OPTIONS, *fused.defines(dtype, T, lif_cuda.CTYPES))
        )
        options = [f"--gpu-architecture={arch}", *options]
        (error,) = nvrtc.nvrtcCompileProgram(
            program, len(options), [option.encode() for option in options]
        )
        log = bytes(nvrtc.nvrtcGetProgramLogSize(program)[1] + 1)
        nvrtc.nvrtcGetProgramLog(program, log)
        assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
        assert nvrtc.nvrtcGetCUBINSize(program)[1] > 0


SHIM = """
#include <barrier>
#include <cmath>
#include <thread>
#include <vector>
#define __CUDACC_RTC__
#define __device__
#define __forceinline__ inline
#define __global__
#define __shared__ static
struct Index { unsigned x, y; };
static thread_local Index threadIdx, blockIdx;
static Index blockDim, gridDim;
static std::barrier<>* gate;
static void __syncthreads() { gate->arrive_and_wait(); }
template <class Kernel> static void team(Index grid, Index block, Kernel kernel) {  // a thread each, block after block
    std::barrier<> barrier(block.x * block.y);
    gridDim = grid, blockDim = block, gate = &barrier;
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < block.x * block.y; ++i)
        threads.emplace_back([=] {
            threadIdx = {i % block.x, i / block.x};
            for (unsigned b = 0; b < grid.x * grid.y; ++b) {
                blockIdx = {b % grid.x, b / grid.x};
                kernel();
                __syncthreads();
            }
        });
    for (auto& thread : threads) thread.join();
}
"""


@pytest.fixture
def cuda_on_host(monkeypatch, tmp_path):
    """fused.launch runs the source's CUDA side, one thread for each of CUDA's."""
    monkeypatch.setattr(fused, "PARTS", 3)
    (tmp_path / "cuda_bf16.h").touch()
    (tmp_path / "cuda_fp16.h").write_text("typedef _Float16 __half;")
    wrappers = ""
    for name, parameters in re.findall(r"ENTRY void (\w+)\((.*?)\) \{", fused.SOURCE, re.S):
        if name == "statistics":  # of the C++ side alone
            continue
        names = ", ".join(part.split()[-1].strip("*") for part in parameters.split(","))
        wrappers += f'extern "C" void run_{name}(Index grid, Index block, {parameters}) {{'
        wrappers += f" team(grid, block, [=] {{ {name}({names}); }}); }}\n"
    libraries = {}

    class Dim(ctypes.Structure):
        _fields_ = [("x", ctypes.c_uint), ("y", ctypes.c_uint)]

    def launch(name, T, y, *args):
        key = (y.dtype, T)
        if key not in libraries:
            types = {**lif_cuda.CTYPES, torch.float64: "double"}
            path = tmp_path / f"{len(libraries)}.so"
            command = [
                "g++",
                "-O1",
                "-std=c++20",
                "-ffp-contract=off",
                "-w",
                f"-I{tmp_path}",
                "-pthread",
                "-shared",
            ]
            command += [*fused.defines(y.dtype, T, types), "-fPIC", "-x", "c++", "-", "-o", path]
            subprocess.run(command, input=SHIM + fused.SOURCE + wrappers, text=True, check=True)
            libraries[key] = ctypes.CDLL(path)
        C = y.shape[2]
        real = ctypes.c_double if y.dtype == torch.float64 else ctypes.c_float
        convert = {int: ctypes.c_longlong, float: real}
        args = [
            ctypes.c_void_p(a.data_ptr()) if torch.is_tensor(a) else convert[type(a)](a)
            for a in args
        ]
        grid = Dim(-(-C // fused.TILE[0]), fused.PARTS)
        sizes = (ctypes.c_longlong(y[0].numel() // C), ctypes.c_longlong(C))
        getattr(libraries[key], f"run_{name}")(grid, Dim(*fused.TILE), *sizes, *args)
        launched.append(name)

    launched = []
    monkeypatch.setattr(fused, "launch", launch)
    return launched


@compiled
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_cuda_side_on_host(cuda_on_host, dtype):
    for T, steps, C in ((4, 4, 48), (4, 1, 33), (16, 16, 3)):
        check_kernels(dtype, T, steps, C)
    for size in SIZES:
        check_pooling(dtype, 35, size)
    assert set(cuda_on_host) == {
        "fire",
        "fire_backward",
        "normalise_backward",
        "pool",
        "pool_backward",
    }


# On a GPU -----------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("dtype", lif_cuda.CTYPES)
@pytest.mark.parametrize(("T", "steps", "C"), CASES)
def test_kernels_on_gpu(dtype, T, steps, C):
    check_kernels(dtype, T, steps, C, device="cuda")
    check_kernels(dtype, T, steps, C, device="cuda", B=7, size=(31, 17))


@gpu
@pytest.mark.parametrize("dtype", lif_cuda.CTYPES)
@pytest.mark.parametrize("size", [*SIZES, (56, 56)])
def test_pooling_on_gpu(dtype, size):
    check_pooling(dtype, 40, size, device="cuda")
