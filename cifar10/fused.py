"""BatchNorm's affine map and the LIF neuron in one pass over memory, forward and backward.

Tensors are [T, B, C, H, W] in channels_last, in memory rows of C channels. One source serves two compilers: NVRTC,
through CuPy, for GPUs, and the system's C++ compiler for CPUs. T and the types are constants in it, so that the loops
over T unroll and the membranes stay in registers. The formulas are those of lif.py; the arithmetic is float32 (float64
for float64), and the membrane is recomputed in the backward pass.
"""

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch

from lif import ALPHA, CTYPES, NAMESPACE, NVRTC_OPTIONS, cupy_error, say

MAX_T = 64  # steps held in registers; a longer sequence (the release's neuron over T*B) runs through plain layers
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
PARTS = 256  # partial sums of a channel: a fixed number, so that sums do not depend on the number of threads
TILE = (32, 8)  # channels x rows of a CUDA block

SOURCE = r"""
#ifdef __CUDACC_RTC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define INLINE __device__ __forceinline__
#define ENTRY extern "C" __global__
#define ROWS(row)                                                                                                      \
    for (index_t row = index_t(blockIdx.y) * blockDim.y + threadIdx.y; row < rows; row += gridDim.y * blockDim.y)
#define CHANNELS(channel)                                                                                              \
    if (const index_t channel = index_t(blockIdx.x) * blockDim.x + threadIdx.x; channel < channels)
#else
#define ROWS(row) _Pragma("omp parallel for") for (index_t row = 0; row < rows; ++row)
#define CHANNELS(channel) _Pragma("omp simd") for (index_t channel = 0; channel < channels; ++channel)
#define INLINE static inline __attribute__((always_inline))
#define ENTRY extern "C"
extern "C" __attribute__((const, simd("notinbranch"))) float expf(float);
extern "C" __attribute__((const, simd("notinbranch"))) double exp(double);
struct __nv_bfloat16 {
    unsigned short bits;
    explicit __nv_bfloat16(float value) {
        const unsigned word = __builtin_bit_cast(unsigned, value);
        bits = (word + 0x7fff + (word >> 16 & 1)) >> 16;
    }
    operator float() const { return __builtin_bit_cast(float, unsigned(bits) << 16); }
};
#endif
#define EACH(row, channel) ROWS(row) CHANNELS(channel)
typedef long long index_t;
INLINE float exponential(float x) { return expf(x); }
INLINE double exponential(double x) { return exp(x); }
INLINE void store(scalar_t* place, real_t value) { *place = scalar_t(value); }  // inlined, bfloat16 vectorises
INLINE index_t clamp(index_t i, index_t size) { return i < 0 ? 0 : i < size ? i : size - 1; }

// Neuron i of n. Its input at step t is scale * y[t * step + i] + shift; step is 0 for an image shown STEPS times.
INLINE void fire_one(index_t i, index_t n, index_t step, const scalar_t* y, scalar_t* spikes, real_t scale,
                     real_t shift, real_t tau, real_t threshold) {
    real_t v = 0;
#pragma unroll
    for (int t = 0; t < STEPS; ++t) {
        const real_t h = v + (scale * real_t(y[t * step + i]) + shift - v) / tau;
        const bool fired = h >= threshold;
        spikes[t * n + i] = scalar_t(fired ? 1.0f : 0.0f);
        v = fired ? 0 : h;
    }
}

// grad is that of scale * y + shift. Adds its sum to `total`, that of its product with y - mean to `dot`.
INLINE void fire_backward_one(index_t i, index_t n, index_t step, const scalar_t* y, const scalar_t* grad_spikes,
                              scalar_t* grad, real_t scale, real_t shift, real_t mean, real_t tau, real_t threshold,
                              real_t alpha, real_t& total, real_t& dot) {
    real_t h[STEPS];
    real_t v = 0, grad_v = 0, sum = 0, product = 0;
#pragma unroll
    for (int t = 0; t < STEPS; ++t) {
        h[t] = v + (scale * real_t(y[t * step + i]) + shift - v) / tau;
        v = h[t] >= threshold ? 0 : h[t];
    }
#pragma unroll
    for (int t = STEPS - 1; t >= 0; --t) {
        const real_t g = 1 / (1 + exponential(-alpha * (h[t] - threshold)));
        const real_t kept = h[t] >= threshold ? 0 : grad_v;
        const real_t grad_h = real_t(grad_spikes[t * n + i]) * (alpha * g * (1 - g)) + kept;
        const real_t grad_x = grad_h / tau;
        grad_v = grad_h - grad_x;
        if (step) grad[t * step + i] = scalar_t(grad_x);
        sum += grad_x;
        product += grad_x * (real_t(y[t * step + i]) - mean);
    }
    if (!step) grad[i] = scalar_t(sum);
    total += sum;
    dot += product;
}

ENTRY void fire(index_t rows, index_t channels, index_t step, const scalar_t* y, scalar_t* spikes,
                const real_t* scale, const real_t* shift, real_t tau, real_t threshold) {
    EACH(r, c) fire_one(r * channels + c, rows * channels, step, y, spikes, scale[c], shift[c], tau, threshold);
}

// partial is [PARTS, 2, channels]: `total` and `dot` over some of the rows each.
ENTRY void fire_backward(index_t rows, index_t channels, index_t step, const scalar_t* y, const scalar_t* grad_spikes,
                         scalar_t* grad, const real_t* scale, const real_t* shift, const real_t* mean,
                         real_t* partial, real_t tau, real_t threshold, real_t alpha) {
#ifdef __CUDACC_RTC__
    __shared__ real_t sums[2][8][32];  // TILE, transposed
    const index_t c = index_t(blockIdx.x) * blockDim.x + threadIdx.x;
    real_t total = 0, dot = 0;
    EACH(r, c) fire_backward_one(r * channels + c, rows * channels, step, y, grad_spikes, grad, scale[c], shift[c],
                                 mean[c], tau, threshold, alpha, total, dot);
    sums[0][threadIdx.y][threadIdx.x] = total;
    sums[1][threadIdx.y][threadIdx.x] = dot;
    __syncthreads();
    if (threadIdx.y < 2 && c < channels) {
        real_t sum = 0;
        for (int k = 0; k < 8; ++k) sum += sums[threadIdx.y][k][threadIdx.x];
        partial[(blockIdx.y * 2 + threadIdx.y) * channels + c] = sum;
    }
#else
#pragma omp parallel for
    for (index_t part = 0; part < PARTS; ++part) {
        real_t* total = partial + part * 2 * channels;
        real_t* dot = total + channels;
        for (index_t c = 0; c < 2 * channels; ++c) total[c] = 0;
        for (index_t r = part * rows / PARTS; r < (part + 1) * rows / PARTS; ++r)
#pragma omp simd
            for (index_t c = 0; c < channels; ++c)
                fire_backward_one(r * channels + c, rows * channels, step, y, grad_spikes, grad, scale[c], shift[c],
                                  mean[c], tau, threshold, alpha, total[c], dot[c]);
    }
#endif
}

#ifndef __CUDACC_RTC__
// Sums of y - pivot and of its square, per part. PyTorch's own for channels_last add up whole columns in float32.
ENTRY void statistics(index_t rows, index_t channels, const scalar_t* y, const real_t* pivot, real_t* partial) {
#pragma omp parallel for
    for (index_t part = 0; part < PARTS; ++part) {
        real_t* total = partial + part * 2 * channels;
        real_t* squares = total + channels;
        for (index_t c = 0; c < 2 * channels; ++c) total[c] = 0;
        for (index_t r = part * rows / PARTS; r < (part + 1) * rows / PARTS; ++r)
#pragma omp simd
            for (index_t c = 0; c < channels; ++c) {
                const real_t d = real_t(y[r * channels + c]) - pivot[c];
                total[c] += d;
                squares[c] += d * d;
            }
    }
}
#endif

// The rest of BatchNorm's backward pass, in place: grad becomes that of y.
ENTRY void normalise_backward(index_t rows, index_t channels, const scalar_t* y, scalar_t* grad, const real_t* a,
                              const real_t* b, const real_t* c) {
    EACH(r, k) {
        const index_t i = r * channels + k;
        store(grad + i, a[k] * real_t(grad[i]) + b[k] * real_t(y[i]) + c[k]);
    }
}

// Max-pooling, 3x3 with stride 2 and padding 1. A tap is which of a window's nine is the largest, the first of equals.
ENTRY void pool(index_t rows, index_t channels, index_t height, index_t width, const scalar_t* y, scalar_t* pooled,
                unsigned char* taps) {
    const index_t out_height = (height + 1) / 2, out_width = (width + 1) / 2;
    ROWS(r) {
        const index_t n = r / (out_width * out_height), oh = r / out_width % out_height, ow = r % out_width;
        const scalar_t* pixel[9];
        int tap[9];
#pragma unroll
        for (int k = 0; k < 9; ++k) {  // outside of y the nearest pixel stands in, which the window has anyway
            const index_t h = clamp(2 * oh - 1 + k / 3, height), w = clamp(2 * ow - 1 + k % 3, width);
            pixel[k] = y + ((n * height + h) * width + w) * channels;
            tap[k] = (h - 2 * oh + 1) * 3 + w - 2 * ow + 1;
        }
        CHANNELS(c) {
            real_t best = pixel[0][c];
            int which = tap[0];
#pragma unroll
            for (int k = 1; k < 9; ++k) {
                const real_t value = real_t(pixel[k][c]);
                const bool larger = value > best || value != value;
                best = larger ? value : best;
                which = larger ? tap[k] : which;
            }
            store(pooled + r * channels + c, best);
            taps[r * channels + c] = which;
        }
    }
}

// normalise_backward of a gradient that comes through max-pooling: a pixel is in one to four windows.
ENTRY void pool_backward(index_t rows, index_t channels, index_t height, index_t width, const scalar_t* y,
                         const scalar_t* grad_pooled, const unsigned char* taps, scalar_t* grad, const real_t* a,
                         const real_t* b, const real_t* c) {
    const index_t out_height = (height + 1) / 2, out_width = (width + 1) / 2;
    ROWS(r) {
        const index_t n = r / (width * height), h = r / width % height, w = r % width;
        index_t window[4];
        int tap[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const index_t oh = h / 2 + j / 2, ow = w / 2 + j % 2;
            const bool inside = j / 2 <= h % 2 && j % 2 <= w % 2 && oh < out_height && ow < out_width;
            window[j] = inside ? ((n * out_height + oh) * out_width + ow) * channels : 0;
            tap[j] = inside ? (h - 2 * oh + 1) * 3 + w - 2 * ow + 1 : -1;
        }
        CHANNELS(k) {
            real_t sum = 0;
#pragma unroll
            for (int j = 0; j < 4; ++j)
                sum += taps[window[j] + k] == tap[j] ? real_t(grad_pooled[window[j] + k]) : 0;
            const index_t i = r * channels + k;
            store(grad + i, a[k] * sum + b[k] * real_t(y[i]) + c[k]);
        }
    }
}
"""
HOST_CTYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "__nv_bfloat16"}
# No fused multiply-add, to round as lif.py does; loops vectorise only where comparisons may not trap.
HOST_OPTIONS = "-O3 -march=native -std=c++17 -fopenmp -ffp-contract=off -fno-math-errno -fno-trapping-math -w".split()


