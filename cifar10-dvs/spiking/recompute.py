"""A module whose activations the backward pass computes again, instead of keeping them."""

from contextlib import nullcontext
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from .spikes import largest, mark


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
