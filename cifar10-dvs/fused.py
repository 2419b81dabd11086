"""BatchNorm's affine map and the LIF neuron in one pass over memory, forward and backward.

Tensors are [T, B, C, H, W] in channels_last: memory holds rows of C channels. One source, fused.cu,
serves two compilers: NVRTC, through CuPy, for GPUs, and the system's C++ compiler for CPUs. It is
compiled for each T and type, so that loops over T unroll and membranes stay in registers. The
formulas are those of lif.py; the arithmetic is float32 (float64 for float64). The backward pass
computes the membranes again.
"""

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch

from lif import ALPHA, say
from lif_cuda import CTYPES, NAMESPACE, NVRTC_OPTIONS, cupy_error

# Most steps that registers hold. Longer sequences, such as T*B with cross_sample_lif, run plain.
MAX_T = 64
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
# Partial sums of a channel: a fixed number, so that sums do not depend on the number of threads.
PARTS = 256
TILE = (32, 8)  # channels x rows of a CUDA block

SOURCE = Path(__file__).with_name("fused.cu").read_text()
HOST_CTYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "__nv_bfloat16"}
# No fused multiply-add, to round as lif.py does. Loops vectorise only if comparisons may not trap.
HOST_OPTIONS = "-O3 -march=native -std=c++17 -fopenmp -w".split()
HOST_OPTIONS += "-ffp-contract=off -fno-math-errno -fno-trapping-math".split()


def defines(dtype, T, ctypes_of):
    real = "double" if dtype == torch.float64 else "float"
    return (
        f"-Dscalar_t={ctypes_of[dtype]}",
        f"-Dreal_t={real}",
        f"-DSTEPS={T}",
        f"-DPARTS={PARTS}",
    )


