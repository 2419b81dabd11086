"""dvs128-gesture/ and cifar10-dvs/: runs from raw recordings to an accuracy."""

import functools
import json
import math
import os
import signal
import time

import pytest

from conftest import Fork, build_model, copy_folder, load, log_of, on_cpu, same, script, weights_of
from on_events import CLASSES, FOLDERS, ONCE, SMALL, check_frames, cpu, resolve, write


@pytest.fixture(scope="module")
def data_path(tmp_path_factory):
    """Recordings of each data set, written once; converted by the first run that needs them."""
    roots = {name: tmp_path_factory.mktemp(name) for name in FOLDERS}
    for name, root in roots.items():
        write(name, root)
    return roots


QUICK = ["-c", "quickstart.yml", "--T", 2, "--epochs", 3]
LITTLE = {"dvs128-gesture": {"train": 10, "test": 2}, "cifar10-dvs": {"samples": 12}}


@pytest.fixture(scope="module")
def trained(data_path, tmp_path_factory):
    """From nothing to a checkpoint, by a copy of the folder alone in an empty place, which draws
    fewer recordings; once for each folder.
    """

    @functools.cache
    def train(name):
        alone = copy_folder(name, tmp_path_factory.mktemp("alone"))
        shapes = alone / "shapes.py"
        shapes.write_text(f"{shapes.read_text()}\n\nQUICK.update({LITTLE[name]})\n")
        args = ["--data-path", data_path[name], *QUICK]
        return alone, script(alone, "train", *args, cwd=alone, timeout=900)

    return train


@pytest.mark.long
@ONCE
def test_short_quick_start(folder, data_path, trained):
    """Trained, tested on one rank and on two, and tested by train.py: the same figures."""
    alone, done = trained(folder.name)
    for words in ("drawing shapes", "reading recordings", "integrating frames"):
        assert done.stdout.count(words) == 1
    assert "the published data set" not in done.stdout
    run = alone / "output" / "quickstart"
    log = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
    best = max(log, key=lambda line: line["test_acc1"])
    assert len(log) == 3 and log[-1]["train_loss"] < math.log(CLASSES[folder.name])  # of chance

    for ranks in (1, 2):
        done = script(alone, "test", cwd=alone, ranks=ranks)
        result = json.loads((run / "test-best.json").read_text())
        assert "reading recordings" not in done.stdout
        assert (result["top1"], result["loss"]) == (best["test_acc1"], best["test_loss"])
    args = ["--data-path", data_path[folder.name], *QUICK]
    done = script(alone, "train", *args, "--test-only", "--resume", "auto", cwd=alone)
    assert f"last.pth: top-1 {log[-1]['test_acc1']:.2f} %" in done.stdout
    assert "epoch" not in done.stdout


RANDOM = "--batch-size 8 --epochs 2 --warmup-epochs 0 --cooldown-epochs 0 --T-train 1"
RANDOM = [*SMALL, *f"{RANDOM} --drop-path 0.2 --mixup-prob 1 --lr 1e-2".split()]


def kill_when(condition, folder, *args):
    """Start train.py and SIGKILL it as soon as condition() holds."""
    run = Fork(folder.name, on_cpu(args), os.devnull)
    deadline = time.monotonic() + 600
    while not condition():
        assert run.wait(0.001) is None and time.monotonic() < deadline
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait(60) == -signal.SIGKILL


