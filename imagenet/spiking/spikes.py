"""Spikes wait for the backward pass as bytes, a half or a quarter of the memory of floats.

Only a tensor that is marked, as holding whole numbers from 0 to 255, is saved so. A neuron with
`fused` marks its spikes, `add` and `masked` mark what they make of marked tensors, and a view
shares the mark of its tensor. All other operations return unmarked tensors, saved as they are, and
a write in place ends a mark. So `x + 0.5 * y` takes more memory, but its gradients are right.
"""

import torch

from . import native, plain
from .compiler import events_available, fault, load_layers
from .observers import observed


def wants_bytes():
    """Whether spikes are marked now: something may be saved, and not by torch.compile, which does
    not see every write in place.
    """
    saves = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    return saves and not torch.compiler.is_compiling()


def mark(x, largest=1, small=None):
    """Mark x as holding whole numbers from 0 to `largest` (None: leave it unmarked); returns x.
    `small`: x as bytes, if its maker has them.
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
    found = known(x)
    if found is None or found[0] > 255:
        return x
    small = found[1].spikes[2]
    if small is None:
        small = x.to(torch.uint8)
    elif found[1] is not x:
        small = small.as_strided(x.shape, x.stride(), x.storage_offset())
    # The debug mode, torch.autograd.set_detect_anomaly(True), looks at the values.
    if torch.is_anomaly_enabled() and not torch.equal(small.to(x.dtype), x):
        raise RuntimeError("a tensor marked as spikes holds other values; was its .data written?")
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
    as_bytes = saves and known != (None, None) and (by_events or None not in known)
    return product(a, b, True, by_events) if as_bytes or (by_events and not saves) else a @ b


def product(a, b, matmul, by_events=False):
    """a @ b or, without `matmul`, a * b, whose backward pass reads what `save` makes of them."""
    if fault(load_layers) is not None:
        return a @ b if matmul else a * b
    return native.product(a, b, save(a), save(b), matmul, by_events)


def takes_events(a, b, lif):
    """Whether a product of the neuron's spikes is a sum of events."""
    may = getattr(lif, "fused", False) and getattr(lif, "events", False) and a.dtype == b.dtype
    may = may and a.dim() == b.dim() == 5 and a.shape[:3] == b.shape[:3]
    may = may and a.shape[4] == b.shape[3] and observed(a) is None
    may = may and not torch.is_autocast_enabled("cpu")
    return may and events_available(a.device.type, a.dtype)


def masked(x, mask):
    """plain.masked(x, mask); spikes are saved as bytes, and masked spikes are spikes."""
    known = largest(x), largest(mask)
    if known == (None, None):
        return plain.masked(x, mask)
    x = x.movedim(2, 4).unflatten(4, (mask.shape[2], -1))  # so that gradients have channels last
    out = product(x, mask.movedim((2, 3), (4, 5)), matmul=False)
    return mark(out, None if None in known else known[0] * known[1]).flatten(4).movedim(4, 2)
