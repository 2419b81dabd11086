"""Training with cifar10/'s scripts, as a user runs them, on the embedded digits."""

import dataclasses
import json
import os
import re
import shutil
import signal

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import log_of, script, start
from on_digits import cifar10
from on_images import TINY, write_images
from on_runs import ARGS, FEW, ONE, is_same, printed, train


def test_run_and_its_folder(whole):
    folder, text = whole
    for words in (
        "data: digits, 1,437 training and 360 test images of 10 classes, 3 x 8 x 8\n",
        "network: QKFormer, T = 1, ",
        "training: 3 epochs of 11 steps, 128 images a step (batch_size 128), learning rate "
        "0.005 at its peak\n",
        "writing to ",
        "cross_sample_lif: false",
    ):
        assert words in text
    log = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [0, 1, 2]
    fields = "lr train_loss test_loss test_acc1 test_acc5 seconds images_per_second peak_memory_mb"
    assert all({*fields.split(), "firing_rate"} <= set(line) for line in log)
    best = max(log, key=lambda line: line["test_acc1"])
    assert f"best top-1 {best['test_acc1']:.2f} %" in text
    args = yaml.safe_load((folder / "args.yaml").read_text())
    assert args["dim"] == 16 and args["mixup"] == 0.5 and set(args) == set(cifar10.options.KEYS)
    checkpoint = torch.load(folder / "last.pth", weights_only=True)
    names = "model optimizer scaler epoch best rng config cross_sample_lif"
    assert set(names.split()) <= set(checkpoint) and checkpoint["epoch"] == 2

    # the first and the last step of each epoch, a log being no terminal, with the loss so far
    lines = re.findall(r"^epoch (\d), step (\d+)/11: loss ([\d.]+), lr .* left", text, re.MULTILINE)
    assert [tuple(map(int, line[:2])) for line in lines] == [
        (e, s) for e in range(3) for s in (1, 11)
    ]
    board = EventAccumulator(str(folder / "steps")).Reload()
    losses = [event.value for event in board.Scalars("step/loss")]
    for (_, _, loss), value, epoch in zip(lines[::2], losses[::11], log, strict=True):
        assert float(loss) == pytest.approx(value, abs=1e-4)
        first = 11 * epoch["epoch"]
        mean = sum(losses[first : first + 11]) / 11
        assert epoch["train_loss"] == pytest.approx(mean) and 1 < mean < 4  # chance is 2.3
    assert [float(line[2]) for line in lines[1::2]] == [round(e["train_loss"], 4) for e in log]
    names = set(EventAccumulator(str(folder)).Reload().Tags()["scalars"])
    assert {"epoch/train_loss", "epoch/test_acc1", "firing_rate/stage1"} <= names
    assert all("/" in name for name in names)  # in groups

    code, text = train("-c", folder / "args.yaml", main=cifar10.test.main)
    result = json.loads((folder / "test-best.json").read_text())
    assert code == 0 and f"top-1 {best['test_acc1']:.2f} %" in text
    assert result["checkpoint"] == str(folder / "best.pth")
    for name, key in (("top1", "test_acc1"), ("top5", "test_acc5"), ("loss", "test_loss")):
        assert result[name] == best[key]


def test_lines_in_time(tmp_path, monkeypatch):
    """At least every SECONDS, however long the interval."""
    monkeypatch.setattr(cifar10.meters, "SECONDS", 0)
    _, text = train(*FEW, "--output", tmp_path, "--epochs", 1)
    assert re.findall(r"epoch 0, step (\d)/4", text) == ["1", "2", "3", "4"]
    monkeypatch.setattr(cifar10.meters, "SECONDS", 30)
    _, text = train(*FEW, "--output", tmp_path, "--epochs", 1, "--log-interval", 3)
    assert re.findall(r"epoch 0, step (\d)/4", text) == ["1", "3", "4"]


