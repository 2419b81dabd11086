"""The neurons' kernels for GPUs, lif.cu: compiled by CuPy, and operators of torch."""

import functools
import re
from pathlib import Path

import torch

CTYPES = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
CUDA_SOURCE = Path(__file__).with_name("lif.cu").read_text()
# Without fused multiply-add the kernels round as the torch backend does: float32 spikes are equal.
NVRTC_OPTIONS = ("-std=c++17", "--fmad=false")
BLOCK = 256


@functools.cache
def cupy_error():
    """None where CuPy compiles and runs the kernels, else the reason in one line."""
    try:
        for dtype in CTYPES:
            x = torch.ones(1, 1, dtype=dtype, device="cuda")
            constants = 2.0, 1.0, 4.0, "lif", None
            lif_backward(lif_forward(x, *constants), x, *constants)
        torch.cuda.synchronize()
    except Exception as error:  # whatever a broken CUDA or CuPy installation throws
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if isinstance(error, ImportError):
            reason += f"; pip install cupy-cuda{(torch.version.cuda or '13')[:2]}x"
        return reason
    return None


def _instance(name, dtype, kind):
    return f"{name}<{CTYPES[dtype]}, {kind.upper()}>"


@functools.cache
def _module(dtype, kind):
    import cupy  # here, so that a machine without CuPy can use the other backends

    kernels = tuple(_instance(name, dtype, kind) for name in ("lif_forward", "lif_backward"))
    return cupy.RawModule(code=CUDA_SOURCE, options=NVRTC_OPTIONS, name_expressions=kernels)


def _launch(name, kind, n, T, x_step, x, *args):
    """Run a kernel, a thread for each of n neurons, on x's device and torch's stream there."""
    import cupy
    import numpy

    convert = {int: numpy.int64, float: numpy.float32, type(None): lambda _: numpy.int64(0)}
    args = (n, T, x_step, x, *args)
    args = tuple(
        arg.data_ptr() if torch.is_tensor(arg) else convert[type(arg)](arg) for arg in args
    )
    stream = torch.cuda.current_stream(x.device)
    with cupy.cuda.Device(x.device.index), cupy.cuda.Stream.from_external(stream):
        kernel = _module(x.dtype, kind).get_function(_instance(name, x.dtype, kind))
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
NAMESPACE = "qkformer_" + re.sub(r"\W", "_", Path(__file__).resolve().parent.parent.name)


@torch.library.custom_op(f"{NAMESPACE}::lif_forward", mutates_args=())
def lif_forward(
    x: torch.Tensor,
    tau: float,
    v_threshold: float,
    alpha: float,
    kind: str,
    rate: torch.Tensor | None,
) -> torch.Tensor:
    """Spikes of x, [T, ...]; `rate` is sigmoid(w) of PLIF, in float32, and None of the others."""
    x = _time_major(x)
    spikes = _empty_like(x)
    if x.numel():
        args = (x, rate, spikes, tau, v_threshold)
        _launch("lif_forward", kind, x[0].numel(), len(x), x.stride(0), *args)
    return spikes


@torch.library.custom_op(f"{NAMESPACE}::lif_backward", mutates_args=())
def lif_backward(
    grad_spikes: torch.Tensor,
    x: torch.Tensor,
    tau: float,
    v_threshold: float,
    alpha: float,
    kind: str,
    rate: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x, and of `rate` a part from each neuron; no part where there is no rate."""
    x = _time_major(x)
    grad_x, grad_rate = _empty_gradients(x, rate)
    if grad_spikes.stride() != grad_x.stride():
        grad_spikes = _empty_like(x).copy_(grad_spikes)
    if x.numel():
        args = (x, rate, grad_spikes, grad_x, grad_rate, tau, v_threshold, alpha)
        _launch("lif_backward", kind, x[0].numel(), len(x), x.stride(0), *args)
    return grad_x, grad_rate


def _empty_gradients(x, rate):
    parts = 0 if rate is None else x[0].numel()
    return _empty_like(x), torch.empty(parts, dtype=torch.float32, device=x.device)


@lif_forward.register_fake
def _(x, tau, v_threshold, alpha, kind, rate):
    return _empty_like(_time_major(x))


@lif_backward.register_fake
def _(grad_spikes, x, tau, v_threshold, alpha, kind, rate):
    return _empty_gradients(_time_major(x), rate)


def _setup_context(ctx, inputs, output):
    x, *ctx.constants, rate = inputs
    ctx.save_for_backward(x, rate)


def _backward(ctx, grad_spikes):
    x, rate = ctx.saved_tensors
    grad_x, parts = lif_backward(grad_spikes, x, *ctx.constants, rate)
    grad_rate = None if rate is None else parts.sum(dtype=torch.float64).to(rate.dtype)
    return grad_x, None, None, None, None, grad_rate


lif_forward.register_autograd(_backward, setup_context=_setup_context)
