"""imagenet/: runs as a user starts, stops and resumes them, on one and two ranks."""

import argparse
import json
import signal
from itertools import chain

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import log_of, same, script, start, weights_of
from on_photos import imagenet, kill_at, photos, resolve, slurm


def test_trains_on_photographs(trained_narrow, narrow, lines):
    """The classes are those of the data; log, curves and test.py say the same."""
    folder, text = trained_narrow
    for words in (
        "128 training and 48 test images of 2 classes, 3 x 32 x 32",
        "8 epochs of 8 steps, 16 images a step",
        "learning rate 0.01 at its peak",
        "204,778 parameters",
        "cross_sample_lif: false",
    ):
        assert words in text, words
    log = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    best = max(log, key=lambda line: line["test_acc1"])
    assert len(log) == 8 and best["test_acc1"] >= 85  # chance is 50; ten seeds end at 96 to 100
    assert log[0]["n_parameters"] == 204_778 and log[0]["test_acc5"] == 100
    lines(imagenet.test.main, *narrow, "--checkpoint", folder / "best.pth")
    result = json.loads((folder / "test-best.json").read_text())
    assert (result["top1"], result["loss"]) == (best["test_acc1"], best["test_loss"])

    rates = EventAccumulator(str(folder / "steps")).Reload().Scalars("step/lr")
    assert [event.step for event in rates] == list(range(64))
    warm_up, peak = [event.value for event in rates[:8]], max(event.value for event in rates)
    assert warm_up == pytest.approx([1e-2 * step / 8 for step in range(8)], rel=1e-6)
    assert rates[8].value == peak == pytest.approx(1e-2, rel=1e-6)
    assert [line["train_lr"] for line in log[:2]] == pytest.approx([1e-2 * 7 / 16, 1e-2], rel=0.05)


def test_slurm_variables():
    convert = imagenet.process.slurm_ranks
    env = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "0"}
    env["SLURM_JOB_ID"] = "123456"
    hosts = {"node[03-06,9]": "node03", "a1,b2": "a1", "gpu-7": "gpu-7", "rack2-[1,4]": "rack2-1"}
    for nodes, first in hosts.items():
        have = convert({**env, "SLURM_STEP_NODELIST": nodes})
        assert (have["RANK"], have["WORLD_SIZE"], have["MASTER_ADDR"]) == ("5", "16", first)
    have = convert({**env, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "99"})
    assert (have["MASTER_ADDR"], have["MASTER_PORT"]) == ("10.0.0.1", "99")


@pytest.mark.long
def test_two_ranks_through_each_launcher(tmp_path, narrow):
    """All launchers give the same run, which learns."""
    args = (*narrow, "--batch_size", 4, "--accum_iter", 2, "--epochs", 5, "--output_dir", tmp_path)
    for launcher in ("", "launch"):  # without one, and torchrun in test_train.py
        name = ("--experiment", launcher or "forks")
        done = script("imagenet", "train", *args, *name, ranks=2, launcher=launcher)
        assert "batch_size 4 x accum_iter 2 x 2 ranks" in done.stdout
    slurm(*args, "--experiment", "slurm")
    log = log_of(tmp_path / "forks")
    assert len(log) == 5 and log == log_of(tmp_path / "launch") == log_of(tmp_path / "slurm")
    assert max(line["test_acc1"] for line in log) >= 70  # chance is 50; eight seeds: 83 to 100


# randomness in every place, in the workers and in the main process
RANDOM = "--aa rand-m9-mstd0.5-inc1 --reprob 0.5 --mixup 0.5 --drop_path 0.2 --accum_iter 2"
RANDOM += " --time_step 2 --batch_size 8 --epochs 2 --workers 1 --log_interval 1"


@pytest.mark.long
def test_killed_and_resumed(tmp_path, narrow):
    """SIGKILL within an epoch: the same command goes on from save_minutes' last.pth, to the same
    weights and log.
    """
    args = (*narrow, *RANDOM.split(), "--output_dir", tmp_path, "--resume", "auto")
    args += ("--save_minutes", 1e-6)
    script("imagenet", "train", *args, "--experiment", "whole")
    kill_at(start("imagenet", *args, "--experiment", "killed"), "epoch 1, step 3/8")
    folder = tmp_path / "killed"
    checkpoint = torch.load(folder / "last.pth", weights_only=True)
    assert checkpoint["epoch"] == 0 and checkpoint["step"] in (2, 3)
    done = script("imagenet", "train", *args, "--experiment", "killed")
    assert f"at epoch 1, step {checkpoint['step']}" in done.stdout
    assert log_of(folder) == log_of(tmp_path / "whole")
    killed, whole = (tmp_path / name / "last.pth" for name in ("killed", "whole"))
    assert same(weights_of(killed), weights_of(whole))
    moments = [torch.load(path)["optimizer"]["state"] for path in (killed, whole)]
    for index, state in moments[0].items():
        assert torch.equal(state["exp_avg"], moments[1][index]["exp_avg"])