@pytest.mark.long
@ONCE
def test_killed_and_restarted(folder, tmp_path):
    """Killed while events are made, while frames are made and in training; the same command ends as
    if never.
    """
    number = {"samples": 10} if folder.name == "cifar10-dvs" else {"trials": 1}
    written = write(folder.name, tmp_path, **number)
    frames, events = tmp_path / "frames_number_2_split_by_number", tmp_path / "events_np"
    building, run = tmp_path / ".qkformer-building", tmp_path / "out" / folder.name
    args = ["--data-path", tmp_path, "--output-dir", tmp_path / "out", "--resume", "auto", *RANDOM]
    kill_when(lambda: any((building / "events_np").rglob("*.npz")), folder, *args)
    assert not events.exists()
    kill_when(lambda: any(building.glob("frames*/**/*.npz")), folder, *args)
    assert events.exists() and not frames.exists()
    kill_when((run / "last.pth").exists, folder, *args)
    check_frames(frames, written, 2)
    assert not building.exists()

    assert "resuming" in script(folder.name, "train", *args).stdout
    args[args.index("--output-dir") + 1] = tmp_path / "whole"
    script(folder.name, "train", *args)
    whole = tmp_path / "whole" / folder.name
    assert log_of(run) == log_of(whole)
    assert same(weights_of(run / "last.pth"), weights_of(whole / "last.pth"))


def evaluate(folder, cfg, path, eval_amp, semantics=False):
    """Metrics of a checkpoint on one rank."""
    one, model = cpu(folder), build_model(folder, cfg, semantics)
    folder.checkpoint.load_weights(model, weights_of(path), path)
    loader = folder.data.test_loader(cfg, folder.data.build_dataset(cfg, False, one), one)
    autocast = folder.meters.make_autocast(cfg, one, eval_amp)
    return folder.meters.evaluate(model, loader, one, autocast)


@ONCE
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_amp_in_training_alone(folder, ranks, tmp_path, data_path):
    """Evaluation is in float32 all the same, unless eval_amp says otherwise; a second rank waits
    for the frames.
    """
    args = [*RANDOM, "--epochs", 1, "--T", 3, "--amp-dtype", "bfloat16"]
    args += ["--data-path", data_path[folder.name], "--output-dir", tmp_path]
    done = script(folder.name, "train", *args, ranks=ranks)
    size = "8 samples a step (batch_size 8)", "16 samples a step (batch_size 8 x 2 ranks)"
    assert size[ranks - 1] in done.stdout
    assert done.stdout.count("integrating frames") == 1
    [line], best = log_of(tmp_path / folder.name), tmp_path / folder.name / "best.pth"
    cfg = resolve(folder, *args)
    assert evaluate(folder, cfg, best, cfg.eval_amp).loss == line["test_loss"]
    assert evaluate(folder, cfg, best, True).loss != line["test_loss"]


@pytest.mark.long
@ONCE
def test_testing_on_two_ranks(folder, data_path, trained):
    """Each sample once, in one rank's batches: the result is one rank's in the release's semantics
    too.
    """
    alone, _ = trained(folder.name)
    args = ["--val-batch-size", 3, "--cross-sample-lif", "true"]
    script(alone, "test", *args, ranks=2, cwd=alone)
    run = alone / "output" / "quickstart"
    newest = max(run.glob("test-best*.json"), key=lambda path: path.stat().st_mtime)
    result = json.loads(newest.read_text())
    cfg = resolve(folder, "--data-path", data_path[folder.name], *QUICK, *args)
    want = evaluate(folder, cfg, run / "best.pth", cfg.eval_amp, True)
    assert (result["top1"], result["top5"]) == (want.top1, want.top5)
    assert result["loss"] == pytest.approx(want.loss, rel=1e-7)
    assert result["cross_sample_lif"]


def test_missing_recordings_on_two_ranks(tmp_path):
    args = ["--data-path", tmp_path, "--output-dir", tmp_path / "out"]
    done = script("cifar10-dvs", "train", *args, ranks=2, check=False)
    assert done.returncode == 1
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert 1 <= len(errors) <= 2 and len(set(errors)) == 1 and "no recordings" in errors[0]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--T-train", 17], ["T_train is 17", "T = 16"]),
        (["-b", 3], ["batch_size is 3", "even"]),
        (["--attention", "token"], ["attention", "token"]),
        (["--split-sead", 3], ["split_sead", "split_seed"]),
    ],
)
def test_mistakes(args, words):
    cifar10_dvs = load("cifar10-dvs")
    with pytest.raises(cifar10_dvs.config.UserError) as error:
        cifar10_dvs.train.main(on_cpu(args))
    assert all(word in str(error.value) for word in words)
