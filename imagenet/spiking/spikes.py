"""Spikes wait for the backward pass as bytes, a half or a quarter of the memory of floats.

Only a tensor that is marked, as holding whole numbers from 0 to 255, is saved so. A neuron with
`fused` marks its spikes, `add` and `masked` mark what they make of marked
tensors, and a view shares the mark of its tensor. All other operations return unmarked tensors,
saved as they are, and a write in place ends a mark. So `x + 0.5 * y` takes more memory, but its
gradients are right.
"""

import torch
from torch.autograd.function import once_differentiable

from . import events, native, ops, plain
from .compiler import is_called_as_operator


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
        set_mark(x, largest, small)
    return x


def set_mark(x, largest, small=None):
    x.spikes = largest, x._version, small


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


def matmul(a, b, lif):
    """a @ b; spikes are saved as bytes, also where a product within copies them. On a CPU what is 0
    in a costs no time, if the neuron that it comes from, `lif`, allows it.
    """
    saves, known = torch.is_grad_enabled(), (largest(a), largest(b))
    by_events = takes_events(a, b, lif)
    if saves and (known == (None, None) or (None in known and not by_events)):
        return a @ b
    operator = events.product if by_events else torch.matmul
    return saved_product(operator, a, b) if saves else operator(a, b)


def saved_product(operator, a, b):
    """operator(a, b), of which the backward pass reads what `save` makes of a and b."""
    if native.takes(a):
        return native.product(operator, a, b, save(a), save(b))
    return Product.apply(operator, a, b)


def takes_events(a, b, lif):
    """Whether a product of the neuron's spikes is one of events.py."""
    may = getattr(lif, "fused", False) and getattr(lif, "events", False) and a.dtype == b.dtype
    may = may and a.dim() == b.dim() == 5 and a.shape[:3] == b.shape[:3]
    may = may and a.shape[4] == b.shape[3]
    # Asked first: torch.compile would trace what events.available does.
    may = may and not is_called_as_operator() and events.available(a.device.type, a.dtype)
    return may and not torch.is_autocast_enabled("cpu") and ops.observed() is None


def masked(x, mask):
    """plain.masked(x, mask); spikes are saved as bytes, and masked spikes are spikes."""
    known = largest(x), largest(mask)
    if known == (None, None):
        return plain.masked(x, mask)
    x = x.movedim(2, 4).unflatten(4, (mask.shape[2], -1))  # so that gradients have channels last
    out = saved_product(torch.mul, x, mask.movedim((2, 3), (4, 5)))
    return mark(out, None if None in known else known[0] * known[1]).flatten(4).movedim(4, 2)


class Product(torch.autograd.Function):
    """(torch.matmul, events.product or torch.mul, a, b) -> their product."""

    @staticmethod
    def forward(ctx, operator, a, b):
        ctx.operator = operator
        ctx.save_for_backward(save(a), save(b))
        return operator(a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # Contiguous, as the batches of a product are read: it would copy them else.
        layout = torch.contiguous_format if ctx.operator is not torch.mul else torch.preserve_format
        a, b = (x.to(grad.dtype, memory_format=layout) for x in ctx.saved_tensors)
        if ctx.operator is not torch.mul:
            grad_a, grad_b = grad @ b.transpose(-2, -1), a.transpose(-2, -1) @ grad
        else:
            grad_a, grad_b = grad * b, grad * a
        return None, grad_a.sum_to_size(a.shape), grad_b.sum_to_size(b.shape)
