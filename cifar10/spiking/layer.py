"""A layer of the network: convolution, BatchNorm over T*B samples, max-pool (or none), LIF over T.

`conv_bn_lif` calls the modules one after another or, where it can, takes the fused path, one
function of autograd. That works in channels_last, shows a static image once instead of T times, and
normalises, integrates and fires in one pass over memory (ops.py). On a CPU convolutions of spikes
add up rows of the weight (events.py); on a GPU a layer is one call (native.py). For the backward
pass it saves the layer's input, spikes as bits or bytes (spikes.py), and, unless the neuron's
`memory` is small, the convolution's output.

Both paths compute the same function, to rounding. The fused path does not call the modules, so it
is taken only where each module has exactly the type and the methods that it knows (fusible.py).
"""

from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import events, native, ops, plain
from .compiler import is_called_as_operator
from .fusible import Layer, autocast_type, can_fuse, changed
from .ops import channels_last, rows
from .spikes import largest, masked, save, set_mark, wants_bytes

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
    if found := can_fuse(x, [conv], [bn], [lif]):
        return fused_layers(x, [bn], [lif], *found, pool)
    return plain.conv_bn_lif(x, conv, bn, lif, pool)


def conv_bn(x, conv, bn, lif, pool=False, mask=None):
    """Spikes or images [T, B, C, H, W] -> membrane inputs [T, B, C', H', W'], for layers with
    membrane shortcuts, which end between BatchNorm and the next neuron.

    Args:
        conv, bn, pool, mask: see conv_bn_lif.
        lif: the neuron before them; the layer runs fused only where this neuron may, too.
    """
    x = x if mask is None else masked(x, mask)
    if found := can_fuse(x, [conv], [bn], [lif]):
        return fused_layers(x, [bn], [lif], *found, pool, fires=False)
    return plain.conv_bn(x, conv, bn, lif, pool)


def conv_bn_lif_each(x, *layers, heads=None):
    """[spikes of each (conv, bn, lif)] for one x, as q, k, v do; fused, one convolution. With
    `heads` each as [T, B, H, W, heads, channels].
    """
    convs, bns, lifs = zip(*layers, strict=True)
    if found := can_fuse(x, convs, bns, lifs):
        # With channels last in the split too, the gradients are joined without a copy.
        spikes = fused_layers(x, bns, lifs, *found).movedim(2, -1)
        each = spikes.split([bn.num_features for bn in bns], dim=-1)
        if heads is None:
            return [part.movedim(-1, 2) for part in each]
        return [part.unflatten(-1, (heads, -1)) for part in each]
    return [plain.in_heads(conv_bn_lif(x, *layer), heads) for layer in layers]


def linear(x, layer, lif):
    """layer(x) of [N, features]. In evaluation on a CPU the sums of a row do not depend on the
    others, nor on their number. `lif`: what makes the model's neurons.
    """
    may = lif.keywords["fused"] and lif.keywords["events"] and type(layer) is torch.nn.Linear
    if layer.training or torch.is_grad_enabled() or not may or changed(layer) is not None:
        return layer(x)
    maps, weight = x[:, :, None, None], layer.weight[:, :, None, None]
    by_events = x.numel() and ops.observed() is None
    if not by_events or not takes_events(maps, weight, autocast_type(x), False):
        return layer(x)
    y = events.convolve(channels_last(maps), weight, (1, 1), (0, 0)).flatten(1)
    return y if layer.bias is None else y + layer.bias


# The fused path -----------------------------------------------------------------------------------


class Options(NamedTuple):
    """What ConvBNLIF needs besides tensors.

    T: steps of the spikes. layer: see Layer in fusible.py. pool: whether a max-pool comes behind
    BatchNorm. fires: whether a neuron comes last. save_bytes: whether the spikes are wanted as
    bytes too. events: whether the convolution is one of events.py. product: whether it is a product
    of matrices, of [pixels, channels]. dtype: that the layer computes in. momenta: of BatchNorms.
    """

    T: int
    layer: Layer
    pool: bool
    fires: bool
    save_bytes: bool
    events: bool
    product: bool
    dtype: torch.dtype
    momenta: tuple


