"""Training with cifar10/'s scripts, as a user runs them, on the embedded digits."""

import copy
import dataclasses
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import ROOT, log_of, on_cpu, one_line, same, script, start, weights_of
from on_digits import CPU, RANDOM, SMALL, cifar10, resolve


def ranks(rank, world_size):
    place = copy.copy(CPU)
    place.rank, place.world_size = rank, world_size
    return place


def test_run_and_its_folder(trained_on_digits):
    folder, text = trained_on_digits
    assert "cross_sample_lif: false" in text and "torch backend" in text and "parameters" in text
    log = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [0, 1]
    fields = (
        "epoch lr train_loss test_loss test_acc1 test_acc5 seconds images_per_second peak_memory_mb"
    )
    assert all(set(fields.split()) <= set(line) for line in log)
    assert list(folder.glob("events.out.tfevents.*"))
    lines = [line for line in text.splitlines() if ", step " in line]
    assert [line.split(":")[0] for line in lines] == [
        f"epoch {epoch}, step 22/22" for epoch in range(2)
    ]
    for line, epoch in zip(
        lines, log, strict=True
    ):  # the loss is that of the step itself, not of the one before
        assert (
            f"loss {epoch['train_loss']:.4f}, lr {epoch['lr']:.3g}, " in line and " left, " in line
        )
    assert (
        f"best top-1 {max(line['test_acc1'] for line in log):.2f} %" in text and "best.pth" in text
    )
    args = yaml.safe_load((folder / "args.yaml").read_text())
    assert args["dim"] == 16 and args["mixup"] == 0.5 and set(args) == set(cifar10.options.KEYS)
    assert sorted(path.name for path in folder.iterdir() if path.suffix == ".pth") == [
        "best.pth",
        "last.pth",
    ]
    checkpoint = torch.load(folder / "last.pth", weights_only=True)
    assert {"model", "optimizer", "scheduler", "scaler", "epoch", "best", "rng", "config"} <= set(
        checkpoint
    )
    assert checkpoint["cross_sample_lif"] is False and checkpoint["epoch"] == 1

    done = script("cifar10", "test", "-c", folder / "args.yaml")
    result = json.loads((folder / "test-best.json").read_text())
    best = max(log, key=lambda line: line["test_acc1"])
    assert result["top1"] == best["test_acc1"] and result["top5"] == best["test_acc5"]
    assert result["loss"] == best["test_loss"] and f"top-1 {result['top1']:.2f} %" in done.stdout
    assert Path(result["checkpoint"]).name == "best.pth"


def test_first_step_and_number_of_epochs(tmp_path, monkeypatch, capsys):
    """The first step's line has its own loss; a line says how many epochs there are, and why."""
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    flags = (
        *SMALL,
        "--workers",
        0,
        "--output",
        tmp_path,
        "--epochs",
        1,
        "--cooldown-epochs",
        1,
        "--log-interval",
        1,
    )
    cifar10.train.main(on_cpu(flags))
    lines = capsys.readouterr().out.splitlines()
    assert "2 epochs of 22 steps (epochs 1 + 1 of cooldown_epochs at min_lr)" in lines
    losses = [
        float(re.search(r"loss ([\d.]+)", line)[1])
        for line in lines
        if line.startswith("epoch 0, step ")
    ]
    assert len(losses) == 22 and 2 < losses[0] < 3  # chance is 2.3; a mean over the steps so far
    board = EventAccumulator(str(tmp_path / "quickstart" / "steps")).Reload()
    points = [event.value for event in board.Scalars("step/loss")]
    means = [sum(points[: step + 1]) / (step + 1) for step in range(22)]
    assert losses == pytest.approx(means, abs=1e-4) and len(points) == 44
    names = EventAccumulator(str(tmp_path / "quickstart")).Reload().Tags()["scalars"]
    assert {
        "loss/train",
        "loss/test",
        "accuracy/top1",
        "accuracy/top5",
        "speed/images_per_second",
    } <= set(names)
    assert not any(
        "/" not in name for name in names
    )  # all in groups, no curve of the epoch's number


