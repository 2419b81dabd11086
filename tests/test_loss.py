"""loss: tet, against spikingjelly's function and the formula."""

import pytest
import torch
from spikingjelly.activation_based.functional import temporal_efficient_training_cross_entropy
from timm.loss import SoftTargetCrossEntropy

from conftest import load, log_of, on_cpu
from on_digits import cifar10
from on_images import TINY

T, B, CLASSES = 5, 6, 7


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(T, B, CLASSES, dtype=torch.float64, requires_grad=True)


def test_as_spikingjelly(logits):
    """Value and gradient for labels."""
    labels = torch.randint(CLASSES, (B,))
    ours = cifar10.meters.tet(torch.nn.CrossEntropyLoss(), 1.0, logits, labels)
    theirs = temporal_efficient_training_cross_entropy(logits, labels)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    assert torch.allclose(*grads, atol=1e-14) and grads[0].abs().max() > 1e-3


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_soft_targets_by_hand(logits, weight):
    targets = torch.rand(B, CLASSES, dtype=torch.float64).softmax(1)

    def loss(x):
        return -sum((targets[b] * x[b].log_softmax(0)).sum() for b in range(B)) / B

    want = weight * sum(loss(x) for x in logits) / T + (1 - weight) * loss(logits.mean(0))
    have = cifar10.meters.tet(SoftTargetCrossEntropy(), weight, logits, targets)
    assert have.item() == pytest.approx(want.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("folder", "entry", "shape"),
    [
        ("cifar10", "QKFormer", (2, 3, 16, 16)),
        ("cifar10-dvs", "QKFormer", (2, 4, 2, 16, 16)),
        ("imagenet", "QKFormer_10_384", (2, 3, 32, 32)),
    ],
)
def test_logits_of_each_step(folder, entry, shape):
    """Their mean is what the model gives without; a test never sees them."""
    torch.manual_seed(0)
    model = getattr(load(folder).model, entry)(
        T=4, embed_dims=32, num_heads=2, fused=False
    ).double()
    x = torch.rand(shape, dtype=torch.float64) * 3
    mean, model.per_step = model(x), True
    steps = model(x)
    assert steps.shape == (4, *mean.shape) and torch.allclose(steps.mean(0), mean, atol=1e-12)
    assert steps.std(0).max() > 1e-3
    assert model.eval()(x).shape == mean.shape


def test_run(tmp_path, image_data):
    flags, losses = ["--data-path", image_data, "--output", tmp_path], []
    for loss in ("ce", "tet"):
        cifar10.train.main(on_cpu([*TINY, *flags, "--loss", loss, "--experiment", loss]))
        losses.append(log_of(tmp_path / loss)[0]["train_loss"])
    assert losses[0] != losses[1] and all(0.9 < loss < 1.3 for loss in losses)  # chance is 1.1
