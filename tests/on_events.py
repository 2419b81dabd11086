"""What the tests of dvs128-gesture/ and cifar10-dvs/ share."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import recordings
from conftest import Golden, load, resolve_in

FOLDERS = ("dvs128-gesture", "cifar10-dvs")
PARAMETERS = {"dvs128-gesture": 1_999_371, "cifar10-dvs": 1_504_138}
CLASSES = {"dvs128-gesture": 11, "cifar10-dvs": 10}
SMALL = ["--T", 2, "--dim", 32, "--num-heads", 2, "--workers", 0]


# For tests of what both folders have by copy: in CI with one of them.
ONCE = pytest.mark.parametrize(
    "folder", ["dvs128-gesture", pytest.param("cifar10-dvs", marks=pytest.mark.long)], indirect=True
)


@pytest.fixture(params=FOLDERS)
def folder(request):
    return SimpleNamespace(name=request.param, **vars(load(request.param)))


def resolve(folder, *argv):
    return resolve_in(folder, *argv)


def cpu(folder):
    return folder.process.Ranks("cpu")


def small_model(folder, **kwargs):
    torch.manual_seed(0)
    return Golden.fill(
        folder.model.QKFormer(embed_dims=32, num_heads=2, backend="torch", **kwargs)
    ).eval()


def write(name, root, **kwargs):
    """Recordings under root/download. Returns {path of the sample's frames under its folder:
    events}.
    """
    if name == "cifar10-dvs":
        written = recordings.write_cifar10_dvs(root / "download", **kwargs)
        return {
            f"{label}/cifar10_{label}_{number}.npz": events
            for (label, number), events in written.items()
        }
    written = recordings.write_gesture(root / "download", **kwargs)
    return {
        f"{split}/{index}/{trial}.npz": events for (split, index, trial), events in written.items()
    }


def check_frames(frames, written, T=3):
    """Every sample's events, per frame, polarity and pixel, and nothing else."""
    assert {str(path.relative_to(frames)) for path in frames.rglob("*.*")} == set(written)
    for name, events in written.items():
        made = np.load(frames / name)["frames"]
        assert made.shape == (T, 2, 128, 128) and made.sum() == len(events), name
        for index, frame in enumerate(made):
            size = len(events) // T
            part = events[index * size : (index + 1) * size if index < T - 1 else None]
            want = np.zeros((2, 128, 128))
            np.add.at(want, (part[:, 3], part[:, 2], part[:, 1]), 1)
            assert (frame == want).all(), (name, index)
