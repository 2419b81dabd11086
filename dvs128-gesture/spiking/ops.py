"""BatchNorm's affine map and the neuron in one pass over memory, forward and backward.

Tensors are [T, B, C, H, W] or [N, C, H, W] in channels_last: memory holds rows of C channels. The
formulas are those of plain.py and of BatchNorm; the kernels are in fused.cu. The backward pass
computes the membranes again.

`norm` is [5, C] of BatchNorm: mean, unbiased variance, 1 / standard deviation, and `affine`, the
scale and shift with which it maps y to scale * y + shift. A neuron is given by its Constants, and
by `rates` [C] where PLIF learns them, else None. Every function that launches is an operator.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules import module as hooks
from torch.overrides import _get_current_function_mode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .compiler import launch, operator, parts
from .plain import rate_of

CHUNK = 16  # steps of `integrate_backward` in registers


class Constants(NamedTuple):
    """Of a neuron, for kernels: `neuron`, how it integrates and its surrogate, by their names in
    fused.cu and plain.py, as in "MULTIPLY sigmoid"; its `rate`; and alpha, the surrogate's slope.
    """

    neuron: str
    rate: float
    v_threshold: float
    alpha: float


def constants_of(tau, v_threshold, alpha, kind, _, surrogate):
    """Constants of MultiStep.constants()."""
    charge, rate = {"plif": "PARAMETRIC", "if": "INTEGRATE"}.get(kind, "DIVIDE"), 1.0
    if kind == "lif":
        rate = float(tau)
        if math.frexp(rate)[0] == 0.5:
            # Where 1 / tau is exact, a product with it has the bits of the division, in less time.
            charge, rate = "MULTIPLY", 1 / rate
    return Constants(f"{charge} {surrogate}", rate, float(v_threshold), float(alpha))


def rates_of(lif, x, channels):
    """PLIF's rate for each channel, in the type that the kernels compute in; None for others."""
    return rate_of(x, lif.w).expand(channels).contiguous() if lif.kind == "plif" else None


def rows_of_channels(x):
    """x with its channels innermost in memory, as the kernels read it; copied only if it is not."""
    _, B, C, H, W = x.shape
    if x.stride() == (B * H * W * C, H * W * C, 1, W * C, C):
        return x
    return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def empty(T, like, dtype=None):
    """Memory for [T, B, C, H, W], channels innermost; not a view, so that spikes can be marked."""
    _, B, C, H, W = like.shape
    strides = B * H * W * C, H * W * C, 1, W * C, C
    dtype = dtype or like.dtype
    return torch.empty_strided((T, B, C, H, W), strides, dtype=dtype, device=like.device)


def rows_and_step(y, T):
    """Rows of a step of y, and the distance in memory between steps: 0 where y has one step, which
    is read T times.
    """
    size = y[0].numel()
    return size // y.shape[2], size if len(y) == T else 0


# Who looks on -------------------------------------------------------------------------------------

is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # PyTorch 2.7 has it


def traced():
    """Whether torch.export or torch.jit.trace wants a graph of PyTorch's own operators."""
    # Within torch.compile is_exporting is always true.
    exporting = is_exporting() and not torch.compiler.is_dynamo_compiling()
    return torch.jit.is_tracing() or exporting


def observed():
    """Why modules and PyTorch's own operators must be called, since something watches them; ""
    where that needs no line. None: nothing does.
    """
    if traced():
        return ""
    if torch.compiler.is_compiling():
        return None
    before = hooks._global_forward_pre_hooks
    if before or hooks._global_forward_hooks or hooks._global_backward_hooks:
        return "hooks on all modules are set"
    for mode in (_get_current_dispatch_mode(), _get_current_function_mode()):
        # Such as spikingjelly's operation counters. DeviceContext says where tensors are made.
        known = mode is None or isinstance(mode, DeviceContext)
        if not known and not getattr(mode, "counts_kernels", False):
            return f"{type(mode).__name__} looks at each operation"
    return None


# Neurons ------------------------------------------------------------------------------------------


