"""BatchNorm's affine map and the neuron in one pass over memory, forward and backward.

Tensors are rows of C channels in memory: [N, C, H, W] in channels_last, [N, C], or a neuron's
[T, B, C, H, W] with channels innermost. The formulas are those of plain.py and of BatchNorm; the
kernels are in fused.cu. The backward pass computes the membranes again.

`norm` is [5, C] of BatchNorm: mean, unbiased variance, 1 / standard deviation, and the scale and
shift with which it maps y to scale * y + shift; a kernel in evaluation reads the last two alone. A
neuron is given by its Constants, and by `rates` [C] where PLIF learns them, else None. Every
function that launches is an operator.
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


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def rows(x):
    """[T, B, C, H, W] or [N, C, H, W] -> [N, C, H, W] in channels_last; copied only if need be."""
    return channels_last(x.flatten(0, -4))


def strides_of(shape):
    """Of [T, B, C, H, W] with channels innermost."""
    _, B, C, H, W = shape
    return B * H * W * C, H * W * C, 1, W * C, C


def empty(shape, like, dtype=None):
    """Memory for [T, B, C, H, W], channels innermost; not a view, so that spikes can be marked."""
    return like.new_empty_strided(shape, strides_of(shape), dtype=dtype)


def rows_and_channels(y):
    """(rows, channels)"""
    return y.numel() // y.shape[1], y.shape[1]


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
    y: Tensor, shape: list[int], norm: Tensor, rates: Tensor | None, neuron: str, rate: float,
    v_threshold: float, bytes_too: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Spikes [T, B, C, H, W], of such a shape, of neurons whose input is scale * y + shift. y has
    the rows of T steps, or of one, which is read T times.

    With `bytes_too` the spikes again, as bytes, in place of an empty tensor.
    """
    T, B, C, H, W = shape
    spikes, rows = empty(shape, y), B * H * W
    small = empty(shape, y, torch.uint8) if bytes_too else y.new_empty(0, dtype=torch.uint8)
    step = rows * C if y.numel() == spikes.numel() else 0
    args = (y, spikes, small if bytes_too else None, norm, rates, rate, v_threshold)
    launch("fire", y, rows, C, step, *args, T=T, neuron=neuron)
    return spikes, small