@functools.cache
def host_library(dtype, T):
    """The kernels as a shared library, compiled in a fraction of a second."""
    compiler = [
        *shlex.split(os.environ.get("CXX", "g++")),
        *HOST_OPTIONS,
        *defines(dtype, T, HOST_CTYPES),
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fused.so")
        command = [*compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", path, "-lm"]
        subprocess.run(
            command, input=SOURCE, text=True, errors="replace", check=True, capture_output=True
        )
        return ctypes.CDLL(path)


def keep_memory():
    """Let glibc keep large freed blocks for the next layer and step (mallopt(3)).

    By default it returns them to the system and asks for them again. The page faults of that take
    longer than the arithmetic.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)  # other C libraries have none
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)


@functools.cache
def host_error(dtype=torch.float32, T=4):
    """None where the system's C++ compiler builds the kernels, else the reason in one line."""
    try:
        host_library(dtype, T)
        keep_memory()
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[0]
        return f"no working C++ compiler ({reason})"
    return None


@functools.cache
def cuda_module(dtype, T):
    import cupy  # here, so that a machine without CuPy can use the rest

    return cupy.RawModule(code=SOURCE, options=(*NVRTC_OPTIONS, *defines(dtype, T, CTYPES)))


@functools.cache
def cuda_error(dtype, T):
    """None where NVRTC builds the kernels, else the reason in one line."""
    try:
        cuda_module(dtype, T).compile()
    except Exception as error:  # whatever a broken CUDA or CuPy installation throws
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


@torch.compiler.assume_constant_result
def available(device_type, dtype, backend, T=4):
    """Whether layers of such tensors, of T steps and with neurons of this backend, can run fused;
    logged once.
    """
    if backend not in ("auto", "cupy"):
        return False
    if device_type == "cuda" and dtype in CTYPES:
        error = cupy_error() or cuda_error(dtype, T)
    elif device_type == "cpu" and dtype in HOST_CTYPES and backend == "auto":
        error = host_error(dtype, T)
    else:
        return False
    how = "fused" if error is None else "unfused"
    say(f"layers run {how} on {device_type}" + ("" if error is None else f": {error}"))
    return error is None


@torch.compiler.assume_constant_result
def say_once(line):
    say(line)


PLAIN = {}  # {why layers run module by module: the first of them}


@torch.compiler.assume_constant_result
def say_plain(layer, reason):
    if reason and PLAIN.setdefault(reason, layer) == layer:
        say(f"{layer} and layers like it run module by module: {reason}")


def launch(name, T, y, *args):
    """Run a kernel on all rows and channels of y, [T, B, C, H, W] in channels_last."""
    C = y.shape[2]
    args = (y[0].numel() // C, C, *args)
    if y.is_cuda:
        launch_cuda(name, T, y, args)
    else:
        real = ctypes.c_double if y.dtype == torch.float64 else ctypes.c_float
        convert = {int: ctypes.c_longlong, float: real}
        args = [
            ctypes.c_void_p(a.data_ptr()) if torch.is_tensor(a) else convert[type(a)](a)
            for a in args
        ]
        getattr(host_library(y.dtype, T), name)(*args)


def launch_cuda(name, T, y, args):
    import cupy
    import numpy

    convert = {int: numpy.int64, float: numpy.float32}
    args = tuple(a.data_ptr() if torch.is_tensor(a) else convert[type(a)](a) for a in args)
    grid = (-(-y.shape[2] // TILE[0]), PARTS)
    stream = torch.cuda.current_stream(y.device)
    with cupy.cuda.Device(y.device.index), cupy.cuda.Stream.from_external(stream):
        cuda_module(y.dtype, T).get_function(name)(grid, TILE, args)


def rows_of_channels(x):
    """x with its channels innermost in memory, as the kernels read it; copied only if it is not."""
    return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def empty(T, like):
    """Memory for [T, B, C, H, W], channels innermost; not a view, so that spikes can be marked."""
    _, B, C, H, W = like.shape
    strides = B * H * W * C, H * W * C, 1, W * C, C
    return torch.empty_strided((T, B, C, H, W), strides, dtype=like.dtype, device=like.device)


def step_of(y, T):
    """Distance in memory between steps of y; 0 where y has one step, which is read T times."""
    return y[0].numel() if len(y) == T else 0


# Operators of torch, so that torch.compile keeps them whole. Each data set folder has its own.


@torch.library.custom_op(f"{NAMESPACE}::fire", mutates_args=())
def fire(
    y: torch.Tensor,
    T: int,
    scale: torch.Tensor,
    shift: torch.Tensor,
    tau: float,
    v_threshold: float,
) -> torch.Tensor:
    """Spikes [T, B, C, H, W] of neurons whose input is scale * y + shift; y has T steps, or one."""
    y = rows_of_channels(y)
    spikes = empty(T, y)
    launch("fire", T, y, step_of(y, T), y, spikes, scale, shift, tau, v_threshold)
    return spikes


@torch.library.custom_op(f"{NAMESPACE}::fire_", mutates_args=("y",))
def fire_(
    y: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, tau: float, v_threshold: float
) -> None:
    """As `fire`, but the spikes overwrite y, which is in channels_last and has all T steps."""
    launch("fire", len(y), y, y[0].numel(), y, y, scale, shift, tau, v_threshold)


@torch.library.custom_op(f"{NAMESPACE}::fire_backward", mutates_args=("grad",))
def fire_backward(
    grad_spikes: torch.Tensor,
    y: torch.Tensor,
    grad: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    tau: float,
    v_threshold: float,
) -> torch.Tensor:
    """Writes the gradient of scale * y + shift into grad, which is like y in channels_last.

    Returns [2, C]: the sums of that gradient and of its product with y - mean.
    """
    T, y, grad_spikes = len(grad_spikes), rows_of_channels(y), rows_of_channels(grad_spikes)
    partial = mean.new_empty(PARTS, 2, len(mean))
    tensors = (y, grad_spikes, grad, scale, shift, mean, partial)
    launch("fire_backward", T, y, step_of(y, T), *tensors, tau, v_threshold, ALPHA)
    return partial.sum(0)


@torch.library.custom_op(f"{NAMESPACE}::normalise_backward_", mutates_args=("grad",))
def normalise_backward_(
    grad: torch.Tensor,
    y: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    gamma: torch.Tensor,
    sums: torch.Tensor,
) -> None:
    """Overwrites grad, the gradient of BatchNorm's output, with that of its input y.

    Both are [N, C, H, W] in channels_last; `sums` are those of fire_backward.
    """
    launch(
        "normalise_backward",
        1,
        y.unsqueeze(0),
        y,
        grad,
        *coefficients(y, mean, invstd, gamma, sums),
    )


@torch.library.custom_op(f"{NAMESPACE}::pool", mutates_args=())
def pool(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """3x3 max-pool of stride 2 of [N, C, H, W] in channels_last.

    Returns the maxima, and for each of them which of the nine places it came from, as a byte.
    """
    pooled, taps = empty_pooled(y)
    launch("pool", 1, pooled.unsqueeze(0), *y.shape[2:], y, pooled, taps)
    return pooled, taps


@torch.library.custom_op(f"{NAMESPACE}::pool_backward", mutates_args=())
def pool_backward(
    grad: torch.Tensor,
    taps: torch.Tensor,
    y: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    gamma: torch.Tensor,
    sums: torch.Tensor,
) -> torch.Tensor:
    """The gradient of y where a max-pool comes before BatchNorm; `grad` is of pooled values."""
    grad_y = torch.empty_like(y)
    factors = coefficients(y, mean, invstd, gamma, sums)
    launch("pool_backward", 1, y.unsqueeze(0), *y.shape[2:], y, grad, taps, grad_y, *factors)
    return grad_y


def empty_pooled(y):
    N, C, H, W = y.shape
    pooled = y.new_empty(N, (H + 1) // 2, (W + 1) // 2, C).permute(0, 3, 1, 2)
    return pooled, torch.empty_like(pooled, dtype=torch.uint8)


def coefficients(y, mean, invstd, gamma, sums):
    """Of BatchNorm's backward pass: a * grad + b * y + c."""
    n = y.numel() // len(mean)
    a = gamma * invstd
    b = -a * invstd.square() * sums[1] / n
    return a, b, -a * sums[0] / n - b * mean


@torch.library.custom_op(f"{NAMESPACE}::statistics", mutates_args=())
def statistics(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each channel of [N, C, H, W] in channels_last."""
    real = torch.float64 if y.dtype == torch.float64 else torch.float32
    if y.device.type == "cpu":
        n, C = y.numel() // y.shape[1], y.shape[1]
        # Sums of differences from one value of each channel: a variance from the values themselves
        # would lose its digits where the mean is large.
        pivot = y[0, :, 0, 0].to(real).contiguous()
        partial = pivot.new_empty(PARTS, 2, C)
        launch("statistics", 1, y.unsqueeze(0), y, pivot, partial)
        total, squares = partial.sum(0, dtype=torch.float64) / n
        return (pivot + total).to(real), (squares - total.square()).clamp_(min=0).to(real)
    # Running statistics, which the operator asks for; a momentum of 0 leaves them alone.
    unused = (torch.zeros(y.shape[1], dtype=real, device=y.device) for _ in range(2))
    return torch.ops.aten.batch_norm_update_stats(y, *unused, 0.0)


@statistics.register_fake
def _(y):
    real = torch.float64 if y.dtype == torch.float64 else torch.float32
    return tuple(y.new_empty(y.shape[1], dtype=real) for _ in range(2))


@pool.register_fake
def _(y):
    return empty_pooled(y)


@pool_backward.register_fake
def _(grad, taps, y, mean, invstd, gamma, sums):
    return torch.empty_like(y)


@fire.register_fake
def _(y, T, scale, shift, tau, v_threshold):
    return empty(T, y)


@fire_backward.register_fake
def _(grad_spikes, y, grad, mean, scale, shift, tau, v_threshold):
    return mean.new_empty(2, len(mean))
