"""dvs128-gesture/ and cifar10-dvs/: files of frames that are damaged, of another kind, or hold
pickles.
"""

import pickle
import random
import zipfile

import numpy as np
import pytest
import torch


class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


WRONG = {
    "another T": np.zeros((3, 2, 128, 128), np.uint8),
    "another size": np.zeros((2, 2, 64, 64), np.uint8),
    "flat": np.zeros(2 * 2 * 128 * 128, np.uint8),
    "complex": np.zeros((2, 2, 128, 128), complex),
    "text": np.zeros((2, 2, 128, 128), "U1"),
    "truth": np.zeros((2, 2, 128, 128), bool),
    "negative": np.full((2, 2, 128, 128), -1, np.int8),
    "nan": np.full((2, 2, 128, 128), np.nan, np.float16),
    "infinite": np.full((2, 2, 128, 128), np.inf, np.float32),
}


def refuses(folder, path):
    with pytest.raises(folder.config.UserError) as error:
        folder.data.load_frames(path, 2)
    text = str(error.value)
    assert text.startswith(f"{path}: not the frames of a sample (") and "\n" not in text, text


@pytest.mark.parametrize("kind", WRONG)
def test_frames_of_another_shape_or_type(folder, tmp_path, kind):
    np.savez(tmp_path / "x.npz", frames=WRONG[kind])
    refuses(folder, tmp_path / "x.npz")


def test_frames_that_hold_pickles(folder, tmp_path):
    planted, path = Planted(tmp_path / "planted"), tmp_path / "x.npz"
    np.savez(path, frames=np.full((2, 2, 128, 128), planted))
    refuses(folder, path)
    path.write_bytes(pickle.dumps(planted))
    refuses(folder, path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("frames.npy", pickle.dumps(planted))
    refuses(folder, path)
    assert not (tmp_path / "planted").exists()
    with pytest.raises(ValueError):
        folder.convert.read_array(path, "frames")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_no_damage_to_frames_passes(folder, tmp_path, save):
    """Flipped bits and cuts at random: refused, or the same frames."""
    path, generator = tmp_path / "x.npz", random.Random(0)
    frames = np.random.default_rng(0).poisson(0.1, (2, 2, 128, 128)).astype(np.uint8)
    save(path, frames=frames)
    whole, refused = path.read_bytes(), 0
    assert np.array_equal(folder.data.load_frames(path, 2), frames)
    ends = [
        *range(200),
        *range(len(whole) - 150, len(whole)),
    ]  # where zip and NumPy keep their headers
    for place in (*ends, *(generator.randrange(len(whole)) for _ in range(100))):
        content = bytearray(whole)
        content[place] ^= 1 << generator.randrange(8)
        for damaged in (content, whole[:place]) if place % 5 == 0 else (content,):
            path.write_bytes(damaged)
            try:
                loaded = folder.data.load_frames(path, 2)
            except folder.config.UserError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                refused += 1
            else:
                assert loaded.dtype == torch.float32 and np.array_equal(loaded, frames), place
    assert refused > 300
