"""The spiking neuron and the layers made of it; the same in every data set folder.

plain.py says what is computed, in PyTorch alone. The rest computes it in less time and memory:
neuron.py the neurons, layer.py the layers, spikes.py what the backward pass keeps, fusible.py which
layers may run fused, and native.py calls layer.cpp, which computes them.
"""

from .layer import conv_bn, conv_bn_lif, conv_bn_lif_each, linear
from .neuron import MultiStepLIF, neuron_maker
from .plain import Stages
from .spikes import add, matmul

__all__ = [
    "MultiStepLIF",
    "Stages",
    "add",
    "conv_bn",
    "conv_bn_lif",
    "conv_bn_lif_each",
    "linear",
    "matmul",
    "neuron_maker",
]