def test_firing_rates_are_of_all_classes(few, tmp_path, monkeypatch):
    """Of test samples from all over the set, which is often in the order of its classes."""
    classes = [label for label in range(8) for _ in range(50)]
    assert [*cifar10.meters.spread(classes)] == [*range(8)]
    assert [*cifar10.meters.spread([1, 2])] == [1, 2]
    taken, rates = [], cifar10.meters.firing_rates

    def firing_rates(model, batches, autocast):
        taken.append(batches)
        return rates(model, batches, autocast)

    monkeypatch.setattr(cifar10.run, "firing_rates", firing_rates)
    code, _ = train(*FEW, "--output", tmp_path, "--val-batch-size", 3)
    tests = cifar10.data.digits(False, None).images
    assert code == 0 and len(tests) == 360 and log_of(few)[0]["firing_rate"]
    images = torch.stack([torch.as_tensor(tests[45 * n]) for n in range(8)]) / 255
    low, high = images.amin((1, 2)), images.amax((1, 2))
    found = torch.cat(taken[0])
    assert len(found) == 8 and all(batches is taken[0] for batches in taken)
    mean, std = 0.4914, 0.2470  # of the first channel
    assert torch.allclose(found[:, 0].amin((1, 2)) * std + mean, low, atol=1e-2)
    assert torch.allclose(found[:, 0].amax((1, 2)) * std + mean, high, atol=1e-2)
    changed = [line["firing_rate"] for line in log_of(tmp_path / "quickstart")]
    assert changed == [line["firing_rate"] for line in log_of(few)]


# Stopped and resumed ------------------------------------------------------------------------------


def test_stopped_in_every_step(few, tmp_path, stop_when):
    """One step at a time, it is the run that nothing interrupts."""
    stop_when(lambda run: run.meter.steps < run.steps)
    args = [*FEW, "--output", tmp_path, "--resume", "auto"]
    for step in range(8):
        code, text = train(*args)
        assert code == 143 and f"stopped in epoch {step // 4} after step {step % 4 + 1};" in text
    assert train(*args)[0] == 0
    is_same(tmp_path / "quickstart", few)


def test_stopped_while_it_tests(few, tmp_path, stop_when):
    stop_when(lambda run: not run.model.training and run.epoch == 1)
    args = [*FEW, "--output", tmp_path, "--resume", "auto"]
    code, text = train(*args)
    assert code == 143 and "SIGTERM: stopped in epoch 1 after step 4;" in text
    stop_when(lambda run: False)
    assert train(*args)[0] == 0
    is_same(tmp_path / "quickstart", few)


def test_resume_auto_alone(few, tmp_path, monkeypatch, stop_when):
    """It goes on with the run as it was, under whatever name and recipe; a line names a change."""
    monkeypatch.setattr(cifar10.folder, "HERE", tmp_path)
    stop_when(lambda run: run.epoch == 1 and run.meter.steps == 1)
    code, text = train(*FEW, "--experiment", "mine")
    assert code == 143 and "in epoch 1 after step 2;" in text
    shutil.copytree(tmp_path / "output" / "mine", tmp_path / "other" / "mine")
    stop_when(lambda run: False)
    code, text = train("--resume", "auto")
    run = tmp_path / "output" / "mine"
    assert (
        code == 0
        and "at epoch 1, step 2" in text
        and [*(tmp_path / "output").glob("[!.]*")] == [run]
    )
    assert not re.search(r"^\w+\.yml: |^command line: ", text, re.MULTILINE)
    is_same(run, few)

    before = {path: path.read_bytes() for path in run.glob("*.pth")}
    code, text = train("--resume", "auto")
    assert code == 0 and "nothing to do: all 2 epochs are done" in text
    assert before == {path: path.read_bytes() for path in run.glob("*.pth")} and len(before) == 2
    assert log_of(run) == log_of(few)

    new = ["--lr", "1e-4", "--output", tmp_path / "other"]
    code, text = train("--resume", "auto", *new)
    changes = [line for line in text.splitlines() if line.startswith("command line: ")]
    assert (
        code == 0 and len(changes) == 1 and "lr is 0.0001" in changes[0] and "0.005" in changes[0]
    )
    assert log_of(tmp_path / "other" / "mine")[0] == log_of(few)[0]
    assert log_of(tmp_path / "other" / "mine")[1] != log_of(few)[1]


