"""dvs128-gesture/ and cifar10-dvs/: from recordings to frames, whole, damaged or missing."""

import errno
import shutil
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import load
from on_events import FOLDERS, ONCE, check_frames, cpu, resolve, write

FEW = {"dvs128-gesture": {"train": 1, "trials": 1}, "cifar10-dvs": {"samples": 2}}


def prepare(folder, root, T=3):
    reader = (
        folder.data.DVS128Gesture if folder.name == "dvs128-gesture" else folder.data.CIFAR10DVS
    )
    return folder.convert.prepare(
        root, T, reader, folder.data.ARCHIVES, folder.data.SUFFIXES, folder.data.PAGE
    )


@pytest.mark.parametrize("archive", [True, False])
def test_events_survive(folder, tmp_path, archive):
    written = write(folder.name, tmp_path, archive=archive, **FEW[folder.name])
    frames = prepare(folder, tmp_path)
    check_frames(frames, written)
    made = {
        "events_np",
        "events_np.whole",
        frames.name,
        f"{frames.name}.whole",
        ".qkformer-building.lock",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"download", *made}
    assert all(path.exists() for path in (tmp_path / "download").iterdir())

    # reused: also without the recordings, where nothing can be written, and for another T from the
    # events
    shutil.rmtree(tmp_path / "download")
    times = {path: path.stat().st_mtime_ns for path in frames.rglob("*")}
    assert prepare(folder, tmp_path) == frames
    assert times == {path: path.stat().st_mtime_ns for path in frames.rglob("*")}
    check_frames(prepare(folder, tmp_path, 4), written, 4)


@ONCE
def test_an_unfinished_build_is_redone(folder, tmp_path):
    """Left by a killed run, by spikingjelly itself, or short of a file."""
    written = write(folder.name, tmp_path, **FEW[folder.name])
    frames, events = tmp_path / "frames_number_3_split_by_number", tmp_path / "events_np"
    for place in (frames, events, tmp_path / ".qkformer-building"):
        (place / "airplane").mkdir(parents=True)
        (place / "airplane" / "half.npz").write_bytes(b"half")
    for place in (frames, events):
        place.with_name(f"{place.name}.building").touch()
    assert prepare(folder, tmp_path) == frames
    check_frames(frames, written)
    assert not list(tmp_path.glob("*.building"))
    (frames / next(iter(written))).unlink()
    check_frames(prepare(folder, tmp_path), written)


@ONCE
def test_full_disk(folder, tmp_path, monkeypatch):
    import spikingjelly.datasets.utils as utils

    written = write(folder.name, tmp_path, **FEW[folder.name])
    savez, count = utils.np_savez, []

    def full(path, **arrays):
        count.append(path)
        if len(count) > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        savez(path, **arrays)

    for limit in (0, 25):  # full while events are made, then while frames are
        count[:] = [None] * limit
        monkeypatch.setattr(utils, "np_savez", full)
        with pytest.raises(folder.config.UserError, match="No space left on device"):
            prepare(folder, tmp_path)
        assert not list(tmp_path.glob("frames*")) and not (tmp_path / ".qkformer-building").exists()
        monkeypatch.undo()
    check_frames(prepare(folder, tmp_path), written)


def test_missing_and_broken_recordings(folder, tmp_path):
    archives = list(folder.data.ARCHIVES.values())
    with pytest.raises(folder.config.UserError) as error:
        prepare(folder, tmp_path)
    for words in (*archives, folder.data.PAGE, tmp_path / "download"):
        assert str(words) in str(error.value) and "\n" not in str(error.value)

    written = write(folder.name, tmp_path, **FEW[folder.name])
    whole = (tmp_path / "download" / archives[0]).read_bytes()
    (tmp_path / "download" / archives[0]).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(folder.config.UserError, match=r"extracting: .* get it again"):
        prepare(folder, tmp_path)
    (tmp_path / "download" / archives[0]).write_bytes(whole)
    check_frames(prepare(folder, tmp_path), written)


