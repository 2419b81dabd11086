"""Layers with membrane shortcuts: convolution and BatchNorm of a neuron's spikes.

A shortcut ends between BatchNorm and the next neuron, so there the two can't be one layer as in
conv_bn_lif of layer.py: the neuron is alone (neuron.py), and so are these. They run fused where
layer.py's layers do, and save the convolution's output and, as bytes, the spikes that it reads.
"""

from .fusible import can_fuse
from .layer import fused_layers, plain_conv_bn


def conv_bn(x, conv, bn, lif, pool=False):
    """Spikes or images [T, B, C, H, W] -> membrane inputs [T, B, C', H', W'].

    Args:
        conv, bn: the layer's modules; a Conv1d gets the H*W tokens as one dimension.
        lif: the neuron before them; the layer runs fused only where this neuron may, too.
        pool: whether a 3x3 max-pool of stride 2 follows BatchNorm.
    """
    if can_fuse(x, [conv], [bn], [lif]):
        return fused_layers(x, [conv], [bn], [lif], pool, fires=False)
    return plain_conv_bn(x, conv, bn, pool)
