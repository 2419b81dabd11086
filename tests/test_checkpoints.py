"""Checkpoints that cifar10/'s scripts load or refuse, and what else a user can get wrong."""

import argparse
import io
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import load, on_cpu, one_line, script
from on_digits import SMALL, cifar10


def small_model(**kwargs):
    return cifar10.model.QKFormer(T=2, embed_dims=16, num_heads=2, depths=3, mlp_ratios=4, **kwargs)


def run_test(path, *args, **kwargs):
    return script("cifar10", "test", *SMALL, "--checkpoint", path, *args, **kwargs)


def test_kinds_of_checkpoints(tmp_path):
    """The release's, timm's with DDP's prefixes and a bare state dict: same figures, and taken for
    the release's.
    """
    torch.manual_seed(0)
    weights = small_model().state_dict()
    args = argparse.Namespace(
        lr=1e-3, betas=(0.9, 0.999), output=Path("x"), best=np.float64(0.5), top=np.float32(1)
    )
    kinds = {
        "release": {"model": weights, "optimizer": {}, "epoch": 3, "scaler": None, "args": args},
        "timm": {
            "state_dict": {f"module.{name}": value for name, value in weights.items()},
            "arch": "x",
            "args": args,
        },
        "bare": weights,
    }
    results = []
    for name, content in kinds.items():
        (tmp_path / name).mkdir()
        torch.save(content, tmp_path / name / "weights.pth")
        done = run_test(tmp_path / name / "weights.pth")
        assert "warning" in done.stdout and "cross_sample_lif: true" in done.stdout
        results.append(json.loads((tmp_path / name / "test-weights.json").read_text()))
    assert all(
        result["cross_sample_lif"] is True and result["loss"] == results[0]["loss"]
        for result in results
    )
    done = run_test(tmp_path / "timm" / "weights.pth", "--cross-sample-lif", "false")
    assert "cross_sample_lif: false" in done.stdout
    assert (
        json.loads((tmp_path / "timm" / "test-weights.json").read_text())["cross_sample_lif"]
        is False
    )


