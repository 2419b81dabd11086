"""The learning rate's course in all folders: what is refused."""

import pytest

from conftest import load, resolve_in

FOLDERS = ("cifar10", "cifar100", "dvs128-gesture", "cifar10-dvs", "imagenet")


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--epochs 10 --warmup_epochs 20", "warmup_epochs is 20, epochs 10; it must be less, or 0"),
        ("--epochs 5 --warmup_epochs 5", "warmup_epochs is 5, epochs 5; it must be less, or 0"),
        ("--epochs 1 --warmup_epochs 1", "warmup_epochs is 1, epochs 1; it must be less, or 0"),
        (
            "--epochs 9 --warmup_epochs 0 --lr 1e-4",
            "min_lr is 0.001, but lr 0.0001; it must not be more",
        ),
        ("--epochs 2 --warmup_epochs 1", ""),
        ("--epochs 1 --warmup_epochs 0 --min_lr 0.01", ""),
    ],
)
def test_no_way_down(folder, flags, words):
    modules = load(folder)
    cfg = resolve_in(modules, "--lr", 0.01, "--min_lr", 0.001, *flags.split())
    if words:
        with pytest.raises(modules.log.UserError, match=words):
            modules.run.check_rates(cfg, cfg.lr)
    else:
        modules.run.check_rates(cfg, cfg.lr)
