"""A layer of the network: convolution, BatchNorm over T*B samples, max-pool (or none), LIF over T.

`conv_bn_lif` calls the modules one after another or, where it can, takes the fused path, one
function of autograd. That works in channels_last, shows a static image once instead of T times, and
normalises, integrates and fires in one pass over memory (ops.py). On a CPU convolutions of spikes
add up rows of the weight (events.py). For the backward pass it saves the layer's input, spikes as
bits or bytes (spikes.py), and, unless the neuron's `memory` is small, the convolution's output.

Both paths compute the same function, to rounding. The fused path does not call the modules, so it
is taken only where each module has exactly the type and the methods that it knows (fusible.py).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import events, ops, plain
from .compiler import is_called_as_operator
from .fusible import autocast_type, can_fuse, changed
from .spikes import largest, mark, masked, save, wants_bytes

aten = torch.ops.aten
MM_TO_FLOAT32 = hasattr(aten.mm, "dtype")  # PyTorch 2.8 has it; a CPU sums in float32 anyway


def conv_bn_lif(x, conv, bn, lif, pool=False, mask=None):
    """[T, B, C, H, W] -> spikes [T, B, C', H', W'].

    Args:
        x: images or spikes.
        conv, bn, lif: the layer's modules; a Conv1d gets the H*W tokens as one dimension.
        pool: whether a 3x3 max-pool of stride 2 comes between BatchNorm and neuron.
        mask: spikes [T, B, heads, 1 or channels, H or 1, W or 1] that each head of x is multiplied
            with first; None: x as it is.
    """
    x = x if mask is None else masked(x, mask)
    if can_fuse(x, [conv], [bn], [lif]):
        return fused_layers(x, [conv], [bn], [lif], pool)
    return plain.conv_bn_lif(x, conv, bn, lif, pool)


def conv_bn(x, conv, bn, lif, pool=False, mask=None):
    """Spikes or images [T, B, C, H, W] -> membrane inputs [T, B, C', H', W'], for layers with
    membrane shortcuts, which end between BatchNorm and the next neuron.

    Args:
        conv, bn, pool, mask: see conv_bn_lif.
        lif: the neuron before them; the layer runs fused only where this neuron may, too.
    """
    x = x if mask is None else masked(x, mask)
    if can_fuse(x, [conv], [bn], [lif]):
        return fused_layers(x, [conv], [bn], [lif], pool, fires=False)
    return plain.conv_bn(x, conv, bn, lif, pool)


def conv_bn_lif_each(x, *layers):
    """[spikes of each (conv, bn, lif)] for one x, as q, k, v do; fused, one convolution."""
    convs, bns, lifs = zip(*layers, strict=True)
    if can_fuse(x, convs, bns, lifs):
        # With channels last in the split too, the gradients are joined without a copy.
        spikes = fused_layers(x, convs, bns, lifs).movedim(2, -1)
        return [
            part.movedim(-1, 2) for part in spikes.split([bn.num_features for bn in bns], dim=-1)
        ]
    return [conv_bn_lif(x, *layer) for layer in layers]


def linear(x, layer, lif):
    """layer(x) of [N, features]. In evaluation on a CPU the sums of a row do not depend on the
    others, nor on their number. `lif`: what makes the model's neurons.
    """
    may = lif.keywords["fused"] and lif.keywords["events"] and type(layer) is torch.nn.Linear
    if layer.training or torch.is_grad_enabled() or not may or changed(layer) is not None:
        return layer(x)
    pixels, weight = x[:, :, None, None], layer.weight[:, :, None, None]
    if not x.numel() or ops.observed() is not None or not takes_events(pixels, weight, False):
        return layer(x)
    bits, _, values = events.find(pixels, x.dtype)
    y = events.convolve(pixels.shape, bits, values, weight, (1, 1), (0, 0)).flatten(1)
    return y if layer.bias is None else y + layer.bias


# The fused path -----------------------------------------------------------------------------------


class Options(NamedTuple):
    """What ConvBNLIF needs besides tensors. Without a neuron the layer ends with BatchNorm.

    repeats: how often a step of x is shown, T where x is an image. save_bytes: whether the spikes
    are wanted as bytes too. events: whether the convolution is one of events.py. dtype: that the
    layer computes in. small: whether the convolution is computed again in the backward pass.
    """

    T: int
    repeats: int
    stride: tuple
    padding: tuple
    eps: float
    pool: bool
    neuron: ops.Constants | None
    save_bytes: bool
    events: bool
    dtype: torch.dtype
    small: bool


def fused_layers(x, convs, bns, lifs, pool=False, fires=True):
    """Spikes of all layers, joined along the channels; parameters stay in their modules. With
    fires=False what their neurons would get.
    """
    bn, lif, (T, B) = bns[0], lifs[0], x.shape[:2]
    if x.stride(0) == 0:  # the same image at every step
        x = x[:1]
    weight = join(conv.weight for conv in convs)
    stride, padding = convs[0].stride, convs[0].padding
    if weight.dim() == 3:  # of a Conv1d
        weight, stride, padding = weight.unsqueeze(3), (1, 1), (0, 0)
    gamma, beta = join(bn.weight for bn in bns), join(bn.bias for bn in bns)
    sign = None
    # Max-pooling comes before BatchNorm here. With gamma >= 0 the two commute, so the sign of gamma
    # moves to the weight.
    if pool:
        sign = torch.where(gamma < 0, -1.0, 1.0).to(gamma)
        weight, gamma = weight * sign[:, None, None, None], gamma * sign
    neuron, rates = None, None
    if fires:
        neuron = ops.constants_of(*lif.constants())
        if lif.kind == "plif":
            pairs = zip(bns, lifs, strict=True)
            rates = join(ops.rates_of(lif, x, bn.num_features) for bn, lif in pairs)
    by_events = lif.events and takes_events(x, weight, bn.training)
    options = Options(
        T=T,
        repeats=T // len(x),
        stride=stride,
        padding=padding,
        eps=float(bn.eps),
        pool=pool,
        neuron=neuron,
        save_bytes=fires and wants_bytes(),
        events=by_events,
        dtype=autocast_type(x),
        small=lif.memory == "small",
    )
    if bn.training:
        bias = None if convs[0].bias is None else join(conv.bias for conv in convs)
        args = (x, weight, bias, gamma, beta, rates, options)
        out, norm, small = ConvBNLIF.apply(*args)
        update_statistics(convs, bns, norm, sign)
        if fires:
            return mark(out, 1, small)
    else:
        y = convolve(x, weight, options)[0]
        affine = running_affine(y, convs, bns, sign)
        y = ops.pool(y, False)[0] if pool else y
        if fires:
            return spikes_of(y.unflatten(0, (-1, B)), affine, rates, options)
        out = ops.normalise(y, affine)
    return out.unflatten(0, (-1, B)).expand(T, -1, -1, -1, -1)


def spikes_of(y, affine, rates, options):
    """Spikes without a gradient, over y where it has all steps."""
    if len(y) < options.T:
        return ops.fire(y, options.T, affine, rates, *options.neuron[:3], False)[0]
    ops.fire_(y, affine, rates, *options.neuron[:3])
    return y


def join(tensors):
    first, *rest = tensors
    return torch.cat([first, *rest]) if rest else first


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def takes_events(x, weight, training):
    """Whether the convolution of x is a sum of events: in training where x is spikes, or frames
    that differ from step to step. In evaluation always: its sums do not depend on the batch.
    """
    # A mode that looks at operations, such as a graph's, would not see these.
    same = x.dtype == weight.dtype == autocast_type(x) and not is_called_as_operator()
    if not same or not events.available(x.device.type, x.dtype):
        return False
    frames = len(x) > 1 and not x.requires_grad  # of event data
    return not training or largest(x) is not None or frames


def convolve(x, weight, options):
    """[T, B, C, H, W] -> ([T*B, C', H', W'] in channels_last, without a bias; what events.find says
    of x, or None).
    """
    if options.events:
        x = rows(save(x))
        found = events.find(x, weight.dtype)
        args = (weight, options.stride, options.padding)
        return events.convolve(x.shape, found[0], found[2], *args), found
    x, weight = rows(x.to(options.dtype)), channels_last(weight.to(options.dtype))
    return channels_last(F.conv2d(x, weight, None, options.stride, options.padding)), None


def steps(y, shape):
    """y [T*B, ...] as [T, B, ...] of a shape."""
    return y.view(*shape[:2], *y.shape[1:])


def rows(x):
    """[T, B, C, H, W] or [N, C, H, W] -> [N, C, H, W] in channels_last."""
    return channels_last(x.flatten(0, -4))


class ConvBNLIF(torch.autograd.Function):
    """(x, weight, bias, gamma, beta, rates, options) -> spikes, `norm`, spikes as bytes or empty.

    Without a neuron -> BatchNorm's output [N, C, H, W], `norm`, empty. See ops.py for norm.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, gamma, beta, rates, options):
        y, found = convolve(x, weight, options)
        if options.repeats * y.numel() == y.shape[1]:
            raise ValueError(f"a single value per channel, in {list(y.shape)}, has no variance")
        norm = ops.batch_norm(y, gamma, beta, options.eps, options.repeats)
        pooled = ops.pool(y, False)[0] if options.pool else y
        if options.neuron:
            pooled = steps(pooled, x.shape)
            args = (norm[3:], rates, *options.neuron[:3], options.save_bytes)
            out, small = ops.fire(pooled, options.T, *args)
        else:
            out, small = ops.normalise(pooled, norm[3:]), y.new_empty(0, dtype=torch.uint8)
        ctx.options, ctx.has_bias = options, bias is not None
        ctx.shape, ctx.dtype = x.shape, x.dtype
        sparse = found and found[1] <= events.DENSE
        bits, x = (found[0], found[2]) if sparse else (None, save(x))
        ctx.save_for_backward(x, bits, None if options.small else y, weight, gamma, rates, norm)
        ctx.mark_non_differentiable(norm, small)
        return out, norm, small

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        x, bits, y, weight, gamma, rates, norm = ctx.saved_tensors
        options, T, B = ctx.options, *ctx.shape[:2]
        shape = (T * B, *ctx.shape[2:])
        if options.small and bits is not None:
            y = events.convolve(shape, bits, x, weight, options.stride, options.padding)
        elif options.small:
            y = convolve(x, weight, options)[0]
        y = channels_last(y)  # it is, unless a hook on saved tensors has changed the layout
        pooled, taps = ops.pool(y, True) if options.pool else (y, None)
        if options.neuron:
            grad_spikes, grad = grad, torch.empty_like(pooled)
            args = (steps(pooled, ctx.shape), steps(grad, ctx.shape), norm[0], norm[3:], rates)
            partial = ops.fire_backward(grad_spikes, *args, *options.neuron)
        else:
            grad = channels_last(grad)
            partial = ops.gradient_sums(grad, pooled, norm[0])
        sums = ops.batch_norm_backward(partial, norm, gamma, y.numel() // y.shape[1])
        grad_beta, grad_gamma, grad_rates, factors = sums[0], sums[1], sums[2], sums[3:]
        if options.pool:
            grad = ops.pool_backward(grad, taps, y, factors)
        else:
            out = grad if options.neuron else torch.empty_like(y)
            ops.normalise_backward(grad, y, out, factors)
            grad = out
        grad_weight, wanted = None, [ctx.needs_input_grad[0], bits is None]
        if bits is not None:
            args = (grad, weight, options.stride, options.padding)
            grad_weight = events.weight_gradient(shape, bits, x, *args)
            # Nothing reads its values.
            x = torch.empty(shape, dtype=grad.dtype, memory_format=torch.channels_last)
        grad_x, dense = convolution_backward(grad, rows(x), weight, options, wanted)
        grad_weight = dense if grad_weight is None else grad_weight
        grad_x = None if grad_x is None else steps(grad_x, ctx.shape).to(ctx.dtype)
        # BatchNorm subtracts the bias again: its gradient is 0, in the plain path rounding errors.
        grad_bias = torch.zeros_like(grad_beta) if ctx.has_bias else None
        # In the layout of the weight, as DistributedDataParallel wants a parameter's gradient.
        if (grad_weight.dtype, grad_weight.stride()) != (weight.dtype, weight.stride()):
            grad_weight = torch.empty_like(weight).copy_(grad_weight)
        grad_rates = None if rates is None else grad_rates
        return grad_x, grad_weight, grad_bias, grad_gamma, grad_beta, grad_rates, None


def convolution_backward(grad, x, weight, options, wanted):
    """(gradient of x, of weight), each None where it is not wanted; all are [N, C, H, W]."""
    if not any(wanted):
        return None, None
    x, weight, stride = x.to(grad.dtype), channels_last(weight.to(grad.dtype)), options.stride
    # On a CPU oneDNN's convolution is as fast as MKL's product, and faster where MKL leaves AVX-512
    # out. It has none in float64, and that of PyTorch 2.11 crashes at stride 2 and few channels.
    products = grad.is_cuda or grad.dtype == torch.float64 or stride != (1, 1)
    if products and weight.shape[2:] == (1, 1) and options.padding == (0, 0):
        seen = x if stride == (1, 1) else x[:, :, :: stride[0], :: stride[1]]
        # rows of channels, and matrix products of them
        pixels, grad_weight = grad.permute(0, 2, 3, 1).flatten(0, 2), None
        if wanted[1]:
            sums = sum_over_rows(pixels, seen.permute(0, 2, 3, 1).flatten(0, 2))
            grad_weight = sums.view_as(weight)
        if not wanted[0]:
            return None, grad_weight
        N, C, H, W = seen.shape
        grad_seen = torch.mm(pixels, weight.flatten(1)).view(N, H, W, C).permute(0, 3, 1, 2)
        if stride == (1, 1):
            return grad_seen, grad_weight
        grad_x = torch.zeros_like(x)
        grad_x[:, :, :: stride[0], :: stride[1]] = grad_seen
        return grad_x, grad_weight
    args = (None, stride, options.padding, [1, 1], False, [0, 0], 1, [*wanted, False])
    return aten.convolution_backward(grad, x, weight, *args)[:2]


def sum_over_rows(a, b):
    """a.t() @ b, on a GPU in float32 sums: those in float16 are too coarse for so many rows."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16) and MM_TO_FLOAT32:
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    return a.t() @ b


def update_statistics(convs, bns, norm, sign):
    """Update running statistics as BatchNorm does."""
    if sign is not None:
        norm = torch.stack([norm[0] * sign, norm[1]])
    start = 0
    for conv, bn in zip(convs, bns, strict=True):
        running = bn.running_mean, bn.running_var, bn.num_batches_tracked
        ops.update(norm, start, conv.bias, float(bn.momentum), *running)
        start += bn.num_features


def running_affine(y, convs, bns, sign):
    """[2, C]: scale and shift of y by the running statistics of all layers."""
    affine, start = y.new_empty(2, y.shape[1], dtype=bns[0].weight.dtype), 0
    for conv, bn in zip(convs, bns, strict=True):
        mean, bias, gamma, eps = bn.running_mean, conv.bias, bn.weight, float(bn.eps)
        if sign is not None:  # of a layer alone
            mean, gamma = mean * sign, gamma * sign
            bias = None if bias is None else bias * sign
        ops.running_norm(affine, start, mean, bn.running_var, bias, gamma, bn.bias, eps)
        start += bn.num_features
    return affine
