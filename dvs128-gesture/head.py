# Copied from cifar10/head.py
"""The head of the network, with the names that timm's models have for it."""

import timm.layers
from torch import nn


class Classifier(nn.Module):
    """Has `head`, a linear layer, on `num_features` features, for `num_classes` classes."""

    per_step = False  # see forward_head

    def reset_classifier(self, num_classes, global_pool=None):
        """A new head; 0 classes: none. `global_pool` is timm's; here it always is the mean."""
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes)
            timm.layers.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
            self.head.to(next(self.parameters()))  # on the device and of the type of the network

    def get_classifier(self):
        return self.head

    def forward_head(self, x, pre_logits=False):
        """[T, B, num_features] -> logits [B, num_classes]; with pre_logits the mean over T alone.

        In training with `per_step`, logits of each step, [T, B, num_classes], as loss.TET wants.
        """
        if self.per_step and self.training:
            return self.head(x)
        return x.mean(0) if pre_logits else self.head(x.mean(0))
