"""The quick starts of imagenet/, dvs128-gesture/ and cifar10-dvs/: data made on first use, and a
run with it.
"""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from conftest import copy_folder, load, resolve_in, script
from on_events import FOLDERS
from on_photos import photos

GENERATORS = [("imagenet", "photos"), *((name, "shapes") for name in FOLDERS)]
SMALL = {"imagenet": {"train": 8, "val": 2}, "dvs128-gesture": {"train": 2, "test": 1, "trials": 1}}
SMALL["cifar10-dvs"] = {"samples": 3}


@pytest.fixture(params=GENERATORS, ids=[name for name, _ in GENERATORS])
def quick(request, monkeypatch):
    """A folder and its generator, which makes little."""
    name, word = request.param
    generator = getattr(load(name), word)
    monkeypatch.setattr(generator, "QUICK", SMALL[name])
    return SimpleNamespace(name=name, word=word, generator=generator, **vars(load(name)))


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_photographs(tmp_path):
    one, other = (
        photos.make(tmp_path / name, train=5, val=3, size=40) for name in ("one", "other")
    )
    assert content(one) == content(other)
    counts = Counter(path.rsplit("/", 1)[0] for path in content(one))
    assert counts == {
        f"{split}/{name}": n for split, n in (("train", 5), ("val", 3)) for name in photos.CLASSES
    }
    pictures = [np.asarray(Image.open(path)) for path in one.rglob("*.JPEG")]
    assert all(picture.shape == (40, 40, 3) and picture.std() > 1 for picture in pictures)


def test_test_photographs_show_what_training_does_not(tmp_path, monkeypatch):
    black_left = np.full((427, 640, 3), 200, np.uint8)
    black_left[:, :426] = 0
    monkeypatch.setattr(
        photos, "load_sample_images", lambda: SimpleNamespace(images=[black_left, black_left])
    )
    photos.make(tmp_path / "data", train=9, val=9, size=32)
    for split, value in (("train", 0), ("val", 200)):
        means = [
            np.asarray(Image.open(path)).mean()
            for path in (tmp_path / "data" / split).rglob("*.JPEG")
        ]
        assert len(means) == 18 and all(abs(mean - value) < 1 for mean in means)


@pytest.mark.parametrize("name", FOLDERS)
def test_shapes(name, tmp_path):
    """Balanced classes of events in the frame, in order, alike each time; which of them are ON
    tells of the motion.
    """
    shapes = load(name).shapes
    kwargs = (
        {"samples": 4, "archive": False}
        if name == "cifar10-dvs"
        else {"trials": 1, "archive": False}
    )
    written = shapes.make(tmp_path / "one", **kwargs)
    again = shapes.make(tmp_path / "other", **kwargs)
    assert content(tmp_path / "one") == content(tmp_path / "other")
    assert set(Counter(key[-2] for key in written).values()) == {4}
    assert len(written) == 4 * {"dvs128-gesture": 11, "cifar10-dvs": 10}[name]
    for key, events in written.items():
        t, x, y, p = events.T
        assert np.array_equal(events, again[key]) and (np.diff(t) >= 0).all() and len(t) > 500
        assert (
            x.min() >= 0 and x.max() < 128 and y.min() >= 0 and y.max() < 128 and set(p) <= {0, 1}
        )
    for motion, want in (("right", (1, 0)), ("up left", (-1, -1)), ("down", (0, 1))):
        ahead = []
        for seed in range(8):
            _, x, y, p = shapes.draw(motion, np.random.default_rng(seed)).T
            ahead.append(
                [axis[p == 1].mean() - axis[p == 0].mean() for axis in (x, y)]
            )  # ON is in front of OFF
        dx, dy = np.mean(ahead, 0)
        for value, sign in ((dx, want[0]), (dy, want[1])):
            assert value * sign > 2 if sign else abs(value) < 2
    for motion, share in (("grow", 1), ("shrink", 0)):
        assert shapes.draw(motion, np.random.default_rng(0))[:, 3].mean() == share


def test_made_whole_or_not_at_all(quick, tmp_path, monkeypatch):
    """Once; by rank 0; again after a run that was killed on the way; and nothing of the user's is
    touched.
    """
    theirs = (
        tmp_path / "data" / "train" / "n1" / "a.JPEG",
        tmp_path / "data" / "download" / "airplane" / "b.aedat",
    )
    for path in theirs:
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    made = tmp_path / "data" / quick.word
    make = quick.generator.make

    def killed(folder, **kwargs):
        make(folder, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(quick.generator, "make", killed)
    with pytest.raises(KeyboardInterrupt):
        quick.generator.prepare(tmp_path / "data")
    assert not [path for path in made.rglob("*") if path.is_file() and path.stat().st_size]
    monkeypatch.setattr(quick.generator, "make", make)
    assert quick.generator.prepare(tmp_path / "data") == made
    before = content(made)
    assert len(before) >= 1
    monkeypatch.setattr(quick.generator, "make", killed)  # not a second time
    assert quick.generator.prepare(tmp_path / "data") == made and content(made) == before
    assert all(path.read_text() == "mine" for path in theirs)


def test_a_place_that_cannot_be_written(quick, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(quick.config.UserError, match=f"{quick.word}: .*can't be written"):
        quick.generator.prepare(tmp_path / "file")


def test_only_rank_0_makes_them(quick, tmp_path):
    """Another rank takes what rank 0 returns."""
    cfg = resolve(quick, "-c", "quickstart.yml", "--data-path", tmp_path)
    with pytest.raises(quick.config.UserError):
        quick.data.build_dataset(
            cfg, True, SimpleNamespace(from_main=lambda *_, **__: tmp_path / "nowhere")
        )
    assert not any(tmp_path.iterdir())


def resolve(quick, *argv):
    return resolve_in(quick, *argv)


def quick_start(name, place, *args):
    """Train and test a copy of the folder alone, in an empty place; (epochs of the log, output,
    result of the test).
    """
    folder = copy_folder(name, place)
    done = script(folder, "train", "-c", "quickstart.yml", *args, cwd=folder, timeout=3600)
    script(folder, "test", cwd=folder, timeout=600)
    run = folder / "output" / "quickstart"
    log = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
    return log, done.stdout, json.loads((run / "test-best.json").read_text())


@pytest.mark.long
def test_short_quick_start_of_imagenet(tmp_path):
    """Those of event data are in test_event_runs.py."""
    args = [
        "--input_size",
        16,
        "--time_step",
        1,
        "--dim",
        32,
        "--num_heads",
        1,
        "--epochs",
        1,
        "--batch_size",
        64,
    ]
    [line], text, result = quick_start("imagenet", tmp_path, *args)
    assert text.count("cutting photographs") == 1
    assert (result["top1"], result["loss"]) == (line["test_acc1"], line["test_loss"])
    made = tmp_path / "imagenet" / "data" / "photos"
    assert [len([*(made / split).rglob("*.JPEG")]) for split in ("train", "val")] == [480, 120]


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "least"), [("imagenet", 95), ("dvs128-gesture", 50), ("cifar10-dvs", 50)]
)
def test_quick_start(name, least, tmp_path):
    """Chance is 50, 9 and 10 %."""
    log, _, result = quick_start(name, tmp_path)
    assert log[-1]["test_acc1"] >= least and result["top1"] == max(
        line["test_acc1"] for line in log
    )