def test_killed_and_resumed(trained_on_digits, tmp_path):
    """SIGKILL within an epoch: the same command goes on from the last epoch's end, to the same
    weights.
    """
    args = [
        *RANDOM,
        "--output",
        tmp_path,
        "--experiment",
        "killed",
        "--resume",
        "auto",
        "--log-interval",
        1,
    ]
    process = start("cifar10", *args)
    for line in process.stdout:
        if line.startswith("epoch 1, step 7/"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = tmp_path / "killed"
    assert torch.load(folder / "last.pth", weights_only=True)["epoch"] == 0
    done = script("cifar10", "train", *args)
    assert "at epoch 1, step 0" in done.stdout
    assert log_of(folder) == log_of(trained_on_digits[0])
    assert same(weights_of(folder / "last.pth"), weights_of(trained_on_digits[0] / "last.pth"))
    assert same(weights_of(folder / "best.pth"), weights_of(trained_on_digits[0] / "best.pth"))
    done = script("cifar10", "train", *args)
    assert "nothing to do" in done.stdout and log_of(folder) == log_of(trained_on_digits[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_and_resume(trained_on_digits, tmp_path, number):
    """A signal to the run and its workers ends it after the step at hand with last.pth written.

    It goes on with the very next step.
    """
    args = [*RANDOM, "--output", tmp_path, "--experiment", "stopped", "--log-interval", 1]
    process = start("cifar10", *args)
    for line in process.stdout:
        if line.startswith("epoch 1, step 9/"):
            break
    os.killpg(process.pid, number)
    rest = process.stdout.read()
    assert process.wait() == 128 + number and "Traceback" not in rest and number.name in rest
    folder = tmp_path / "stopped"
    checkpoint = torch.load(folder / "last.pth", weights_only=True)
    assert checkpoint["epoch"] == 0 and 9 <= checkpoint["step"] < 22
    done = script("cifar10", "train", *args, "--resume", folder / "last.pth", "--workers", 0)
    assert f"at epoch 1, step {checkpoint['step']}" in done.stdout
    assert log_of(folder) == log_of(trained_on_digits[0])
    assert same(weights_of(folder / "last.pth"), weights_of(trained_on_digits[0] / "last.pth"))


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("launch", marks=pytest.mark.long)])
def test_two_ranks(tmp_path, launcher):
    args = [*SMALL, "--epochs", 2, "--output", tmp_path, "--experiment", "two"]
    done = script("cifar10", "train", *args, ranks=2, launcher=launcher)
    assert "2 rank(s), 128 images a step" in done.stdout
    log = log_of(tmp_path / "two")
    assert len(log) == 2
    best = max(log, key=lambda line: line["test_acc1"])
    for number in (1, 2):
        path = tmp_path / "two" / "best.pth"
        script("cifar10", "test", *SMALL, "--checkpoint", path, ranks=number)
        result = json.loads((tmp_path / "two" / "test-best.json").read_text())
        assert (result["top1"], result["loss"]) == (best["test_acc1"], best["test_loss"])


def test_two_ranks_stop_together_and_resume(tmp_path):
    """Each with its own running statistics, which are saved too."""
    args = [*SMALL, "--epochs", 3, "--log-interval", 1, "--output", tmp_path]
    args += ["--dist-bn", "reduce", "--model-ema", "--model-ema-decay", 0.9]
    script("cifar10", "train", *args, "--experiment", "whole", ranks=2)
    process = start("cifar10", *args, "--experiment", "stopped", ranks=2)
    for line in process.stdout:
        if line.startswith("epoch 1, step 3/"):
            break
    process.send_signal(signal.SIGTERM)
    process.stdout.read()
    assert process.wait() != 0
    assert torch.load(tmp_path / "stopped" / "last.pth", weights_only=True)["step"] >= 3
    script("cifar10", "train", *args, "--experiment", "stopped", "--resume", "auto", ranks=2)
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "whole")
    assert same(*(weights_of(tmp_path / name / "last.pth") for name in ("stopped", "whole")))


