"""The learning rate's course in all folders: what the first lines say of it, and what is refused."""

from math import cos, pi
from types import SimpleNamespace

import pytest
import torch

from conftest import load, resolve_in

FOLDERS = ("cifar10", "cifar100", "dvs128-gesture", "cifar10-dvs", "imagenet")


def schedule(folder, *flags):
    modules = load(folder)
    cfg = resolve_in(modules, "--lr", 0.01, "--min_lr", 0.001, *flags)
    run = SimpleNamespace(cfg=cfg, lr=cfg.lr, num_epochs=cfg.epochs)
    if folder != "imagenet":
        model = torch.nn.Linear(2, 2)
        run.optimizer, run.scheduler, run.num_epochs = modules.train.build_optimizer(cfg, model)
    run.course = lambda: modules.train.Trainer.course(run)
    try:
        return modules.run.Run.schedule(run)
    except modules.log.UserError as error:
        return f"error: {error}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_course(folder):
    """From the warm-up's start to the peak behind it, and half a cosine down to min_lr."""
    imagenet = folder == "imagenet"
    start = 0 if imagenet else 0.002
    own = () if imagenet else ("--warmup_lr", start, "--cooldown_epochs", 3)
    # timm's cosine counts from epoch 0, whatever the warm-up: at epoch 2 of 20 it is a tenth on
    peak = 0.01 if imagenet else 0.001 + 0.009 * (1 + cos(pi / 10)) / 2
    said = schedule(folder, "--epochs", 20, "--warmup_epochs", 2, *own)
    last = 20 if imagenet else 23
    want = f"from {start:.3g}, peak {peak:.3g} at epoch 2, to 0.001 at epoch {last}, by cosine"
    assert said == want
    said = schedule(folder, "--epochs", 1, "--warmup_epochs", 0)
    assert said.startswith("from 0.01, peak 0.01 at epoch 0, to 0.001 at epoch ")
    constant = schedule(folder, "--epochs", 4, "--warmup_epochs", 0, "--min_lr", 0.01)
    assert constant.startswith("from 0.01, peak 0.01 at epoch 0, to 0.01 at epoch ")


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--epochs 10 --warmup_epochs 20", "epochs 10, warmup_epochs 20"),
        ("--epochs 5 --warmup_epochs 5", "epochs 5, warmup_epochs 5"),
        ("--epochs 1 --warmup_epochs 1", "epochs 1, warmup_epochs 1"),
        ("--epochs 9 --warmup_epochs 0 --lr 1e-4", "lr 0.0001 and min_lr 0.001"),
    ],
)
def test_no_way_down(folder, flags, words):
    said = schedule(folder, *flags.split())
    assert said.startswith("error: ") and words in said and "must be below epochs" in said


@pytest.mark.parametrize("folder", FOLDERS[:-1])
def test_steps_that_never_come(folder):
    flags, cool = (
        "--epochs 9 --warmup_epochs 0 --sched step --decay_epochs",
        ["--cooldown_epochs", 0],
    )
    assert "never comes down" in schedule(folder, *flags.split(), 30)
    assert "to 1e-05 at epoch 9, by step" in schedule(folder, *flags.split(), 3, *cool)