def defines(dtype, T, ctypes_of):
    real = "double" if dtype == torch.float64 else "float"
    return (f"-Dscalar_t={ctypes_of[dtype]}", f"-Dreal_t={real}", f"-DSTEPS={T}", f"-DPARTS={PARTS}")


@functools.cache
def host_library(dtype, T):
    """The kernels as a shared library, compiled in a fraction of a second."""
    compiler = [*shlex.split(os.environ.get("CXX", "g++")), *HOST_OPTIONS, *defines(dtype, T, HOST_CTYPES)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fused.so")
        command = [*compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", path, "-lm"]
        subprocess.run(command, input=SOURCE, text=True, errors="replace", check=True, capture_output=True)
        return ctypes.CDLL(path)


def keep_memory():
    """Let glibc keep large blocks that are freed, for the next layer and step (mallopt(3)).

    It would return them to the system, which hands them out anew page by page: longer than the arithmetic in them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)  # other C libraries have none
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)


@functools.cache
def host_error():
    """None where the system's C++ compiler builds the kernels, else the reason in one line."""
    try:
        host_library(torch.float32, 4)
        keep_memory()
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[0]
        return f"no working C++ compiler ({reason})"
    return None


@functools.cache
def cuda_module(dtype, T):
    import cupy  # here, so that a machine without CuPy can use the rest

    return cupy.RawModule(code=SOURCE, options=(*NVRTC_OPTIONS, *defines(dtype, T, CTYPES)))


@torch.compiler.assume_constant_result
def available(device_type, dtype, backend):
    """Whether a layer with neurons of this backend can run fused on such tensors; a line in the log says which."""
    if backend not in ("auto", "cupy"):
        return False
    if device_type == "cuda" and dtype in CTYPES:
        error = cupy_error()
    elif device_type == "cpu" and dtype in HOST_CTYPES and backend == "auto":
        error = host_error()
    else:
        return False
    say(f"layers run fused on {device_type}" if error is None else f"layers run unfused on {device_type}: {error}")
    return error is None


@torch.compiler.assume_constant_result
def say_once(line):
    say(line)


def launch(name, T, y, *args):
    """Run a kernel on all rows and channels of y, [T, B, C, H, W] in channels_last."""
    C = y.shape[2]
    args = (y[0].numel() // C, C, *args)
    if y.is_cuda:
        launch_cuda(name, T, y, args)
    else:
        real = ctypes.c_double if y.dtype == torch.float64 else ctypes.c_float
        convert = {int: ctypes.c_longlong, float: real}
        args = [ctypes.c_void_p(a.data_ptr()) if torch.is_tensor(a) else convert[type(a)](a) for a in args]
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
    _, B, C, H, W = like.shape
    return like.new_empty(T, B, H, W, C).permute(0, 1, 4, 2, 3)


def step_of(y, T):
    """Distance in memory from a step of y to the next, 0 for a y of one step that stands for T."""
    return y[0].numel() if len(y) == T else 0


# Operators of torch, so that torch.compile keeps them whole. Each data set folder has its own.


@torch.library.custom_op(f"{NAMESPACE}::fire", mutates_args=())
def fire(
    y: torch.Tensor, T: int, scale: torch.Tensor, shift: torch.Tensor, tau: float, v_threshold: float
) -> torch.Tensor:
    """Spikes [T, B, C, H, W] of neurons whose input is scale * y + shift; y has T steps, or one that stands for all."""
    y = rows_of_channels(y)
    spikes = empty(T, y)
    launch("fire", T, y, step_of(y, T), y, spikes, scale, shift, tau, v_threshold)
    return spikes


@torch.library.custom_op(f"{NAMESPACE}::fire_", mutates_args=("y",))
def fire_(y: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, tau: float, v_threshold: float) -> None:
    """The same in the memory of y, which is in channels_last and has all T steps."""
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
    """From the gradient of BatchNorm's output, [N, C, H, W] in channels_last, and its sums to the gradient of y."""
    launch("normalise_backward", 1, y.unsqueeze(0), y, grad, *coefficients(y, mean, invstd, gamma, sums))


@torch.library.custom_op(f"{NAMESPACE}::pool", mutates_args=())
def pool(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """3x3 max-pooling of stride 2 of [N, C, H, W] in channels_last; which of its window each value was, as bytes."""
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
    """The same from the gradient of what pool() made of BatchNorm's output, and its sums."""
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
    """Mean and biased variance of each channel of [N, C, H, W] in channels_last, in the kernels' arithmetic."""
    real = torch.float64 if y.dtype == torch.float64 else torch.float32
    if y.device.type == "cpu":
        n, C = y.numel() // y.shape[1], y.shape[1]
        pivot = y[0, :, 0, 0].to(real).contiguous()  # a value of each channel, so that few digits cancel
        partial = pivot.new_empty(PARTS, 2, C)
        launch("statistics", 1, y.unsqueeze(0), y, pivot, partial)
        total, squares = partial.sum(0, dtype=torch.float64) / n
        return (pivot + total).to(real), (squares - total.square()).clamp_(min=0).to(real)
    unused = (torch.zeros(y.shape[1], dtype=real, device=y.device) for _ in range(2))  # a run's; momentum 0 keeps them
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