@pytest.mark.long
def test_101_samples_on_two_ranks():
    """Each sample once and in its batch: one rank and two give the same figures, under both
    semantics.
    """
    results = {}
    for cross in ("false", "true"):
        for number in (1, 2):
            args = (ROOT / "tests", cross, "-c", "quickstart.yml", "--val-batch-size", 8)
            done = script(
                "cifar10", "../tests/eval_101", *args, ranks=number, env={"PYTHONPATH": "."}
            )
            line = next(line for line in done.stdout.splitlines() if line.startswith("METRICS"))
            results[cross, number] = json.loads(line.partition(" ")[2])
    assert results["false", 1] == results["false", 2] and results["true", 1] == results["true", 2]
    assert results["false", 1] != results["true", 1]


def test_folders(tmp_path):
    """A run's folder is written to only by going on from its last.pth."""

    def opened(**settings):
        cfg = resolve("--output", tmp_path, "--experiment", "a")
        vars(cfg).update({name: str(value) for name, value in settings.items()})
        folder, resume = cifar10.folder.open_run(cfg, cfg.output)
        return folder.name, resume and str(resume.relative_to(tmp_path))

    def make(name, *files, experiment="a"):
        (tmp_path / name).mkdir(exist_ok=True)
        for file in files:
            (tmp_path / name / file).touch()
        (tmp_path / name / "args.yaml").write_text(f"experiment: {experiment}\n")

    assert opened() == opened(resume="auto") == ("a", None)
    make("a")  # ended before its first checkpoint
    assert opened() == ("a-2", None) and opened(resume="auto") == ("a", None)
    make("a", "last.pth", "best.pth")
    assert opened() == ("a-2", None) and opened(resume="auto") == ("a", "a/last.pth")
    make("a-b", "last.pth", experiment="a-b")
    make("a-384", "last.pth", experiment="a-384")  # another experiment, whose name ends in a number
    make("b", "last.pth", experiment="b")
    os.utime(tmp_path / "a" / "last.pth", (1, 1))
    assert opened(resume="auto") == ("a", "a/last.pth")
    make("a-2", "last.pth")
    assert opened() == ("a-3", None) and opened(resume="auto") == ("a-2", "a-2/last.pth")
    assert opened(resume=tmp_path / "a" / "last.pth") == ("a", "a/last.pth")
    assert opened(resume=tmp_path / "a" / "best.pth") == ("a-3", "a/best.pth")
    assert opened(resume=tmp_path / "b" / "last.pth") == ("b", "b/last.pth")
    cfg = resolve("--output", tmp_path, "--experiment", "a", "--resume", tmp_path / "b/last.pth")
    cifar10.folder.open_run(cfg, cfg.output)
    assert cfg.experiment == "b"  # by which resume: auto finds it again


def test_log_with_a_torn_line(tmp_path):
    lines = [json.dumps({"epoch": epoch}) for epoch in range(4)]
    (tmp_path / "log.txt").write_text("\n".join([*lines, '{"epoch": 4, "lr']))
    log = cifar10.folder.RunLog(tmp_path, 3, 0)
    assert log.path.read_text().splitlines() == lines[:3]


def test_failed_resume_changes_nothing(trained_on_digits):
    folder, _ = trained_on_digits
    before = {path.name: path.read_bytes() for path in folder.rglob("*.*")}
    args = [*RANDOM, "--output", folder.parent, "--experiment", "whole", "--resume", "auto"]
    one_line(script("cifar10", "train", *args, "--dim", 32, check=False), "dim is 32", "of dim 16")
    one_line(
        script("cifar10", "train", *args, "--opt", "sgd", check=False), "last.pth", "adamw", "sgd"
    )
    assert {path.name: path.read_bytes() for path in folder.rglob("*.*")} == before


