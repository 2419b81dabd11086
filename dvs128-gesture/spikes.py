"""Spikes wait for the backward pass as bytes, a half or a quarter of the memory of floats.

Only a tensor that is marked, as holding whole numbers from 0 to 255, is saved so. A neuron marks
its spikes, `add` and `product` mark what they make of marked tensors, and a view shares the mark of
its tensor. All other operations return unmarked tensors, saved as they are, and a write in
place ends a mark. So `x + 0.5 * y` takes more memory, but its gradients are right.
"""

import torch

is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # PyTorch 2.7 has it


def traced():
    """Whether torch.export or torch.jit.trace wants a graph of PyTorch's own operators."""
    # Within torch.compile is_exporting is always true.
    exporting = is_exporting() and not torch.compiler.is_dynamo_compiling()
    return torch.jit.is_tracing() or exporting


def mark(x, largest=1):
    """Mark x as holding whole numbers from 0 to `largest` (None: leave it unmarked); returns x."""
    # torch.compile does not see every write in place, so nothing is marked there.
    if largest is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        x.spikes = largest, x._version
    return x


def largest(x):
    """The largest value that a marked x may hold; None if x is not marked."""
    for known in (x, x._base):
        value, version = getattr(known, "spikes", (None, None))
        if value is not None and version == known._version and known.dtype == x.dtype:
            return value
    return None


def save(x):
    """x as it is to be saved for the backward pass; `.to(dtype)` undoes it."""
    if torch.compiler.is_compiling() or (largest(x) or 256) > 255:
        return x
    small = x.to(torch.uint8)
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
