"""BatchNorm's affine map and the neuron in one pass over memory, forward and backward.

Tensors are [T, B, C, H, W] or [N, C, H, W] in channels_last: memory holds rows of C channels. The
formulas are those of plain.py and of BatchNorm; the kernels are in fused.cu. The backward pass
computes the membranes again.

`norm` is [5, C] of BatchNorm: mean, unbiased variance, 1 / standard deviation, and `affine`, the
scale and shift with which it maps y to scale * y + shift. A neuron is given by its Constants, and
by `rates` [C] where PLIF learns them, else None.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch.nn.modules import module as hooks
from torch.overrides import _get_current_function_mode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .compiler import launch, parts
from .cupy_lif import NAMESPACE
from .plain import rate_of


class Constants(NamedTuple):
    """Of a neuron, for kernels: `charge`, the name in fused.cu of how it integrates, its `rate`,
    and alpha, the slope of the surrogate gradient.
    """

    charge: str
    rate: float
    v_threshold: float
    alpha: float


def charge_of(lif):
    """(charge, rate) of a neuron."""
    if lif.kind != "lif":
        return {"plif": "PARAMETRIC", "if": "INTEGRATE"}[lif.kind], 1.0
    # Where 1 / tau is exact, a product with it has the bits of the division, in less time.
    tau = float(lif.tau)
    exact = math.frexp(tau)[0] == 0.5
    return ("MULTIPLY", 1 / tau) if exact else ("DIVIDE", tau)


def constants_of(lif):
    return Constants(*charge_of(lif), float(lif.v_threshold), float(lif.alpha))


def rates_of(lif, x, channels):
    """PLIF's rate for each channel, in the type that the kernels compute in; None for others."""
    return rate_of(x, lif.w).expand(channels).contiguous() if lif.kind == "plif" else None


def rows_of_channels(x):
    """x with its channels innermost in memory, as the kernels read it; copied only if it is not."""
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


def is_called_as_operator():
    """Whether a kernel is called as an operator of torch, which torch.compile keeps whole and a
    dispatch mode sees. It takes longer than a launch, so else the function itself is called.
    """
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def operator(mutates=()):
    """Decorator of a function that is an operator too. Each data set folder has its own."""

    def decorate(function):
        name = f"{NAMESPACE}::{function.__name__}"
        of_torch = torch.library.custom_op(name, function, mutates_args=mutates)

        @functools.wraps(function)
        def call(*args):
            return of_torch(*args) if is_called_as_operator() else function(*args)

        call.of_torch, call.register_fake = of_torch, of_torch.register_fake
        return call

    return decorate


# Neurons ------------------------------------------------------------------------------------------


