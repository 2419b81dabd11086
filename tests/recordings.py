"""Tiny event recordings in the data sets' own formats: discs whose class is their size and motion.

A pixel that the disc reaches sends an ON event, one that it leaves an OFF event, as a camera's would.
"""

import struct
import tarfile
import zipfile

import numpy as np

SIZE = 128
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


MOTIONS = ("grow", "shrink", "move")
RADII = (14, 26, 40, 56)


def sample(index, generator, steps=24):
    """Events (t in microseconds, x, y, p) of class 0..11: a disc of one of four sizes that grows, shrinks or moves."""
    motion, radius = MOTIONS[index % 3], RADII[index // 3] * generator.uniform(0.95, 1.05)
    centre, angle = SIZE / 2 + generator.uniform(-10, 10, 2), generator.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:SIZE, :SIZE]
    before, events = None, []
    for step in range(steps + 1):
        done = step / steps
        size = radius * {"grow": done, "shrink": 1 - done, "move": 0.7}[motion]
        shift = (done - 0.5) * radius * (motion == "move")
        inside = np.hypot(x - centre[0] - shift * np.cos(angle), y - centre[1] - shift * np.sin(angle)) < size
        if before is not None:
            for polarity, changed in ((1, inside & ~before), (0, before & ~inside)):
                rows, columns = np.nonzero(changed)
                t = 1000 * step + generator.integers(0, 1000, len(rows))
                events.append(np.stack([t, columns, rows, np.full(len(rows), polarity)], 1))
        before = inside
    events = np.concatenate(events)
    return events[np.argsort(events[:, 0], kind="stable")]


def write_aedat3(path, events, packet=1000):
    """AEDAT 3.1, as DVS128 Gesture has it: packets of polarity events of 8 bytes, little-endian."""
    with open(path, "wb") as file:
        file.write(b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 0: DVS128\r\n#!END-HEADER\r\n")
        file.write(struct.pack("<HHIIIIII", 2, 0, 8, 4, 0, 1, 1, 1) + bytes(8))  # special events, to be skipped
        for start in range(0, len(events), packet):
            t, x, y, p = events[start : start + packet].T
            file.write(struct.pack("<HHIIIIII", 1, 0, 8, 4, 0, len(t), len(t), len(t)))
            words = np.stack([(x << 17) | (y << 2) | (p << 1) | 1, t], 1)
            file.write(words.astype("<u4").tobytes())


def write_aedat2(path, events):
    """AEDAT 2.0, as CIFAR10-DVS has it: address and time, big-endian; bit 0 set is OFF, the axes run backwards."""
    t, x, y, p = events.T
    address = ((127 - x) << 8) | ((127 - y) << 1) | (1 - p)
    with open(path, "wb") as file:
        file.write(b"#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n# Creation time: none\r\n")
        file.write(np.stack([address, t], 1).astype(">u4").tobytes())


def write_gesture(download, train=3, test=1, trials=2, archive=True, seed=0):
    """DvsGesture with that many recordings of all 11 gestures, `trials` times each.

    Returns {(split, class, number of the sample): events}.
    """
    generator, written = np.random.default_rng(seed), {}
    folder = download / "DvsGesture"
    folder.mkdir(parents=True)
    for split, recordings in (("train", train), ("test", test)):
        names = [f"user{number:02d}_{split}" for number in range(recordings)]
        (folder / f"trials_to_{split}.txt").write_text("".join(f"{name}.aedat\n" for name in names))
        for name in names:
            clock, events, rows = 5_000, [], ["class,startTime_usec,endTime_usec"]
            for trial in range(trials):
                for index in range(11):
                    disc = sample(index, generator)
                    disc[:, 0] += clock
                    end = int(disc[-1, 0]) + 1
                    rows.append(f"{index + 1},{clock},{end}")
                    noise = np.array([[end, 3, 4, 1], [end + 10, 5, 6, 0]])  # between the trials
                    events += [disc, noise]
                    written[split, index, f"{name}_{trial}"] = disc
                    clock = end + 1_000
            (folder / f"{name}_labels.csv").write_text("\n".join(rows) + "\n")
            write_aedat3(folder / f"{name}.aedat", np.concatenate(events))
    if archive:
        with tarfile.open(download / "DvsGesture.tar.gz", "w:gz", compresslevel=1) as tar:
            tar.add(folder, "DvsGesture")
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    return written


def write_cifar10_dvs(download, samples=10, archive=True, seed=0):
    """Ten classes with that many recordings each. Returns {(class, number): events}."""
    generator, written = np.random.default_rng(seed), {}
    for index, name in enumerate(CLASSES):
        folder = download / name
        folder.mkdir(parents=True)
        for number in range(samples):
            written[name, number] = sample(index, generator)
            write_aedat2(folder / f"cifar10_{name}_{number}.aedat", written[name, number])
        if archive:
            with zipfile.ZipFile(download / f"{name}.zip", "w") as file:
                for path in sorted(folder.iterdir()):
                    file.write(path, f"{name}/{path.name}")
                    path.unlink()
            folder.rmdir()
    return written
