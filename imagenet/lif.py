"""Multi-step leaky integrate-and-fire neuron with three interchangeable backends.

    h[t] = v[t-1] + (x[t] - v[t-1]) / tau      charge
    s[t] = 1 if h[t] >= v_threshold else 0     fire
    v[t] = 0 if s[t] else h[t]                 hard reset, detached: no gradient through s here

v[-1] = 0 in every call. The surrogate gradient is that of a sigmoid with slope ALPHA:
ds/dh = ALPHA * g * (1 - g), g = sigmoid(ALPHA * (h - v_threshold)). The membrane is kept in float32
(float64 for float64 input), whatever the type of the input.
"""

import functools
import logging
import re
from pathlib import Path

import torch
from spikingjelly.activation_based import functional, neuron, surrogate

from spikes import mark, traced

ALPHA = 4.0
BACKENDS = ("auto", "torch", "cupy", "spikingjelly")
logger = logging.getLogger("qkformer")


class MultiStepLIF(neuron.LIFNode):
    """LIF neuron over the first dimension of [T, ...]: spikes of the input's shape and type.

    Every call starts anew, so there is nothing to reset. It is a LIFNode of spikingjelly, so
    that library's monitors, operation counters and `reset_net` work on it.

    Args:
        tau: membrane time constant in steps, > 1. Default 2.0.
        v_threshold: firing threshold. Default 1.0.
        backend: "torch" (any device, float64 to bfloat16), "cupy" (CUDA, float32 to bfloat16),
            "spikingjelly" (its functional LIF), or "auto": cupy on a GPU where CuPy works, else
            spikingjelly there, torch on any other device and in float64.
        fused: whether the layer that ends in this neuron may run fused, see layer.py. Default True.

    Attributes of LIFNode may be set afterwards. With v_reset, surrogate_function, detach_reset or
    decay_input other than those above, or store_v_seq, the neuron is spikingjelly's functional LIF,
    whatever the backend, and its layer does not run fused.

    Raises ValueError for a tau or a backend out of these, or a membrane `v` that is set;
    RuntimeError where cupy is asked for and can't run.
    """

    def __init__(self, tau=2.0, v_threshold=1.0, backend="auto", fused=True):
        if tau <= 1.0:
            raise ValueError(f"tau is {tau}; it must be larger than 1")
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
        super().__init__(
            tau=float(tau),
            v_threshold=float(v_threshold),
            surrogate_function=surrogate.Sigmoid(alpha=ALPHA),
            detach_reset=True,
            step_mode="m",
        )
        self.backend = backend
        self.fused = fused

    def supported_step_mode(self):
        return ("m",)

    def extra_repr(self):
        return f"tau={self.tau}, v_threshold={self.v_threshold}, backend={self.backend}"

    def is_usual(self):
        """Whether the neuron is the one of the formulas above, as every backend computes it."""
        f = self.surrogate_function
        usual = type(f) is surrogate.Sigmoid and f.alpha == ALPHA and f.spiking
        usual = usual and self.v_reset == 0.0 and self.detach_reset and self.decay_input
        return usual and type(self.v) is float and self.v == 0.0 and not self.store_v_seq

    def multi_step_forward(self, x_seq):
        if self.is_usual():
            if traced():
                return traced_lif(x_seq, self.tau, self.v_threshold)
            backend = resolve_backend(self.backend, x_seq.device.type, x_seq.dtype)
            return mark(IMPLEMENTATIONS[backend](x_seq, self.tau, self.v_threshold))
        if type(self.v) is not float or self.v not in (0.0, self.v_reset):
            raise ValueError("the neuron's v was set, but calls start from v_reset; reset() it")
        spikes, self.v_seq = spikingjelly_lif(x_seq, self.tau, self.v_threshold, self)
        return spikes


@torch.compiler.assume_constant_result
def resolve_backend(backend, device_type, dtype):
    """The implementation that `backend` means for tensors of this device and type."""
    return _resolve(backend, device_type, dtype)


@functools.cache
def _resolve(backend, device_type, dtype):
    name, why = backend, ""
    if backend == "auto":
        name = "torch"
        if device_type == "cuda" and dtype != torch.float64:
            error = cupy_error()
            name, why = ("cupy", "") if error is None else ("spikingjelly", f" (no CuPy: {error})")
    elif backend == "cupy":
        error = "needs a CUDA tensor" if device_type != "cuda" else cupy_error()
        if error is None and dtype not in CTYPES:
            error = f"does not take {dtype}"
        if error is not None:
            raise RuntimeError(f"the cupy backend of the LIF neuron can't run: {error}")
    say(f"LIF neurons: {name} backend on {device_type}{why}")
    return name


@functools.cache
def say(line):
    logger.info(line)  # once for each line


# torch: the plain formulas ------------------------------------------------------------------------