@ONCE
def test_what_has_no_proof_is_made_again_or_taken_with_a_warning(folder, tmp_path, caplog):
    written = write(folder.name, tmp_path, **FEW[folder.name])
    frames, events = tmp_path / "frames_number_3_split_by_number", tmp_path / "events_np"
    events.mkdir()  # without a sample
    for path in (frames / next(iter(written)), frames / "another.npz"):  # another tool's
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"another's")
    check_frames(prepare(folder, tmp_path), written)
    assert (tmp_path / f"{frames.name}.old" / "another.npz").exists() and (
        tmp_path / "events_np.old"
    ).exists()

    (events / next(iter(written))).unlink()  # lost since; the frames for another T need it
    check_frames(prepare(folder, tmp_path, 2), written, 2)
    (events / next(iter(written))).unlink()
    (tmp_path / "events_np.whole").unlink()  # as an older spikingjelly leaves it when it is killed
    check_frames(prepare(folder, tmp_path, 4), written, 4)
    assert (tmp_path / "events_np.old2").exists()

    shutil.rmtree(tmp_path / "download")
    (tmp_path / "events_np.whole").unlink()
    caplog.set_level("INFO")
    check_frames(prepare(folder, tmp_path, 5), written, 5)
    (tmp_path / f"{frames.name}.whole").unlink()
    check_frames(prepare(folder, tmp_path), written)
    warnings = [
        record.message for record in caplog.records if record.message.startswith("warning: ")
    ]
    assert [str(events) in warnings[0], str(frames) in warnings[1], len(warnings)] == [
        True,
        True,
        2,
    ]


@ONCE
def test_an_archive_goes_before_its_folder_and_other_files_do_not_matter(folder, tmp_path):
    written = write(
        folder.name, tmp_path, archive=folder.name == "dvs128-gesture", **FEW[folder.name]
    )
    for name in folder.data.ARCHIVES:
        place = (
            tmp_path / "download" / name
        )  # of Gesture, a folder half unpacked beside its archive
        place.mkdir(exist_ok=True)
        (place / ".DS_Store").write_bytes(b"Finder's")
        (place / "._half.aedat").write_bytes(b"Finder's")
    frames = prepare(folder, tmp_path)
    check_frames(frames, written)
    (frames / ".DS_Store").write_bytes(b"Finder's")
    (tmp_path / "events_np" / ".DS_Store").write_bytes(b"Finder's")
    time = frames.stat().st_mtime_ns
    assert prepare(folder, tmp_path).stat().st_mtime_ns == time
    check_frames(prepare(folder, tmp_path, 2), written, 2)


def damaged(whole, kind):
    """A recording that lost its tail, everything, part of an event, or the address of its first
    one.
    """
    first = (
        whole.find(b"#!END-HEADER\r\n") + 14 + 28 + 8 + 28
    )  # behind a packet of one special event, and a header
    outside = whole[: first + 3] + b"\xff" + whole[first + 4 :]
    return {"cut": whole[: first + 8 * 500], "odd": whole[:-3], "empty": b"", "outside": outside}[
        kind
    ]


@pytest.mark.parametrize("kind", ["empty", "cut", "odd", "outside"])
def test_a_damaged_recording_is_named_and_a_mended_one_is_read(folder, tmp_path, kind):
    if folder.name == "cifar10-dvs" and kind in ("cut", "outside"):
        pytest.skip("the format has neither an end nor addresses outside")
    written = write(folder.name, tmp_path, archive=False, **FEW[folder.name])
    path = max(
        (tmp_path / "download").rglob("*_1.aedat" if folder.name == "cifar10-dvs" else "*.aedat")
    )
    whole = path.read_bytes()
    path.write_bytes(damaged(whole, kind))
    with pytest.raises(folder.config.UserError, match=f"{path}.* get it again"):
        prepare(folder, tmp_path)
    assert not (tmp_path / "events_np").exists()
    path.write_bytes(whole)
    check_frames(prepare(folder, tmp_path), written)