def fused_layers(x, bns, lifs, layer, dtype, tensors, pool=False, fires=True):
    """Spikes of all layers, joined along the channels; parameters stay in their modules. With
    fires=False what their neurons would get.

    layer, dtype, tensors: see can_fuse.
    """
    T = x.shape[0]
    if x.stride(0) == 0:  # the same image at every step
        x = x[:1]
    rates = None
    if fires and lifs[0].kind == "plif":
        pairs = zip(lifs, tensors, strict=True)
        rates = join([ops.rates_of(lif, x, weight.shape[0]) for lif, (weight, *_) in pairs])
    by_events = layer.events and takes_events(x, tensors[0][0], dtype, layer.training)
    product = not by_events and not pool and takes_product(x, layer)
    bytes_too = fires and wants_bytes()
    momenta = tuple([float(bn.momentum) for bn in bns])
    options = Options(T, layer, pool, fires, bytes_too, by_events, product, dtype, momenta)
    if native.takes(x):
        saved = save(x) if layer.training and torch.is_grad_enabled() else None
        out, *small = native.layer(x, saved, rates, options, tensors)
        if small:
            set_mark(out, 1, small[0])
    elif layer.training:
        out = ConvBNLIF.apply(x, rates, options, *chain(*tensors))
    else:
        out = in_evaluation(x, rates, options, tensors)
    return out if fires else steps(out, x.shape).expand(T, -1, -1, -1, -1)


def in_evaluation(x, rates, options, tensors):
    """As ConvBNLIF, by the running statistics."""
    y, layer = convolve(x, kernel_of(weight_of(tensors), options), options)[0], options.layer
    norm, start = y.new_empty(5, y.shape[1], dtype=ops.real(y)), 0
    for weight, bias, gamma, beta, mean, var, _ in tensors:
        ops.running_norm(norm, start, mean, var, bias, gamma, beta, layer.eps)
        start += weight.shape[0]
    y = ops.pool(y, norm, False)[0] if options.pool else y
    if not options.fires:
        return ops.normalise(y, norm)
    if x.shape[0] < options.T:
        shape = (options.T, *sizes(y, x.shape))
        return ops.fire(y, shape, norm, rates, *layer.neuron[:3], False)[0]
    ops.fire_(y, options.T, norm, rates, *layer.neuron[:3])  # over y, which no gradient needs
    return steps(y, x.shape)


def weight_of(tensors):
    """The weights of all layers, joined."""
    return join([own[0] for own in tensors])


def kernel_of(weight, options):
    """The weight as `convolve` takes it: a matrix for a product, else that of a Conv2d."""
    if options.product:
        return weight.to(options.dtype).flatten(1)
    return weight if weight.dim() == 4 else weight.unsqueeze(3)


def join(tensors):
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def takes_product(x, layer):
    """Whether the convolution is a product of matrices, which the host launches in less time."""
    return layer.pointwise and x.is_cuda


def takes_events(x, weight, dtype, training):
    """Whether the convolution of x is a sum of events: in training where x is spikes, or frames
    that differ from step to step. In evaluation always: its sums do not depend on the batch.
    """
    # A mode that looks at operations, such as a graph's, would not see these.
    same = x.dtype == weight.dtype == dtype and not is_called_as_operator()
    if not same or not events.available(x.device.type, x.dtype):
        return False
    if x.shape[-3] != weight.shape[1]:  # PyTorch's convolution says what is wrong
        return False
    frames = len(x) > 1 and not x.requires_grad  # of event data
    return not training or largest(x) is not None or frames