class TorchLIF(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tau, v_threshold):
        h = torch.empty_like(x, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        v = torch.zeros_like(h[0])
        # A tensor, not a number: on CUDA, x / number is x * (1 / number), which rounds differently.
        divisor = h.new_full((), tau)
        for t in range(len(x)):
            torch.sub(x[t], v, out=h[t]).div_(divisor).add_(v)
            v = h[t].masked_fill(h[t] >= v_threshold, 0.0)
        ctx.save_for_backward(h)
        ctx.tau, ctx.v_threshold, ctx.dtype = tau, v_threshold, x.dtype
        return (h >= v_threshold).to(x.dtype)

    @staticmethod
    def backward(ctx, grad_spikes):
        (h,) = ctx.saved_tensors
        g = torch.sub(h, ctx.v_threshold).mul_(ALPHA).sigmoid_()
        grad_h = torch.sub(1.0, g).mul_(g).mul_(ALPHA).mul_(grad_spikes)
        for t in range(len(h) - 2, -1, -1):  # step t+1 saw v[t] = h[t], unless step t fired
            grad_v = grad_h[t + 1] * (1.0 - 1.0 / ctx.tau)
            grad_h[t].add_(grad_v.masked_fill_(h[t] >= ctx.v_threshold, 0.0))
        return grad_h.div_(ctx.tau).to(ctx.dtype), None, None


def torch_lif(x, tau, v_threshold):
    return TorchLIF.apply(x, tau, v_threshold)


def traced_lif(x, tau, v_threshold):
    """The formulas in PyTorch's own operators, for exported graphs: spikes without a gradient."""
    v, spikes = torch.zeros_like(x[0], dtype=torch.promote_types(x.dtype, torch.float32)), []
    for step in x.unbind():
        h = v + (step - v) / tau
        spikes.append(h >= v_threshold)
        v = h.masked_fill(spikes[-1], 0.0)
    return torch.stack(spikes).to(x.dtype)


# spikingjelly: the baseline -----------------------------------------------------------------------


def spikingjelly_lif(x, tau, v_threshold, node=None):
    """Spikes of the usual neuron; with a `node`, (spikes, membranes or None) by its attributes."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    options = (0.0, surrogate.Sigmoid(alpha=ALPHA), True, False)
    if node is not None:
        options = (node.v_reset, node.surrogate_function, node.detach_reset, node.store_v_seq)
    v = torch.full(x.shape[1:], options[0] or 0.0, dtype=dtype, device=x.device)
    decay_input = node is None or node.decay_input
    spikes, _, v_seq = functional.lif_multi_step(x, v, tau, decay_input, v_threshold, *options)
    return spikes.to(x.dtype) if node is None else (spikes.to(x.dtype), v_seq)


# cupy: a thread per neuron, the loop over T in the kernel, the membrane in a float32 register -----

CTYPES = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
CUDA_SOURCE = r"""
#include <cuda_fp16.h>
#include <cuda_bf16.h>

// Neuron i of n reads x[t * x_step + i]; x_step is n, or 0 for an input that stays the same.
template <typename scalar_t>
__global__ void lif_forward(long long n, long long T, long long x_step, const scalar_t* x,
                            scalar_t* spikes, float tau, float v_threshold) {
    const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float v = 0.0f;
    for (long long t = 0; t < T; ++t) {
        const float h = v + (static_cast<float>(x[t * x_step + i]) - v) / tau;
        const bool fired = h >= v_threshold;
        spikes[t * n + i] = static_cast<scalar_t>(fired ? 1.0f : 0.0f);
        v = fired ? 0.0f : h;
    }
}

// h is computed again from x, CHUNK steps at a time so that it stays in registers. The last chunk
// comes first. Each chunk starts by integrating the steps before it. There are none where
// T <= CHUNK, as for every neuron over T of a published recipe; over T*B there are many.
template <typename scalar_t>
__global__ void lif_backward(long long n, long long T, long long x_step, const scalar_t* x,
                             const scalar_t* grad_spikes, scalar_t* grad_x,
                             float tau, float v_threshold, float alpha) {
    const int CHUNK = 16;
    const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float grad_v = 0.0f;
    for (long long begin = (T - 1) / CHUNK * CHUNK; begin >= 0; begin -= CHUNK) {
        float h[CHUNK];
        float v = 0.0f;
        for (long long t = 0; t < begin; ++t) {
            v = v + (static_cast<float>(x[t * x_step + i]) - v) / tau;
            v = v >= v_threshold ? 0.0f : v;
        }
#pragma unroll
        for (int k = 0; k < CHUNK; ++k) {
            if (begin + k < T) {
                h[k] = v + (static_cast<float>(x[(begin + k) * x_step + i]) - v) / tau;
                v = h[k] >= v_threshold ? 0.0f : h[k];
            }
        }
#pragma unroll
        for (int k = CHUNK - 1; k >= 0; --k) {
            if (begin + k < T) {
                const long long j = (begin + k) * n + i;
                const float g = 1.0f / (1.0f + expf(-alpha * (h[k] - v_threshold)));
                float grad_h = static_cast<float>(grad_spikes[j]) * (alpha * g * (1.0f - g));
                grad_h += h[k] >= v_threshold ? 0.0f : grad_v;
                grad_x[j] = static_cast<scalar_t>(grad_h / tau);
                grad_v = grad_h * (1.0f - 1.0f / tau);
            }
        }
    }
}
"""
# Without fused multiply-add the kernels round as the torch backend does: float32 spikes are equal.
NVRTC_OPTIONS = ("-std=c++17", "--fmad=false")
BLOCK = 256


@functools.cache
def cupy_error():
    """None where CuPy compiles and runs the kernels, else the reason in one line."""
    try:
        for dtype in CTYPES:
            x = torch.ones(1, 1, dtype=dtype, device="cuda")
            lif_backward(lif_forward(x, 2.0, 1.0), x, 2.0, 1.0)
        torch.cuda.synchronize()
    except Exception as error:  # whatever a broken CUDA or CuPy installation throws
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if isinstance(error, ImportError):
            reason += f"; pip install cupy-cuda{(torch.version.cuda or '13')[:2]}x"
        return reason
    return None


@functools.cache
def _module(dtype):
    import cupy  # here, so that a machine without CuPy can use the other backends

    kernels = tuple(f"{name}<{CTYPES[dtype]}>" for name in ("lif_forward", "lif_backward"))
    return cupy.RawModule(code=CUDA_SOURCE, options=NVRTC_OPTIONS, name_expressions=kernels)


def _launch(name, n, T, x_step, x, *args):
    """Run a kernel, a thread for each of n neurons, on x's device and torch's stream there."""
    import cupy
    import numpy

    convert = {int: numpy.int64, float: numpy.float32}
    args = (n, T, x_step, x, *args)
    args = tuple(
        arg.data_ptr() if torch.is_tensor(arg) else convert[type(arg)](arg) for arg in args
    )
    stream = torch.cuda.current_stream(x.device)
    with cupy.cuda.Device(x.device.index), cupy.cuda.Stream.from_external(stream):
        kernel = _module(x.dtype).get_function(f"{name}<{CTYPES[x.dtype]}>")
        kernel((-(-n // BLOCK),), (BLOCK,), args)


def _time_major(x):
    """x with each x[t] a dense block of memory, dimensions in any order; copied only if need be."""
    dense = 1
    for stride, size in sorted(zip(x.stride()[1:], x.shape[1:], strict=True)):
        if size > 1 and stride != dense:
            return x.contiguous()
        dense *= size
    return x


def _empty_like(x):
    """Memory for [T, ...] that is dense over T too, its steps laid out like those of x."""
    return torch.empty_strided(
        x.shape, (x[0].numel(), *x.stride()[1:]), dtype=x.dtype, device=x.device
    )


# Operators of torch, so that torch.compile keeps them whole; named by folder, see hubconf.py.
NAMESPACE = "qkformer_" + re.sub(r"\W", "_", Path(__file__).resolve().parent.name)


@torch.library.custom_op(f"{NAMESPACE}::lif_forward", mutates_args=())
def lif_forward(x: torch.Tensor, tau: float, v_threshold: float) -> torch.Tensor:
    x = _time_major(x)
    spikes = _empty_like(x)
    if x.numel():
        _launch("lif_forward", x[0].numel(), len(x), x.stride(0), x, spikes, tau, v_threshold)
    return spikes


@torch.library.custom_op(f"{NAMESPACE}::lif_backward", mutates_args=())
def lif_backward(
    grad_spikes: torch.Tensor, x: torch.Tensor, tau: float, v_threshold: float
) -> torch.Tensor:
    x = _time_major(x)
    grad_x = _empty_like(x)
    if grad_spikes.stride() != grad_x.stride():
        grad_spikes = _empty_like(x).copy_(grad_spikes)
    if x.numel():
        args = (x, grad_spikes, grad_x, tau, v_threshold, ALPHA)
        _launch("lif_backward", x[0].numel(), len(x), x.stride(0), *args)
    return grad_x


@lif_forward.register_fake
def _(x, tau, v_threshold):
    return _empty_like(_time_major(x))


@lif_backward.register_fake
def _(grad_spikes, x, tau, v_threshold):
    return _empty_like(_time_major(x))


def _setup_context(ctx, inputs, output):
    x, ctx.tau, ctx.v_threshold = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad_spikes):
    return lif_backward(grad_spikes, *ctx.saved_tensors, ctx.tau, ctx.v_threshold), None, None


lif_forward.register_autograd(_backward, setup_context=_setup_context)

IMPLEMENTATIONS = {"torch": torch_lif, "spikingjelly": spikingjelly_lif, "cupy": lif_forward}
