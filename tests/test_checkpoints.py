"""Checkpoints that cifar10/'s scripts load or refuse, and what else a user can get wrong."""

import argparse
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import on_cpu
from on_digits import call, cifar10
from on_images import NET, TINY

UserError = cifar10.config.UserError
load_checkpoint = cifar10.checkpoint.load_checkpoint


def small_model(**kwargs):
    return cifar10.model.QKFormer(T=2, embed_dims=16, num_heads=2, depths=3, **kwargs)


def test_kinds_of_checkpoints(tmp_path, image_data, capsys):
    """The release's, timm's with DDP's prefixes and a bare state dict: same figures, and taken for
    the release's.
    """
    torch.manual_seed(0)
    weights = small_model(num_classes=3).state_dict()
    args = argparse.Namespace(
        lr=1e-3, betas=(0.9, 0.999), output=Path("x"), best=np.float64(0.5), top=np.float32(1)
    )
    kinds = {
        "release": {"model": weights, "optimizer": {}, "epoch": 3, "scaler": None, "args": args},
        "timm": {"state_dict": {f"module.{n}": v for n, v in weights.items()}, "args": args},
        "bare": weights,
    }
    results = []
    for name, content in kinds.items():
        path = tmp_path / f"{name}.pth"
        torch.save(content, path)
        for flags in (), ("--cross-sample-lif", "false"):
            flags = *NET, "--data-path", image_data, "--checkpoint", path, *flags
            text = call(cifar10.test.main, capsys, *flags)
            file = tmp_path / f"test-{name}.json"
            results.append(json.loads(file.read_text()))
            file.unlink()
            cross = results[-1]["cross_sample_lif"]
            assert f"cross_sample_lif: {str(cross).lower()}" in text
            assert ("warning" in text) == cross == (len(flags) < len(NET) + 6)
    assert results[0]["loss"] == results[2]["loss"] == results[4]["loss"]
    assert results[1]["loss"] == results[3]["loss"] == results[5]["loss"]