def convolve(x, kernel, options):
    """[T, B, C, H, W] -> ([T*B, C', H', W'] in channels_last, or with `product` [T*B*H*W, C'],
    without a bias; what events.find says of x, or None).
    """
    stride, padding, dtype = options.layer.stride, options.layer.padding, options.dtype
    if options.events:
        x = rows(save(x))
        found = events.find(x, kernel.dtype) if options.layer.training else None
        return events.convolve(x, kernel, stride, padding), found
    x = x if x.dtype == dtype else x.to(dtype)
    if options.product:
        return F.linear(pixels(x), kernel), None
    kernel = kernel.to(dtype, memory_format=torch.channels_last)
    return channels_last(F.conv2d(rows(x), kernel, None, stride, padding)), None


def sizes(y, x_shape):
    """(B, C, H, W) of what `convolve` returns for an x of this shape, or of its maxima."""
    return (x_shape[1], *y.shape[1:]) if y.dim() == 4 else (x_shape[1], y.shape[1], *x_shape[3:])


def steps(y, x_shape):
    """The same as [T, B, C, H, W]."""
    B, C, H, W = sizes(y, x_shape)
    if y.dim() == 4:
        return y.view(-1, B, C, H, W)
    return y.view(-1, B, H, W, C).permute(0, 1, 4, 2, 3)


def pixels(x):
    """[T, B, C, H, W] or [N, C, H, W] -> [N*H*W, C]."""
    return x.movedim(-3, -1).reshape(-1, x.shape[-3])


