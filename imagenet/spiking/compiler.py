"""Compiles the kernels of fused.cu and runs them.

NVRTC, through CuPy, compiles them for GPUs, the system's C++ compiler for CPUs: for each number of
steps T, type, neuron and surrogate, so that loops over T unroll and membranes stay in registers.
The arithmetic is float32 (float64 for float64).

A kernel's caller is an operator of torch too, so that torch.compile keeps it whole.
"""

import contextlib
import ctypes
import functools
import logging
import os
import re
import shlex
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .plain import SURROGATES

logger = logging.getLogger("qkformer")

# Most steps that registers hold. Longer sequences, such as T*B with cross_sample_lif, run plain.
MAX_T = 64
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
# Partial sums of a channel: fixed numbers, so that sums do not depend on threads or processors.
HOST_PARTS, CUDA_PARTS = 64, 512
THREADS = 256  # at most, of a CUDA block
# Kernels in which a column of threads works on a channel, and the threads of their blocks.
OF_COLUMNS = ("batch_norm", "running_norm", "batch_norm_backward")
COLUMNS = (32, 16)

PORTABLE, KERNELS = (
    Path(__file__).with_name(name).read_text() for name in ("portable.cuh", "fused.cu")
)
CTYPES = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
# Without fused multiply-add the kernels round as the torch backend does: float32 spikes are equal.
NVRTC_OPTIONS = ("-std=c++17", "--fmad=false")
HOST_CTYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16"}
# Comparisons that may trap do not vectorise.
HOST_OPTIONS = "-O3 -march=native -std=c++17 -fopenmp -w".split()
HOST_OPTIONS += "-ffp-contract=off -fno-math-errno -fno-trapping-math".split()
COMPILER_SECONDS = 300  # it takes one or two, and with PyTorch's headers twenty


def cached(function):
    """functools.cache, but torch.compile calls the function too and keeps the result, where it
    would warn and trace what is within.
    """
    known = functools.cache(function)
    call = functools.wraps(function)(lambda *args: known(*args))
    call.cache_clear = known.cache_clear
    return torch.compiler.assume_constant_result(call)


@cached
def say(line):
    logger.info(line)  # once for each line


class Build(NamedTuple):
    """What the kernels are compiled for.

    neuron: see ops.Constants. lanes: channels of a GPU's thread. index: the type of a place in
    memory.
    """

    dtype: torch.dtype
    T: int = 1
    neuron: str = "MULTIPLY sigmoid"
    lanes: int = 1
    index: str = "long long"

    def source(self):
        body = SURROGATES[self.neuron.split()[1]].kernel
        return f"{PORTABLE}INLINE real_t derivative(real_t x, real_t alpha) {{ {body} }}\n{KERNELS}"

    def defines(self, ctypes_of):
        return (
            f"-Dscalar_t={ctypes_of[self.dtype]}",
            f"-Dreal_t={'double' if self.dtype == torch.float64 else 'float'}",
            f"-DINDEX={self.index}",
            f"-DSTEPS={self.T}",
            f"-DLANES={self.lanes}",
            f"-DCHARGE={self.neuron.split()[0]}",
        )


@functools.cache
def host_library(build):
    """The kernels as a shared library, compiled in a fraction of a second."""
    return build_library(build.source(), *HOST_OPTIONS, *build.defines(HOST_CTYPES))


def build_library(source, *options):
    """C++ as a shared library. Raises OSError or ValueError where that can't be built."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fused.so")
        compile_to(path, source, *options, "-lm")
        return ctypes.CDLL(path)


def compile_to(path, source, *options):
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    files = ["-shared", "-fPIC", "-x", "c++", "-", "-o", path]
    run_alone([*compiler, *files, *options], source, COMPILER_SECONDS)


def run_alone(command, text, seconds):
    """Run a command that reads `text`. In a session of its own it does not get the signals that end
    a run after a step. Raises OSError with what it says where it fails or takes longer.
    """
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    options = {"start_new_session": True, "text": True, "errors": "replace"}
    with subprocess.Popen(command, **pipes, **options) as process:
        try:
            _, said = process.communicate(text, seconds)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
            if isinstance(error, subprocess.TimeoutExpired):
                raise OSError(f"{command[0]} takes more than {seconds} s") from None
            raise
    if process.returncode:
        raise OSError(said.strip() or f"{command[0]} ends with {process.returncode}")


def keep_memory():
    """Let glibc keep large freed blocks for the next layer and step (mallopt(3)).

    By default it returns them to the system and asks for them again. The page faults of that take
    longer than the arithmetic.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)  # other C libraries have none
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@functools.cache
def host_error(build):
    """None where the system's C++ compiler builds the kernels, else the reason in one line."""
    try:
        host_library(build)
        keep_memory()
    except (OSError, ValueError) as error:  # ValueError: of shlex
        cxx = f", CXX={os.environ['CXX']}" if "CXX" in os.environ else ""
        return f"no working C++ compiler ({first_line(error)}{cxx})"
    return None


@functools.cache
def cuda_module(build):
    import cupy  # here, so that a machine without CuPy can use the rest

    options = (*NVRTC_OPTIONS, *build.defines(CTYPES))
    return cupy.RawModule(code=build.source(), options=options)


@functools.cache
def cupy_error():
    """None where CuPy compiles and runs the kernels, else the reason in one line."""
    try:
        for dtype in CTYPES:
            x = torch.ones(8, dtype=dtype, device="cuda")
            spikes = torch.empty_like(x)
            launch("integrate", x, 1, 8, 1, 8, x, spikes, None, 0.5, 0.5, T=16)
            if not torch.equal(spikes, x):
                raise RuntimeError(f"a kernel computes other numbers in {dtype}")
    except Exception as error:  # whatever a broken CUDA or CuPy installation throws
        reason = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(error, ImportError):
            reason += f"; pip install cupy-cuda{(torch.version.cuda or '13')[:2]}x"
        return reason
    return None


