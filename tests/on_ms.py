"""What the tests of MS-QKFormer share: small models, cifar10/'s and imagenet/'s."""

import pytest
import torch
from torch import nn

from conftest import load

cifar10, cifar100, imagenet = load("cifar10"), load("cifar100"), load("imagenet")
compiled = pytest.mark.skipif(
    not cifar10.native.available("cpu", torch.float32, "auto"), reason="needs a C++ compiler"
)
SMALL = {
    "cifar10": ({"embed_dims": 48, "num_heads": 2}, (2, 3, 16, 12)),
    "imagenet": ({"embed_dims": 48, "num_heads": 2, "depths": 5, "num_classes": 7}, (2, 3, 64, 48)),
}


def entry(name):
    return cifar10.ms.MSQKFormer if name == "cifar10" else imagenet.ms.MSQKFormer_10_384


def make_model(name, **options):
    """A small model with BatchNorms that let about half of the neurons fire, and its input."""
    torch.manual_seed(4)
    keywords, shape = SMALL[name]
    model = entry(name)(**{**keywords, **options})
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight, 1.0, 0.8)  # negative ones too: max-pooling must know
            nn.init.normal_(module.bias, 0.5, 0.5)
            nn.init.normal_(module.running_mean, 0.0, 0.3)
    return model.double(), torch.rand(shape, dtype=torch.float64) * 2