@operator()
def fire(
    y: torch.Tensor,
    T: int,
    affine: torch.Tensor,
    rates: torch.Tensor | None,
    charge: str,
    rate: float,
    v_threshold: float,
    bytes_too: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spikes [T, B, C, H, W] of neurons whose input is scale * y + shift; y has T steps, or one.

    With `bytes_too` the spikes again, as bytes, in place of an empty tensor.
    """
    y = rows_of_channels(y)
    rows, step = rows_and_step(y, T)
    spikes, small = empty(T, y), empty(T if bytes_too else 0, y, torch.uint8)
    args = (affine, rates, rate, v_threshold)
    memory = (y, spikes, small if bytes_too else None)
    launch("fire", y, rows, y.shape[2], step, *memory, *args, T=T, charge=charge)
    return spikes, small


@fire.register_fake
def _(y, T, affine, rates, charge, rate, v_threshold, bytes_too):
    return empty(T, y), empty(T if bytes_too else 0, y, torch.uint8)


@operator(mutates=("y",))
def fire_(
    y: torch.Tensor,
    affine: torch.Tensor,
    rates: torch.Tensor | None,
    charge: str,
    rate: float,
    v_threshold: float,
) -> None:
    """As `fire`, but the spikes overwrite y, which is in channels_last and has all T steps."""
    T = len(y)
    rows, step = rows_and_step(y, T)
    args = (step, y, y, None, affine, rates, rate, v_threshold)
    launch("fire", y, rows, y.shape[2], *args, T=T, charge=charge)


@operator(mutates=("grad",))
def fire_backward(
    grad_spikes: torch.Tensor,
    y: torch.Tensor,
    grad: torch.Tensor,
    mean: torch.Tensor,
    affine: torch.Tensor,
    rates: torch.Tensor | None,
    charge: str,
    rate: float,
    v_threshold: float,
    alpha: float,
) -> torch.Tensor:
    """Writes the gradient of scale * y + shift into grad, which is like y in channels_last.

    Returns [parts, 2, C], whose sums over parts are those of that gradient and of its product with
    y - mean; with `rates` [parts, 3, C], the last for their gradient.
    """
    T, y, grad_spikes = len(grad_spikes), rows_of_channels(y), rows_of_channels(grad_spikes)
    C, (rows, step) = y.shape[2], rows_and_step(y, T)
    partial = mean.new_empty(parts(y, rows, C, T), 2 if rates is None else 3, C)
    sizes = (rows, C, len(partial), step)
    args = (mean, affine, rates, rate, v_threshold, alpha, partial)
    launch("fire_backward", y, *sizes, y, grad_spikes, grad, *args, T=T, charge=charge)
    return partial


@fire_backward.register_fake
def _(grad_spikes, y, grad, mean, affine, rates, *neuron):
    rows, C = y[0].numel() // y.shape[2], y.shape[2]
    count = parts(y, rows, C, len(grad_spikes))
    return mean.new_empty(count, 2 if rates is None else 3, C)


# BatchNorm ----------------------------------------------------------------------------------------


def real(y):
    return torch.float64 if y.dtype == torch.float64 else torch.float32


@operator()
def batch_norm(
    y: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, eps: float, repeats: int
) -> torch.Tensor:
    """`norm` of [N, C, H, W] in channels_last, each row of which counts `repeats` times."""
    C = y.shape[1]
    rows = y.numel() // C
    count = parts(y, rows, C)
    partial = y.new_empty(count, 2, C, dtype=real(y))
    launch("statistics", y, rows, C, count, y, partial)
    norm = y.new_empty(5, C, dtype=real(y))
    launch("batch_norm", y, C, count, rows, repeats, eps, y, partial, gamma, beta, norm)
    return norm


@batch_norm.register_fake
def _(y, gamma, beta, eps, repeats):
    return y.new_empty(5, y.shape[1], dtype=real(y))


@operator(mutates=("affine",))
def running_norm(
    affine: torch.Tensor,
    start: int,
    mean: torch.Tensor,
    var: torch.Tensor,
    bias: torch.Tensor | None,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    eps: float,
) -> None:
    """Writes scale and shift of a BatchNorm's running statistics into affine [2, channels from
    `start` on]. The bias is the convolution's, which y lacks.
    """
    args = (mean, var, bias, gamma, beta, affine[:, start:])
    launch("running_norm", affine, len(mean), affine.shape[1], eps, *args)


@operator(mutates=("running_mean", "running_var", "batches"))
def update(
    norm: torch.Tensor,
    start: int,
    bias: torch.Tensor | None,
    momentum: float,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    batches: torch.Tensor,
) -> None:
    """Moves a BatchNorm's running statistics on to `norm`, in which its channels begin at `start`.
    The mean lacks the convolution's bias, which is added.
    """
    mean, var = norm[0, start:], norm[1, start:]
    C = len(running_mean)
    launch("update", norm, C, momentum, mean, var, bias, running_mean, running_var, batches)


@operator()
def batch_norm_backward(
    partial: torch.Tensor, norm: torch.Tensor, gamma: torch.Tensor, rows: int
) -> torch.Tensor:
    """From the partial sums of y's rows to [6, C]: gradients of beta, gamma and `rates`, and the
    factors of normalise_backward and pool_backward.
    """
    count, sums, C = partial.shape
    out = partial.new_empty(6, C)
    args = (partial, norm[0], norm[2], gamma, out)
    launch("batch_norm_backward", norm, C, count, sums, rows, *args)
    return out


@batch_norm_backward.register_fake
def _(partial, norm, gamma, rows):
    return partial.new_empty(6, partial.shape[2])


@operator()
def gradient_sums(grad: torch.Tensor, y: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """As fire_backward returns, for a BatchNorm without a neuron behind it; [N, C, H, W]."""
    C = y.shape[1]
    rows = y.numel() // C
    partial = mean.new_empty(parts(y, rows, C), 2, C)
    launch("gradient_sums", y, rows, C, len(partial), y, grad, mean, partial)
    return partial


@gradient_sums.register_fake
def _(grad, y, mean):
    return mean.new_empty(parts(y, y.numel() // y.shape[1], y.shape[1]), 2, y.shape[1])


@operator()
def normalise(y: torch.Tensor, affine: torch.Tensor) -> torch.Tensor:
    """scale * y + shift of [N, C, H, W] in channels_last."""
    out = torch.empty_like(y)
    launch("normalise", y, y.numel() // y.shape[1], y.shape[1], y, out, affine)
    return out


@normalise.register_fake
def _(y, affine):
    return torch.empty_like(y)


@operator(mutates=("out",))
def normalise_backward(
    grad: torch.Tensor, y: torch.Tensor, out: torch.Tensor, factors: torch.Tensor
) -> None:
    """Writes the gradient of BatchNorm's input y into out, which may be grad, the gradient of its
    output; all are [N, C, H, W] in channels_last.
    """
    rows, C = y.numel() // y.shape[1], y.shape[1]
    launch("normalise_backward", y, rows, C, y, grad, out, factors)


# Max-pooling --------------------------------------------------------------------------------------


@operator()
def pool(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """3x3 max-pool of stride 2 of [N, C, H, W] in channels_last.

    Returns the maxima, and for each of them which of the nine places it came from, as a byte.
    """
    pooled, taps = empty_pooled(y)
    rows, C = pooled.numel() // pooled.shape[1], pooled.shape[1]
    launch("pool", y, rows, C, *y.shape[2:], y, pooled, taps)
    return pooled, taps


def empty_pooled(y):
    N, C, H, W = y.shape
    pooled = y.new_empty(N, (H + 1) // 2, (W + 1) // 2, C).permute(0, 3, 1, 2)
    return pooled, torch.empty_like(pooled, dtype=torch.uint8)


@pool.register_fake
def _(y):
    return empty_pooled(y)


@operator()
def pool_backward(
    grad: torch.Tensor, taps: torch.Tensor, y: torch.Tensor, factors: torch.Tensor
) -> torch.Tensor:
    """The gradient of y where a max-pool comes before BatchNorm; `grad` is of pooled values."""
    grad_y = torch.empty_like(y)
    rows, C = y.numel() // y.shape[1], y.shape[1]
    launch("pool_backward", y, rows, C, *y.shape[2:], y, grad, taps, grad_y, factors)
    return grad_y


@pool_backward.register_fake
def _(grad, taps, y, factors):
    return torch.empty_like(y)
