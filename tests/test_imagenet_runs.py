"""imagenet/: runs as a user starts, stops and resumes them, on one and two ranks."""

import argparse
import copy
import dataclasses
import json
import math
import signal

import pytest
import torch

from conftest import log_of, same, script, start, weights_of
from on_photos import imagenet, kill_at, photos, resolve, slurm


def test_trains_on_photographs(trained_narrow, narrow):
    folder, text = trained_narrow
    for words in (
        "16 images a step",
        "lr 0.01",
        "204,778 parameters",
        "cross_sample_lif: false",
        "torch backend",
    ):
        assert words in text, words
    assert "images/s" in text and "left" in text
    log = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    best = max(log, key=lambda line: line["test_acc1"])
    assert len(log) == 8 and best["test_acc1"] >= 85  # chance is 50; ten seeds end at 96 to 100
    fields = "train_lr train_loss test_loss test_acc1 test_acc5 epoch n_parameters seconds images_per_second"
    assert (
        all(set(fields.split()) <= set(line) for line in log) and log[0]["n_parameters"] == 204_778
    )
    script("imagenet", "test", *narrow, "--checkpoint", folder / "best.pth")
    result = json.loads((folder / "test-best.json").read_text())
    assert (result["top1"], result["loss"]) == (best["test_acc1"], best["test_loss"])


def test_curves_for_tensorboard(trained_narrow):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    boards = [
        EventAccumulator(str(path)).Reload()
        for path in (trained_narrow[0], trained_narrow[0] / "steps")
    ]
    log = log_of(trained_narrow[0])
    values = [event.value for event in boards[0].Scalars("accuracy/top1")]
    assert values == pytest.approx([line["test_acc1"] for line in log])
    rates = boards[1].Scalars("step/lr")
    assert [event.step for event in rates] == list(range(64))
    assert max(event.value for event in rates) == pytest.approx(1e-2, rel=1e-6)
    losses = boards[1].Scalars("step/loss")
    assert [event.step for event in losses] == list(range(64))
    for line, first in zip(log, range(0, 64, 8), strict=True):
        mean = math.fsum(event.value for event in losses[first : first + 8]) / 8
        assert mean == pytest.approx(line["train_loss"], rel=1e-5)


def test_slurm_variables():
    convert = imagenet.ranks.slurm_ranks
    env = {
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_LOCALID": "0",
        "SLURM_JOB_ID": "123456",
    }
    hosts = {"node[03-06,9]": "node03", "a1,b2": "a1", "gpu-7": "gpu-7", "rack2-[1,4]": "rack2-1"}
    for nodes, first in hosts.items():
        have = convert({**env, "SLURM_STEP_NODELIST": nodes})
        assert (have["RANK"], have["WORLD_SIZE"], have["MASTER_ADDR"]) == ("5", "16", first)
    have = convert({**env, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "99"})
    assert (have["MASTER_ADDR"], have["MASTER_PORT"]) == ("10.0.0.1", "99")


def test_two_ranks_through_each_launcher(tmp_path, narrow):
    """All launchers give the same run."""
    args = (*narrow, "--batch_size", 4, "--accum_iter", 2, "--epochs", 1, "--output_dir", tmp_path)
    for launcher in ("", "launch"):  # without one, and torchrun in test_train.py
        name = ("--experiment", launcher or "forks")
        done = script("imagenet", "train", *args, *name, ranks=2, launcher=launcher)
        assert "2 rank(s)" in done.stdout and "16 images a step" in done.stdout
    slurm(*args, "--experiment", "slurm")
    log = log_of(tmp_path / "forks")
    assert len(log) == 1 and log == log_of(tmp_path / "launch") == log_of(tmp_path / "slurm")


def test_two_ranks_learn(tmp_path, narrow):
    """Gradients accumulate without synchronisation in between."""
    args = (*narrow, "--batch_size", 4, "--accum_iter", 2, "--epochs", 5, "--output_dir", tmp_path)
    script("imagenet", "train", *args, ranks=2)
    best = max(line["test_acc1"] for line in log_of(tmp_path / "narrow"))
    assert best >= 70  # chance is 50; eight seeds come to 83 to 100


# randomness in every place, in the workers and in the main process
RANDOM = [
    "--aa",
    "rand-m9-mstd0.5-inc1",
    "--reprob",
    0.5,
    "--mixup",
    0.5,
    "--drop_path",
    0.2,
    "--accum_iter",
    2,
]
RANDOM += ["--batch_size", 8, "--epochs", 3, "--num_workers", 1, "--log_interval", 1]


def test_killed_and_resumed(tmp_path, narrow):
    """SIGKILL within an epoch: the same command goes on from save_minutes' last.pth, to the same
    weights and log.
    """
    args = (*narrow, *RANDOM, "--output_dir", tmp_path, "--resume", "auto", "--save_minutes", 1e-6)
    script("imagenet", "train", *args, "--experiment", "whole")
    process = start("imagenet", *args, "--experiment", "killed")
    kill_at(process, "epoch 1, step 6/8")
    folder = tmp_path / "killed"
    checkpoint = torch.load(folder / "last.pth", weights_only=True)
    assert checkpoint["epoch"] == 0 and checkpoint["step"] in (5, 6)
    done = script("imagenet", "train", *args, "--experiment", "killed")
    assert f"at epoch 1, step {checkpoint['step']}" in done.stdout
    assert log_of(folder) == log_of(tmp_path / "whole")
    assert same(*(weights_of(tmp_path / name / "last.pth") for name in ("killed", "whole")))
    moments = [
        torch.load(tmp_path / name / "last.pth")["optimizer"]["state"]
        for name in ("killed", "whole")
    ]
    assert all(
        torch.equal(one["exp_avg"], moments[1][index]["exp_avg"])
        for index, one in moments[0].items()
    )


