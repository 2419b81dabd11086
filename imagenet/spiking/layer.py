"""A layer of the network: convolution, BatchNorm over T*B samples, max-pool (or none), LIF over T.

`conv_bn_lif` calls the modules one after another or, where it can, takes the fused path, one call
of layer.cpp. That works in channels_last, shows a static image once instead of T times, and
normalises, integrates and fires in one pass over memory. On a CPU convolutions of spikes add up
rows of the weight. For the backward pass it saves the layer's input, spikes as bits or bytes
(spikes.py), and, unless the neuron's `memory` is small, the convolution's output.

Both compute the same, to rounding; fusible.py knows the modules that the fused path stands for.
"""

import torch

from . import native, plain
from .compiler import events_available
from .fusible import can_fuse
from .observers import observed
from .plain import rate_of
from .spikes import largest, mark, masked, save, wants_bytes


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
        each = spikes.split([len(conv.weight) for conv in convs], dim=-1)
        if heads is None:
            return [part.movedim(-1, 2) for part in each]
        return [part.unflatten(-1, (heads, -1)) for part in each]
    return [plain.in_heads(conv_bn_lif(x, *layer), heads) for layer in layers]


def linear(x, layer):
    """layer(x) of [N, features]; in evaluation on a CPU row by row, so that the bits of one do not
    depend on the others.
    """
    rows = x.device.type == "cpu" and x.dim() == 2 and len(x) and not layer.training
    plain = type(layer) is torch.nn.Linear and "forward" not in vars(layer)
    plain = plain and not layer._forward_hooks and not layer._forward_pre_hooks
    if not rows or not plain or torch.is_grad_enabled() or observed(x) is not None:
        return layer(x)
    return torch.cat([layer(row.clone()) for row in x.split(1)])


# The fused path -----------------------------------------------------------------------------------


def fused_layers(x, bns, lifs, layer, dtype, tensors, pool=False, fires=True):
    """Spikes of all layers, joined along the channels; parameters stay in their modules. With
    fires=False what their neurons would get.

    layer, dtype, tensors: see can_fuse.
    """
    T, x = len(x), native.shown_once(x)
    rates = None
    if fires and lifs[0].kind == "plif":
        pairs = zip(lifs, tensors, strict=True)
        rates = torch.cat([rate_of(x, lif.w).expand(len(weight)) for lif, (weight, *_) in pairs])
    by_events = layer.events and takes_events(x, tensors[0][0], dtype, layer.training)
    momenta = tuple([float(bn.momentum) for bn in bns])
    saved = save(x) if layer.training and wants_bytes() else None
    options = layer, dtype, T, pool, fires, by_events, momenta
    out, *small = native.layer(x, saved, rates, tensors, options)
    if small:
        mark(out, 1, small[0])
    return out if fires else out.expand(T, -1, -1, -1, -1)


def takes_events(x, weight, dtype, training):
    """Whether the convolution of x is a sum of events: in training where x is spikes, or frames
    that differ from step to step. In evaluation always: its sums do not depend on the batch.
    """
    if not x.dtype == weight.dtype == dtype or not events_available(x.device.type, x.dtype):
        return False
    if x.shape[2] != weight.shape[1]:  # PyTorch's convolution says what is wrong
        return False
    frames = len(x) > 1 and not x.requires_grad  # of event data
    return not training or largest(x) is not None or frames
