"""What a file declares against what is needed, before it is read; and what is left out, counted."""

import argparse
import gzip
import io
import logging
import os
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from conftest import load
from on_events import cpu, resolve, write

FOLDERS = ("cifar10", "cifar100", "dvs128-gesture", "cifar10-dvs", "imagenet")
IMAGES = ("cifar10", "cifar100", "imagenet")


def refused(modules, function, *args):
    with pytest.raises(modules.log.UserError) as error:
        function(*args)
    return str(error.value)


# Checkpoints


@pytest.mark.parametrize("folder", FOLDERS)
def test_views_of_less_memory_than_they_show(folder, tmp_path):
    """Each of 10,000 names is whole, but all are of one memory: read in no time."""
    modules, path = load(folder), tmp_path / "x.pth"
    one = torch.ones(1000, 1000)
    torch.save({"model": {f"a{number}": one for number in range(10_000)}}, path)
    start = time.perf_counter()
    said = refused(modules, modules.checkpoint.load_checkpoint, path)
    assert "views of less memory than they show" in said and time.perf_counter() - start < 5
    torch.save({"model": {"a": one[:500], "b": one[500:]}}, path)  # of one memory, each once
    loaded = modules.checkpoint.load_checkpoint(path)["model"]
    assert torch.equal(torch.cat([loaded["a"], loaded["b"]]), one)


@pytest.mark.parametrize("name", ["exp_avg", "other", "list"])
def test_optimizer_of_views(name):
    """4 TB in a few bytes."""
    modules, linear = load("cifar10"), torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state, huge = optimizer.state_dict(), torch.ones(1, dtype=torch.float64).expand(10**6, 10**6)
    state["state"][0][name] = [huge] if name == "list" else huge
    args = optimizer, torch.amp.GradScaler("cpu"), {"optimizer": state}, Path("x.pth"), "adamw"
    assert "than they show" in refused(modules, modules.checkpoint.load_optimizer, *args)


@pytest.mark.parametrize("folder", FOLDERS)
def test_size_of_a_header_of_safetensors(folder, tmp_path):
    modules, path = load(folder), tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, path)
    assert modules.checkpoint.load_checkpoint(path)["model"]["a"].tolist() == [1, 1]
    content = path.read_bytes()
    path.write_bytes((2**27).to_bytes(8, "little") + content[8:])
    os.truncate(path, 2**28)  # it takes no room on the disk
    start = time.perf_counter()
    said = refused(modules, modules.checkpoint.load_checkpoint, path)
    assert "header too large" in said and time.perf_counter() - start < 5


def test_types_that_are_no_weights(tmp_path):
    """Float8, for one, of which PyTorch can't say whether it is finite."""
    modules, path = load("cifar10"), tmp_path / "x.pth"
    for kind in (torch.float8_e4m3fn, torch.complex64, torch.int32):
        torch.save({"model": {"a": torch.ones(2).to(kind)}}, path)
        said = refused(modules, modules.checkpoint.load_checkpoint, path)
        assert f"a is of type {kind}, which weights are not" in said


def test_endless_yml(tmp_path):
    path = tmp_path / "x.yml"
    path.touch()
    os.truncate(path, 2**40)
    assert "x.yml: not a yml: it has 1,0" in refused(
        load("cifar10"), load("cifar10").config.read_yml, path
    )


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_file_larger_than_memory(tmp_path, suffix):
    modules, path = load("cifar10"), tmp_path / f"x.{suffix}"
    path.touch()
    os.truncate(path, 2**42)
    assert "not enough memory" in refused(modules, modules.checkpoint.load_checkpoint, path)


def test_deep_nesting_beside_a_checkpoint(tmp_path):
    """args.yaml and test-x.json of 5,000 brackets: the first counts for none, the second goes."""
    folder = load("cifar10").folder
    for name in ("args.yaml", "test-x.json"):
        (tmp_path / name).write_text("[" * 5000)
    assert folder.read_args(tmp_path) == {}
    folder.write_result(tmp_path / "x.pth", {"top1": 1.0})
    assert (tmp_path / "test-x.json").read_text() == '{\n "top1": 1.0\n}\n'


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: (path.touch(), os.truncate(path, 2**40))])
def test_pipes_and_endless_files_beside_a_checkpoint(tmp_path, make):
    """They are left aside, or an error, at once."""
    folder = load("cifar10").folder
    for name in ("args.yaml", "test-x.json", "log.txt"):
        make(tmp_path / name)
    assert folder.read_args(tmp_path) == {}
    folder.write_result(tmp_path / "x.pth", {"top1": 1.0})
    assert (tmp_path / "test-x.json").read_text() == '{\n "top1": 1.0\n}\n'
    assert "log.txt is no file of a run" in refused(load("cifar10"), folder.RunLog, tmp_path, 1, 0)


def test_lists_that_show_more_than_they_hold(tmp_path, monkeypatch):
    """3 KB that are a billion numbers to whoever goes through them, and a list in itself."""
    modules, path = load("cifar10"), tmp_path / "x.pth"
    monkeypatch.setattr(modules.checkpoint, "MOST_VALUES", 10**5)
    many, loop = [0] * 10, []
    loop.append(loop)
    for _ in range(8):
        many = [many] * 10
    for odd in (many, loop):
        for content in (
            {"optimizer": {"state": {0: {"more": odd}}}},
            {"cross_sample_lif": odd},
            {"rng": [{"python": odd}]},
            {"args": argparse.Namespace(T=odd)},
        ):
            torch.save({"model": {"a": torch.ones(2)}, **content}, path)
            said = refused(modules, modules.checkpoint.load_checkpoint, path)
            assert "it shows more than 100,000 values" in said and path.stat().st_size < 5000