def test_start_epoch(tmp_path, stop_when):
    """It counts once: with auto a run that is started again goes on where it was."""
    args = [*FEW, "--epochs", 3, "--start-epoch", 1, "--resume", "auto", "--output", tmp_path]
    stop_when(lambda run: run.epoch == 2)
    assert train(*args)[0] == 143
    stop_when(lambda run: False)
    code, text = train(*args)
    assert code == 0 and "at epoch 2, step 1" in text
    log = log_of(tmp_path / "quickstart")
    assert [line["epoch"] for line in log] == [1, 2] and 1e-5 < log[1]["lr"] < log[0]["lr"] < 4e-3
    last = tmp_path / "quickstart" / "last.pth"
    _, text = train(*args[:-4], "--resume", last, "--output", tmp_path)
    assert "at epoch 1, step 0" in text  # said of a checkpoint, it goes back


def test_other_images_within_an_epoch(tmp_path, stop_when):
    """As many, under other names, are in another order: the epoch begins again, with a line. Moved
    data are the same.
    """
    data = write_images(tmp_path / "data")
    args = [*TINY, "--batch-size", 2, "--output", tmp_path, "--resume", "auto", "--data-path"]
    stop_when(lambda run: run.meter.steps == 1)
    assert train(*args, data)[0] == 143
    data = data.rename(tmp_path / "moved")
    stop_when(lambda run: True)
    code, text = train(*args, data)
    assert "at epoch 0, step 2\n" in text and "now there are" not in text
    name = next((data / "train").rglob("0.png"))
    name.rename(name.with_name("9.png"))
    stop_when(lambda run: False)
    code, text = train(*args, data)
    assert "is of 12 training images, now there are 12 others: epoch 0 begins again" in text
    assert code == 0 and "at epoch 0, step 0\n" in text


def test_killed(whole, tmp_path):
    """SIGKILL within an epoch: the same command goes on from the last epoch's end."""
    args = [*ARGS, "--output", tmp_path, "--resume", "auto", "--log-interval", 1, "--workers", 1]
    process = start("cifar10", *args)
    next(line for line in process.stdout if line.startswith("epoch 1, step 3/"))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    folder = tmp_path / "quickstart"
    assert torch.load(folder / "last.pth", weights_only=True)["epoch"] == 0
    assert "at epoch 1, step 0" in script("cifar10", "train", *args).stdout
    is_same(folder, whole[0])


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)]
)
def test_signal(whole, tmp_path, number):
    """To the run and its workers: it ends after the step at hand, and what it prints goes on with
    the very next one.
    """
    place = tmp_path / "two words"
    args = [*ARGS, "--output", place, "--log-interval", 1, "--workers", 1]
    process = start("cifar10", *args)
    next(line for line in process.stdout if line.startswith("epoch 1, step 3/"))
    os.killpg(process.pid, number)
    rest = process.stdout.read()
    assert process.wait() == 128 + number and "Traceback" not in rest and number.name in rest
    checkpoint = torch.load(place / "quickstart" / "last.pth", weights_only=True)
    assert checkpoint["epoch"] == 0 and 3 <= checkpoint["step"] <= 11
    python, name, *flags = printed(rest)
    assert (python, name) == ("python", "train.py")
    done = script("cifar10", "train", *flags)
    assert f"at epoch 1, step {checkpoint['step']}" in done.stdout
    is_same(place / "quickstart", whole[0])


# Numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [358, 1024])
def test_divergence(tmp_path, batch, monkeypatch):
    """In the middle of an epoch, and in its only step, when no loss shows it yet."""
    for name in ("lr", "min_lr", "weight_decay"):  # more than the keys allow
        key = dataclasses.replace(cifar10.options.KEYS[name], high=1e39)
        monkeypatch.setitem(cifar10.options.KEYS, name, key)
    args = [*ONE, "--output", tmp_path, "--batch-size", batch]
    assert train(*args)[0] == 0
    last = tmp_path / "quickstart" / "last.pth"
    before = last.read_bytes()
    wild = "--lr 1e38 --min-lr 1e38 --weight-decay 1e3 --opt sgd --no-resume-opt --epochs 2"
    code, text = train(*args, *wild.split(), "--resume", "auto")
    words = ("step", "epoch 1", "learning rate 1e+38", "last.pth is as it was")
    assert code == 1 and all(word in text.splitlines()[-1] for word in words), text
    assert last.read_bytes() == before
