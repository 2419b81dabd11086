"""The CUDA side of the kernels, without a GPU: compiled by NVRTC, and run on the host."""

import contextlib
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
@pytest.mark.parametrize("T", [1, 4, 16, pytest.param(64, marks=pytest.mark.long)])
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
        names = ", ".join(part.split()[-1].strip("*") for part in parameters.split(","))
        wrappers += f'extern "C" void run_{name}(Index grid, Index block, {parameters}) {{'
        wrappers += f" team(grid, block, [=] {{ {name}({names}); }}); }}\n"
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

    def cuda_kernel(name, build):
        if build not in libraries:
            libraries[build] = library(build)

        def kernel(grid, block, args):
            launched.append((name, build.lanes))
            real = ctypes.c_double if build.dtype == torch.float64 else ctypes.c_float
            types = {"int32": ctypes.c_int, "int64": ctypes.c_longlong, "float32": real}
            args = [types.get(type(arg).__name__, ctypes.c_void_p)(arg) for arg in args]
            getattr(libraries[build], f"run_{name}")(Dim(*grid), Dim(*block), *args)

        return kernel

    def launch(name, y, *args, T=1, neuron="MULTIPLY sigmoid"):
        kernels.launch_cuda(name, y, args, T, neuron)

    def parts(y, rows, channels, T=1):
        return kernels.tiling(y.element_size(), rows, channels, T)[2][1]

    kernels.tiling.cache_clear()
    for name, value in {"CUDA_PARTS": 3, "THREADS": 24, "COLUMNS": (8, 16)}.items():
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(kernels, "cuda_kernel", cuda_kernel)
    monkeypatch.setattr(kernels, "cupy_stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(fused, "launch", launch)
    monkeypatch.setattr(fused, "parts", parts)
    yield launched
    kernels.tiling.cache_clear()


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
    names, lanes = ({*column} for column in zip(*cuda_on_host, strict=True))
    entries = set(re.findall(r"^ENTRY (\w+)", kernels.SOURCE, re.M))
    assert entries - names == {"update", "running_norm"} and lanes >= {1, 16 // dtype.itemsize}
