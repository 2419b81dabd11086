"""Which layers the fused path of layer.py can stand for: all that it knows exactly, no others."""

import functools
from typing import NamedTuple

import torch
from torch import nn

from . import compiler
from .compiler import say
from .neuron import MultiStep, MultiStepIF, MultiStepLIF, MultiStepPLIF
from .ops import Constants, constants_of, observed

# The methods that the fused path replaces. A module that overrides one of them is called instead.
METHODS = {
    nn.Conv1d: ("forward", "_conv_forward"),
    nn.Conv2d: ("forward", "_conv_forward"),
    nn.Linear: ("forward",),
    nn.BatchNorm1d: ("forward",),
    nn.BatchNorm2d: ("forward",),
    nn.SyncBatchNorm: ("forward",),
    MultiStepLIF: ("forward", "multi_step_forward"),
    MultiStepIF: ("forward", "multi_step_forward"),
    MultiStepPLIF: ("forward", "multi_step_forward"),
}
KNOWN = {kind: {name: getattr(kind, name) for name in names} for kind, names in METHODS.items()}

reasons = {}  # {why layers run module by module: the first of them}


@torch.compiler.assume_constant_result
def say_plain(layer, reason):
    if reason and reasons.setdefault(reason, layer) == layer:
        say(f"{layer} and layers like it run module by module: {reason}")


class Layer(NamedTuple):
    """What layers that read the same x have in common.

    pointwise: whether their kernels are one pixel, taken at each. small: whether the convolution is
    computed again in the backward pass. events: whether it may be one of events.py.
    """

    stride: tuple
    padding: tuple
    pointwise: bool
    training: bool
    eps: float
    neuron: Constants
    backend: str
    small: bool
    events: bool


def can_fuse(x, convs, bns, lifs):
    """(Layer, the type to compute in, tensors of each layer) if the fused path computes what these
    layers, which all read x, compute; or None. All that may change is looked at in each call.

    The tensors: (weight, bias, gamma, beta, running mean and variance, number of batches).
    """
    device_type = x.device.type
    if device_type not in ("cpu", "cuda") or not all(getattr(lif, "fused", True) for lif in lifs):
        return None
    for reason in (observed(), *map(changed, (*convs, *bns, *lifs))):
        if reason is not None:
            say_plain(describe(convs[0]), reason)
            return None
    if x.dim() != 5 or not x.numel() or len(x) > compiler.MAX_T:
        return None
    common, *others = map(settings, convs, bns, lifs)
    if common is None or any(theirs != common for theirs in others):
        return None
    layer = (layer_of.__wrapped__ if torch.compiler.is_compiling() else layer_of)(common)
    if layer.training and isinstance(bns[0], nn.SyncBatchNorm):
        say("layers with SyncBatchNorm run module by module in training")
        return None
    if not layer.training and torch.is_grad_enabled():  # frozen statistics: no fused backward pass
        return None
    dtype, tensors = autocast_type(x), []
    real = torch.float64 if dtype == torch.float64 else torch.float32
    for conv, bn in zip(convs, bns, strict=True):
        rows = conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var
        for row in rows:  # kernels read them in the type they compute in
            if row is not None and not (row.dtype == real and row.is_contiguous()):
                return None
        tensors.append((conv.weight, *rows, bn.num_batches_tracked))
    args = layer.backend, len(x), layer.neuron.neuron
    return (layer, dtype, tensors) if compiler.available(device_type, dtype, *args) else None


def changed(module):
    """None where the fused path may replace a module, else the reason; "" is one not to log."""
    kind, own = type(module), module.__dict__
    if kind not in KNOWN:
        return f"it has a {kind.__name__}, which is called as it is"
    for name, known in KNOWN[kind].items():
        if name in own or getattr(kind, name) is not known:
            return f"its {kind.__name__} has a forward of its own"
    if module._forward_pre_hooks:
        return f"its {kind.__name__} has hooks that run before it"
    if module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
        return ""  # such as a monitor's; no line each time
    if isinstance(module, MultiStep) and not module.is_usual():
        return f"its {kind.__name__} has attributes that no kernel knows"
    return None


def describe(conv):
    sizes = (getattr(conv, name, "?") for name in ("in_channels", "out_channels", "kernel_size"))
    return f"{type(conv).__name__}({', '.join(map(str, sizes))})"


def settings(conv, bn, lif):
    """What layers joined into one must have in common; None for a layer that can't run fused."""
    if bn.momentum is None or bn.running_mean is None or bn.weight is None:
        return None
    if conv.dilation not in ((1,), (1, 1)) or conv.groups != 1 or conv.padding_mode != "zeros":
        return None
    tokens, shape = isinstance(conv, nn.Conv1d), (conv.kernel_size, conv.stride, conv.padding)
    if any(type(sizes) is not tuple for sizes in shape) or tokens != isinstance(bn, nn.BatchNorm1d):
        return None
    if tokens and shape != ((1,), (1,), (0,)):
        return None
    tau = float(lif.tau) if lif.kind == "lif" else 0.0  # PLIF's differ, and are tensors
    neuron = tau, float(lif.v_threshold), float(lif.alpha), lif.kind, None, lif.surrogate
    way = lif.backend, lif.memory, lif.events
    return tokens, *shape, conv.bias is None, bn.training, float(bn.eps), neuron, *way


@functools.lru_cache(1024)
def layer_of(settings):
    """The Layer of what `settings` returns: numbers and words, which stay what they are."""
    tokens, kernel, stride, padding, _, training, eps, neuron, backend, memory, events = settings
    if tokens:
        kernel, stride, padding = (1, 1), (1, 1), (0, 0)
    pointwise = (*kernel, *stride, *padding) == (1, 1, 1, 1, 0, 0)
    neuron, small = constants_of(*neuron), memory == "small"
    return Layer(stride, padding, pointwise, training, eps, neuron, backend, small, events)


def autocast_type(x):
    """x's type, or autocast's where that is on; it leaves float64 alone."""
    device_type, dtype = x.device.type, x.dtype
    on = torch.is_autocast_enabled(device_type) and dtype != torch.float64
    return torch.get_autocast_dtype(device_type) if on else dtype
