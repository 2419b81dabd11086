"""A neuron without convolution and BatchNorm before it, in one pass over memory on a CPU.

For the backward pass it saves its input.
"""

import torch

from . import compiler, ops
from .fusible import changed, observed
from .layer import neuron_of, rates_of
from .spikes import mark, wants_bytes


def fire(x, lif):
    """Membrane inputs [T, B, C, H, W] -> spikes, in one pass over memory."""
    if x.device.type != "cpu" or not can_fire(x, lif):  # on a GPU the neuron's own kernel does it
        return lif(x)
    T, x = len(x), x[:1] if x.stride(0) == 0 else x
    wanted = lif.byte_spikes and wants_bytes()
    spikes, small = Fire.apply(x, rates_of(lif, x, x.shape[2]), T, neuron_of(lif), wanted)
    return mark(spikes, 1, small) if lif.byte_spikes else spikes


def can_fire(x, lif):
    if not getattr(lif, "fused", True) or x.dim() != 5 or len(x) > compiler.MAX_T or not x.numel():
        return False
    if observed() is not None or changed(lif) is not None:
        return False
    return compiler.available(x.device.type, x.dtype, lif.backend, len(x))


class Fire(torch.autograd.Function):
    """(x of T steps or one that stands for all, PLIF's rates or None, T, neuron, whether the spikes
    are wanted as bytes too) -> spikes of T steps, the same as bytes or empty.
    """

    @staticmethod
    def forward(ctx, x, rates, T, neuron, bytes_too):
        ctx.save_for_backward(x, rates)
        ctx.neuron = neuron
        args = (identity(x), rates, neuron.charge, neuron.rate, neuron.v_threshold, bytes_too)
        spikes, small = ops.fire(x, T, *args)
        ctx.mark_non_differentiable(small)
        return spikes, small

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_spikes, *_):
        x, rates = ctx.saved_tensors
        x = ops.rows_of_channels(x)
        grad, affine = torch.empty_like(x), identity(x)
        args = (grad_spikes, x, grad, affine[1], affine, rates)
        partial = ops.fire_backward(*args, *ctx.neuron)
        return grad, None if rates is None else partial[:, 2].sum(0), None, None, None


def identity(x):
    """Scale 1 and shift 0: a BatchNorm that is not there."""
    affine = x.new_zeros(2, x.shape[2], dtype=ops.real(x))
    affine[0].fill_(1)
    return affine
