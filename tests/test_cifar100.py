"""cifar100/: what differs from cifar10/ (the rest is copied code, tested there and checked by
tools/copies.py).
"""

import csv
import json

import pytest
import torch
import yaml

import models
from conftest import (
    ROOT,
    Golden,
    build_model,
    copy_folder,
    load,
    on_cpu,
    register,
    resolve_in,
)
from on_digits import cifar10
from on_golden import LONG, OURS, check_golden
from on_images import TINY

cifar100 = load("cifar100")


def resolve(*argv):
    return resolve_in(cifar100, *argv)


@pytest.mark.parametrize(("semantics", "fused", "losses"), [OURS, *LONG])
def test_golden(semantics, fused, losses):
    golden = Golden("cifar100")

    def build():
        return cifar100.model.QKFormer(
            T=golden.meta["T"], cross_sample_lif=semantics == "release", fused=fused
        )

    check_golden(golden, build, cifar100.neuron.MultiStepLIF, semantics, fused, losses)


def test_the_recipe_builds_the_published_model():
    model = build_model(cifar100, resolve())
    meta = Golden("cifar100").meta
    assert [[name, list(value.shape)] for name, value in model.state_dict().items()] == meta[
        "state_dict"
    ]
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_740_884


def test_learning_rates_of_the_published_run():
    optimizer, scheduler, num_epochs = cifar100.train.build_optimizer(
        resolve(), torch.nn.Linear(2, 2)
    )
    with open(ROOT / "cifar100" / "curves" / "cifar100.csv") as file:
        published = [float(row["lr"]) for row in csv.DictReader(file)]
    assert num_epochs == len(published) == 410
    for epoch, want in enumerate(published):
        scheduler.step(epoch)
        assert f"{optimizer.param_groups[0]['lr']:.4g}" == f"{want:.4g}", epoch


def test_the_recipe_is_that_of_cifar10():
    ours, theirs = (
        yaml.safe_load((ROOT / name / f"{name}.yml").read_text())
        for name in ("cifar100", "cifar10")
    )
    own = {name for name in theirs if ours.get(name) != theirs[name]}
    assert own == {"layer", "dataset"} and ours.keys() <= theirs.keys()
    cfg = resolve()
    assert (cfg.layer, cfg.dataset) == (4, "torch/cifar100")


def test_quick_start_copied_alone(tmp_path, image_data):
    """The folder needs nothing outside it: trained and tested from a copy in an empty place."""
    folder = copy_folder("cifar100", tmp_path)
    hub = models.import_file(folder / "harness" / "hub.py")
    train, test = hub.import_folder(folder, "train", "test")
    register(cifar10)  # of timm's table of models
    small = [*TINY, "-c", "quickstart.yml", "--data-path", image_data]
    assert train.main(on_cpu(small)) == test.main(on_cpu(["--fused", "false"])) == 0
    result = json.loads((folder / "output" / "quickstart" / "test-best.json").read_text())
    logged = json.loads((folder / "output" / "quickstart" / "log.txt").read_text())
    assert (result["top1"], result["loss"]) == (logged["test_acc1"], logged["test_loss"])
