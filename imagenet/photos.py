"""Real photographs without a download, in ImageNet's folder layout: crops of scikit-learn's two
sample photos.

`dataset: photos` makes them on first use, in data_path/photos/. To make others: python photos.py
FOLDER [TRAIN VAL]
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images
from tqdm import tqdm

from harness.log import UserError, logger

QUICK = {"train": 240, "val": 60}  # what the quick start makes, of each class
CLASSES = ("n01000001", "n02000002")  # the Chinese temple, the flower


def prepare(data_path):
    """data_path/photos, made where it is missing: whole or, when that is interrupted,
    not at all.
    """
    root = Path(data_path) / "photos"
    if root.is_dir():
        return root
    logger.info(f"cutting photographs: {root.resolve()} (once)")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".photos-", dir=root.parent) as work:
            make(Path(work) / "photos", **QUICK)
            os.sync()  # before its name says that it is whole
            os.rename(Path(work) / "photos", root)
    except OSError as error:
        if not root.is_dir():  # else another run was faster
            raise UserError(
                f"{root}: photographs can't be written there: {error.strerror or error}"
            ) from None
    return root


def make(folder, train=64, val=24, size=96):
    """Make `folder` with train/CLASS/*.JPEG and val/CLASS/*.JPEG, the same ones each time; returns
    it.

    Args:
        train, val: images of each class. Those of train/ show the left two thirds of a photo, those
            of val/ the rest.
        size: their height and width; the squares they are cut from have 120 to 213 pixels a side.
    """
    generator = np.random.RandomState(0)
    bar = tqdm(
        desc="photographs", total=2 * (train + val), leave=False, disable=not sys.stderr.isatty()
    )
    for name, photo in zip(CLASSES, load_sample_images().images, strict=True):
        edge = photo.shape[1] * 2 // 3
        for split, part, count in (
            ("train", photo[:, :edge], train),
            ("val", photo[:, edge:], val),
        ):
            path = Path(folder) / split / name
            path.mkdir(parents=True)
            for number in range(count):
                side = generator.randint(120, photo.shape[1] - edge)
                top, left = (generator.randint(0, length - side + 1) for length in part.shape[:2])
                crop = part[top : top + side, left : left + side]
                crop = crop[:, ::-1] if generator.randint(2) else crop
                Image.fromarray(crop).resize((size, size), Image.BICUBIC).save(
                    path / f"{name}_{number:03d}.JPEG"
                )
                bar.update()
    bar.close()
    return Path(folder)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: python {Path(__file__).name} FOLDER [TRAIN VAL]")
    print(make(sys.argv[1], *map(int, sys.argv[2:])))