@ONCE
def test_a_folder_without_recordings(folder, tmp_path):
    write(folder.name, tmp_path, archive=False, **FEW[folder.name])
    place = tmp_path / "download" / max(folder.data.ARCHIVES)
    for path in place.glob("*.aedat"):
        path.unlink()
    with pytest.raises(folder.config.UserError, match=f"{place} holds no recordings"):
        prepare(folder, tmp_path)


def test_a_class_without_test_samples(tmp_path):
    """Labels stay what they are."""
    folder = SimpleNamespace(name="dvs128-gesture", **vars(load("dvs128-gesture")))
    written = write(folder.name, tmp_path, archive=False, **FEW[folder.name])
    labels = tmp_path / "download" / "DvsGesture" / "user00_test_labels.csv"
    rows = labels.read_text().splitlines(keepends=True)
    labels.write_text("".join(row for row in rows if not row.startswith("2,")))  # label 1
    del written["test/1/user00_test_0.npz"]
    check_frames(prepare(folder, tmp_path), written)
    dataset = folder.data.build_dataset(
        resolve(folder, "--data-path", tmp_path, "--T", 3), False, cpu(folder)
    )
    names = [path.split("/")[-2] for path, _ in dataset.samples]
    assert names == ["0", "10", *"23456789"] and dataset.targets == [0, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def fabricate(folder, root, count=10):
    """Frames of zeros, T = 2, for the two classes that come first. Returns their paths."""
    frames, paths = root / "frames_number_2_split_by_number", []
    for split in ("",) if folder.name == "cifar10-dvs" else ("train", "test"):
        for label in sorted(folder.data.CLASSES)[:2]:
            (frames / split / label).mkdir(parents=True)
            paths += [frames / split / label / f"{number}.npz" for number in range(count)]
    for path in paths:
        np.savez(path, frames=np.zeros((2, 2, 128, 128), np.uint8))
    return paths


def test_only_training_samples_are_augmented(folder, tmp_path):
    fabricate(folder, tmp_path)
    for train, no_aug in ((True, False), (False, False), (True, True)):
        cfg = resolve(folder, "--data-path", tmp_path, "--T", 2, *(["--no-aug"] if no_aug else []))
        dataset = folder.data.build_dataset(cfg, train, cpu(folder))
        assert dataset.transform is (folder.augment.augment if train and not no_aug else None)


def test_no_test_samples(tmp_path):
    """Two recordings of a class are both for training."""
    folder = load("cifar10-dvs")
    write("cifar10-dvs", tmp_path, samples=2)
    cfg = resolve(folder, "--data-path", tmp_path, "--T", 2)
    with pytest.raises(folder.config.UserError) as error:
        folder.data.build_dataset(cfg, False, cpu(folder))
    for words in (f"{tmp_path}/frames_number_2", "no test samples", f"{tmp_path}/download"):
        assert words in str(error.value)


def test_frames_of_another_data_set(folder, tmp_path):
    other = load(next(name for name in FOLDERS if name != folder.name))
    fabricate(
        SimpleNamespace(name=next(name for name in FOLDERS if name != folder.name), **vars(other)),
        tmp_path,
    )
    cfg = resolve(folder, "--data-path", tmp_path, "--T", 2)
    with pytest.raises(folder.config.UserError, match="give each its own data_path"):
        folder.data.build_dataset(cfg, True, cpu(folder))


@ONCE
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "content", [b"", b"PK half", {"events": [1]}, {"frames": np.zeros((3, 2, 128, 128))}]
)
def test_a_damaged_frames_file(folder, tmp_path, workers, content):
    paths = fabricate(folder, tmp_path, count=4)
    if isinstance(content, bytes):
        paths[0].write_bytes(content)
    else:
        np.savez(paths[0], **content)
    cfg = resolve(folder, "--data-path", tmp_path, "--T", 2, "-b", 2, "-j", workers)
    loader = folder.data.train_loader(
        cfg, folder.data.build_dataset(cfg, True, cpu(folder)), 0, 0, cpu(folder), 0
    )
    with pytest.raises(folder.config.UserError) as error:
        list(loader)
    folder.batches.end_workers()  # PyTorch would wait for them
    assert str(paths[0]) in str(error.value) and "\n" not in str(error.value)


