"""Firing rates: what passes through a model, counted by hooks on its layers and neurons."""

import re

import torch
from spikingjelly.activation_based import neuron
from torch import nn

from .runtime import logger


class Tally:
    """What one layer or neuron saw: sums in float64, in which spikes are counted exactly."""

    def __init__(self):
        self.values = 0  # how many there were
        self.macs = 0  # multiply-accumulates for them
        self.passes = 0  # samples x time steps
        self.real = False  # whether the values are real numbers, not spikes or sums of spikes
        self.sums = torch.zeros(2, dtype=torch.float64)  # of the values; of those that are not 0

    def add(self, x, macs=0, passes=0):
        self.values += x.numel()
        self.macs += macs
        self.passes += passes
        sums = torch.stack([x.sum(dtype=torch.float64), x.count_nonzero().double()])
        self.sums = self.sums.to(x.device) + sums

    def merge(self, other):
        self.values += other.values
        self.macs += other.macs
        self.passes += other.passes
        self.real |= other.real
        self.sums = self.sums + other.sums

    @property
    def rate(self):
        return self.sums[0].item() / self.values

    @property
    def nonzero(self):
        return self.sums[1].item() / self.values


class Counter:
    """Within it, hooks count what passes through a model; layers then run unfused, see layer.py.

    Args:
        model: any that takes images [B, C, H, W] for `model.T` steps, or frames [B, T, C, H, W],
            with spikingjelly's neurons between convolutions and linear layers.

    Attributes: `layers` (inputs of convolutions and linear layers) and `neurons` (outputs), a Tally
    for each name of a module, in the order of the first call; of what was evaluated, `images`
    (samples), `T` and `static` (images, the same at all steps).
    """

    def __init__(self, model):
        self.model = model
        self.layers, self.neurons, self.hooks = {}, {}, []
        self.images, self.T, self.static = 0, 0, True

    def __enter__(self):
        self.hooks = [self.model.register_forward_pre_hook(self._input)]
        for name, module in self.model.named_modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
                self.hooks.append(module.register_forward_hook(self._layer(name)))
            elif isinstance(module, neuron.BaseNode):
                self.hooks.append(module.register_forward_hook(self._neuron(name)))
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    def _input(self, model, args):
        (x,) = args
        self.static = x.dim() == 4
        self.T = model.T if self.static else x.shape[1]
        self.images += len(x)

    def _layer(self, name):
        def hook(module, args, output):
            (x,) = args
            # The layer that is called first reads the images.
            image = self.static and name == next(iter(self.layers), name)
            linear = isinstance(module, nn.Linear)
            tally = self.layers.setdefault(name, Tally())
            tally.real = image or (linear and x.dim() == 2)  # [B, D]: a mean over T
            passes = x.numel() // x.shape[-1] if linear else len(x)
            tally.add(x, output.numel() * module.weight[0].numel(), passes)

        return hook

    def _neuron(self, name):
        def hook(module, args, output):
            self.neurons.setdefault(name, Tally()).add(output)

        return hook

    def gather(self, ranks):
        """A Counter with the sums of all ranks, on each of them; exact for any share of batches."""
        for tally in (*self.layers.values(), *self.neurons.values()):
            tally.sums = tally.sums.cpu()
        whole = Counter(self.model)
        mine = self.images, self.T, self.static, self.layers, self.neurons
        for images, T, static, layers, neurons in ranks.gather(mine):
            if images == 0:  # fewer batches than ranks
                continue
            whole.images += images
            whole.T, whole.static = T, static
            for name, tally in layers.items():
                whole.layers.setdefault(name, Tally()).merge(tally)
            for name, tally in neurons.items():
                whole.neurons.setdefault(name, Tally()).merge(tally)
        return whole


def stage_of(name):
    """stage1 for the modules of patch_embed1 and stage1, head for those behind the last stage."""
    match = re.match(r"(?:patch_embed|stage)(\d+)", name)
    return f"stage{match[1]}" if match else "head"


def silent(counter):
    """A line that names the neurons without a single spike, "" if there are none."""
    names = [name for name, tally in counter.neurons.items() if tally.rate == 0]
    if not names:
        return ""
    named = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"no spike in {len(names)} of {len(counter.neurons)} neurons: {named}"


class Peek:
    """The batches of an evaluation loader; keeps the first samples to see how a model fires."""

    samples = 8

    def __init__(self, loader):
        self.loader, self.images, self.said = loader, None, ""

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            if self.images is None:
                self.images = batch[0][: self.samples].clone()
            yield batch

    @torch.inference_mode()
    def rates(self, model, autocast):
        """{stage: firing rate of its neurons}, {} where there was no batch; logs which neurons are
        silent if that has changed.

        One more pass of a few samples, in evaluation mode, which changes nothing in the model.
        """
        if self.images is None:
            return {}
        with Counter(model) as counter, autocast():
            model.forward(self.images)  # torch.compile's would not call the hooks
        stages = {}
        for name, tally in counter.neurons.items():
            stages.setdefault(stage_of(name), Tally()).merge(tally)
        before, self.said = self.said, silent(counter)
        if self.said not in ("", before):
            logger.info(f"{self.said} ({len(self.images)} test samples)")
        return {stage: tally.rate for stage, tally in stages.items()}