def test_a_name_of_a_megabyte():
    """Its start is printed, and what it could do to a terminal is not done."""
    name = "\x1b[2J" + "x" * 10**6
    log = load("cifar10").log
    for said in (log.escaped(name), str(log.UserError(name))):  # of torch.hub too
        assert said.startswith("\\x1b[2Jxxx") and len(said) < 10_010


# Images


@pytest.mark.parametrize("folder", IMAGES)
def test_images_that_declare_too_much(folder, tmp_path, monkeypatch):
    modules, path = load(folder), tmp_path / "x.png"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("1", (10, 10)).save(path)
    assert modules.images.read_image(path).size == (10, 10)
    Image.new("1", (11, 10)).save(path)
    said = refused(modules, modules.images.read_image, path)
    assert "11 x 10 pixels, more than 100" in said
    os.truncate(path, 401)
    assert "401 bytes are too many" in refused(modules, modules.images.read_image, path)


@pytest.mark.parametrize("folder", IMAGES)
def test_scans_without_end(folder, tmp_path):
    """Each of a JPEG's takes as long as a whole one, for some hundred bytes."""
    modules, path, content = load(folder), tmp_path / "x.jpg", io.BytesIO()
    Image.new("L", (64, 64), 99).save(content, "JPEG", progressive=True)
    whole = content.getvalue()
    path.write_bytes(whole)
    want = modules.images.read_image(path)
    last = whole[whole.rfind(b"\xff\xda") : -2]
    path.write_bytes(whole[:-2] + 20 * last + whole[-2:])
    assert modules.images.read_image(path) == want
    path.write_bytes(whole[:-2] + 200 * last + whole[-2:])
    assert " scans, more than 100" in refused(modules, modules.images.read_image, path)


@pytest.mark.parametrize("folder", IMAGES)
def test_files_that_are_left_out(folder, tmp_path, caplog):
    """By suffix, those beside the folders too; where there are none, no line."""
    modules = load(folder)
    for place in ("train/a", "val/a"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place / "1.png")
    caplog.set_level(logging.INFO, "qkformer")
    modules.images.list_split(tmp_path, True)
    assert not caplog.messages
    for name in ("a/2.heic", "a/3.heic", "a/notes.txt", "a/._1.png", "a/README", "4.png"):
        (tmp_path / "train" / name).write_text("x")
    samples, _ = modules.images.list_split(tmp_path, True)
    assert [path for path, _ in samples] == [str(tmp_path / "train/a/1.png")]
    [line] = caplog.messages
    start = f"{tmp_path / 'train'}: 6 files are left out (2 .heic, "
    assert line.startswith(start)
    for part in ("1 .txt", "1 hidden", "1 without a suffix", "1 .png"):
        assert part in line


# Event data


def test_arrays_that_declare_too_much(folder, tmp_path):
    """100 MB of zeros in 100 KB are not unpacked; frames of 8 bytes each, the largest, are."""
    path = tmp_path / "x.npz"
    np.savez_compressed(path, frames=np.zeros((1, 2, 128, 128), np.int64))
    assert folder.data.load_frames(path, 1).shape == (1, 2, 128, 128)
    np.savez_compressed(path, frames=np.zeros(100 * 2**20, np.uint8))
    assert path.stat().st_size < 2**18
    assert "its frames has 104,857,728 bytes" in refused(folder, folder.data.load_frames, path, 1)


@pytest.mark.parametrize("kind", ["tar", "trailing", "zip"])
def test_archives_that_hold_too_much(folder, tmp_path, monkeypatch, kind):
    """Counted before they are written, and what comes after the end of the tar too."""
    monkeypatch.setattr(folder.archives, "MOST", 2**20)
    out, archive = tmp_path / "out", tmp_path / ("x.zip" if kind == "zip" else "x.tar.gz")
    out.mkdir()
    first, second = bytes(2**19), bytes(2**20)
    if kind == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("a", first)
            file.writestr("b", second)
    else:
        with gzip.open(archive, "w") as file:
            with tarfile.open(fileobj=file, mode="w|") as tar:
                for name, content in (("a", first), ("b", second))[: 1 + (kind == "tar")]:
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
            file.write(second if kind == "trailing" else b"")
    said = refused(folder, folder.archives.unpack, archive, out)
    assert "is refused: it holds more than" in said and not (out / "b").exists()


def test_recordings_newer_than_the_frames(folder, tmp_path, caplog):
    """They are counted in a line; what was made stays."""
    write(folder.name, tmp_path)
    cfg = resolve(folder, "--T", 2, "--data_path", tmp_path)
    caplog.set_level(logging.INFO, "qkformer")
    made = len(folder.data.build_dataset(cfg, True, cpu(folder)))
    assert "newer than" not in caplog.text
    new = sorted((tmp_path / "download").rglob("*.aedat"))
    new = new[:2] or sorted((tmp_path / "download").iterdir())[:1]  # in archives
    for path in new:
        os.utime(path, (time.time() + 60, time.time() + 60))
    for train in (True, True, False):
        assert len(folder.data.build_dataset(cfg, train, cpu(folder))) == made or not train
    said = f"warning: {len(new)} files in {tmp_path}/download are newer than"
    assert caplog.text.count(said) == 1