def test_ranks_and_resumption_share_the_order_of_images(narrow):
    """Every step has the same images on 2 ranks and on 1, from the first and from any other on."""

    def steps(world_size, batch, accum, first):
        cfg, found = resolve(*narrow, "--batch_size", batch, "--accum_iter", accum), []
        for rank in range(world_size):
            ranks = argparse.Namespace(rank=rank, world_size=world_size, device=torch.device("cpu"))
            loader = imagenet.data.train_loader(cfg, range(70), 3, first, ranks).loader
            found.append([indices for indices, _ in loader.sampler])
        assert all(len(batches) % accum == 0 for batches in found)
        return [
            sorted(
                index
                for batches in found
                for indices in batches[start : start + accum]
                for index in indices
            )
            for start in range(0, len(found[0]), accum)
        ]

    whole = steps(2, 8, 1, 0)
    assert [len(step) for step in whole] == [16] * 4
    for world_size, batch, accum in ((1, 8, 2), (1, 16, 1), (2, 4, 2), (4, 2, 2)):
        assert (
            steps(world_size, batch, accum, 0) == whole
            and steps(world_size, batch, accum, 3) == whole[3:]
        )


@pytest.mark.long
def test_started_on_two_ranks_resumed_on_one(tmp_path, narrow):
    args = (
        *narrow,
        "--batch_size",
        8,
        "--output_dir",
        tmp_path,
        "--resume",
        "auto",
        "--log_interval",
        1,
    )
    process = start("imagenet", *args, "--epochs", 8, "--save_minutes", 1e-6, ranks=2)
    kill_at(process, "epoch 1, step 5/8")
    folder = tmp_path / "narrow"
    checkpoint = torch.load(folder / "last.pth", weights_only=True)
    assert checkpoint["step"] in (4, 5) and checkpoint["global_batch"] == 16
    copied = copy.deepcopy(checkpoint)
    done = script("imagenet", "train", *args, "--epochs", 8, "--accum_iter", 2)
    assert f"at epoch 1, step {checkpoint['step']}" in done.stdout and "warning" not in done.stdout
    log = log_of(folder)
    assert [line["epoch"] for line in log] == list(range(8)) and log[-1]["test_acc1"] >= 80
    torch.save(copied, folder / "last.pth")
    done = script("imagenet", "train", *args, "--epochs", 2)
    assert f"at epoch 1, step {2 * checkpoint['step']}" in done.stdout
    assert (
        "warning: 8 images a step" in done.stdout
        and "had 16; accum_iter: 2 would keep that" in done.stdout
    )
    assert [line["epoch"] for line in log_of(folder)] == [0, 1]


def test_signal_within_an_accumulation(tmp_path, narrow):
    args = (*narrow, *RANDOM, "--output_dir", tmp_path)
    process = start("imagenet", *args)
    for line in process.stdout:
        if line.startswith("epoch 0, step 2/"):
            break
    process.send_signal(signal.SIGTERM)
    assert (
        "resume: auto goes on from there" in process.stdout.read()
        and process.wait() == 128 + signal.SIGTERM
    )
    checkpoint = torch.load(tmp_path / "narrow" / "last.pth")
    assert checkpoint["global_batch"] == 16 and {
        int(s["step"]) for s in checkpoint["optimizer"]["state"].values()
    } == {checkpoint["step"]}


def test_non_finite_loss(tmp_path, narrow, monkeypatch, lines):
    key = dataclasses.replace(imagenet.options.KEYS["lr"], high=1e38)  # more than the key allows
    monkeypatch.setitem(imagenet.options.KEYS, "lr", key)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    text = lines(
        imagenet.train.main, *narrow, "--lr", "1e30", "--warmup_epochs", 0, "--output_dir", tmp_path
    )
    error = text.splitlines()[-1]
    assert all(word in error for word in ("error", "the loss is", "epoch 0", "learning rate")), text


def test_one_step_of_hst_10_384(tmp_path, capsys):
    """A training step and an evaluation at 224 x 224 through train.py; prints time and
    peak memory.
    """
    data = photos.make(tmp_path / "data", train=1, val=1, size=256)
    args = (
        "--data_path",
        data,
        "--nb_classes",
        2,
        "--batch_size",
        2,
        "--accum_iter",
        1,
        "--epochs",
        1,
    )
    done = script("imagenet", "train", *args, "--num_workers", 0, "--output_dir", tmp_path)
    assert "note: 2 images a step" in done.stdout
    (line,) = [
        json.loads(line) for line in (tmp_path / "imagenet" / "log.txt").read_text().splitlines()
    ]
    assert line["train_loss"] > 0 and line["n_parameters"] == 16_473_688 - 998 * 385
    with capsys.disabled():
        print(
            f"\nHST-10-384 at 224, CPU: a step of 2 images at {line['images_per_second']:.2f} "
            f"images/s; with an "
            f"evaluation of 2 images {line['seconds']:.1f} s; peak memory {line['peak_memory_mb']} "
            f"MB"
        )
