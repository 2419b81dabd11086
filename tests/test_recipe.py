"""cifar10/'s recipe, data and the shares of its ranks."""

import copy
import csv
import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from conftest import ROOT
from on_digits import CPU, cifar10, resolve


def ranks(rank, world_size):
    place = copy.copy(CPU)
    place.rank, place.world_size = rank, world_size
    return place


def test_learning_rates_of_the_published_run():
    model = torch.nn.Linear(2, 2)
    optimizer, scheduler, num_epochs = cifar10.train.build_optimizer(resolve(), model)
    with open(ROOT / "cifar10" / "curves" / "cifar10.csv") as file:
        published = [float(row["lr"]) for row in csv.DictReader(file)]
    assert num_epochs == len(published) == 410
    for epoch, want in enumerate(published):
        scheduler.step(epoch)
        assert f"{optimizer.param_groups[0]['lr']:.4g}" == f"{want:.4g}", epoch


def test_weight_decay_groups():
    model = cifar10.model.QKFormer(embed_dims=32, num_heads=2)
    optimizer, *_ = cifar10.train.build_optimizer(resolve(), model)
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.06 if parameter.ndim > 1 else 0.0), name
    assert all(
        group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8 for group in optimizer.param_groups
    )


def make_cifar(folder, monkeypatch, train=40, test=10):
    """CIFAR-10 in its own format, small and random."""
    import torchvision

    generator = np.random.RandomState(0)
    base = folder / "cifar-10-batches-py"
    base.mkdir(parents=True)
    for name, size in [(f"data_batch_{i}", train // 5) for i in range(1, 6)] + [
        ("test_batch", test)
    ]:
        images = generator.randint(0, 256, (size, 3072), dtype=np.uint8)
        labels = [int(label) for label in generator.randint(0, 10, size)]
        (base / name).write_bytes(pickle.dumps({"data": images, "labels": labels}))
    (base / "batches.meta").write_bytes(
        pickle.dumps({"label_names": [f"class {i}" for i in range(10)]})
    )
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)


def test_cifar_batches(tmp_path, monkeypatch):
    make_cifar(tmp_path, monkeypatch)
    cfg = resolve("--data-path", tmp_path, "-b", 8, "-j", 0)
    train_set, test_set = (cifar10.data.build_dataset(cfg, train, CPU) for train in (True, False))
    names = [type(step).__name__ for step in train_set.transform.transforms]
    names.remove("RandomResizedCropAndInterpolation")  # of the whole image, to its own size
    assert names[:2] == ["RandomHorizontalFlip", "RandAugment"] and len(names) == 3
    assert (
        torch.as_tensor(train_set[0][0]).dtype == torch.uint8
    )  # not yet normalised: mixup comes first
    batches = list(cifar10.data.train_loader(cfg, train_set, 0, 0, CPU, 7))
    assert len(batches) == 5 and batches[0][0].shape == (8, 3, 32, 32)
    assert all(torch.allclose(targets.sum(1), torch.ones(8)) for _, targets in batches)

    images, labels = zip(*cifar10.data.test_loader(cfg, test_set, CPU), strict=True)
    raw = torch.from_numpy(test_set.data).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (cfg.mean, cfg.std))
    torch.testing.assert_close(torch.cat(images), (raw - mean) / std, rtol=1e-5, atol=1e-5)
    assert torch.cat(labels).tolist() == test_set.targets


@pytest.mark.parametrize("bits", [0, 1, 2, 4])
def test_posterize(bits):
    """timm's increasing severities come to 0 bits at magnitude 10, for which today's
    Pillow raises.
    """
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    step = timm.data.auto_augment.AugmentOp(
        "PosterizeIncreasing", prob=1.0, magnitude=10 - 2.5 * bits
    )
    np.testing.assert_array_equal(
        np.asarray(step(image)), np.asarray(image) & (0xFF << (8 - bits) & 0xFF)
    )


def few_digits(cfg, count):
    dataset = cifar10.data.build_dataset(cfg, True, CPU)
    dataset.images, dataset.targets = dataset.images[:count], dataset.targets[:count]
    return dataset


@pytest.mark.parametrize("workers", [0, 2])
def test_mixup_off_epoch_reaches_the_workers(workers):
    flags = "-c quickstart.yml --mixup 0.5 --mixup-off-epoch 2 --smoothing 0.1 -j".split()
    cfg = resolve(*flags, workers)
    dataset = few_digits(cfg, 128)

    def targets_of(cfg, epoch):
        return torch.cat([t for _, t in cifar10.data.train_loader(cfg, dataset, epoch, 0, CPU, 7)])

    def share_of_two_classes(targets):
        return ((targets > 0.011).sum(1) == 2).float().mean()

    for epoch in range(4):
        targets = targets_of(cfg, epoch)
        two_classes = share_of_two_classes(targets)
        assert two_classes > 0.5 if epoch < 2 else two_classes == 0
        assert targets.min().item() == pytest.approx(0.01)  # smoothed in either case
    cfg = resolve(*flags, workers, "--mixup-off-epoch", 0)
    assert share_of_two_classes(targets_of(cfg, 399)) > 0.5


def test_shares_of_the_ranks():
    for size, batch, world in ((101, 8, 3), (64, 8, 2), (50000, 64, 1)):
        parts = [
            cifar10.batches.train_batches(size, batch, 7, 3, ranks(rank, world))
            for rank in range(world)
        ]
        indices = [index for part in parts for batch_indices, _ in part for index in batch_indices]
        assert len(indices) == len(set(indices)) == size // (batch * world) * batch * world
        assert len({seed for part in parts for _, seed in part}) == len(parts) * len(parts[0])
        whole = [
            cifar10.batches.test_batches(size, batch, ranks(rank, world)) for rank in range(world)
        ]
        order = [whole[i % world][i // world][0] for i in range(-(-size // batch))]
        assert [index for indices in order for index in indices] == list(range(size))
        assert all(len(indices) == batch for indices in order[:-1])
    first, second = (cifar10.batches.train_batches(101, 8, 7, epoch, CPU) for epoch in (0, 1))
    assert first != second and len(first) == 12


def test_batches_do_not_depend_on_what_came_before():
    flags = "-c quickstart.yml --mixup 0.5 --hflip 0.5 --aa rand-m9-n1-mstd0.4-inc1 -j".split()
    dataset = few_digits(resolve(*flags, 0), 256)
    state = torch.get_rng_state()
    runs = []
    for workers, first in ((0, 0), (2, 0), (1, 5)):
        loader = cifar10.data.train_loader(resolve(*flags, workers), dataset, 1, first, CPU, 7)
        runs.append(list(loader))
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(runs[0], runs[1], strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    for one, other in zip(runs[0][5:], runs[2], strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize(
    ("env", "want"),
    [
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # python in a batch script
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "a"}, ("1", "2", "a")),
        (
            {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "gpu[03-04]"},
            ("3", "4", "gpu03"),
        ),
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "x1,x2"},
            ("0", "4", "x1"),
        ),
    ],
)
def test_tasks_of_slurm(env, want):
    ranks = cifar10.process.slurm_ranks(env)
    assert want == ((ranks and (ranks["RANK"], ranks["WORLD_SIZE"], ranks["MASTER_ADDR"])) or None)