def test_semantics_rule():
    resolve_semantics = cifar10.build.resolve_semantics
    assert resolve_semantics("auto", None, None)[0] is False
    for recorded in (False, True):
        value, line = resolve_semantics("auto", {"cross_sample_lif": recorded}, "a.pth")
        assert value is recorded and f"cross_sample_lif: {str(recorded).lower()}" in line
    value, line = resolve_semantics("auto", {"model": {}}, "a.pth")
    assert (
        value is True
        and line.startswith("warning: a.pth ")
        and "set cross_sample_lif: false" in line
    )
    for setting, value in (("true", True), ("false", False)):
        assert resolve_semantics(setting, None, None)[0] is value
        assert resolve_semantics(setting, {"model": {}}, "a.pth")[0] is value
        got, line = resolve_semantics(setting, {"cross_sample_lif": not value}, "a.pth")
        assert got is value and line.startswith("warning")
    with pytest.raises(UserError, match="its cross_sample_lif is 'maybe', neither true nor false"):
        resolve_semantics("auto", {"cross_sample_lif": "maybe"}, "a.pth")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_bad_checkpoints(trained_on_images, tmp_path):
    path, generator = tmp_path / "bad.pth", np.random.RandomState(0)

    def refused(content=None, words="", **options):
        if content is not None:
            torch.save(content, path, **options)
        with pytest.raises(UserError, match=rf"bad\.pth: .*{words}"):
            load_checkpoint(path)

    whole = (trained_on_images / "last.pth").read_bytes()
    for size in (0, 10, 1000, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:size])
        refused(words="not a checkpoint, or not whole")
    weights, old = small_model().state_dict(), {"_use_new_zipfile_serialization": False}
    torch.save(weights, path, **old)
    legacy = path.read_bytes()
    assert load_checkpoint(path)["model"].keys() == weights.keys()
    for _ in range(40):
        path.write_bytes(legacy[: generator.randint(len(legacy) // 10)])
        refused()
    for content in ({"model": {}}, [1, 2], {"epoch": 3}, {"model": {"a": 3}}, {1: torch.ones(2)}):
        refused(content)
    refused({"model": weights, "given": {"yml": 3}}, "damaged: its given is")
    evil = {"model": {"a": Evil(tmp_path / "ran")}}
    refused(evil, "could run code in it")
    refused(evil, **old)
    assert not (tmp_path / "ran").exists()
    other = cifar10.model.QKFormer(T=2, embed_dims=32, num_heads=2, depths=4)
    with pytest.raises(UserError) as error:
        cifar10.checkpoint.load_weights(other, weights, "a.pth")
    for word in ("missing", "stage3.1.ssa", "of another shape", "instead of"):
        assert word in str(error.value)


def test_bad_input_to_the_scripts(trained_on_images, tmp_path, capsys):
    """One line, exit code 1, nothing lost or run."""
    last, cut, evil = trained_on_images / "last.pth", tmp_path / "cut.pth", tmp_path / "evil.pth"
    before = last.read_bytes()
    cut.write_bytes(before[:5000])
    torch.save({"model": {"a": Evil(tmp_path / "ran")}}, evil)
    output, test, train = ("--output", trained_on_images.parent), cifar10.test, cifar10.train
    for main, argv, line in (
        (test, ["--checkpoint", cut], f"{cut}: not a checkpoint, or not whole"),
        (test, ["--checkpoint", evil], f"{evil}: not loaded, since doing so could run code in it"),
        (test, ["--checkpoint", "none.pth"], "no such checkpoint: none.pth"),
        (test, ["--checkpoint", last, "--epochs", 3], "command line: --epochs is not read by test"),
        (train, [*TINY, *output, "--resume", cut], f"{cut}: not a checkpoint, or not whole"),
        (train, ["--batchsize", 3], "command line: unknown flag --batchsize; is batch_size meant?"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cifar10.process.run(lambda main=main, argv=argv: main.main(on_cpu(argv)))
        errors = capsys.readouterr().err
        assert end.value.code == 1 and errors.count("\n") == 1
        assert errors.startswith(f"error: {line}"), errors
    assert last.read_bytes() == before and not (tmp_path / "ran").exists()
    assert {path.name for path in trained_on_images.parent.glob("*/args.yaml")} == {"args.yaml"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num-heads", 5], ["num_heads is 5"]),
        (["--img-size", 18], ["18", "multiples of 4"]),
        (["--mixup", 0.5, "-b", 3], ["batch_size is 3", "even"]),
        (["-b", 4000], ["batch_size 4000", "12 training samples"]),
        (["--num-classes", 2], ["num_classes is 2", "3 classes"]),
        (["--aa", "nonsense"], ["aa is nonsense"]),
        (["--opt", "nonsense"], ["nonsense"]),
        (["--opt", "adan"], ["opt adan", "opt_betas"]),
        (["--img-size", 4, "-b", 1, "-T", 1, "--mixup", 0], ["batch_size 1", "single value"]),
        (["--input-size", 1, 16, 16], ["input_size", "3 channels"]),
        (["--mlp-ratio", 0.1, "--dim", 16], ["mlp_ratios is 0.1"]),
        (["--experiment", "a/b"], ["experiment is 'a/b'"]),
        (["--device", "meta"], ["device is 'meta'"]),
        (["--device", "cuda:77"], ["cuda:77"]),
        (["--device", "gpu"], ["device is 'gpu'"]),
        (["--model", "resnet18"], ["resnet18", "QKFormer"]),
        (["--backend", "cupy"], ["cupy backend", "CUDA"]),
        (["--initial-checkpoint", "none.pth"], ["none.pth"]),
    ],
)
def test_one_line_for_each_mistake(flags, words, tmp_path, image_data):
    """And no folder stays behind."""
    flags = [*TINY, "--data-path", image_data, "--output", tmp_path, *flags]
    with pytest.raises(UserError) as error:
        cifar10.train.main(on_cpu(flags))
    text = str(error.value)
    assert all(word in text for word in words) and "\n" not in text, text
    assert all(path.suffix == ".lock" for path in tmp_path.iterdir())


@pytest.mark.parametrize("room", [0, 100, 5000, 10**6])
def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch, room):
    """Full after so many bytes, or when they are flushed; torch.save speaks of something else."""
    path = tmp_path / "last.pth"
    cifar10.checkpoint.save_checkpoint({"a": torch.ones(3)}, path)
    before = path.read_bytes()

    def no_space(*args):
        raise OSError(28, "No space left on device")

    class File(io.FileIO):
        def write(self, part):
            return super().write(part) if self.tell() + len(part) <= room else no_space()

    monkeypatch.setattr(cifar10.folder, "open", File, raising=False)
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match=r"last\.pth: can't be written: .*No space"):
        cifar10.checkpoint.save_checkpoint({"a": torch.zeros(9999)}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