class ConvBNLIF(torch.autograd.Function):
    """(x, PLIF's rates or None, options, *seven tensors of each layer, see can_fuse) -> spikes;
    without a neuron BatchNorm's output, as `convolve` returns. Running statistics move on.
    """

    @staticmethod
    def forward(ctx, x, rates, options, *tensors):
        tensors = [tensors[i : i + 7] for i in range(0, len(tensors), 7)]
        weight, layer = weight_of(tensors), options.layer
        kernel = kernel_of(weight, options)
        y, found = convolve(x, kernel, options)
        C, repeats, start = y.shape[1], options.T // x.shape[0], 0
        if repeats * y.numel() == C:
            raise ValueError(f"a single value per channel, in {list(y.shape)}, has no variance")
        partial, norm = ops.statistics(y), y.new_empty(5, C, dtype=ops.real(y))
        for each, momentum in zip(tensors, options.momenta, strict=True):
            own, bias, gamma, beta, *running = each
            args = (repeats, layer.eps, momentum, gamma, beta, bias, *running)
            ops.batch_norm(y, partial, norm, start, *args)
            start += own.shape[0]
        pooled = ops.pool(y, norm, False)[0] if options.pool else y
        if options.fires:
            args = (norm, rates, *layer.neuron[:3], options.save_bytes)
            out, small = ops.fire(pooled, (options.T, *sizes(pooled, x.shape)), *args)
            if options.save_bytes:
                set_mark(out, 1, small)
        else:
            out = ops.normalise(pooled, norm)
        ctx.options, ctx.shape, ctx.dtype = options, x.shape, x.dtype
        ctx.channels, ctx.has_bias = [own[0].shape[0] for own in tensors], tensors[0][1] is not None
        sparse = found and found[1] <= events.DENSE
        bits, x = (found[0], found[2]) if sparse else (None, save(x))
        y, kernel = None if layer.small else y, kernel if options.product else None
        ctx.save_for_backward(x, bits, y, weight, kernel, rates, norm)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, bits, y, weight, kernel, rates, norm = ctx.saved_tensors
        options, layer, shape = ctx.options, ctx.options.layer, ctx.shape
        kernel = kernel_of(weight, options) if kernel is None else kernel
        if bits is not None:
            shape = shape[0] * shape[1], *shape[2:]
            args = kernel, layer.stride, layer.padding
        if layer.small:
            if bits is not None:
                y = events.convolve(events.unpack(shape, bits, x, weight.dtype), *args)
            else:
                y = convolve(x, kernel, options)[0]
        # It is so, unless a hook on saved tensors has changed the layout.
        y = y.contiguous() if options.product else channels_last(y)
        pooled, taps = ops.pool(y, norm, True) if options.pool else (y, None)
        if options.fires:
            grad_spikes, grad = grad, torch.empty_like(pooled)
            partial = ops.fire_backward(grad_spikes, pooled, grad, norm, rates, *layer.neuron)
        else:
            grad = grad.contiguous() if options.product else channels_last(grad)
            partial = ops.gradient_sums(grad, pooled, norm)
        sums = ops.batch_norm_backward(partial, norm, y.numel() // y.shape[1])
        if options.pool:
            grad = ops.pool_backward(grad, taps, y, sums)
        else:
            out = grad if options.fires else torch.empty_like(y)
            ops.normalise_backward(grad, y, out, sums)
            grad = out
        wanted = ctx.needs_input_grad[0]
        if bits is not None:
            grad_weight = events.weight_gradient(shape, bits, x, grad, *args)
            # Nothing reads its values.
            x = torch.empty(shape, dtype=grad.dtype, memory_format=torch.channels_last)
            grad_x, _ = convolution_backward(grad, x, kernel, layer, [wanted, False])
        elif options.product:
            grad_weight = sum_over_rows(grad, pixels(x.to(grad.dtype)))
            grad_x = torch.mm(grad, kernel) if wanted else None
        else:
            grad_x, grad_weight = convolution_backward(grad, rows(x), kernel, layer, [wanted, True])
        if grad_x is not None:
            grad_x = steps(grad_x, ctx.shape).to(ctx.dtype)
        if grad_weight.dim() != weight.dim():
            grad_weight = grad_weight.view_as(weight)
        # In the layout of the weight, as DistributedDataParallel wants a parameter's gradient.
        if (grad_weight.dtype, grad_weight.stride()) != (weight.dtype, weight.stride()):
            grad_weight = torch.empty_like(weight).copy_(grad_weight)
        grad_beta, grad_gamma, grad_rates, *_, zeros = sums.unbind()
        # BatchNorm subtracts the bias again: its gradient is 0, in the plain path rounding errors.
        grads, found = (grad_weight, zeros, grad_gamma, grad_beta), []
        if len(ctx.channels) > 1:
            grads = zip(*(grad.split(ctx.channels) for grad in grads), strict=True)
        for grad_weight, zeros, *others in grads if len(ctx.channels) > 1 else [grads]:
            found += grad_weight, zeros if ctx.has_bias else None, *others, None, None, None
        return grad_x, None if rates is None else grad_rates, None, *found


def convolution_backward(grad, x, weight, layer, wanted):
    """(gradient of x, of weight), each None where it is not wanted; all are [N, C, H, W]."""
    if not any(wanted):
        return None, None
    x, weight, stride = x.to(grad.dtype), channels_last(weight.to(grad.dtype)), layer.stride
    # On a CPU oneDNN's convolution is as fast as MKL's product, and faster where MKL leaves AVX-512
    # out. It has none in float64, and that of PyTorch 2.11 crashes at stride 2 and few channels.
    products = grad.is_cuda or grad.dtype == torch.float64 or stride != (1, 1)
    if products and weight.shape[2:] == (1, 1) and layer.padding == (0, 0):
        seen = x if stride == (1, 1) else x[:, :, :: stride[0], :: stride[1]]
        grad, grad_weight = pixels(grad), None
        if wanted[1]:
            grad_weight = sum_over_rows(grad, pixels(seen)).view_as(weight)
        if not wanted[0]:
            return None, grad_weight
        N, C, H, W = seen.shape
        grad_seen = torch.mm(grad, weight.flatten(1)).view(N, H, W, C).permute(0, 3, 1, 2)
        if stride == (1, 1):
            return grad_seen, grad_weight
        grad_x = torch.zeros_like(x)
        grad_x[:, :, :: stride[0], :: stride[1]] = grad_seen
        return grad_x, grad_weight
    args = (None, stride, layer.padding, [1, 1], False, [0, 0], 1, [*wanted, False])
    return aten.convolution_backward(grad, x, weight, *args)[:2]


def sum_over_rows(a, b):
    """a.t() @ b, on a GPU in float32 sums: those in float16 are too coarse for so many rows."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16) and MM_TO_FLOAT32:
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    return a.t() @ b
