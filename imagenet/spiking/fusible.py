"""Which layers the fused path of layer.py can stand for: all that it knows exactly, no others."""

import torch
from torch import nn

from . import compiler
from .compiler import say
from .neuron import MultiStep, MultiStepIF, MultiStepLIF, MultiStepPLIF
from .ops import constants_of, observed

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


@torch.compiler.assume_constant_result
def say_once(line):
    say(line)


def can_fuse(x, convs, bns, lifs):
    """Whether the fused path computes what these layers, which all read x, compute."""
    if not all(getattr(lif, "fused", True) for lif in lifs) or x.device.type not in ("cpu", "cuda"):
        return False
    for reason in (observed(), *map(changed, (*convs, *bns, *lifs))):
        if reason is not None:
            say_plain(describe(convs[0]), reason)
            return False
    if x.dim() != 5 or not x.numel() or len(x) > compiler.MAX_T:
        return False
    common, *others = [settings(*layer) for layer in zip(convs, bns, lifs, strict=True)]
    if common is None or any(theirs != common for theirs in others):
        return False
    if bns[0].training and isinstance(bns[0], nn.SyncBatchNorm):
        say_once("layers with SyncBatchNorm run module by module in training")
        return False
    if not bns[0].training and torch.is_grad_enabled():  # frozen statistics: no fused backward pass
        return False
    dtype = autocast_type(x)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    for conv, bn in zip(convs, bns, strict=True):  # kernels read rows in the type they compute in
        for row in (bn.weight, bn.bias, bn.running_mean, bn.running_var, conv.bias):
            if row is not None and not (row.dtype == real and row.is_contiguous()):
                return False
    neuron = constants_of(*lifs[0].constants()).neuron
    return compiler.available(x.device.type, dtype, lifs[0].backend, len(x), neuron)


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
    tokens = isinstance(conv, nn.Conv1d)
    if isinstance(conv.padding, str) or tokens != isinstance(bn, nn.BatchNorm1d):
        return None
    if tokens and (*conv.kernel_size, *conv.stride, *conv.padding) != (1, 1, 0):
        return None
    shape = type(conv), conv.kernel_size, conv.stride, conv.padding, conv.bias is None
    tau = lif.tau if lif.kind == "lif" else None  # PLIF's differ, and are tensors
    neuron = lif.kind, tau, lif.v_threshold, lif.alpha, lif.surrogate
    return *shape, bn.training, bn.eps, *neuron, lif.backend, lif.memory, lif.events


def autocast_type(x):
    """x's type, or autocast's where that is on; it leaves float64 alone."""
    on = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if on else x.dtype