@functools.cache
def cuda_error(build):
    """None where NVRTC builds the kernels, else the reason in one line."""
    try:
        cuda_module(build).compile()
    except Exception as error:  # whatever a broken CUDA or CuPy installation throws
        return f"{type(error).__name__}: {first_line(error)}"
    return None


@cached
def available(device_type, dtype, backend, T=4, neuron="MULTIPLY sigmoid"):
    """Whether layers of such tensors, of T steps and with such neurons, can run fused; logged once.
    All kernels that they launch on a CPU are there then.
    """
    if backend not in ("auto", "cupy"):
        return False
    if device_type == "cuda" and dtype in CTYPES:
        error = cupy_error() or cuda_error(Build(dtype, T, neuron))
    elif device_type == "cpu" and dtype in HOST_CTYPES and backend == "auto":
        real = torch.float64 if dtype == torch.float64 else torch.float32
        builds = Build(dtype, T, neuron), Build(dtype), Build(real)
        error = next(filter(None, map(host_error, builds)), None)
    else:
        return False
    if error is None:
        say(f"fused kernels on the {'CPU' if device_type == 'cpu' else 'GPU'}")
    else:
        say(f"layers run module by module on {device_type}: {error}")
    return error is None


# Operators ----------------------------------------------------------------------------------------

# Named by the data set folder, each of which has its own; see hubconf.py.
NAMESPACE = "qkformer_" + re.sub(r"\W", "_", Path(__file__).resolve().parent.parent.name)


def is_called_as_operator():
    """Whether a kernel is called as an operator of torch, which torch.compile keeps whole and a
    dispatch mode sees. It takes longer than a launch, so else the function itself is called.
    """
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def operator(*mutates):
    """Decorator of a function that launches kernels: an operator that writes to `mutates`. With
    tensors that have no values it does the same but for the launches.
    """

    def decorate(function):
        name = f"{NAMESPACE}::{function.__name__}"
        of_torch = torch.library.custom_op(name, function, mutates_args=mutates)
        of_torch.register_fake(function)

        @functools.wraps(function)
        def call(*args):
            return of_torch(*args) if is_called_as_operator() else function(*args)

        call.of_torch = of_torch
        return call

    return decorate


# Launches -----------------------------------------------------------------------------------------


def is_fake(y):
    return isinstance(y, FakeTensor)


@functools.cache
def tiling(itemsize, rows, channels, T):
    """(lanes, block, grid) of a CUDA kernel over rows of channels."""
    lanes = 16 // itemsize  # a load of 16 bytes, the widest there is
    while channels % lanes or (lanes > 1 and T * lanes > 32):  # registers hold T times as many
        lanes //= 2
    groups = channels // lanes
    across = -(-groups // (THREADS // 2))
    x = -(-groups // across)
    y = THREADS // x
    return lanes, (x, y), (across, min(CUDA_PARTS, -(-rows // y)))


def parts(y, rows, channels, T=1):
    """How many partial sums a kernel makes of each channel."""
    return tiling(y.element_size(), rows, channels, T)[2][1] if y.is_cuda else HOST_PARTS


def launch(name, y, *args, T=1, neuron="MULTIPLY sigmoid"):
    """Run a kernel for tensors of y's type and device.

    args: those of the kernel; rows and channels, or channels alone, come first. None is a null
    pointer.
    """
    if is_fake(y):
        return
    if y.is_cuda:
        launch_cuda(name, y, args, T, neuron)
    else:
        getattr(host_library(Build(y.dtype, T, neuron)), name)(*in_c(y, args))


def in_c(y, args):
    real = ctypes.c_double if y.dtype == torch.float64 else ctypes.c_float
    return [
        ctypes.c_longlong(arg)
        if isinstance(arg, int)
        else real(arg)
        if isinstance(arg, float)
        else ctypes.c_void_p(0 if arg is None else arg.data_ptr())
        for arg in args
    ]


def launch_cuda(name, y, args, T, neuron):
    device, large = y.get_device(), y.numel() * T >= 2**30
    address, grid, block = kernel_at(name, y.dtype, T, neuron, *args[:2], large, device)
    values = in_c(y, args)  # a kernel reads as many bytes of each as its parameter has
    places = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    sizes = *grid, 1, *block, 1, 0
    stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(device))
    with torch.cuda.device(device):
        code = driver()(ctypes.c_void_p(address), *sizes, stream, places, None)
    if code:
        raise RuntimeError(f"CUDA refuses to launch a kernel (error {code})")


@functools.cache
def kernel_at(name, dtype, T, neuron, rows, channels, large, device):
    """(address, grid, block) of a CUDA kernel; see launch."""
    if name in OF_COLUMNS:  # the first argument are the channels
        lanes, block, grid = 1, COLUMNS, (-(-rows // COLUMNS[0]), 1)
    else:
        lanes, block, grid = tiling(dtype.itemsize, rows, channels, T)
    build = Build(dtype, T, neuron, lanes, "long long" if large else "int")
    return address_of(name, build, device), grid, block


@functools.cache
def address_of(name, build, device):
    with torch.cuda.device(device):
        return cuda_module(build).get_function(name).kernel.ptr


@functools.cache
def driver():
    """CUDA's cuLaunchKernel. CuPy's own call of it takes longer than a small kernel runs."""
    return ctypes.PyDLL("libcuda.so.1").cuLaunchKernel
