"""How often the neurons of a model fire: {stage: mean rate} of a few test samples."""

import re
from functools import partial

import torch
from spikingjelly.activation_based.neuron import BaseNode
from torch.utils.data import Subset

SAMPLES = 8


def stage_of(name):
    """stage1 for the modules of patch_embed1 and stage1, head for those behind the last stage."""
    match = re.match(r"(?:patch_embed|stage)(\d+)", name)
    return f"stage{match[1]}" if match else "head"


def spread(dataset):
    """A few samples from all over a data set, whose order is often that of its classes."""
    count = min(SAMPLES, len(dataset))
    return Subset(dataset, [index * len(dataset) // count for index in range(count)])


@torch.inference_mode()
def firing_rates(model, batches, autocast) -> dict:
    """{stage: share of 1 in its spikes} for batches of samples; one more pass in evaluation mode,
    which changes nothing in the model.
    """
    sums = {}

    def count(stage, module, args, spikes):
        ones, values = sums.get(stage, (0.0, 0))
        sums[stage] = ones + spikes.sum(dtype=torch.float64), values + spikes.numel()

    neurons = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseNode)]
    hooks = [m.register_forward_hook(partial(count, stage_of(name))) for name, m in neurons]
    with autocast():
        for images in batches:
            model.forward(images)  # torch.compile's would not call the hooks
    for hook in hooks:
        hook.remove()
    return {stage: ones.item() / values for stage, (ones, values) in sums.items()}