@operator("y")
def fire_(
    y: Tensor, T: int, norm: Tensor, rates: Tensor | None, neuron: str, rate: float,
    v_threshold: float
) -> None:  # fmt: skip
    """As `fire`, but the spikes overwrite y, which has all T steps."""
    rows, C = rows_and_channels(y)
    args = (y, y, None, norm, rates, rate, v_threshold)
    launch("fire", y, rows // T, C, rows // T * C, *args, T=T, neuron=neuron)


@operator("grad")
def fire_backward(
    grad_spikes: Tensor, y: Tensor, grad: Tensor, norm: Tensor, rates: Tensor | None, neuron: str,
    rate: float, v_threshold: float, alpha: float
) -> Tensor:  # fmt: skip
    """Writes the gradient of scale * y + shift into grad, which is like y.

    Returns [parts, 2, C], whose sums over parts are those of that gradient and of its product with
    y - mean; with `rates` [parts, 3, C], the last for their gradient.
    """
    T, C = len(grad_spikes), y.shape[1]
    if grad_spikes.stride() != strides_of(grad_spikes.shape):
        grad_spikes = rows(grad_spikes)
    count = grad_spikes.numel() // (T * C)
    partial = norm.new_empty(parts(y, count, C, T), 2 if rates is None else 3, C)
    step = count * C if y.numel() == grad_spikes.numel() else 0
    args = (y, grad_spikes, grad, norm, rates, rate, v_threshold, alpha, partial)
    launch("fire_backward", y, count, C, len(partial), step, *args, T=T, neuron=neuron)
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
    return x.new_empty_strided(x.shape, (math.prod(x.shape[1:]), *x.stride()[1:]))


def sizes_in_time(x):
    """rows, channels, T and the distance between steps, for `integrate`: any order of memory."""
    size, channels = math.prod(x.shape[1:]), channels_in_time(x)
    return size // channels, channels, x.shape[0], x.stride(0)


def channels_in_time(x):
    """The length of rows for `integrate`, all of which begin at multiples of it in memory: a GPU
    loads several channels at once, from such places alone.
    """
    return math.gcd(math.prod(x.shape[1:]), x.stride(0), x.storage_offset(), 1024)


@operator()
def integrate(
    x: Tensor, own: Tensor | None, neuron: str, rate: float, v_threshold: float
) -> Tensor:
    """Spikes of x, [T, ...], T and the layout as they may be; `own` is the layer's rate of PLIF."""
    x = time_major(x)
    spikes = like_steps(x)
    if x.numel():
        args = (x, spikes, own, rate, v_threshold)
        launch("integrate", x, *sizes_in_time(x), *args, T=CHUNK, neuron=neuron)
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
    slopes = x.new_empty(0 if own is None else math.prod(x.shape[1:]), dtype=real(x))
    if x.numel():
        args = (x, upstream, grad, own, rate, v_threshold, alpha, None if own is None else slopes)
        launch("integrate_backward", x, *sizes_in_time(x), *args, T=CHUNK, neuron=neuron)
    return grad, slopes


# BatchNorm ----------------------------------------------------------------------------------------


def real(y):
    return torch.float64 if y.dtype == torch.float64 else torch.float32


@operator()
def statistics(y: Tensor) -> Tensor:
    """The sums that batch_norm needs of y's rows, in parts."""
    rows, C = rows_and_channels(y)
    partial = y.new_empty(parts(y, rows, C), 2, C, dtype=real(y))
    launch("statistics", y, rows, C, len(partial), y, partial)
    return partial


@operator("norm", "mean", "var", "batches")
def batch_norm(
    y: Tensor, partial: Tensor, norm: Tensor, start: int, repeats: int, eps: float, momentum: float,
    gamma: Tensor, beta: Tensor, bias: Tensor | None, mean: Tensor | None, var: Tensor | None,
    batches: Tensor | None
) -> None:  # fmt: skip
    """Writes `norm` of a BatchNorm, whose channels begin at `start` of those of y, each row of
    which counts `repeats` times. Its running statistics, if there are any, move on; the bias is the
    convolution's, which y lacks.
    """
    rows, C = rows_and_channels(y)
    sizes = (gamma.shape[0], C, start, len(partial), rows, repeats, eps, momentum)
    launch("batch_norm", y, *sizes, y, partial, gamma, beta, bias, norm, mean, var, batches)


@operator("norm")
def running_norm(
    norm: Tensor, start: int, mean: Tensor, var: Tensor, bias: Tensor | None, gamma: Tensor,
    beta: Tensor, eps: float
) -> None:  # fmt: skip
    """Writes scale and shift of a BatchNorm's running statistics into `norm`, in which its channels
    begin at `start`. The bias is the convolution's, which y lacks.
    """
    args = (start, eps, mean, var, bias, gamma, beta, norm)
    launch("running_norm", norm, mean.shape[0], norm.shape[1], *args)


@operator()
def batch_norm_backward(partial: Tensor, norm: Tensor, rows: int) -> Tensor:
    """`sums` from the partial sums of y's rows: [7, C], gradients of beta, gamma and `rates`, three
    rows that normalise_backward and pool_backward need, and zeros.
    """
    count, kinds, C = partial.shape
    sums = norm.new_empty(7, C)
    launch("batch_norm_backward", norm, C, count, kinds, rows, partial, norm, sums)
    return sums


@operator()
def gradient_sums(grad: Tensor, y: Tensor, norm: Tensor) -> Tensor:
    """As fire_backward returns, for a BatchNorm without a neuron behind it."""
    rows, C = rows_and_channels(y)
    partial = norm.new_empty(parts(y, rows, C), 2, C)
    launch("gradient_sums", y, rows, C, len(partial), y, grad, norm, partial)
    return partial


@operator()
def normalise(y: Tensor, norm: Tensor) -> Tensor:
    """scale * y + shift."""
    out = torch.empty_like(y)
    launch("normalise", y, *rows_and_channels(y), y, out, norm)
    return out


@operator("out")
def normalise_backward(grad: Tensor, y: Tensor, out: Tensor, sums: Tensor) -> None:
    """Writes the gradient of BatchNorm's input y into out, which may be grad, the gradient of its
    output.
    """
    launch("normalise_backward", y, *rows_and_channels(y), y, grad, out, sums)


# Max-pooling --------------------------------------------------------------------------------------


@operator()
def pool(y: Tensor, norm: Tensor, with_taps: bool) -> tuple[Tensor, Tensor]:
    """What of y, [N, C, H, W], a 3x3 max-pool of stride 2 behind its BatchNorm would take: where
    the scale in `norm` is negative, minima.

    Returns these values and, empty but `with_taps`, for each which of the nine places it came from,
    as a byte.
    """
    N, C, H, W = y.shape
    pooled = y.new_empty(N, (H + 1) // 2, (W + 1) // 2, C).permute(0, 3, 1, 2)
    taps = torch.empty_like(pooled if with_taps else y[:0], dtype=torch.uint8)
    args = (y, norm, pooled, taps if with_taps else None)
    launch("pool", y, *rows_and_channels(pooled), H, W, *args)
    return pooled, taps


@operator()
def pool_backward(grad: Tensor, taps: Tensor, y: Tensor, sums: Tensor) -> Tensor:
    """The gradient of y where a max-pool comes before BatchNorm; `grad` is of pooled values."""
    grad_y = torch.empty_like(y)
    launch("pool_backward", y, *rows_and_channels(y), *y.shape[2:], y, grad, taps, grad_y, sums)
    return grad_y
