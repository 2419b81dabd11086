"""Spikes wait for the backward pass as bytes, a half or a quarter of the memory of floats.

Only a tensor that is marked, as holding whole numbers from 0 to 255, is saved so. A neuron marks
its spikes, `add` and `product` mark what they make of marked tensors, and a view shares the mark of
its tensor. All other operations return unmarked tensors, saved as they are, and a write in
place ends a mark. So `x + 0.5 * y` takes more memory, but its gradients are right.
"""

from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # PyTorch 2.7 has it


def traced():
    """Whether torch.export or torch.jit.trace wants a graph of PyTorch's own operators."""
    # Within torch.compile is_exporting is always true.
    exporting = is_exporting() and not torch.compiler.is_dynamo_compiling()
    return torch.jit.is_tracing() or exporting


def wants_bytes():
    """Whether spikes are marked now: something may be saved, and not by torch.compile, which does
    not see every write in place.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def mark(x, largest=1, small=None):
    """Mark x as holding whole numbers from 0 to `largest` (None: leave it unmarked); returns x.
    `small`: x as bytes, if its maker has them; None or empty.
    """
    if largest is not None and wants_bytes():
        x.spikes = largest, x._version, small
    return x


def known(x):
    """(largest value that a marked x may hold, tensor with the mark); None if x is not marked."""
    for marked in (x, x._base):
        value, version, _ = getattr(marked, "spikes", (None, None, None))
        if value is not None and version == marked._version and marked.dtype == x.dtype:
            return value, marked
    return None


def largest(x):
    """The largest value that a marked x may hold; None if x is not marked."""
    found = known(x)
    return found and found[0]


def save(x):
    """x as it is to be saved for the backward pass; `.to(dtype)` undoes it."""
    found = None if torch.compiler.is_compiling() else known(x)
    if found is None or found[0] > 255:
        return x
    small = found[1].spikes[2]
    if small is None or not small.numel():
        small = x.to(torch.uint8)
    elif found[1] is not x:
        small = small.as_strided(x.shape, x.stride(), x.storage_offset())
    # The debug mode, torch.autograd.set_detect_anomaly(True), looks at the values.
    if torch.is_anomaly_enabled() and not torch.equal(small.to(x.dtype), x):
        raise RuntimeError(
            "a tensor marked as spikes holds other values; was its .data written to?"
        )
    return small


def add(x, y):
    """x + y; the sum of spikes is known to be whole numbers."""
    known = largest(x), largest(y)
    return mark(x + y, None if None in known else sum(known))


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operator, a, b):
        ctx.operator = operator
        ctx.save_for_backward(save(a), save(b))
        return operator(a, b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        a, b = (x.to(grad.dtype) for x in ctx.saved_tensors)
        if ctx.operator is torch.matmul:
            grad_a, grad_b = grad @ b.transpose(-2, -1), a.transpose(-2, -1) @ grad
        else:
            grad_a, grad_b = grad * b, grad * a
        return None, grad_a.sum_to_size(a.shape), grad_b.sum_to_size(b.shape)


def product(operator, a, b, lif):
    """operator(a, b), torch.matmul or torch.mul; spikes are saved as bytes if lif.fused is set."""
    if not getattr(lif, "fused", False) or operator not in (torch.matmul, torch.mul) or traced():
        return operator(a, b)
    known = largest(a), largest(b)
    out = Product.apply(operator, a, b)
    return mark(out, None if operator is torch.matmul or None in known else known[0] * known[1])


# Activations computed again -----------------------------------------------------------------------


def checkpointed(module, x):
    """module(x); only x is kept for the backward pass, which computes the rest again."""
    known = largest(x)  # x comes back from autograd without its mark

    def run(x):
        return module(mark(x, known))

    contexts = partial(recomputing, module)
    return checkpoint(run, x, use_reentrant=False, context_fn=contexts)


def recomputing(module):
    return nullcontext(), Recomputation(module)


class Recomputation:
    """Context in which BatchNorms see a batch again without counting it in running statistics."""

    def __init__(self, module):
        self.bns = [
            bn for bn in module.modules() if isinstance(bn, nn.modules.batchnorm._BatchNorm)
        ]

    def __enter__(self):
        self.kept = [(bn.momentum, bn.num_batches_tracked.clone()) for bn in self.bns]
        for bn in self.bns:
            bn.momentum = 0.0

    def __exit__(self, *error):
        for bn, (momentum, batches) in zip(self.bns, self.kept, strict=True):
            bn.momentum = momentum
            bn.num_batches_tracked.copy_(batches)
