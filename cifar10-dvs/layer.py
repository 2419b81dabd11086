"""A layer of the network: convolution, BatchNorm over T*B samples, max-pool (or none), LIF over T.

`conv_bn_lif` calls the modules one after another or, where it can, takes the fused path, one
function of autograd. That works in channels_last, shows a static image once instead of T times, and
normalises, integrates and fires in one pass over memory (fused.py). For the backward pass it saves
the convolution's output and the layer's input, spikes as bytes (spikes.py).

Both paths compute the same function, to rounding. The fused path does not call the modules, so it
is taken only where each module has exactly the type and the methods that it knows (`changed`).
"""

from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as hooks
from torch.overrides import _get_current_function_mode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint

import fused
from lif import ALPHA, MultiStepLIF
from spikes import largest, mark, save, traced

aten = torch.ops.aten
MM_TO_FLOAT32 = hasattr(aten.mm, "dtype")  # PyTorch 2.8 has it; a CPU sums in float32 anyway


def conv_bn_lif(x, conv, bn, lif, pool=False):
    """[T, B, C, H, W] -> spikes [T, B, C', H', W'].

    Args:
        x: images or spikes.
        conv, bn, lif: the layer's modules; a Conv1d gets the H*W tokens as one dimension.
        pool: whether a 3x3 max-pool of stride 2 comes between BatchNorm and neuron.
    """
    if can_fuse(x, [conv], [bn], [lif]):
        return fused_layers(x, [conv], [bn], lif, pool)
    return lif(plain_conv_bn(x, conv, bn, pool))


def plain_conv_bn(x, conv, bn, pool=False):
    """The modules one after another, without the neuron."""
    steps, space = x.shape[:2], x.shape[3:]
    x = x.flatten(0, 1)
    x = bn(conv(x.flatten(2))).unflatten(2, space) if isinstance(conv, nn.Conv1d) else bn(conv(x))
    if pool:
        x = F.max_pool2d(x, 3, 2, 1)
    return x.unflatten(0, steps)


def conv_bn_lif_each(x, *layers):
    """[spikes of each (conv, bn, lif)] for one x, as q, k, v do; fused, one convolution."""
    convs, bns, lifs = zip(*layers, strict=True)
    if can_fuse(x, convs, bns, lifs):
        # With channels last in the split too, the gradients are joined without a copy.
        spikes = fused_layers(x, convs, bns, lifs[0]).movedim(2, -1)
        return [
            part.movedim(-1, 2) for part in spikes.split([bn.num_features for bn in bns], dim=-1)
        ]
    return [conv_bn_lif(x, *layer) for layer in layers]


def checkpointed(module, x):
    """module(x); only x is kept for the backward pass, which computes the rest again."""
    known = largest(x)  # x comes back from autograd without its mark

    def run(x):
        return module(mark(x, known))

    contexts = partial(recomputing, module)
    return checkpoint(run, x, use_reentrant=False, context_fn=contexts)


def recomputing(module):
    return nullcontext(), Recomputation(module)


class Recomputation:
    """Context in which BatchNorms see a batch again without counting it in running statistics."""

    def __init__(self, module):
        self.bns = [
            bn for bn in module.modules() if isinstance(bn, nn.modules.batchnorm._BatchNorm)
        ]

    def __enter__(self):
        self.kept = [(bn.momentum, bn.num_batches_tracked.clone()) for bn in self.bns]
        for bn in self.bns:
            bn.momentum = 0.0

    def __exit__(self, *error):
        for bn, (momentum, batches) in zip(self.bns, self.kept, strict=True):
            bn.momentum = momentum
            bn.num_batches_tracked.copy_(batches)


# The fused path -----------------------------------------------------------------------------------


class Options(NamedTuple):
    """What ConvBNLIF, and ConvBN in preact.py, need besides tensors."""

    T: int
    stride: tuple
    padding: tuple
    eps: float
    tau: float
    v_threshold: float
    pool: bool


# The methods that the fused path replaces. A module that overrides one of them is called instead.
METHODS = {
    nn.Conv1d: ("forward", "_conv_forward"),
    nn.Conv2d: ("forward", "_conv_forward"),
    nn.BatchNorm1d: ("forward",),
    nn.BatchNorm2d: ("forward",),
    nn.SyncBatchNorm: ("forward",),
    MultiStepLIF: ("forward", "multi_step_forward"),
}
KNOWN = {kind: {name: getattr(kind, name) for name in names} for kind, names in METHODS.items()}