class Numbers:
    """70 samples."""

    classes = ["a", "b"]

    def __len__(self):
        return 70


def test_ranks_and_resumption_share_the_order_of_images(narrow):
    """Every step has the same images on 2 ranks and on 1, from the first and from any other on."""

    def steps(world_size, batch, accum, first):
        cfg, found = resolve(*narrow, "--batch_size", batch, "--accum_iter", accum), []
        for rank in range(world_size):
            ranks = argparse.Namespace(rank=rank, world_size=world_size, device=torch.device("cpu"))
            loader = imagenet.data.train_loader(cfg, Numbers(), 3, first, ranks, 0).loader
            found.append([indices for indices, _ in loader.dataset])
        assert all(len(batches) % accum == 0 for batches in found)
        found = [[*chain(*batches)] for batches in found]  # the images of each rank
        size = batch * accum
        starts = range(0, len(found[0]), size)
        return [sorted(chain(*(of[at : at + size] for of in found))) for at in starts]

    whole = steps(2, 8, 1, 0)
    assert [len(step) for step in whole] == [16] * 4
    for how in ((1, 8, 2), (1, 16, 1), (2, 4, 2), (4, 2, 2)):
        assert steps(*how, 0) == whole and steps(*how, 3) == whole[3:]


@pytest.mark.long
def test_started_on_two_ranks_resumed_on_one(tmp_path, narrow):
    args = (*narrow, "--batch_size", 8, "--output_dir", tmp_path, "--resume", "auto")
    args += ("--log_interval", 1)
    process = start("imagenet", *args, "--epochs", 8, "--save_minutes", 1e-6, ranks=2)
    kill_at(process, "epoch 1, step 5/8")
    folder = tmp_path / "narrow"
    copied = (folder / "last.pth").read_bytes()
    checkpoint = torch.load(folder / "last.pth", weights_only=True)
    assert checkpoint["step"] in (4, 5) and checkpoint["global_batch"] == 16
    done = script("imagenet", "train", *args, "--epochs", 8, "--accum_iter", 2)
    assert f"at epoch 1, step {checkpoint['step']}" in done.stdout
    assert "images a step, but" not in done.stdout
    log = log_of(folder)
    assert [line["epoch"] for line in log] == list(range(8)) and log[-1]["test_acc1"] >= 80
    (folder / "last.pth").write_bytes(copied)
    done = script("imagenet", "train", *args, "--epochs", 2, "--accum_iter", 1)
    assert f"at epoch 1, step {2 * checkpoint['step']}" in done.stdout
    assert "warning: 8 images a step, but " in done.stdout and "last.pth had 16" in done.stdout
    assert [line["epoch"] for line in log_of(folder)] == [0, 1]


def test_signal_within_an_accumulation(tmp_path, narrow):
    """The run ends behind a whole step of the optimizer."""
    process = start("imagenet", *narrow, *RANDOM.split(), "--output_dir", tmp_path)
    for line in process.stdout:
        if line.startswith("epoch 0, step 2/"):
            break
    process.send_signal(signal.SIGTERM)
    assert "--resume" in process.stdout.read() and process.wait() == 128 + signal.SIGTERM
    checkpoint = torch.load(tmp_path / "narrow" / "last.pth")
    steps = {int(state["step"]) for state in checkpoint["optimizer"]["state"].values()}
    assert checkpoint["global_batch"] == 16 and steps == {checkpoint["step"]}


@pytest.mark.parametrize(("size", "T"), [(32, 1), pytest.param(224, 4, marks=pytest.mark.long)])
def test_one_step_of_hst_10_384(tmp_path, lines, size, T):
    """A training step and an evaluation of the published network through train.py."""
    data = photos.make(tmp_path / "data", train=1, val=1, size=size)
    args = [
        "--data_path",
        data,
        "--batch_size",
        2,
        "--accum_iter",
        1,
        "--epochs",
        1,
        "--warmup_epochs",
        0,
    ]
    args += ["--input_size", size, "--time_step", T, "--num_workers", 0, "--output_dir", tmp_path]
    text = lines(imagenet.train.main, *args)
    if size == 224:
        assert "note: 2 images a step" in text
    (line,) = (tmp_path / "imagenet" / "log.txt").read_text().splitlines()
    line = json.loads(line)
    assert line["train_loss"] > 0 and line["n_parameters"] == 16_473_688 - 998 * 385
