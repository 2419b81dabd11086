"""How often the neurons of a model fire: {stage: mean rate} of a few test samples."""

import re

import torch
from spikingjelly.activation_based.neuron import BaseNode
from torch.utils.data import Subset

from .log import logger

SAMPLES = 8


def stage_of(name):
    """stage1 for the modules of patch_embed1 and stage1, head for those behind the last stage."""
    match = re.match(r"(?:patch_embed|stage)(\d+)", name)
    return f"stage{match[1]}" if match else "head"


def spread(dataset):
    """A few samples from all over a data set, whose order is often that of its classes."""
    count = min(SAMPLES, len(dataset))
    return Subset(dataset, [index * len(dataset) // count for index in range(count)])


class Firing:
    """The firing rates of a model, epoch by epoch; `images` is a batch of samples.

    One more pass in evaluation mode, which changes nothing in the model.
    """

    def __init__(self, images):
        self.images, self.said = images, ""

    @torch.inference_mode()
    def rates(self, model, autocast) -> dict:
        """{stage: share of 1 in its spikes}; logs which layers are silent if that has changed."""
        names = {m: name for name, m in model.named_modules() if isinstance(m, BaseNode)}
        found = {}

        def count(module, args, spikes):
            found[names[module]] = spikes.sum(dtype=torch.float64), spikes.numel()

        hooks = [module.register_forward_hook(count) for module in names]
        with autocast():
            model.forward(self.images)  # torch.compile's would not call the hooks
        for hook in hooks:
            hook.remove()
        stages = {}
        for name, (spikes, values) in found.items():
            sums = stages.setdefault(stage_of(name), [0.0, 0])
            sums[0], sums[1] = sums[0] + spikes.item(), sums[1] + values
        silent = [name for name, (spikes, _) in found.items() if not spikes]
        more = f" and {len(silent) - 3} more" if len(silent) > 3 else ""
        line = f"silent: {len(silent)} of {len(found)} layers, {', '.join(silent[:3])}{more}"
        before, self.said = self.said, line if silent else ""
        if self.said not in ("", before):
            logger.info(f"{line} (no spike for {len(self.images)} samples)")
        return {stage: spikes / values for stage, (spikes, values) in stages.items()}
