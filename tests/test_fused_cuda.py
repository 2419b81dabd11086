"""The CUDA side of the kernels, without a GPU: what NVRTC makes of it; run on this processor, a
thread for each of CUDA's, against autograd and the plain path, and under the address and
undefined-behaviour sanitizers.
"""

import ctypes
import os
import re
import subprocess
import sys

import pytest
import torch

import by_hand
import on_gpus
from conftest import ROOT, Golden, load
from test_fused import SIZES, check_kernels, check_pooling, check_running_statistics, compiled

cifar10 = load("cifar10")
lif, kernels = cifar10.neuron, cifar10.compiler
NEURONS = {
    "MULTIPLY sigmoid": torch.float16,  # the published one
    "DIVIDE atan": torch.float32,
    "PARAMETRIC erf": torch.bfloat16,
    "INTEGRATE rect": torch.float16,
    kernels.NO_NEURON: torch.float16,
}
REGISTERS = 128  # of the 65,536 of a multiprocessor: two blocks of 256 threads run

OLDEST_TO_NEWEST = [
    pytest.param(arch, marks=pytest.mark.long) for arch in ("sm_75", "sm_80", "sm_120")
]


@pytest.mark.parametrize("arch", ["sm_90", *OLDEST_TO_NEWEST])
@pytest.mark.parametrize("T", [4, *(pytest.param(T, marks=pytest.mark.long) for T in (1, 16, 64))])
def test_nvrtc(arch, T):
    """Everything compiles, and stays in registers."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")  # not with every PyTorch
    headers = pytest.importorskip("cupy._core.core")
    for neuron, dtype in NEURONS.items():
        lanes = kernels.tiling(dtype.itemsize, 1000, 384, T)[0]
        build = kernels.Build(dtype, T, neuron, lanes, "long long" if T == 64 else "int")
        error, program = nvrtc.nvrtcCreateProgram(build.source().encode(), b"fused.cu", 0, [], [])
        options = headers.assemble_cupy_compiler_options(
            (*kernels.NVRTC_OPTIONS, *build.defines(kernels.CTYPES))
        )
        options = [f"--gpu-architecture={arch}", *options, "--ptxas-options=-v"]
        (error,) = nvrtc.nvrtcCompileProgram(
            program, len(options), [option.encode() for option in options]
        )
        log = bytes(nvrtc.nvrtcGetProgramLogSize(program)[1] + 1)
        nvrtc.nvrtcGetProgramLog(program, log)
        assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
        assert nvrtc.nvrtcGetCUBINSize(program)[1] > 0
        seen = set()
        for text in log.decode().split("Compiling entry function ")[1:]:
            name = text.split("'")[1]
            seen.add(name)
            if T < 64:
                assert text.count(" 0 bytes stack frame, 0 bytes spill stores, 0 bytes") == 1, text
            if neuron.startswith("MULTIPLY") and T < 64 and arch == "sm_90":
                assert int(re.search(r"Used (\d+) registers", text)[1]) <= REGISTERS, text
        assert seen == entries()


def entries():
    return {*re.findall(r"^ENTRY (\w+)", kernels.KERNELS, re.M)}


def check_neuron(kind, shape, dtype):
    """The neuron without a layer, of any shape, against the torch backend."""
    torch.manual_seed(sum(shape))
    x, grad, found = (2 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype), []
    for function in (lambda *args: by_hand.kernel_lif(*args)[0], lif.torch_lif):
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


# For a run of its own: more options of g++, and a fault that is put into the source.
OPTIONS, RIGHT, WRONG = (
    os.environ.get(f"ON_HOST_{name}", "") for name in ("FLAGS", "RIGHT", "WRONG")
)


@pytest.fixture
def cuda_on_host(monkeypatch, tmp_path):
    """Launches run the source's CUDA side, one thread for each of CUDA's. Returns the list of them:
    names and lanes.
    """
    (tmp_path / "cuda_bf16.h").touch()
    (tmp_path / "cuda_fp16.h").write_text("typedef _Float16 __half;")
    wrappers = ""
    for name, parameters in re.findall(r"^ENTRY (\w+)\((.*?)\) \{", kernels.KERNELS, re.S | re.M):
        kinds = [
            part.rpartition(" ")[0].replace("__restrict__", "") for part in parameters.split(",")
        ]
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
        command += [f"-I{tmp_path}", *OPTIONS.split(), *build.defines(types), "-o", path]
        source = build.source()
        assert RIGHT in source
        source = source.replace(RIGHT, WRONG) if RIGHT else source
        subprocess.run(command, input=SHIM + source + wrappers, text=True, check=True)
        return ctypes.CDLL(path)

    kernels_at = []

    def address_of(name, build, device):
        if build not in libraries:
            libraries[build] = library(build)
        kernels_at.append((name, build))
        return len(kernels_at) - 1

    sizes = [ctypes.c_uint] * 7
    pointer = ctypes.c_void_p

    @ctypes.CFUNCTYPE(ctypes.c_int, pointer, *sizes, pointer, pointer, pointer)
    def driver(address, *how):  # cuLaunchKernel
        name, build = kernels_at[address or 0]
        launched.append((name, build.lanes))
        run = getattr(libraries[build], f"run_{name}")
        run(Dim(*how[:2]), Dim(*how[3:5]), pointer(how[8]))
        return 0

    on_gpus.forget()
    place = ctypes.cast(driver, ctypes.c_void_p).value
    changes = {"CUDA_PARTS": 3, "THREADS": 24, "COLUMNS": (8, 16), "driver": lambda: place}
    changes |= {"address_of": address_of, "on_gpu": lambda device: True}
    for name, value in changes.items():
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(cifar10.layer, "takes_events", lambda *args: False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)
    yield launched
    on_gpus.forget()


@pytest.mark.long
@compiled
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.half], ids=str)
def test_cuda_side_on_host(cuda_on_host, dtype):
    for T, steps, C in ((4, 4, 48), (4, 1, 33), (16, 16, 200)):
        check_kernels(dtype, T, steps, C)
    for size, C in zip(SIZES, (35, 24, 8, 33), strict=True):
        check_pooling(dtype, C, size)
    if dtype != torch.half:
        check_running_statistics(dtype, 0.1)
    for kind, shape in (("plif", (19, 5, 30)), ("lif", (4, 2, 64)), ("if", (33, 7))):
        check_neuron(kind, shape, dtype)
    names, lanes = ({*column} for column in zip(*cuda_on_host, strict=True))
    missing = {"running_norm"} if dtype == torch.half else set()
    assert entries() - names == missing and lanes >= {1, 16 // dtype.itemsize}


@pytest.mark.long
@compiled
def test_model_on_host(cuda_on_host):
    """Every launch of a model's step, and of its evaluation, against the plain path in float64."""
    found = []
    for plain in (True, False):
        model = cifar10.model.QKFormer(
            T=2, embed_dims=48, num_heads=2, depths=3, fused=not plain, events=False
        )
        Golden.fill(model)
        x = torch.rand(
            2, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        logits = model.train()(x)
        logits.square().sum().backward()
        with torch.no_grad():
            after = model.eval()(x)
        assert bool(cuda_on_host) != plain
        found.append([logits, after, *model.buffers(), *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


@pytest.mark.long
@compiled
@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ("", "", "1 passed"),
        ("row < rows;", "row < rows + 1;", "heap-buffer-overflow"),
        ("row += gridDim.y * blockDim.y", "row += 1", "AssertionError"),
        ("channel < channels)", "channel + LANES < channels)", "AssertionError"),
        ("load(y + r * channels + c)", "load(y + r * channels + c + (r > 0))", "misaligned"),
    ],
)
def test_memory(right, wrong, says):
    """Nothing is read or written outside of tensors or across the alignment of loads, and faults
    are found.
    """
    libraries = ("libasan.so", "libstdc++.so")
    paths = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout
        for name in libraries
    ]
    # An offset to a null pointer is one that is not read: of bytes or rates that are not there.
    flags = "-g1 -fsanitize=address,undefined -fno-sanitize-recover=all"
    done = subprocess.run(
        [*f"{sys.executable} -m pytest -n0 -s -q -m long -k".split(), "host and float16", __file__],
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(map(str.strip, paths)),
            "ASAN_OPTIONS": "detect_leaks=0",
            "ON_HOST_FLAGS": f"{flags} -fno-sanitize=pointer-overflow",
            "ON_HOST_RIGHT": right,
            "ON_HOST_WRONG": wrong,
        },
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert says in done.stdout and (done.returncode == 0) == (not right), done.stdout[-3000:]
