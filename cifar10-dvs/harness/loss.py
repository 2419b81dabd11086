"""Temporal efficient training (TET): a loss at each time step, not of their mean alone.

Deng et al., "Temporal Efficient Training of Spiking Neural Network via Gradient Re-weighting",
ICLR 2022. Off by default; the published runs did without it.
"""

from torch import nn


class TET(nn.Module):
    """(1 - weight) x the loss of the mean logits + weight x the mean of the losses of all steps.

    criterion: the recipe's, of logits [N, classes] and targets [N] or [N, classes]. weight: 0 to 1.
    """

    def __init__(self, criterion, weight):
        super().__init__()
        self.criterion, self.weight = criterion, weight

    def forward(self, logits, targets):
        """Logits [T, B, classes] of a model whose `per_step` is set, targets of the B samples."""
        steps = targets.repeat(len(logits), *[1] * (targets.dim() - 1))
        loss = self.weight * self.criterion(logits.flatten(0, 1), steps)
        return loss + (1 - self.weight) * self.criterion(logits.mean(0), targets)
