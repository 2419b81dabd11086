"""What the tests of cifar10/ on a folder of images share: the folder, and a run on it that takes a
second.
"""

import numpy as np
import pytest
from PIL import Image

from conftest import on_cpu
from on_digits import cifar10

CLASSES = ("green things", "red", "über")
# Flags of test.py too. Neurons of this threshold fire, so that figures depend on every setting.
NET = [
    *"--dataset folder --dim 16 --num-heads 2 --time-step 2 --img-size 12 --v-threshold 0.2".split(),
    *"--workers 0 --fused false".split(),
]
TINY = [
    *NET,
    *"--batch-size 4 --lr 1e-2 --epochs 1 --warmup-epochs 0 --cooldown-epochs 0".split(),
]


def write_images(root, classes=CLASSES, train=4):
    """Images of noise, 16 x 20, `train` of a class and one to test; the class adds to a channel."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", 1)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 100, (16, 20, 3), dtype=np.uint8)
                pixels[..., (1, 0, 2)[label]] += 150
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def image_data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture(scope="session")
def trained_on_images(tmp_path_factory, image_data):
    """The folder of a run of TINY with 2 epochs and mixed precision, which nobody may change."""
    output = tmp_path_factory.mktemp("output")
    flags = [*TINY, "--data-path", image_data, "--output", output, "--experiment", "tiny"]
    flags += ["--epochs", 2, "--amp-dtype", "bfloat16", "--model-ema", "--model-ema-decay", 0.5]
    assert cifar10.train.main(on_cpu(flags)) == 0
    return output / "tiny"
