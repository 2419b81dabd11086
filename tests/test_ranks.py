"""cifar10/'s scripts on two ranks."""

import json
import shutil
import signal

import pytest
import torch

from conftest import ROOT, log_of, script, start
from on_digits import cifar10
from on_runs import ARGS, is_same, printed, train


def test_two_ranks(tmp_path):
    """By torchrun or without a launcher; each has running statistics of its own, which are saved
    too.
    """
    args = [*ARGS, "--log-interval", 1, "--output", tmp_path, "--batch-size", 64]
    args += ["--dist-bn", "reduce", "--model-ema", "--model-ema-decay", 0.9]
    args += ["--cooldown-epochs", 0]
    done = script("cifar10", "train", *args, "--experiment", "whole", ranks=2)
    assert "128 images a step (batch_size 64 x 2 ranks)" in done.stdout
    process = start("cifar10", *args, "--experiment", "stopped", ranks=2)
    next(line for line in process.stdout if line.startswith("epoch 0, step 3/"))
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait() != 0
    folder = tmp_path / "stopped"
    step = torch.load(folder / "last.pth", weights_only=True)["step"]
    assert step >= 3
    shutil.copytree(folder, tmp_path / "one" / "stopped")
    launcher, number, name, *flags = printed(rest)
    assert (launcher, number, name) == ("torchrun", "--nproc_per_node=2", "train.py")
    script("cifar10", "train", *flags, ranks=2)
    is_same(folder, tmp_path / "whole")

    best = max(log_of(folder), key=lambda line: line["test_acc1"])
    test = ["--checkpoint", folder / "best.pth"]
    for ranks in (1, 2):
        if ranks == 1:
            train(*test, main=cifar10.test.main)
        else:
            script("cifar10", "test", *test, ranks=2)
        result = json.loads((folder / "test-best.json").read_text())
        assert (result["top1"], result["loss"]) == (best["test_acc1"], best["test_loss"])

    # on one rank, behind the samples that were seen, in the same order of the epoch
    code, text = train("--resume", "auto", "--output", tmp_path / "one")
    assert code == 0 and "64 images a step" in text and f"at epoch 0, step {2 * step}\n" in text
    assert f"epoch 0, step {2 * step + 1}/22" in text or step == 11
    assert len(log_of(tmp_path / "one" / "stopped")) == 2


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