@ONCE
def test_waiting_for_another_run(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    with folder.convert.alone(tmp_path):
        thread = threading.Thread(target=lambda: folder.convert.alone(tmp_path).__enter__())
        thread.start()
        while not caplog.messages:
            time.sleep(0.01)
        assert thread.is_alive()
    thread.join(10)
    assert (
        caplog.messages == [f"waiting for the run that converts {tmp_path}"]
        and not thread.is_alive()
    )


def test_split():
    """9 : 1 in each class, in the order of the file names; no sample is read for it."""
    split = load("cifar10-dvs").data.split
    labels = [0] * 1000 + [1] * 1000 + [2] * 7
    train, test = split(labels, True), split(labels, False)
    assert test == [*range(900, 1000), *range(1900, 2000)] and len(train) == 1807
    assert sorted(train + test) == list(range(2007))
    drawn = split(labels, False, seed=3)
    assert sorted(drawn + split(labels, True, seed=3)) == list(range(2007)) and drawn != test
    assert drawn == split(labels, False, seed=3) != split(labels, False, seed=4)
    assert np.bincount(np.array(labels)[drawn], minlength=3).tolist() == [100, 100, 0]


def test_split_of_recordings(tmp_path, monkeypatch):
    folder = SimpleNamespace(name="cifar10-dvs", **vars(load("cifar10-dvs")))
    write(folder.name, tmp_path, samples=11)
    monkeypatch.setattr(folder.data, "read_array", None)
    cfg = resolve(folder, "--data-path", tmp_path, "--T", 2)
    names = []
    for train in (True, False):
        dataset = folder.data.build_dataset(cfg, train, cpu(folder))
        names.append([path.rsplit("_", 1)[1] for path, _ in dataset.samples])
    order = [f"{number}.npz" for number in (0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9)]
    assert names == [order[:10] * 10, order[10:] * 10]


@ONCE
def test_a_proof_that_is_not_text(folder, tmp_path):
    fabricate(folder, tmp_path)
    (tmp_path / "frames_number_2_split_by_number.whole").write_bytes(b"\xff\x00")
    cfg = resolve(folder, "--data-path", tmp_path, "--T", 2)
    assert (
        len(folder.data.build_dataset(cfg, True, cpu(folder))) > 0
    )  # taken with a warning, as without one


@ONCE
def test_a_path_that_can_not_be(folder, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "file", tmp_path / "loop", tmp_path / ("x" * 300)):
        with pytest.raises(folder.config.UserError) as error:
            prepare(folder, path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_prepare(folder, tmp_path, capsys):
    """--prepare makes the frames of the T at hand, and no run."""
    written = write(folder.name, tmp_path, **FEW[folder.name])
    flags = ["--prepare", "--data-path", str(tmp_path), "--T", "3", "--device", "cpu"]
    flags += ["--output", str(tmp_path / "output")]
    if folder.name == "cifar10-dvs":  # too few to test on
        with pytest.raises(folder.config.UserError, match="no test samples"):
            folder.train.main(flags)
    else:
        assert folder.train.main(flags) == 0
        counts = [sum(name.startswith(split) for name in written) for split in ("train", "test")]
        said = "{} training and {} test samples are ready in {}".format(*counts, tmp_path)
        assert capsys.readouterr().out.endswith(f"dvs128-gesture: {said}\n")
    check_frames(tmp_path / "frames_number_3_split_by_number", written)
    assert not (tmp_path / "output").exists()
