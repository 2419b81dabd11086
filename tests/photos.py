"""Real photographs in ImageNet's folder layout: crops and flips of scikit-learn's two sample photos.

Usage: python tests/photos.py FOLDER [TRAIN VAL]    # images of each class, default 64 and 24
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

CLASSES = ("n01000001", "n02000002")  # the Chinese temple, the flower


def make(folder, train=64, val=24, size=96):
    """folder/train and folder/val with a folder a class; the photos' left two thirds train, all of them validates."""
    generator = np.random.RandomState(0)
    for name, photo in zip(CLASSES, load_sample_images().images, strict=True):
        edge = photo.shape[1] * 2 // 3
        for split, half, count in (("train", photo[:, :edge], train), ("val", photo, val)):
            path = Path(folder) / split / name
            path.mkdir(parents=True)
            for number in range(count):
                side = generator.randint(120, min(half.shape[:2]) + 1)
                top, left = (generator.randint(0, length - side + 1) for length in half.shape[:2])
                crop = half[top : top + side, left : left + side]
                crop = crop[:, ::-1] if generator.randint(2) else crop
                Image.fromarray(crop).resize((size, size), Image.BICUBIC).save(path / f"{name}_{number:03d}.JPEG")
    return Path(folder)


if __name__ == "__main__":
    print(make(sys.argv[1], *map(int, sys.argv[2:])))
