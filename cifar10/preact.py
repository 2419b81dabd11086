"""Layers with membrane shortcuts: a neuron alone, and convolution and BatchNorm of its spikes.

A shortcut ends between BatchNorm and the next neuron, so there the two can't be one layer as in
conv_bn_lif of layer.py: each has a function here. Both run fused where layer.py's layers do. For
the backward pass the neuron saves its input, and the convolution its output and, as bytes, the
spikes that it reads.
"""

import torch
import torch.nn.functional as F

import fused
import layer
from spikes import mark, save


def fire(x, lif):
    """Membrane inputs [T, B, C, H, W] -> spikes, in one pass over memory."""
    if x.device.type != "cpu" or not can_fire(x, lif):  # on a GPU the neuron's own kernel does it
        return lif(x)
    return mark(Fire.apply(x[:1] if x.stride(0) == 0 else x, len(x), lif.tau, lif.v_threshold))


def can_fire(x, lif):
    if not getattr(lif, "fused", True) or x.dim() != 5 or len(x) > fused.MAX_T:
        return False
    if layer.observed() is not None or layer.changed(lif) is not None:
        return False
    return fused.available(x.device.type, x.dtype, lif.backend, len(x))


class Fire(torch.autograd.Function):
    """(x of T steps or one that stands for all, T, tau, v_threshold) -> spikes of T steps."""

    @staticmethod
    def forward(ctx, x, T, *options):
        ctx.save_for_backward(x)
        ctx.options = options
        one, zero = identity(x)
        return fused.fire(x, T, one, zero, *options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_spikes):
        x = fused.rows_of_channels(*ctx.saved_tensors)
        grad = torch.empty_like(x)
        one, zero = identity(x)
        fused.fire_backward(grad_spikes, x, grad, zero, one, zero, *ctx.options)
        return grad, None, None, None


def identity(x):
    """Scale and shift of a BatchNorm that is not there."""
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_ones(x.shape[2], dtype=real), x.new_zeros(x.shape[2], dtype=real)


def conv_bn(x, conv, bn, lif, pool=False):
    """Spikes or images [T, B, C, H, W] -> membrane inputs [T, B, C', H', W'].

    Args:
        conv, bn: the layer's modules; a Conv1d gets the H*W tokens as one dimension.
        lif: the neuron before them; the layer runs fused only where this neuron may, too.
        pool: whether a 3x3 max-pool of stride 2 follows BatchNorm.
    """
    if not layer.can_fuse(x, [conv], [bn], [lif]):
        return layer.plain_conv_bn(x, conv, bn, pool)
    T, batch = x.shape[:2]
    if x.stride(0) == 0:  # the same image at every step
        x = x[:1]
    weight, stride, padding = conv.weight, conv.stride, conv.padding
    if weight.dim() == 3:  # of a Conv1d
        weight, stride, padding = weight.unsqueeze(3), (1, 1), (0, 0)
    gamma, sign = bn.weight, torch.ones_like(bn.weight)
    if pool:  # comes before BatchNorm here, with gamma >= 0: see layer.fused_layers
        sign = torch.where(gamma < 0, -sign, sign)
        weight, gamma = weight * sign[:, None, None, None], gamma * sign
    options = layer.Options(T, stride, padding, bn.eps, lif.tau, lif.v_threshold, pool)
    if bn.training:
        y, mean, var = ConvBN.apply(x, weight, conv.bias, gamma, bn.bias, options)
        layer.update_statistics([conv], [bn], mean * sign, var)
    else:
        y = layer.convolve(x, weight, options)
        y = fused.pool(y)[0] if pool else y
        # The convolution leaves its bias out.
        mean = bn.running_mean if conv.bias is None else bn.running_mean - conv.bias
        y = F.batch_norm(y, mean * sign, bn.running_var, gamma, bn.bias, eps=bn.eps)
    return y.unflatten(0, (-1, batch)).expand(T, -1, -1, -1, -1)


class ConvBN(torch.autograd.Function):
    """ConvBNLIF without the neuron, for training: -> [T*B, C', H', W'], mean, unbiased variance."""

    @staticmethod
    def forward(ctx, x, weight, bias, gamma, beta, options):
        y = layer.convolve(x, weight, options)
        mean, var = fused.statistics(y)
        # Values of a channel; an image that is shown T times counts T times.
        n = options.T * y.numel() // (len(x) * len(mean))
        if n == 1:
            raise ValueError(f"a single value per channel, in {list(y.shape)}, has no variance")
        ctx.options, ctx.dtype, ctx.has_bias = options, x.dtype, bias is not None
        ctx.save_for_backward(save(x), y, weight, gamma, mean, torch.rsqrt(var + options.eps))
        pooled = fused.pool(y)[0] if options.pool else y
        out = F.batch_norm(pooled, mean, var, gamma, beta, eps=options.eps)
        var = var * (n / (n - 1))  # unbiased, as running_var has it
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        x, y, weight, gamma, mean, invstd = ctx.saved_tensors
        options, y, grad = ctx.options, layer.channels_last(y), layer.channels_last(grad)
        pooled, taps = fused.pool(y) if options.pool else (y, None)
        wanted = [not options.pool, True, True]
        grad_y, grad_gamma, grad_beta = layer.aten.native_batch_norm_backward(
            grad, pooled, gamma, None, None, mean, invstd, True, options.eps, wanted
        )
        if options.pool:
            sums = torch.stack([grad_beta, grad_gamma / invstd])
            grad_y = fused.pool_backward(grad, taps, y, mean, invstd, gamma, sums)
        wants_x = ctx.needs_input_grad[0]
        grad_x, grad_weight = layer.convolution_backward(grad_y, x, weight, options, wants_x)
        grad_x = None if grad_x is None else grad_x.unflatten(0, x.shape[:2]).to(ctx.dtype)
        # BatchNorm subtracts the bias with the mean, so its gradient is 0.
        grad_bias = torch.zeros_like(grad_beta) if ctx.has_bias else None
        return grad_x, grad_weight.to(weight.dtype), grad_bias, grad_gamma, grad_beta, None
