"""Recordings without a download, in the data set's own format: shapes that move, as an event camera
sees them.

`dataset: shapes` makes them on first use, in data_path/shapes/download/. The class is the motion;
shapes, their sizes and places are drawn. To make others: python shapes.py FOLDER
"""

import os
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from convert import alone, scratch
from harness.log import logger, telling

QUICK = {"samples": 40}  # what the quick start makes
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIZE = 128  # of the picture
STEPS = 24  # of a motion, 1 ms each
SHAPES = ("square", "bar", "cross")
WAYS = "right, down right, down, down left, left, up left, up, up right"
MOTIONS = (*WAYS.split(", "), "grow", "shrink")


# Copied from dvs128-gesture/shapes.py
def prepare(data_path):
    """data_path/shapes, with recordings under download/ there: whole or, when that is interrupted,
    not at all.
    """
    root = Path(data_path) / "shapes"
    download = root / "download"
    if download.is_dir():
        return root
    with telling(f"{root}: recordings can't be written there: ", kinds=OSError):
        root.mkdir(parents=True, exist_ok=True)
        with alone(root), scratch(root / ".download-making") as work:
            if not download.is_dir():  # another run may have made them by now
                logger.info(f"drawing shapes that move: {download.resolve()} (once)")
                make(work, **QUICK)
                os.sync()  # before its name says that it is whole
                os.rename(work, download)
    return root


# Copied from dvs128-gesture/shapes.py
def inside(shape, x, y, radius):
    """Which points are in a shape around 0, a boolean array."""
    x, y = np.abs(x), np.abs(y)
    if shape == "square":
        return np.maximum(x, y) < radius
    if shape == "bar":
        return (x < radius) & (y < 0.4 * radius)
    return (np.minimum(x, y) < 0.4 * radius) & (np.maximum(x, y) < radius)  # cross


# Copied from dvs128-gesture/shapes.py
def draw(motion, generator):
    """Events [n, 4] (t in microseconds, x, y, polarity), in the order of t, of shapes in one of
    MOTIONS.

    A pixel that a shape reaches sends an ON event (polarity 1), one that it leaves an OFF event
    (0).
    """
    angle = np.pi / 4 * MOTIONS.index(motion)  # y points down
    way = generator.uniform(12, 24) * np.array([np.cos(angle), np.sin(angle)])
    shapes = [
        (generator.choice(SHAPES), generator.uniform(24, SIZE - 24, 2), generator.uniform(6, 10))
        for _ in range(generator.integers(8, 13))
    ]
    y, x = np.ogrid[:SIZE, :SIZE]
    before, events = None, []
    for step in range(STEPS + 1):
        done, now = step / STEPS - 0.5, np.zeros((SIZE, SIZE), bool)
        for shape, place, radius in shapes:
            if motion == "grow":
                now |= inside(shape, x - place[0], y - place[1], radius * (1 + done))
            elif motion == "shrink":
                now |= inside(shape, x - place[0], y - place[1], radius * (1 - done))
            elif motion == "turn":
                sine, cosine = np.sin(done * np.pi / 2), np.cos(done * np.pi / 2)
                across, down = x - place[0], y - place[1]
                now |= inside(
                    shape, across * cosine + down * sine, down * cosine - across * sine, radius
                )
            else:
                place = place + done * way
                now |= inside(shape, x - place[0], y - place[1], radius)
        if before is not None:
            for polarity, changed in ((1, now & ~before), (0, before & ~now)):
                rows, columns = np.nonzero(changed)
                t = 1000 * step + generator.integers(0, 1000, len(rows))
                events.append(np.stack([t, columns, rows, np.full(len(rows), polarity)], 1))
        before = now
    events = np.concatenate(events)
    return events[np.argsort(events[:, 0], kind="stable")]


def write_aedat(path, events):
    """Write events as AEDAT 2.0: address and time, big-endian; bit 0 set is OFF, the axes run
    backwards.
    """
    t, x, y, p = events.T
    address = ((SIZE - 1 - x) << 8) | ((SIZE - 1 - y) << 1) | (1 - p)
    with open(path, "wb") as file:
        file.write(
            b"#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n# Creation time: "
            b"none\r\n"
        )
        file.write(np.stack([address, t], 1).astype(">u4").tobytes())


def make(download, samples=10, archive=True, seed=0):
    """Write the ten zips, or the folders that are in them, the same for the same arguments.

    Args:
        download: folder to write to.
        samples: recordings of each class.

    Returns {(class, number): events}.
    """
    generator, written = np.random.default_rng(seed), {}
    total = samples * len(CLASSES)
    bar = tqdm(desc="recordings", total=total, leave=False, disable=not sys.stderr.isatty())
    for name, motion in zip(CLASSES, MOTIONS, strict=True):
        folder = Path(download) / name
        folder.mkdir(parents=True)
        for number in range(samples):
            written[name, number] = draw(motion, generator)
            write_aedat(folder / f"cifar10_{name}_{number}.aedat", written[name, number])
            bar.update()
        if archive:
            with zipfile.ZipFile(folder.with_name(f"{name}.zip"), "w") as file:
                for path in sorted(folder.iterdir()):
                    file.write(path, f"{name}/{path.name}")
            shutil.rmtree(folder)
    bar.close()
    return written


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: python {Path(__file__).name} FOLDER")
    print(f"{len(make(sys.argv[1]))} samples")
