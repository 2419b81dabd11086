"""Every optimizer of timm that `opt` takes goes on from a checkpoint to the bit; others are refused."""

import os

import pytest
import torch
from timm.optim import list_optimizers

from conftest import load, resolve_in

QUICK = ("lamb", "nadamlegacy", "muon", "lookahead_novograd", "adan", "bnbadam8bit")
ALL = [name for name in list_optimizers() for name in (name, f"lookahead_{name}")]
FEW = [name for name in ALL if name not in QUICK]
STEPS = int(os.environ.get("STEPS", 20))


def build(modules, *flags):
    """(a small network, its optimizer, its schedule); UserError where opt is refused."""
    cfg = resolve_in(modules, "--warmup_epochs", 0, "--epochs", STEPS, *flags)
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten()
    model = torch.nn.Sequential(*layers, torch.nn.Linear(16, 3))
    return model, *modules.train.build_optimizer(cfg, model)[:2]


def train(model, optimizer, scheduler, steps):
    for step in steps:
        scheduler.step(step)
        torch.manual_seed(step)  # of the data, and of what an optimizer draws
        loss = torch.nn.functional.cross_entropy(
            model(torch.randn(5, 3, 4, 4)), torch.arange(5) % 3
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def resumes(folder, path, opt, *flags):
    """Whether opt was accepted; then it has to resume at each of a few steps."""
    modules, flags = load(folder), ("--opt", opt, *flags)
    try:
        whole = build(modules, *flags)
    except modules.log.UserError as error:
        assert "opt" in str(error) and "\n" not in str(error)
        return False
    train(*whole, range(STEPS))
    want = whole[0].state_dict()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for stop in (1, STEPS // 2 + 1):
        model, optimizer, scheduler = build(modules, *flags)
        train(model, optimizer, scheduler, range(stop))
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "config": {"opt": opt}}, path)
        checkpoint = modules.checkpoint.load_checkpoint(path)
        model, optimizer, scheduler = build(modules, *flags)
        model.load_state_dict(checkpoint["model"])
        modules.checkpoint.load_optimizer(optimizer, scaler, checkpoint, path, opt)
        train(model, optimizer, scheduler, range(stop, STEPS))
        assert all(torch.equal(value, want[name]) for name, value in model.state_dict().items())
    return True


@pytest.mark.parametrize("opt", [*QUICK, *(pytest.param(n, marks=pytest.mark.long) for n in FEW)])
def test_resumes_to_the_bit_or_is_refused(opt, tmp_path):
    """With betas and without: Adan has three, and refuses two."""
    accepted = [
        resumes("cifar10", tmp_path / "x.pth", opt, *betas)
        for betas in ((), ("--opt_betas", "none", "--weight_decay", 0))
    ]
    known = opt.removeprefix("lookahead_")
    assert any(accepted) != (known.startswith(("bnb", "fused")) or known == "adahessian")
    assert accepted[0] or "adan" in known or not accepted[1]


@pytest.mark.parametrize("folder", ["cifar100", "dvs128-gesture", "cifar10-dvs"])
def test_in_the_other_folders(folder, tmp_path):
    assert resumes(folder, tmp_path / "x.pth", "lookahead_lamb")
    for opt in ("fusedadam", "lookahead_bnblion", "adahessian", "none such"):
        assert not resumes(folder, tmp_path / "x.pth", opt)
