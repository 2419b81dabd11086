"""A model as a CUDA graph: the GPU gets all kernels of a pass in one call, not hundreds.

They run on the same memory each time: input and output are copied. Loss, scaler, optimizer and what
ranks exchange stay outside.
"""

import contextlib
from functools import partial

import torch
from torch.func import functional_call

from spiking.neuron import say

from .log import UserError, first_line

WARM_UP = 3  # passes in which libraries load kernels, choose algorithms and make workspaces


def graphed(model, cfg, ranks, training=False):
    """The model as a Graph where cfg.cuda_graph asks for it; a line says why where it can't be."""
    if cfg.cuda_graph and (why := obstacle(cfg, ranks, training)):
        say(f"cuda_graph has no effect: {why}")
    return Graph(model) if cfg.cuda_graph and not why else model


def obstacle(cfg, ranks, training):
    """What a pass of this configuration needs to be a graph, in words; None: nothing more."""
    if ranks.device.type != "cuda":
        return "a graph needs a GPU"
    if cfg.compile:  # which makes programs of its own
        return "a graph needs compile: false"
    if training and ranks.world_size > 1 and getattr(cfg, "sync_bn", False):  # ranks meet within
        return "in training a graph needs sync_bn: false"
    return None


class Graph(torch.nn.Module):
    """Computes model(x) by a graph of its forward pass and, where gradients are on, one of its
    backward pass. DistributedDataParallel can wrap it: gradients are exchanged after the replay.

    They are captured at the first x; another shape, and the other mode of train() and eval(), run
    kernel by kernel. Parameters and buffers must stay in their memory, as load_state_dict() and
    optimizers leave them. UserError if it can't be captured.
    """

    def __init__(self, model):
        super().__init__()
        self.model, self.captured, self.number = model, None, 0

    def forward(self, x):
        kind = self.model.training, x.shape, x.dtype
        if self.captured is None:
            try:
                self.capture(x)
            except RuntimeError as error:
                first = error.__context__ or error  # an error in a capture makes its end fail too
                if isinstance(first, torch.OutOfMemoryError):
                    raise first from None
                text = f"this model can't be captured ({first_line(first)})"
                raise UserError(f"cuda_graph: {text}; cuda_graph: false runs without") from None
            self.captured = kind
        return Replay.apply(self, x, *self.trained) if self.captured == kind else self.model(x)

    def capture(self, x):
        self.x, on = x.clone(), torch.is_grad_enabled()
        known = {name: p for name, p in self.model.named_parameters() if on and p.requires_grad}
        self.trained, self.passes = [*known.values()], [torch.cuda.CUDAGraph() for _ in range(2)]
        device = x.device.type
        settings = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        # With its cache, autocast could keep 16-bit weights that are those of now for ever.
        with restored(self.model, x), torch.autocast(device, *settings, cache_enabled=False):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self.gradients(*self.compute(known))
            torch.cuda.current_stream().wait_stream(side)
            # The loader's thread goes on pinning memory meanwhile, which the mode "global" forbids.
            capturing = partial(torch.cuda.graph, capture_error_mode="thread_local")
            with capturing(self.passes[0]):
                logits, leaves = self.compute(known)
            if known:
                self.grad = torch.zeros_like(logits)
                with capturing(self.passes[1], pool=self.passes[0].pool()):
                    grads = self.gradients(logits, leaves, self.grad)
                pairs = zip(self.trained, grads, strict=True)
                used = [(parameter, grad) for parameter, grad in pairs if grad is not None]
                self.trained, self.grads = zip(*used, strict=True)
            self.logits = logits.detach()  # without the nodes, which are of the capture's stream

    def compute(self, known):
        """(logits, leaves of autograd in the memory of the `known` parameters)."""
        # The parameters' own nodes, which an earlier loss keeps, are of another stream.
        leaves = {name: parameter.detach().requires_grad_() for name, parameter in known.items()}
        return functional_call(self.model, leaves, (self.x,)), [*leaves.values()]

    def gradients(self, logits, leaves, grad=None):
        if leaves:
            grad = torch.zeros_like(logits) if grad is None else grad
            return torch.autograd.grad(logits, leaves, grad, allow_unused=True)


class Replay(torch.autograd.Function):
    """(Graph, x, *parameters) -> logits."""

    @staticmethod
    def forward(ctx, graph, x, *parameters):
        graph.x.copy_(x)
        graph.passes[0].replay()
        graph.number += 1
        ctx.graph, ctx.number = graph, graph.number
        return graph.logits.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        graph = ctx.graph
        if ctx.number != graph.number:
            raise RuntimeError("a graph's backward pass must come before its next forward pass")
        graph.grad.copy_(grad)
        graph.passes[1].replay()
        # Copies, for with accum_iter the next replay would overwrite the gradients that are summed.
        copies = [torch.empty_like(grad) for grad in graph.grads]
        torch._foreach_copy_(copies, graph.grads)  # in a few kernels, not one each
        return None, None, *copies


@contextlib.contextmanager
def restored(model, x):
    """Passes within leave no trace in running statistics and random state."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.cuda.get_rng_state(x.device)
    yield
    model.load_state_dict(buffers, strict=False)
    torch.cuda.set_rng_state(state, x.device)
