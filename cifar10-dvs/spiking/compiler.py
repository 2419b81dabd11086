"""Compiles the kernels of fused.cu, the sums of events.cpp, and layer.cpp, which calls both.

NVRTC, through CuPy, compiles kernels for GPUs, the system's C++ compiler for CPUs: for each number
of steps T, type, neuron and surrogate, so that loops over T unroll and membranes stay in registers.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from .plain import SURROGATES

logger = logging.getLogger("qkformer")

# Most steps that registers hold. Longer sequences, such as T*B with cross_sample_lif, run plain.
MAX_T = 64
# Partial sums of a channel: fixed numbers, so that sums do not depend on threads or processors.
HOST_PARTS, CUDA_PARTS = 64, 512
THREADS = 256  # at most, of a CUDA block
# Kernels in which a column of threads works on a channel, and the threads of their blocks.
OF_COLUMNS = ("batch_norm", "running_norm", "batch_norm_backward")
COLUMNS = (32, 16)

PORTABLE, KERNELS, EVENTS, LAYERS = (
    Path(__file__).with_name(name).read_text()
    for name in ("portable.cuh", "fused.cu", "events.cpp", "layer.cpp")
)
CTYPES = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
# Without fused multiply-add the kernels round as the torch backend does: float32 spikes are equal.
NVRTC_OPTIONS = ("-std=c++17", "--fmad=false")
HOST_CTYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16"}
# Comparisons that may trap do not vectorise.
HOST_OPTIONS = "-O3 -march=native -std=c++17 -fopenmp -w".split()
HOST_OPTIONS += "-ffp-contract=off -fno-math-errno -fno-trapping-math".split()
NO_NEURON = "NONE sigmoid"  # see native.Constants
COMPILER_SECONDS = 300  # it takes one or two, and with PyTorch's headers twenty


@functools.cache
def say(line):
    logger.info(line)  # once for each line


class Build(NamedTuple):
    """What the kernels are compiled for.

    neuron: see native.Constants. lanes: channels of a GPU's thread. index: the type of a place in
    memory.
    """

    dtype: torch.dtype
    T: int = 1
    neuron: str = NO_NEURON
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
    keep_memory()
    return build_library(build.source(), *HOST_OPTIONS, *build.defines(HOST_CTYPES))


@functools.cache
def events_library(dtype):
    """Convolutions of spikes on a CPU, whose time falls with the firing rate."""
    options = [*HOST_OPTIONS, "-ffp-contract=fast", f"-Dscalar_t={HOST_CTYPES[dtype]}"]
    return build_library(EVENTS, *options)


@functools.cache
def cuda_module(build):
    import cupy  # here, so that a machine without CuPy can use the rest

    module = cupy.RawModule(code=build.source(), options=(*NVRTC_OPTIONS, *build.defines(CTYPES)))
    module.compile()
    return module


def build_library(source, *options):
    """C++ as a shared library; see compile_to."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fused.so")
        compile_to(path, source, *options, "-lm")
        return ctypes.CDLL(path)


def compile_to(path, source, *options):
    """Write C++ as a shared library. Raises OSError where the system's compiler can't."""
    cxx = os.environ.get("CXX") or "g++"
    files = ["-shared", "-fPIC", "-x", "c++", "-", "-o", path]
    how = {"text": True, "errors": "replace", "timeout": COMPILER_SECONDS, "capture_output": True}
    # In a session of its own it does not get the signals that end a run after a step.
    how |= {"check": True, "start_new_session": True}
    try:
        subprocess.run([*shlex.split(cxx), *files, *options], input=source, **how)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = first_line(getattr(error, "stderr", None) or error)
        raise OSError(f"no working C++ compiler ({said}, CXX={cxx})") from None


def keep_memory():
    """Let glibc keep large freed blocks (mallopt(3)): to get them again would take longer than the
    arithmetic on them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)  # other C libraries have none
    mallopt(-4, 0)  # M_MMAP_MAX
    mallopt(-1, -1)  # M_TRIM_THRESHOLD


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@functools.cache
def fault(build, *args):
    """Why build(*args) can't be had, in one line; None where it can."""
    try:
        build(*args)
    except Exception as error:  # whatever a broken compiler, CUDA or CuPy throws
        if isinstance(error, ImportError):
            kind = f"cupy-cuda{(torch.version.cuda or '13')[:2]}x"
            return f"{type(error).__name__}: {first_line(error)}; pip install {kind}"
        return first_line(error)
    return None


# layer.cpp ----------------------------------------------------------------------------------------

ROOT = Path(torch.__file__).parent
LAYER_OPTIONS = ["-O1", "-std=c++20", "-w", f"-I{ROOT}/include", f"-L{ROOT}/lib"]
LAYER_OPTIONS += [f"-I{ROOT}/include/torch/csrc/api/include", "-lc10", "-ltorch_cpu"]
LAYER_OPTIONS += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
# Of the library and its operators; folders whose layers are equal share them.
NAME = f"{LAYERS}{torch.__version__}{LAYER_OPTIONS}{platform.machine()}"
NAME = f"qkformer_{hashlib.sha256(NAME.encode()).hexdigest()[:16]}"


def load_layers():
    """Builds layer.cpp, for PyTorch to load; OSError or RuntimeError where that can't be.

    It takes some twenty seconds, once: the library is kept among PyTorch's extensions, in
    TORCH_EXTENSIONS_DIR or ~/.cache/torch_extensions. Their own loader, torch.utils.cpp_extension,
    would need ninja.
    """
    if hasattr(getattr(torch.ops, NAME), "layer"):  # another folder has loaded it
        return
    cache = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions"
    path = Path(cache, f"{NAME}.so")
    with contextlib.suppress(OSError):  # it is not there, or of another system
        return torch.ops.load_library(path)
    say("compiling spiking/layer.cpp, once: about 20 s")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # other ranks do the same
        part = Path(folder, path.name)
        compile_to(part, LAYERS, *LAYER_OPTIONS, f"-DNAMESPACE={NAME}")
        part.replace(path)
    torch.ops.load_library(path)


@functools.cache
def events_available(device_type, dtype):
    """Whether convolutions of such tensors can be sums of events; logged once if they can't."""
    if device_type != "cpu" or dtype not in (torch.float32, torch.float64):
        return False
    error = fault(events_library, dtype) or fault(load_layers)
    if error is not None:
        say(f"convolutions of spikes are dense: {error}")
    return error is None


# Launches -----------------------------------------------------------------------------------------


def on_gpu(device):
    """Whether a tensor's get_device() is a GPU."""
    return device >= 0


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


def kernel_at(name, dtype, T, neuron, rows, channels, large, device):
    """(address, grid, block) of a kernel for so many rows and channels; grid[1] is the number of
    partial sums that it makes of each channel. large: places in memory need 64 bits.
    """
    if not on_gpu(device):
        function = getattr(host_library(Build(dtype, T, neuron)), name)
        return ctypes.cast(function, ctypes.c_void_p).value, (1, HOST_PARTS), (1, 1)
    if name in OF_COLUMNS:
        lanes, block, grid = 1, COLUMNS, (-(-channels // COLUMNS[0]), 1)
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
    """The address of CUDA's cuLaunchKernel. CuPy's own call takes longer than a small kernel."""
    return ctypes.cast(ctypes.PyDLL("libcuda.so.1").cuLaunchKernel, ctypes.c_void_p).value