def can_fuse(x, convs, bns, lifs):
    """Whether the fused path computes what these layers, which all read x, compute."""
    if not all(getattr(lif, "fused", True) for lif in lifs) or x.device.type not in ("cpu", "cuda"):
        return False
    for reason in (observed(), *map(changed, (*convs, *bns, *lifs))):
        if reason is not None:
            fused.say_plain(describe(convs[0]), reason)
            return False
    if x.dim() != 5 or len(x) > fused.MAX_T:
        return False
    kinds = {settings(*layer) for layer in zip(convs, bns, lifs, strict=True)}
    if len(kinds) > 1 or None in kinds:
        return False
    if bns[0].training and isinstance(bns[0], nn.SyncBatchNorm):
        fused.say_once("SyncBatchNorm: layers run unfused")
        return False
    if not bns[0].training and torch.is_grad_enabled():  # frozen statistics: no fused backward pass
        return False
    dtype = autocast(x[:0]).dtype
    real = torch.float64 if dtype == torch.float64 else torch.float32
    for bn in bns:  # the kernels read BatchNorm's tensors in the type that they compute in
        if any(t.dtype != real for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var)):
            return False
    return fused.available(x.device.type, dtype, lifs[0].backend, len(x))


def changed(module):
    """None where the fused path may replace a module, else the reason; "" is one not to log."""
    kind, own = type(module), module.__dict__
    if kind not in KNOWN:
        return f"it has a {kind.__name__}, which is called as it is"
    if any(name in own or getattr(kind, name) is not known for name, known in KNOWN[kind].items()):
        return f"its {kind.__name__} has a forward of its own"
    if module._forward_pre_hooks:
        return f"its {kind.__name__} has hooks that run before it"
    if module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
        return ""  # such as a monitor's; no line each time
    if kind is MultiStepLIF and not (module.is_usual() and module.alpha == ALPHA):
        return f"its {kind.__name__} has attributes that no kernel knows"
    return None


def observed():
    """Why all modules must be called, since something watches operations; None: nothing does."""
    if traced():
        return ""
    if torch.compiler.is_compiling():
        return None
    if (
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
    ):
        return "hooks on all modules are set"
    for mode in (_get_current_dispatch_mode(), _get_current_function_mode()):
        # Such as spikingjelly's operation counters. DeviceContext says where tensors are made.
        if (
            mode is not None
            and not isinstance(mode, DeviceContext)
            and not getattr(mode, "counts_kernels", False)
        ):
            return f"{type(mode).__name__} looks at each operation"
    return None


def describe(conv):
    sizes = (getattr(conv, name, "?") for name in ("in_channels", "out_channels", "kernel_size"))
    return f"{type(conv).__name__}({', '.join(map(str, sizes))})"


def settings(conv, bn, lif):
    """What layers joined into one must have in common; None for a layer that can't run fused."""
    if bn.momentum is None or bn.running_mean is None or bn.weight is None:
        return None
    if set(conv.dilation) != {1} or conv.groups != 1 or conv.padding_mode != "zeros":
        return None
    if isinstance(conv.padding, str) or isinstance(conv, nn.Conv1d) != isinstance(
        bn, nn.BatchNorm1d
    ):
        return None
    if isinstance(conv, nn.Conv1d) and (*conv.kernel_size, *conv.stride, *conv.padding) != (
        1,
        1,
        0,
    ):
        return None
    shape = type(conv), conv.kernel_size, conv.stride, conv.padding, conv.bias is None
    return *shape, bn.training, bn.eps, lif.tau, lif.v_threshold, lif.backend


def fused_layers(x, convs, bns, lif, pool=False):
    """Spikes of all layers, joined along the channels; parameters stay in their modules."""
    bn, T = bns[0], len(x)
    if x.stride(0) == 0:  # the same image at every step
        x = x[:1]
    weight = join(conv.weight for conv in convs)
    stride, padding = convs[0].stride, convs[0].padding
    if weight.dim() == 3:  # of a Conv1d
        weight, stride, padding = weight.unsqueeze(3), (1, 1), (0, 0)
    bias = None if convs[0].bias is None else join(conv.bias for conv in convs)
    gamma, beta = join(bn.weight for bn in bns), join(bn.bias for bn in bns)
    sign = torch.ones_like(gamma)
    # Max-pooling comes before BatchNorm here. With gamma >= 0 the two commute, so the sign of gamma
    # moves to the weight.
    if pool:
        sign = torch.where(gamma < 0, -sign, sign)
        weight, gamma = weight * sign[:, None, None, None], gamma * sign
    options = Options(T, stride, padding, bn.eps, lif.tau, lif.v_threshold, pool)
    if bn.training:
        spikes, mean, var = ConvBNLIF.apply(x, weight, bias, gamma, beta, options)
        update_statistics(convs, bns, mean * sign, var)
        return mark(spikes)
    # `convolve` leaves the bias out, so it is taken from the mean.
    mean = join(bn.running_mean for bn in bns) - (0 if bias is None else bias)
    invstd = torch.rsqrt(join(bn.running_var for bn in bns) + bn.eps)
    y = convolve(x, weight, options)
    y = (fused.pool(y)[0] if pool else y).unflatten(0, x.shape[:2])
    neurons = (*affine(mean * sign, invstd, gamma, beta), lif.tau, lif.v_threshold)
    if len(y) < T:
        return fused.fire(y, T, *neurons)
    fused.fire_(y, *neurons)
    return y


def join(tensors):
    first, *rest = tensors
    return torch.cat([first, *rest]) if rest else first


