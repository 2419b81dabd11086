"""The CUDA side of the kernels, without a GPU: compiled by NVRTC, and run on the host."""

import ctypes
import re
import subprocess

import pytest
import torch

from conftest import load
from test_fused import SIZES, check_kernels, check_pooling, compiled

cifar10 = load("cifar10")
lif, fused, kernels = cifar10.neuron, cifar10.ops, cifar10.compiler
NEURONS = ("MULTIPLY sigmoid", "DIVIDE atan", "PARAMETRIC erf", "INTEGRATE rect")


@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.long), "sm_90"])
@pytest.mark.parametrize("T", [4, *(pytest.param(T, marks=pytest.mark.long) for T in (1, 16, 64))])
def test_nvrtc(arch, T):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")  # not with every PyTorch
    headers = pytest.importorskip("cupy._core.core")
    for dtype, neuron in zip(kernels.CTYPES, NEURONS, strict=False):
        lanes = kernels.tiling(dtype.itemsize, 1000, 384, T)[0]
        build = kernels.Build(dtype, T, neuron, lanes, "long long" if T == 64 else "int")
        error, program = nvrtc.nvrtcCreateProgram(build.source().encode(), b"fused.cu", 0, [], [])
        options = headers.assemble_cupy_compiler_options(
            (*kernels.NVRTC_OPTIONS, *build.defines(kernels.CTYPES))
        )
        options = [f"--gpu-architecture={arch}", *options]
        (error,) = nvrtc.nvrtcCompileProgram(
            program, len(options), [option.encode() for option in options]
        )
        log = bytes(nvrtc.nvrtcGetProgramLogSize(program)[1] + 1)
        nvrtc.nvrtcGetProgramLog(program, log)
        assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
        assert nvrtc.nvrtcGetCUBINSize(program)[1] > 0


def check_neuron(kind, shape, dtype):
    """The neuron without a layer, of any T, against the torch backend."""
    torch.manual_seed(sum(shape))
    x, grad, found = (2 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype), []
    for function in (lif.cupy_lif, lif.torch_lif):
        leaf, w = x.clone().requires_grad_(), torch.tensor(0.3, requires_grad=True)
        y = function(leaf, 3.7, 0.8, 2.0, kind, w if kind == "plif" else None, "atan")
        y.backward(grad)
        found.append([y.detach(), leaf.grad, *([w.grad] if kind == "plif" else [])])
    rtol = 8e-3 if dtype.itemsize == 2 else 1e-5
    torch.testing.assert_close(*found, rtol=rtol, atol=1e-5)


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
#define __fdividef(x, y) ((x) / (y))
struct Index { int x, y; };  // as CUDA's, but for the sign, which indices of 32 bits have
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
    """kernels.launch runs the source's CUDA side, one thread for each of CUDA's. Returns the list
    of launches: names and lanes.
    """
    (tmp_path / "cuda_bf16.h").touch()
    (tmp_path / "cuda_fp16.h").write_text("typedef _Float16 __half;")
    wrappers = ""
    for name, parameters in re.findall(r"^ENTRY (\w+)\((.*?)\) \{", kernels.KERNELS, re.S | re.M):
        kinds = [
            part.rpartition(" ")[0].replace("__restrict__", "") for part in parameters.split(",")
        ]
        kinds = ["float" if kind.strip() == "real_t" else kind for kind in kinds]
        values = ", ".join(f"*({kind}*)places[{i}]" for i, kind in enumerate(kinds))
        wrappers += f'extern "C" void run_{name}(Index grid, Index block, void** places) {{'
        wrappers += f" team(grid, block, [=] {{ {name}({values}); }}); }}\n"
    libraries, launched = {}, []

    class Dim(ctypes.Structure):
        _fields_ = [("x", ctypes.c_int), ("y", ctypes.c_int)]

    def library(build):
        types = {**kernels.CTYPES, torch.float64: "double"}
        path = tmp_path / f"{len(libraries)}.so"
        command = "g++ -O1 -std=c++20 -ffp-contract=off -w -pthread -shared -fPIC -x c++ -".split()
        command += [f"-I{tmp_path}", *build.defines(types), "-o", path]
        subprocess.run(command, input=SHIM + build.source() + wrappers, text=True, check=True)
        return ctypes.CDLL(path)

    kernels_at = []

    def address_of(name, build, device):
        if build not in libraries:
            libraries[build] = library(build)
        kernels_at.append((name, build))
        return len(kernels_at) - 1

    def driver(address, *how):  # cuLaunchKernel
        name, build = kernels_at[address]
        launched.append((name, build.lanes))
        getattr(libraries[build], f"run_{name}")(Dim(*how[:2]), Dim(*how[3:5]), how[8])
        return 0

    def launch(name, y, *args, T=1, neuron="MULTIPLY sigmoid"):
        kernels.launch_cuda(name, y, args, T, neuron)

    def parts(y, rows, channels, T=1):
        return kernels.tiling(y.element_size(), rows, channels, T)[2][1]

    kernels.tiling.cache_clear()
    kernels.cuda_kernel.cache_clear()
    small = {"CUDA_PARTS": 3, "THREADS": 24, "COLUMNS": (8, 16)}
    for name, value in {**small, "address_of": address_of, "driver": lambda: driver}.items():
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)
    monkeypatch.setattr(fused, "launch", launch)
    monkeypatch.setattr(fused, "parts", parts)
    yield launched
    kernels.tiling.cache_clear()
    kernels.cuda_kernel.cache_clear()


@compiled
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(d, marks=pytest.mark.long) for d in (torch.float64, torch.float32, torch.half)],
)
def test_cuda_side_on_host(cuda_on_host, dtype):
    for T, steps, C in ((4, 4, 48), (4, 1, 33), (16, 16, 200)):
        check_kernels(dtype, T, steps, C)
    for size, C in zip(SIZES, (35, 24, 8, 33), strict=True):
        check_pooling(dtype, C, size)
    for kind, shape in (("plif", (19, 5, 30)), ("lif", (4, 2, 64)), ("if", (33, 7))):
        check_neuron(kind, shape, dtype)
    names, lanes = ({*column} for column in zip(*cuda_on_host, strict=True))
    entries = set(re.findall(r"^ENTRY (\w+)", kernels.KERNELS, re.M))
    assert entries - names == {"update", "running_norm"} and lanes >= {1, 16 // dtype.itemsize}