@operator()
def fire(
    y: Tensor, T: int, affine: Tensor, rates: Tensor | None, neuron: str, rate: float,
    v_threshold: float, bytes_too: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Spikes [T, B, C, H, W] of neurons whose input is scale * y + shift; y has T steps, or one.

    With `bytes_too` the spikes again, as bytes, in place of an empty tensor.
    """
    y = rows_of_channels(y)
    rows, step = rows_and_step(y, T)
    spikes, small = empty(T, y), empty(T if bytes_too else 0, y, torch.uint8)
    args = (affine, rates, rate, v_threshold)
    memory = (y, spikes, small if bytes_too else None)
    launch("fire", y, rows, y.shape[2], step, *memory, *args, T=T, neuron=neuron)
    return spikes, small


@operator("y")
def fire_(
    y: Tensor, affine: Tensor, rates: Tensor | None, neuron: str, rate: float, v_threshold: float
) -> None:
    """As `fire`, but the spikes overwrite y, which is in channels_last and has all T steps."""
    T = len(y)
    rows, step = rows_and_step(y, T)
    args = (step, y, y, None, affine, rates, rate, v_threshold)
    launch("fire", y, rows, y.shape[2], *args, T=T, neuron=neuron)


@operator("grad")
def fire_backward(
    grad_spikes: Tensor, y: Tensor, grad: Tensor, mean: Tensor, affine: Tensor,
    rates: Tensor | None, neuron: str, rate: float, v_threshold: float, alpha: float
) -> Tensor:  # fmt: skip
    """Writes the gradient of scale * y + shift into grad, which is like y in channels_last.

    Returns [parts, 2, C], whose sums over parts are those of that gradient and of its product with
    y - mean; with `rates` [parts, 3, C], the last for their gradient.
    """
    T, y, grad_spikes = len(grad_spikes), rows_of_channels(y), rows_of_channels(grad_spikes)
    C, (rows, step) = y.shape[2], rows_and_step(y, T)
    partial = mean.new_empty(parts(y, rows, C, T), 2 if rates is None else 3, C)
    sizes = (rows, C, len(partial), step)
    args = (mean, affine, rates, rate, v_threshold, alpha, partial)
    launch("fire_backward", y, *sizes, y, grad_spikes, grad, *args, T=T, neuron=neuron)
    return partial


def time_major(x):
    """x with each x[t] a dense block of memory, dimensions in any order; copied only if need be."""
    dense = 1
    for stride, size in sorted(zip(x.stride()[1:], x.shape[1:], strict=True)):
        if size > 1 and stride != dense:
            return x.contiguous()
        dense *= size
    return x


def like_steps(x):
    """Memory for [T, ...] that is dense over T too, its steps laid out like those of x."""
    strides = x[0].numel(), *x.stride()[1:]
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)


def sizes_of(x):
    """rows, channels, T and the distance between steps, for `integrate`: any order of memory."""
    channels = math.gcd(x[0].numel(), 1024)
    return x[0].numel() // channels, channels, len(x), x.stride(0)


@operator()
def integrate(
    x: Tensor, own: Tensor | None, neuron: str, rate: float, v_threshold: float
) -> Tensor:
    """Spikes of x, [T, ...], T and the layout as they may be; `own` is the layer's rate of PLIF."""
    x = time_major(x)
    spikes = like_steps(x)
    if x.numel():
        args = (x, spikes, own, rate, v_threshold)
        launch("integrate", x, *sizes_of(x), *args, T=CHUNK, neuron=neuron)
    return spikes


@operator()
def integrate_backward(
    grad_spikes: Tensor, x: Tensor, own: Tensor | None, neuron: str, rate: float,
    v_threshold: float, alpha: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of x, and of `own` a part from each neuron; no part where it is None."""
    x = time_major(x)
    grad, upstream = like_steps(x), grad_spikes
    if upstream.stride() != grad.stride():
        upstream = like_steps(x).copy_(grad_spikes)
    slopes = torch.empty(0 if own is None else x[0].numel(), dtype=real(x), device=x.device)
    if x.numel():
        args = (x, upstream, grad, own, rate, v_threshold, alpha, None if own is None else slopes)
        launch("integrate_backward", x, *sizes_of(x), *args, T=CHUNK, neuron=neuron)
    return grad, slopes


# BatchNorm ----------------------------------------------------------------------------------------


def real(y):
    return torch.float64 if y.dtype == torch.float64 else torch.float32


@operator()
def batch_norm(y: Tensor, gamma: Tensor, beta: Tensor, eps: float, repeats: int) -> Tensor:
    """`norm` of [N, C, H, W] in channels_last, each row of which counts `repeats` times."""
    C = y.shape[1]
    rows = y.numel() // C
    count = parts(y, rows, C)
    partial = y.new_empty(count, 2, C, dtype=real(y))
    launch("statistics", y, rows, C, count, y, partial)
    norm = y.new_empty(5, C, dtype=real(y))
    launch("batch_norm", y, C, count, rows, repeats, eps, y, partial, gamma, beta, norm)
    return norm


@operator("affine")
def running_norm(
    affine: Tensor, start: int, mean: Tensor, var: Tensor, bias: Tensor | None, gamma: Tensor,
    beta: Tensor, eps: float
) -> None:  # fmt: skip
    """Writes scale and shift of a BatchNorm's running statistics into affine [2, channels from
    `start` on]. The bias is the convolution's, which y lacks.
    """
    args = (start, eps, mean, var, bias, gamma, beta, affine)
    launch("running_norm", affine, len(mean), affine.shape[1], *args)


@operator("running_mean", "running_var", "batches")
def update(
    norm: Tensor, start: int, bias: Tensor | None, momentum: float, running_mean: Tensor,
    running_var: Tensor, batches: Tensor
) -> None:  # fmt: skip
    """Moves a BatchNorm's running statistics on to `norm`, in which its channels begin at `start`.
    The mean lacks the convolution's bias, which is added.
    """
    sizes = (len(running_mean), norm.shape[1], start)
    launch("update", norm, *sizes, momentum, norm, bias, running_mean, running_var, batches)


@operator()
def batch_norm_backward(partial: Tensor, norm: Tensor, gamma: Tensor, rows: int) -> Tensor:
    """From the partial sums of y's rows to [6, C]: gradients of beta, gamma and `rates`, and the
    factors of normalise_backward and pool_backward.
    """
    count, sums, C = partial.shape
    out = partial.new_empty(6, C)
    launch("batch_norm_backward", norm, C, count, sums, rows, partial, norm, gamma, out)
    return out


@operator()
def gradient_sums(grad: Tensor, y: Tensor, mean: Tensor) -> Tensor:
    """As fire_backward returns, for a BatchNorm without a neuron behind it; [N, C, H, W]."""
    C = y.shape[1]
    rows = y.numel() // C
    partial = mean.new_empty(parts(y, rows, C), 2, C)
    launch("gradient_sums", y, rows, C, len(partial), y, grad, mean, partial)
    return partial


@operator()
def normalise(y: Tensor, affine: Tensor) -> Tensor:
    """scale * y + shift of [N, C, H, W] in channels_last."""
    out = torch.empty_like(y)
    launch("normalise", y, y.numel() // y.shape[1], y.shape[1], y, out, affine)
    return out


@operator("out")
def normalise_backward(grad: Tensor, y: Tensor, out: Tensor, factors: Tensor) -> None:
    """Writes the gradient of BatchNorm's input y into out, which may be grad, the gradient of its
    output; all are [N, C, H, W] in channels_last.
    """
    rows, C = y.numel() // y.shape[1], y.shape[1]
    launch("normalise_backward", y, rows, C, y, grad, out, factors)


# Max-pooling --------------------------------------------------------------------------------------


@operator()
def pool(y: Tensor, with_taps: bool) -> tuple[Tensor, Tensor]:
    """3x3 max-pool of stride 2 of [N, C, H, W] in channels_last.

    Returns the maxima and, empty but `with_taps`, for each of them which of the nine places it came
    from, as a byte.
    """
    N, C, H, W = y.shape
    pooled = y.new_empty(N, (H + 1) // 2, (W + 1) // 2, C).permute(0, 3, 1, 2)
    taps = torch.empty_like(pooled if with_taps else y[:0], dtype=torch.uint8)
    launch("pool", y, pooled.numel() // C, C, H, W, y, pooled, taps if with_taps else None)
    return pooled, taps


@operator()
def pool_backward(grad: Tensor, taps: Tensor, y: Tensor, factors: Tensor) -> Tensor:
    """The gradient of y where a max-pool comes before BatchNorm; `grad` is of pooled values."""
    grad_y = torch.empty_like(y)
    rows, C = y.numel() // y.shape[1], y.shape[1]
    launch("pool_backward", y, rows, C, *y.shape[2:], y, grad, taps, grad_y, factors)
    return grad_y