def autocast(x):
    """x in autocast's type, where that is on; it leaves float64 alone."""
    on = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(x.device.type)) if on else x


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def convolve(x, weight, options):
    """[T, B, C, H, W] -> [T*B, C', H', W'] in channels_last, in autocast's type."""
    x, weight = channels_last(autocast(x.flatten(0, 1))), channels_last(autocast(weight))
    return channels_last(F.conv2d(x, weight, None, options.stride, options.padding))


def affine(mean, invstd, gamma, beta):
    """BatchNorm as scale * y + shift."""
    scale = gamma * invstd
    return scale, beta - mean * scale


class ConvBNLIF(torch.autograd.Function):
    """(x, weight, bias, gamma, beta, options) -> spikes, the batch's mean and unbiased variance."""

    @staticmethod
    def forward(ctx, x, weight, bias, gamma, beta, options):
        y = convolve(x, weight, options)
        mean, var = fused.statistics(y)
        invstd = torch.rsqrt(var + options.eps)
        pooled = fused.pool(y)[0] if options.pool else y
        scale, shift = affine(mean, invstd, gamma, beta)
        spikes = fused.fire(
            pooled.unflatten(0, x.shape[:2]),
            options.T,
            scale,
            shift,
            options.tau,
            options.v_threshold,
        )
        # Values of a channel; an image shown T times counts T times.
        n = options.T * y.numel() // (len(x) * len(mean))
        if n == 1:
            raise ValueError(f"a single value per channel, in {list(y.shape)}, has no variance")
        ctx.options, ctx.dtype, ctx.has_bias = options, x.dtype, bias is not None
        ctx.save_for_backward(save(x), y, weight, gamma, beta, mean, invstd)
        var = var * (n / (n - 1))  # unbiased, as running_var has it
        ctx.mark_non_differentiable(mean, var)
        return spikes, mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_spikes, *_):
        x, y, weight, gamma, beta, mean, invstd = ctx.saved_tensors
        y = channels_last(y)  # it is, unless a hook on saved tensors has changed the layout
        options, pooled = ctx.options, y
        if options.pool:
            pooled, taps = fused.pool(y)
        neurons = (*affine(mean, invstd, gamma, beta), options.tau, options.v_threshold)
        grad = torch.empty_like(pooled)
        steps = x.shape[:2]
        sums = fused.fire_backward(
            grad_spikes, pooled.unflatten(0, steps), grad.unflatten(0, steps), mean, *neurons
        )
        if options.pool:
            grad = fused.pool_backward(grad, taps, y, mean, invstd, gamma, sums)
        else:
            fused.normalise_backward_(grad, y, mean, invstd, gamma, sums)
        grad_x, grad_weight = convolution_backward(
            grad, x, weight, options, ctx.needs_input_grad[0]
        )
        grad_x = None if grad_x is None else grad_x.unflatten(0, x.shape[:2]).to(ctx.dtype)
        # BatchNorm subtracts the bias again: its gradient is 0, in the plain path rounding errors.
        grad_bias = torch.zeros_like(beta) if ctx.has_bias else None
        # In the layout of the weight, as DistributedDataParallel wants a parameter's gradient.
        grad_weight = torch.empty_like(weight).copy_(grad_weight)
        return grad_x, grad_weight, grad_bias, sums[1] * invstd, sums[0], None


def convolution_backward(grad, x, weight, options, wants_x):
    x, weight = channels_last(x.flatten(0, 1)), channels_last(weight.to(grad.dtype))
    x = x.to(grad.dtype)
    pointwise = (
        weight.shape[2:] == (1, 1) and options.stride == (1, 1) and options.padding == (0, 0)
    )
    if pointwise:  # matrix products of rows of channels
        rows = grad.permute(0, 2, 3, 1).flatten(0, 2)
        grad_weight = sum_over_rows(rows, x.permute(0, 2, 3, 1).flatten(0, 2))[:, :, None, None]
        grad_x = rows @ weight.flatten(1) if wants_x else None
        if not wants_x:
            return None, grad_weight
        return grad_x.unflatten(0, (len(x), *x.shape[2:])).permute(0, 3, 1, 2), grad_weight
    args = (None, options.stride, options.padding, [1, 1], False, [0, 0], 1, [wants_x, True, False])
    return aten.convolution_backward(grad, x, weight, *args)[:2]


def sum_over_rows(a, b):
    """a.t() @ b, on a GPU in float32 sums: those in float16 are too coarse for so many rows."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16) and MM_TO_FLOAT32:
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    return a.t() @ b


@torch.no_grad()
def update_statistics(convs, bns, mean, var):
    """Update running statistics as BatchNorm does; the mean lacks the bias, which is added."""
    start = 0
    for conv, bn in zip(convs, bns, strict=True):
        part = slice(start, start := start + bn.num_features)
        bn.running_mean.lerp_(
            mean[part] if conv.bias is None else mean[part] + conv.bias, bn.momentum
        )
        bn.running_var.lerp_(var[part], bn.momentum)
        bn.num_batches_tracked.add_(1)