def test_resume_on_another_number_of_ranks(tmp_path):
    """Within an epoch: it goes on behind the samples that were seen, in the same order of the
    epoch.
    """
    args = [
        *SMALL,
        "--epochs",
        2,
        "--log-interval",
        1,
        "--output",
        tmp_path,
        "--experiment",
        "ranks",
    ]
    process = start("cifar10", *args, ranks=2)
    for line in process.stdout:
        if line.startswith("epoch 1, step 4/"):
            break
    process.send_signal(signal.SIGTERM)
    process.stdout.read()
    process.wait()
    step = torch.load(tmp_path / "ranks" / "last.pth", weights_only=True)["step"]
    assert 4 <= step < 11
    done = script("cifar10", "train", *args, "--resume", "auto")
    assert f"epoch 1, step {2 * step}" in done.stdout and "64 images a step" in done.stdout
    assert (
        f"epoch 1, step {2 * step + 1}/22" in done.stdout and len(log_of(tmp_path / "ranks")) == 2
    )


def test_start_epoch(tmp_path):
    script("cifar10", "train", *SMALL, "--output", tmp_path, "--epochs", 3, "--start-epoch", 2)
    (line,) = log_of(tmp_path / "quickstart")
    assert line["epoch"] == 2 and 1e-5 < line["lr"] < 4e-3  # far down the cosine


def test_signal_during_evaluation(trained_on_digits, tmp_path):
    args = [*RANDOM, "--output", tmp_path, "--experiment", "stopped", "--log-interval", 1]
    process = start("cifar10", *args, "--val-batch-size", 1)
    for line in process.stdout:
        if line.startswith("epoch 1, step 22/22"):
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: stopped in epoch 1 after step 22" in process.stdout.read()
    assert process.wait() == 143
    script("cifar10", "train", *args, "--resume", "auto")
    assert same(
        *(weights_of(path / "last.pth") for path in (tmp_path / "stopped", trained_on_digits[0]))
    )


def test_channels_last_on_a_cpu(tmp_path):
    """In the plain path PyTorch's own convolutions would crash with so few channels."""
    args = [*SMALL, "--output", tmp_path, "--epochs", 1, "--cooldown-epochs", 0, "--fused", "false"]
    done = script("cifar10", "train", *args, "--channels-last")
    assert "channels_last has no effect on a CPU" in done.stdout and "best top-1" in done.stdout


@pytest.mark.parametrize("batch", [64, 1024])
def test_divergence(tmp_path, batch, monkeypatch):
    """In the middle of an epoch, and in its only step, when no loss shows it yet."""
    for name in ("lr", "min_lr", "weight_decay"):  # more than the keys allow
        key = dataclasses.replace(cifar10.options.KEYS[name], high=1e38)
        monkeypatch.setitem(cifar10.options.KEYS, name, key)
    args = [
        *SMALL,
        "--output",
        tmp_path,
        "--batch-size",
        batch,
        "--warmup-epochs",
        0,
        "--experiment",
        "wild",
    ]
    script("cifar10", "train", *args, "--epochs", 1)
    before = (tmp_path / "wild" / "last.pth").read_bytes()
    wild = [
        "--lr",
        "1e38",
        "--min-lr",
        "1e38",
        "--weight-decay",
        "1e3",
        "--opt",
        "sgd",
        "--no-resume-opt",
    ]
    with pytest.raises(cifar10.config.UserError) as error:
        cifar10.train.main(on_cpu([*args, *wild, "--epochs", 2, "--resume", "auto"]))
    words = ("step", "epoch 1", "learning rate 1e+38", "last.pth is as it was")
    assert all(word in str(error.value) for word in words), error.value
    assert (tmp_path / "wild" / "last.pth").read_bytes() == before