def test_semantics_rule():
    resolve_semantics = cifar10.checkpoint.resolve_semantics
    assert resolve_semantics("auto", None, None)[0] is False
    for recorded in (False, True):
        value, line = resolve_semantics("auto", {"cross_sample_lif": recorded}, "a.pth")
        assert value is recorded and "a.pth records" in line
    value, line = resolve_semantics("auto", {"model": {}}, "a.pth")
    assert (
        value is True and line.startswith("warning") and "a.pth" in line and "other images" in line
    )
    for setting, value in (("true", True), ("false", False)):
        assert resolve_semantics(setting, None, None)[0] is value
        assert resolve_semantics(setting, {"model": {}}, "a.pth")[0] is value
        got, line = resolve_semantics(setting, {"cross_sample_lif": not value}, "a.pth")
        assert got is value and line.startswith("warning")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_bad_checkpoints(trained_on_digits, tmp_path):
    folder, _ = trained_on_digits
    load_checkpoint, load_weights = (
        cifar10.checkpoint.load_checkpoint,
        cifar10.checkpoint.load_weights,
    )
    UserError = cifar10.config.UserError
    whole = (folder / "last.pth").read_bytes()
    for size in (0, 10, 1000, len(whole) // 2, len(whole) - 30):
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.pth: not a checkpoint, or not whole"):
            load_checkpoint(tmp_path / "cut.pth")
    torch.save(
        small_model().state_dict(), tmp_path / "legacy.pth", _use_new_zipfile_serialization=False
    )
    legacy, generator = (tmp_path / "legacy.pth").read_bytes(), np.random.RandomState(0)
    assert (
        load_checkpoint(tmp_path / "legacy.pth")["model"].keys()
        == small_model().state_dict().keys()
    )
    for _ in range(40):
        (tmp_path / "legacy.pth").write_bytes(legacy[: generator.randint(len(legacy) // 10)])
        with pytest.raises(UserError, match=r"legacy\.pth"):
            load_checkpoint(tmp_path / "legacy.pth")
    for content in ({"model": {}}, [1, 2], {"epoch": 3}, {"model": {"a": 3}}, {1: torch.ones(2)}):
        torch.save(content, tmp_path / "empty.pth")
        with pytest.raises(UserError, match=r"empty\.pth"):
            load_checkpoint(tmp_path / "empty.pth")
    trace = tmp_path / "ran"
    for zipped in (True, False):
        torch.save(
            {"model": {"a": Evil(trace)}},
            tmp_path / "evil.pth",
            _use_new_zipfile_serialization=zipped,
        )
        with pytest.raises(UserError, match=r"evil\.pth"):
            load_checkpoint(tmp_path / "evil.pth")
        assert not trace.exists()
    weights = small_model().state_dict()
    with pytest.raises(UserError) as error:
        load_weights(
            cifar10.model.QKFormer(T=2, embed_dims=32, num_heads=2, depths=4),
            {"model": weights},
            "a.pth",
        )
    assert all(
        word in str(error.value)
        for word in ("missing", "stage3.1.ssa", "of another shape", "instead of")
    )


def test_bad_input_to_the_scripts(trained_on_digits, tmp_path):
    """Through the scripts: one line, exit code 1, nothing lost or run."""
    folder, _ = trained_on_digits
    before = (folder / "last.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(before[:5000])
    one_line(run_test(tmp_path / "cut.pth", check=False), "cut.pth", "not whole")
    one_line(run_test(tmp_path / "none.pth", check=False), "none.pth", "no such checkpoint")
    one_line(
        run_test(folder / "best.pth", "--dim", 32, check=False),
        "dim is 32",
        "best.pth is of dim 16",
    )
    torch.save({"model": {"a": Evil(tmp_path / "ran")}}, tmp_path / "evil.pth")
    one_line(run_test(tmp_path / "evil.pth", check=False), "evil.pth", "could run code")
    assert not (tmp_path / "ran").exists()
    args = ["--output", folder.parent, "--resume", tmp_path / "cut.pth"]
    one_line(script("cifar10", "train", *SMALL, *args, check=False), "cut.pth", "not whole")
    one_line(script("cifar10", "train", "--batchsize", 3, check=False), "--batchsize", "batch_size")
    assert (folder / "last.pth").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num-heads", 5], ["num_heads is 5"]),
        (["--img-size", 18], ["18", "multiple of 4"]),
        (["--mixup", 0.5, "-b", 3], ["batch_size is 3", "even"]),
        (["-b", 4000], ["batch_size 4000", "1437"]),
        (["--num-classes", 7], ["num_classes is 7", "10 classes"]),
        (["--aa", "nonsense"], ["aa is 'nonsense'"]),
        (["--opt", "nonsense"], ["nonsense"]),
        (["--opt", "adahessian"], ["adahessian"]),
        (["--opt", "adan"], ["opt adan", "opt_betas"]),
        (["--img-size", 4, "-b", 1, "--time-step", 1], ["batch_size 1", "single value"]),
        (["--cutmix-minmax", 0.9, 0.1], ["cutmix_minmax"]),
        (["--input-size", 1, 16, 16], ["input_size", "3 channels"]),
        (["--mlp-ratio", 0.1, "--dim", 16], ["mlp_ratios is 0.1"]),
        (["--experiment", "a/b"], ["experiment is 'a/b'"]),
        (["--device", "meta"], ["device is 'meta'"]),
        (["--model", "resnet18"], ["resnet18", "QKFormer"]),
        (["--device", "cuda:77"], ["cuda:77"]),
        (["--device", "gpu"], ["device is 'gpu'"]),
        (["--attention", "token", "ssa"], ["attention", "3 words"]),
        (["--attention", "token", "ssa", "sas"], ["sas"]),
        (["--backend", "cupy", "--device", "cpu"], ["cupy backend", "CUDA"]),
        (["--initial-checkpoint", "none.pth"], ["none.pth"]),
    ],
)
def test_one_line_for_each_mistake(flags, words, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    with pytest.raises(cifar10.config.UserError) as error:
        cifar10.train.main(on_cpu([*SMALL, "--output", tmp_path, *flags]))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), str(
        error.value
    )


def test_a_resumed_run_says_which_settings_changed(caplog):
    cfg = cifar10.config.load_config(
        cifar10.options.KEYS, cifar10.options.NO_EFFECT, cifar10.options.DEFAULT_CONFIG, []
    )[0]
    then = {**vars(cfg), "lr": 0.5, "mixup": 0.0, "output": "elsewhere", "workers": 1}
    with caplog.at_level("INFO", logger="qkformer"):
        cifar10.build.say_changes(cfg, {"config": dict(vars(cfg))}, "a.pth")
        cifar10.build.say_changes(cfg, {}, "a.pth")
        assert not caplog.messages
        cifar10.build.say_changes(cfg, {"config": then}, "a.pth")
    changed = "mixup 0.5 (was 0.0), lr 0.001 (was 0.5)"
    assert caplog.messages == [f"warning: a.pth was trained otherwise; now {changed}"]


def test_a_file_of_another_folder_is_not_damaged(tmp_path):
    torch.manual_seed(0)
    weights = load("imagenet").model.QKFormer_10_384(T=1).state_dict()
    content = {"model": weights, "config": {"input_size": 48}}
    torch.save(content, tmp_path / "imagenet.pth")
    with pytest.raises(cifar10.config.UserError, match=r"for ImageNet, another architecture"):
        cifar10.build.read_config(content, tmp_path / "imagenet.pth")


def test_no_data_and_no_network(tmp_path):
    offline = dict.fromkeys(
        ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"
    )
    args = ["--data-dir", tmp_path / "data", "--output", tmp_path]
    one_line(
        script("cifar10", "train", *args, check=False, env=offline),
        tmp_path / "data",
        "cifar-10-python.tar.gz",
        "quickstart.yml",
    )


@pytest.mark.long
def test_no_compiler_for_torch_compile(tmp_path):
    args = [*SMALL, "--compile", "true", "--epochs", 1, "--output", tmp_path]
    done = script("cifar10", "train", *args, env={"CXX": "no-such-compiler"}, check=False)
    one_line(done, "torch.compile", "no-such-compiler", "compile: false")


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

    monkeypatch.setattr(cifar10.checkpoint, "open", File, raising=False)
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(cifar10.config.UserError, match=r"last\.pth: can't be written .*No space"):
        cifar10.checkpoint.save_checkpoint({"a": torch.zeros(9999)}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
