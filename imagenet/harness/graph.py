"""A model as CUDA graphs: the GPU gets all kernels of a pass in one call, not hundreds."""

from functools import partial
from unittest import mock

import torch
from torch.func import functional_call

from spiking.neuron import say

from .log import UserError, first_line


def graphed(model, cfg, ranks, training=False):
    """The model as a Graph where cfg.cuda_graph asks for it; a line says why where it can't be."""
    if cfg.cuda_graph and (why := obstacle(cfg, ranks, training)):
        say(f"cuda_graph has no effect: {why}")
    return Graph(model) if cfg.cuda_graph and not why else model


def obstacle(cfg, ranks, training):
    """What a pass of this configuration needs to be a graph, in words; None: nothing more."""
    if ranks.device.type != "cuda":
        return "a graph needs a GPU"
    if training and ranks.world_size > 1 and getattr(cfg, "sync_bn", False):  # ranks meet within
        return "in training a graph needs sync_bn: false"
    return None


class Graph(torch.nn.Module):
    """Computes model(x) by PyTorch's graphs of its passes, captured at the first x; another shape,
    and the other mode of train() and eval(), run kernel by kernel. UserError if it can't be
    captured. DistributedDataParallel can wrap it: gradients are exchanged after the replay.
    """

    def __init__(self, model):
        super().__init__()
        self.model, self.captured, self.one = model, None, torch.ones(())

    def forward(self, x):
        kind = self.model.training, torch.is_grad_enabled(), x.shape, x.dtype
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
        if self.captured != kind:
            return self.model(x)
        # A copy. By `one`, autograd refuses a backward pass that comes after another forward pass.
        return self.replay(self.trained, (x,)) * self.one.fill_(1)

    def capture(self, x):
        """Makes replay(parameters, (x,)) and restores what its passes change."""
        model, device, on = self.model, x.device.type, torch.is_grad_enabled()
        self.trained = {name: p for name, p in model.named_parameters() if on and p.requires_grad}
        # The parameters' own nodes, which DistributedDataParallel keeps, are of another stream.
        leaves = {name: p.detach().requires_grad_() for name, p in self.trained.items()}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        state = torch.cuda.get_rng_state(x.device)
        # With its cache, autocast could keep 16-bit weights that are those of now for ever.
        settings = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), False
        # The loader's thread goes on pinning memory meanwhile, which the mode "global" forbids.
        thread_local = partial(torch.cuda.graph, capture_error_mode="thread_local")
        with torch.autocast(device, *settings), mock.patch("torch.cuda.graph", thread_local):
            call, inputs = partial(functional_call, model), (leaves, (x.clone(),))
            self.replay = torch.cuda.make_graphed_callables(call, inputs, allow_unused_input=True)
        model.load_state_dict(buffers, strict=False)
        torch.cuda.set_rng_state(state, x.device)
        for parameter in self.trained.values():  # the next replay writes to its gradient's memory
            parameter.register_hook(lambda grad: None if grad is None else grad.clone())
