"""Recordings without a download, in the data set's own format: shapes that move, as an event camera
sees them.

`dataset: shapes` makes them on first use, in data_path/shapes/download/. The class is the motion;
shapes, their sizes and places are drawn. To make others: python shapes.py FOLDER
"""

import os
import shutil
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from convert import alone, scratch
from harness.log import logger, telling

QUICK = {"train": 30, "test": 6, "trials": 1}  # what the quick start makes
SIZE = 128  # of the picture
STEPS = 24  # of a motion, 1 ms each
SHAPES = ("square", "bar", "cross")
WAYS = "right, down right, down, down left, left, up left, up, up right"
MOTIONS = (*WAYS.split(", "), "grow", "shrink", "turn")


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


def inside(shape, x, y, radius):
    """Which points are in a shape around 0, a boolean array."""
    x, y = np.abs(x), np.abs(y)
    if shape == "square":
        return np.maximum(x, y) < radius
    if shape == "bar":
        return (x < radius) & (y < 0.4 * radius)
    return (np.minimum(x, y) < 0.4 * radius) & (np.maximum(x, y) < radius)  # cross


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


def write_aedat(path, events, packet=1000):
    """Write events as AEDAT 3.1: packets of polarity events of 8 bytes, little-endian."""
    with open(path, "wb") as file:
        file.write(b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 0: DVS128\r\n#!END-HEADER\r\n")
        file.write(
            struct.pack("<HHIIIIII", 2, 0, 8, 4, 0, 1, 1, 1) + bytes(8)
        )  # special events, to be skipped
        for start in range(0, len(events), packet):
            t, x, y, p = events[start : start + packet].T
            file.write(struct.pack("<HHIIIIII", 1, 0, 8, 4, 0, len(t), len(t), len(t)))
            words = np.stack([(x << 17) | (y << 2) | (p << 1) | 1, t], 1)
            file.write(words.astype("<u4").tobytes())


def make(download, train=3, test=1, trials=2, archive=True, seed=0):
    """Write DvsGesture.tar.gz or, without `archive`, its folder; equal arguments, equal events.

    Args:
        download: folder to write to.
        train, test: recordings; each has all eleven motions, one after another, `trials` times.

    Returns {(split, class, sample as spikingjelly names it): its events, in the recording's time}.
    """
    generator, written = np.random.default_rng(seed), {}
    folder = Path(download) / "DvsGesture"
    folder.mkdir(parents=True)
    total = (train + test) * trials * len(MOTIONS)
    bar = tqdm(desc="recordings", total=total, leave=False, disable=not sys.stderr.isatty())
    for split, recordings in (("train", train), ("test", test)):
        names = [f"user{number:02d}_{split}" for number in range(recordings)]
        (folder / f"trials_to_{split}.txt").write_text("".join(f"{name}.aedat\n" for name in names))
        for name in names:
            clock, events, rows = 5_000, [], ["class,startTime_usec,endTime_usec"]
            for trial in range(trials):
                for index, motion in enumerate(MOTIONS):
                    shape = draw(motion, generator)
                    shape[:, 0] += clock
                    end = int(shape[-1, 0]) + 1
                    rows.append(f"{index + 1},{clock},{end}")
                    noise = np.array([[end, 3, 4, 1], [end + 10, 5, 6, 0]])  # between the trials
                    events += [shape, noise]
                    written[split, index, f"{name}_{trial}"] = shape
                    clock = end + 1_000
                    bar.update()
            (folder / f"{name}_labels.csv").write_text("\n".join(rows) + "\n")
            write_aedat(folder / f"{name}.aedat", np.concatenate(events))
    bar.close()
    if archive:
        with tarfile.open(folder.with_name("DvsGesture.tar.gz"), "w:gz", compresslevel=1) as tar:
            tar.add(folder, "DvsGesture")
        shutil.rmtree(folder)
    return written


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: python {Path(__file__).name} FOLDER")
    print(f"{len(make(sys.argv[1]))} samples")
