"""Which layers the fused path of layer.py can stand for: all that it knows exactly, no others."""

from operator import is_
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .compiler import say
from .native import Constants, available, constants_of
from .neuron import MultiStep, MultiStepIF, MultiStepLIF, MultiStepPLIF
from .observers import PLAIN, observed
from .plain import membrane_type

KINDS = nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm
KINDS += MultiStepLIF, MultiStepIF, MultiStepPLIF  # none that a user adds to NEURONS
# The methods that the fused path replaces. A module that overrides one of them is called instead.
METHODS = ("forward", "_conv_forward", "multi_step_forward")
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
DICTIONARIES = ("_parameters", "_buffers", "_modules")
KNOWN = {
    kind: {name: getattr(kind, name) for name in METHODS if hasattr(kind, name)} for kind in KINDS
}

reasons = {}  # {why layers run module by module: the first of them}


def say_plain(layer, reason):
    if reason and reasons.setdefault(reason, layer) == layer:
        say(f"{layer} and layers like it run module by module: {reason}")


class Layer(NamedTuple):
    """What layers that read the same x, and are joined, have in common.

    tokens: whether the convolution is a Conv1d. small: whether it is computed again in the backward
    pass. events: whether it may be a sum of events.
    """

    tokens: bool
    kernel: tuple
    stride: tuple
    padding: tuple
    has_bias: bool
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
    device, device_type = x.device, x.device.type
    if device_type not in ("cpu", "cuda") or x.dim() != 5 or not x.numel():
        return None
    if (reason := observed(x)) is not None:
        if all(getattr(lif, "fused", True) for lif in lifs):
            say_plain(describe(convs[0]), reason)
        return None
    found = remember(convs, bns, lifs)
    if found is None:
        return None
    layer, tensors = found
    if not layer.training and torch.is_grad_enabled():  # frozen statistics: no fused backward pass
        return None
    dtype, real, cast = x.dtype, membrane_type(x), torch.is_autocast_enabled(device_type)
    if cast and dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(device_type)
    for weight, *rows, batches in tensors:
        channels = weight.shape[:1]
        if weight.device != device or not (cast or weight.dtype == dtype):
            return None
        if batches.device != device or batches.dtype != torch.int64:
            return None
        for row in rows:  # kernels read them as they are; where one does not fit PyTorch says so
            if row is None:
                continue
            fits = row.dtype == real and row.shape == channels and row.device == device
            if not fits or not row.is_contiguous():
                return None
    args = layer.backend, len(x), layer.neuron.neuron
    return (layer, dtype, tensors) if available(device_type, dtype, *args) else None


def look(convs, bns, lifs):
    """(Layer, tensors of each layer) if the modules may be joined and run fused, or None."""
    if not all(getattr(lif, "fused", True) for lif in lifs):
        return None
    for reason in map(changed, (*convs, *bns, *lifs)):
        if reason is not None:
            say_plain(describe(convs[0]), reason)
            return None
    layer, *others = map(layer_of, convs, bns, lifs)
    if layer is None:
        say_plain(describe(convs[0]), "kernels know no such convolution, BatchNorm or neuron")
    if layer is None or any(other != layer for other in others):
        return None
    if layer.training and isinstance(bns[0], nn.SyncBatchNorm):
        say("layers with SyncBatchNorm run module by module in training")
        return None
    tensors = []
    for conv, bn in zip(convs, bns, strict=True):
        running = bn.running_mean, bn.running_var, bn.num_batches_tracked
        tensors.append((conv.weight, conv.bias, bn.weight, bn.bias, *running))
        if any(type(tensor) not in (*PLAIN, type(None)) for tensor in tensors[-1]):
            return None
    return layer, tensors


found_of = WeakKeyDictionary()  # {first module: Found}


def remember(convs, bns, lifs):
    """`look`, which asks again only where something in the modules is another than it was."""
    modules = (*convs, *bns, *lifs)
    if (known := found_of.get(convs[0])) is not None and known.holds(modules):
        return known.found
    found = look(convs, bns, lifs)
    shared = convs[0] in modules[1:]  # Found would keep it alive
    if found is not None and not shared and not any(map(holds_arrays, modules)):
        found_of[convs[0]] = Found(found, modules)
    return found


class Found:
    """What `look` has found, and all that it read of the modules."""

    def __init__(self, found, modules):
        self.found, self.others = found, modules[1:]  # nothing may keep the first alive
        self.parts = [part for module in self.others for part in module.modules()]
        self.kinds = [*map(type, (modules[0], *self.parts))]
        kinds = {*map(type, modules)}
        self.methods = [(kind, name) for kind in kinds for name in KNOWN[kind]]
        self.hooks = [getattr(module, name) for module in modules for name in HOOKS]
        own = [vars(part) for module in modules for part in module.modules()]
        own += [getattr(module, name) for module in modules for name in DICTIONARIES]
        own += [node._memories for node in modules if isinstance(node, MultiStep)]
        self.own = [(values, [*values.values()]) for values in own]

    def holds(self, modules):
        """Whether all is as it was."""
        if modules[1:] != self.others or any(self.hooks):
            return False
        if [*map(type, (modules[0], *self.parts))] != self.kinds:
            return False
        for kind, name in self.methods:
            if getattr(kind, name) is not KNOWN[kind][name]:
                return False
        for own, values in self.own:
            if len(own) != len(values) or not all(map(is_, own.values(), values)):
                return False
        return True


def holds_arrays(module):
    """Whether attributes, such as a threshold, are tensors, arrays or lists, which may change."""
    values = [value for each in module.modules() for value in vars(each).values()]
    if isinstance(module, MultiStep) and module.state_dict().keys() - {"w"}:
        return True  # such as a tau that is a parameter
    return any(hasattr(value, "__setitem__") and not isinstance(value, dict) for value in values)


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
    if any(getattr(module, name) for name in HOOKS):
        return ""  # such as a monitor's; no line each time
    if isinstance(module, MultiStep) and not module.is_usual():
        return f"its {kind.__name__} has attributes that no kernel knows"
    return None


def describe(conv):
    sizes = (getattr(conv, name, "?") for name in ("in_channels", "out_channels", "kernel_size"))
    return f"{type(conv).__name__}({', '.join(map(str, sizes))})"


def layer_of(conv, bn, lif):
    """The Layer of modules that `changed` lets pass; None if they can't run fused."""
    needed = bn.momentum, bn.running_mean, bn.num_batches_tracked, bn.weight, bn.bias
    if any(each is None for each in needed) or not bn.track_running_stats:
        return None
    if conv.dilation not in ((1,), (1, 1)) or conv.groups != 1 or conv.padding_mode != "zeros":
        return None
    tokens, shape = isinstance(conv, nn.Conv1d), (conv.kernel_size, conv.stride, conv.padding)
    if any(type(sizes) is not tuple for sizes in shape) or tokens != isinstance(bn, nn.BatchNorm1d):
        return None
    if (tokens and shape != ((1,), (1,), (0,))) or (lif.kind == "plif" and lif.w.dim()):
        return None
    kernel, stride, padding = ((1, 1), (1, 1), (0, 0)) if tokens else shape
    of_conv = tokens, kernel, stride, padding, conv.bias is not None
    of_bn = bn.training, float(bn.eps)
    of_lif = constants_of(*lif.constants()), lif.backend, lif.memory == "small", lif.events
    return Layer(*of_conv, *of_bn, *of_lif)
