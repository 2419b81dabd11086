"""What all of spiking/ computes, in plain PyTorch: the spiking neuron and the layers made of it.

    charge   LIF:   h[t] = v[t-1] + (x[t] - v[t-1]) / tau
             IF:    h[t] = v[t-1] + x[t]
             PLIF:  h[t] = v[t-1] + (x[t] - v[t-1]) * sigmoid(w), where the layer learns w
    fire            s[t] = 1 if h[t] >= v_threshold else 0
    reset           v[t] = 0 if s[t] else h[t]; detached: no gradient through s here

v[-1] = 0 in every call. The surrogate gradient is that of a sigmoid with slope alpha:
ds/dh = alpha * g * (1 - g), g = sigmoid(alpha * (h - v_threshold)). The membrane is kept in float32
(float64 for float64 input), whatever the type of the input. Tensors are [T, B, C, H, W].

A copy of this file, named spiking.py, beside model.py is all that a model needs besides torch and
timm; the rest of the folder computes the same in less time and memory.
"""

import math
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

ALPHA = 4.0


def membrane_type(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rate_of(x, w):
    """sigmoid(w) of a PLIF neuron in the membrane's type; None of the others."""
    return None if w is None else w.to(membrane_type(x)).sigmoid()


class TorchLIF(torch.autograd.Function):
    """(x, PLIF's rate or None, tau, v_threshold, alpha, kind) -> spikes of x's shape and type."""

    @staticmethod
    def forward(ctx, x, rate, tau, v_threshold, alpha, kind):
        h = torch.empty_like(x, dtype=membrane_type(x))
        v = torch.zeros_like(h[0])
        # A tensor, not a number: on CUDA, x / number is x * (1 / number), which rounds differently.
        divisor = h.new_full((), tau)
        for t in range(len(x)):
            if kind == "if":
                torch.add(x[t], v, out=h[t])
            elif kind == "lif":
                torch.sub(x[t], v, out=h[t]).div_(divisor).add_(v)
            else:
                torch.sub(x[t], v, out=h[t]).mul_(rate).add_(v)
            v = h[t].masked_fill(h[t] >= v_threshold, 0.0)
        ctx.save_for_backward(h, *((x, rate) if kind == "plif" else ()))
        ctx.constants, ctx.dtype = (tau, v_threshold, alpha, kind), x.dtype
        return (h >= v_threshold).to(x.dtype)

    @staticmethod
    def backward(ctx, grad_spikes):
        h, *charges = ctx.saved_tensors
        tau, v_threshold, alpha, kind = ctx.constants
        g = torch.sub(h, v_threshold).mul_(alpha).sigmoid_()
        grad_h = torch.sub(1.0, g).mul_(g).mul_(alpha).mul_(grad_spikes)
        kept = 1.0 if kind == "if" else 1.0 - 1.0 / tau if kind == "lif" else 1.0 - charges[1]
        for t in range(len(h) - 2, -1, -1):  # step t+1 saw v[t] = h[t], unless step t fired
            grad_v = grad_h[t + 1] * kept
            grad_h[t].add_(grad_v.masked_fill_(h[t] >= v_threshold, 0.0))
        if kind != "plif":
            grad_x = grad_h if kind == "if" else grad_h.div_(tau)
            return grad_x.to(ctx.dtype), None, None, None, None, None
        x, rate = charges
        v = h.masked_fill(h >= v_threshold, 0.0).roll(1, 0)  # v[t-1]
        v[0] = 0.0
        grad_rate = v.neg_().add_(x).mul_(grad_h).sum(dtype=torch.float64).to(rate.dtype)
        return grad_h.mul_(rate).to(ctx.dtype), grad_rate, None, None, None, None


def torch_lif(x, tau, v_threshold, alpha=ALPHA, kind="lif", w=None):
    """Spikes of x, [T, ...]."""
    return TorchLIF.apply(x, rate_of(x, w), tau, v_threshold, alpha, kind)


def check(tau, v_threshold, alpha):
    """ValueError for a neuron that can't be."""
    if tau <= 1.0:
        raise ValueError(f"tau is {tau}; it must be larger than 1")
    for name, value in (("v_threshold", v_threshold), ("alpha", alpha)):
        if value <= 0.0:
            raise ValueError(f"{name} is {value}; it must be larger than 0")


class MultiStepLIF(nn.Module):
    """The neuron as a module. Arguments: see MultiStep in neuron.py; backend, fused and byte_spikes
    choose between ways to compute the same, of which there is one here.
    """

    kind = "lif"

    def __init__(
        self, tau=2.0, v_threshold=1.0, backend="auto", fused=True, alpha=ALPHA, byte_spikes=True
    ):
        super().__init__()
        check(tau, v_threshold, alpha)
        self.tau, self.v_threshold, self.alpha, self.w = tau, v_threshold, alpha, None
        if self.kind == "plif":
            self.w = nn.Parameter(torch.tensor(-math.log(tau - 1.0)))

    def forward(self, x):
        return torch_lif(x, self.tau, self.v_threshold, self.alpha, self.kind, self.w)


class MultiStepIF(MultiStepLIF):
    kind = "if"


class MultiStepPLIF(MultiStepLIF):
    kind = "plif"


NEURONS = {"lif": MultiStepLIF, "if": MultiStepIF, "plif": MultiStepPLIF}


def neuron_maker(
    neuron="lif",
    tau=2.0,
    v_threshold=1.0,
    surrogate_alpha=ALPHA,
    backend="auto",
    fused=True,
    byte_spikes=True,
    kinds=NEURONS,
):
    """What makes a model's neurons, called with no argument.

    `neuron` is a key of `kinds`, or a class that takes the arguments of MultiStepLIF, which the
    others are. ValueError for an unknown neuron, and for a tau of neurons that have none.
    """
    kind = kinds.get(neuron, neuron)
    if not callable(kind):
        raise ValueError(f"neuron is {neuron!r}; it must be one of {', '.join(kinds)}")
    if neuron == "if" and tau != 2.0:
        raise ValueError(f"tau is {tau}, but the neuron `if` has no time constant; leave tau out")
    return partial(kind, tau, v_threshold, backend, fused, surrogate_alpha, byte_spikes)


# Layers -------------------------------------------------------------------------------------------


def add(x, y):
    return x + y


def matmul(a, b):
    return a @ b


def masked(x, mask):
    """x [T, B, C, H, W], each head of it multiplied with mask [T, B, heads, 1 or channels, H or 1,
    W or 1].
    """
    return (x.unflatten(2, (mask.shape[2], -1)) * mask).flatten(2, 3)


def conv_bn(x, conv, bn, lif=None, pool=False, mask=None):
    """bn(conv(x)) of all T*B samples; a Conv1d gets the H*W tokens as one dimension. `pool`: a 3x3
    max-pool of stride 2 comes last. `mask`: see masked. `lif`, the neuron before, is not used.
    """
    x = x if mask is None else masked(x, mask)
    steps, space = x.shape[:2], x.shape[3:]
    x = x.flatten(0, 1)
    x = bn(conv(x.flatten(2))).unflatten(2, space) if isinstance(conv, nn.Conv1d) else bn(conv(x))
    x = F.max_pool2d(x, 3, 2, 1) if pool else x
    return x.unflatten(0, steps)


def conv_bn_lif(x, conv, bn, lif, pool=False, mask=None):
    return lif(conv_bn(x, conv, bn, lif, pool, mask))


def conv_bn_lif_each(x, *layers):
    return [conv_bn_lif(x, *layer) for layer in layers]


# Activations computed again -----------------------------------------------------------------------


def checkpointed(module, x, run=None):
    """module(x), or run(x); only x is kept for the backward pass, which computes the rest again."""
    contexts = partial(recomputing, module)
    return checkpoint(run or module, x, use_reentrant=False, context_fn=contexts)


def recomputing(module):
    return nullcontext(), Recomputation(module)


class Recomputation:
    """Context in which BatchNorms see a batch again without counting it in running statistics."""

    def __init__(self, module):
        self.bns = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def __enter__(self):
        self.kept = [(bn.momentum, bn.num_batches_tracked.clone()) for bn in self.bns]
        for bn in self.bns:
            bn.momentum = 0.0

    def __exit__(self, *error):
        for bn, (momentum, batches) in zip(self.bns, self.kept, strict=True):
            bn.momentum = momentum
            bn.num_batches_tracked.copy_(batches)
