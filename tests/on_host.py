"""The CUDA kernels of the neurons without a GPU: their own source, compiled for this processor."""

import ctypes
import itertools
import re
import shutil
import subprocess

import pytest
import torch

from conftest import load

lif, lif_cuda = load("cifar10").neuron, load("cifar10").cupy_lif

HOST = """
#include <cmath>
#include <cstdint>
#include <cstring>
#define __global__
#define __device__
typedef _Float16 __half;
struct __nv_bfloat16 {{  // the upper half of a float, rounded to nearest even
    uint16_t bits;
    explicit __nv_bfloat16(float value) {{
        uint32_t word;
        std::memcpy(&word, &value, 4);
        bits = (word + 0x7fff + (word >> 16 & 1)) >> 16;
    }}
    explicit operator float() const {{
        const uint32_t word = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &word, 4);
        return value;
    }}
}};
struct Index {{ long long x; }};
static Index blockIdx, blockDim{{1}}, threadIdx{{0}};
{source}
{wrappers}
"""
WRAPPER = """
extern "C" void {kernel}_{kind}_{index}(long long n, {parameters}) {{
    for (blockIdx.x = 0; blockIdx.x < n + 3; ++blockIdx.x) {instance}(n, {names});
}}
"""
PARAMETERS = {
    "lif_forward": "long long T, long long x_step, const {c}* x, const float* rate, {c}* y, "
    "float tau, float v_threshold",
    "lif_backward": "long long T, long long x_step, const {c}* x, const float* rate, const {c}* g, "
    "{c}* y, float* sums, float tau, float v_threshold, float alpha",
}


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory):
    """The kernels' own source, compiled for this processor: a loop stands for the threads (three
    too many).
    """
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("host")
    wrappers = ""
    for kernel, parameters in PARAMETERS.items():
        names = ", ".join(part.split()[-1].strip("*") for part in parameters.split(", "))
        for (index, dtype), kind in itertools.product(enumerate(lif_cuda.CTYPES), lif.NEURONS):
            text = parameters.format(c=lif_cuda.CTYPES[dtype])
            wrappers += WRAPPER.format(
                kernel=kernel,
                kind=kind,
                index=index,
                parameters=text,
                instance=lif_cuda._instance(kernel, dtype, kind),
                names=names,
            )
    source = re.sub("#include <cuda_.*>", "", lif_cuda.CUDA_SOURCE)
    (folder / "lif.cpp").write_text(HOST.format(source=source, wrappers=wrappers))
    command = ["g++", "-O2", "-ffp-contract=off", "-std=c++17", "-w", "-shared", "-fPIC"]
    subprocess.run([*command, "-o", folder / "lif.so", folder / "lif.cpp"], check=True)
    return ctypes.CDLL(str(folder / "lif.so"))


@pytest.fixture
def host(host_kernels, monkeypatch):
    """lif_forward and lif_backward as they are, but for the launch: it runs the kernels here, on
    CPU tensors.
    """
    convert = {
        torch.Tensor: lambda x: ctypes.c_void_p(x.data_ptr()),
        int: ctypes.c_longlong,
        float: ctypes.c_float,
        type(None): lambda _: ctypes.c_void_p(0),
    }
    launched = []

    def launch(name, kind, *args):
        x = args[3]
        function = getattr(host_kernels, f"{name}_{kind}_{[*lif_cuda.CTYPES].index(x.dtype)}")
        function(*(convert[type(arg)](arg) for arg in args))
        launched.append(args)

    monkeypatch.setattr(lif_cuda, "_launch", launch)
    return launched
