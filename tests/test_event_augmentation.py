"""dvs128-gesture/ and cifar10-dvs/: augmentation, mixup and T_train."""

import collections
import math

import numpy as np
import pytest
import torch

from on_events import CLASSES, ONCE, cpu, resolve


def chi_square(counts, shares):
    """How far counts are from the expected ones, in units of what chance gives (about 0, larger
    than 5: not chance).
    """
    counts, expected = np.array(counts), sum(counts) * np.array(shares)
    statistic, degrees = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
    return (statistic - degrees) / math.sqrt(2 * degrees)


@ONCE
def test_flip_and_operations_have_their_shares(folder, monkeypatch):
    augment, chosen = folder.augment, []
    names = [operation.__name__ for operation in augment.OPERATIONS]
    assert names == ["identity", "shear_x", "translate_x", "translate_y", "rotate", "cutout"]

    def record(name):
        return lambda frames: chosen.append((name, frames[0, 0, 0, 0].item())) or frames

    monkeypatch.setattr(augment, "OPERATIONS", tuple(map(record, names)))
    torch.manual_seed(0)
    frames = torch.arange(2.0).expand(1, 2, 1, 2)
    for _ in range(6000):
        augment.augment(frames)
    counts = [sum(pair == (name, flip) for pair in chosen) for name in names for flip in (0.0, 1.0)]
    assert sum(counts) == 6000 and chi_square(counts, [1 / 12] * 12) < 5


def move_by(frames, right, down):
    """Independent of torchvision: whole pixels, 0 comes in."""
    moved, (H, W) = torch.zeros_like(frames), frames.shape[-2:]
    to = moved[..., max(down, 0) : H + min(down, 0), max(right, 0) : W + min(right, 0)]
    to.copy_(frames[..., max(-down, 0) : H + min(-down, 0), max(-right, 0) : W + min(-right, 0)])
    return moved


@ONCE
def test_shifts_are_those_of_the_release(folder):
    """Of its 62 values (31 magnitudes, two signs) 14 shift by 0 and 4 by 2 either way; and float32,
    step by step.

    Its linspace goes from both ends inwards, each product and sum rounded once.
    """
    shifts = folder.augment.SHIFTS
    both = collections.Counter([*shifts, *(-shift for shift in shifts)])
    assert both == {0: 14, **dict.fromkeys((1, 3, 4, -1, -3, -4), 6), 2: 4, -2: 4, 5: 2, -5: 2}
    step = float(np.float32(10) / np.float32(30))
    values = [np.float32(-5 + i * step if i < 15 else 5 - (30 - i) * step) for i in range(31)]
    assert (
        [*map(int, values)] == [*shifts] and -1 < values[12] < -0.9999 and 1.9999 < values[21] < 2
    )
    assert len(shifts) == folder.augment.STEPS


@ONCE
@pytest.mark.parametrize("axis", ["x", "y"])
def test_translation(folder, axis):
    torch.manual_seed(1)
    frames = torch.rand(3, 2, 16, 24)
    shifts = [(s, 0) if axis == "x" else (0, s) for s in range(-5, 6)]
    wanted, counts = [move_by(frames, *shift) for shift in shifts], [0] * 11
    for _ in range(800):
        moved = getattr(folder.augment, f"translate_{axis}")(frames)
        [which] = [index for index, want in enumerate(wanted) if torch.equal(moved, want)]
        counts[which] += 1
    assert chi_square(counts, np.array([1, 3, 3, 2, 3, 7, 3, 2, 3, 3, 1]) / 31) < 5


def warp(frames, matrix):
    """Nearest pixel under `matrix`, output to input coordinates about the centre; 0 from outside.
    In NumPy.
    """
    H, W = frames.shape[-2:]
    y, x = np.mgrid[:H, :W]
    xy = np.stack([x - (W - 1) / 2, y - (H - 1) / 2]).reshape(2, -1)
    x, y = np.rint(matrix @ xy + [[(W - 1) / 2], [(H - 1) / 2]]).astype(int)
    inside = (x >= 0) & (x < W) & (y >= 0) & (y < H)
    source = frames.numpy()[..., y.clip(0, H - 1), x.clip(0, W - 1)]
    return torch.from_numpy(np.where(inside, source, 0).reshape(frames.shape))


def largest_agreement(moved, candidates):
    shares = [(moved == candidate).float().mean().item() for candidate in candidates]
    return int(np.argmax(shares)), max(shares)


@ONCE
@pytest.mark.parametrize("operation", ["shear_x", "rotate"])
def test_shear_and_rotation(folder, operation):
    """Angles: 31 values, equally spaced and equally often, about the centre. (Ties of rounding may
    differ.)
    """
    torch.manual_seed(2)
    frames = torch.rand(2, 2, 64, 48)
    if operation == "shear_x":
        angles = np.linspace(-0.3, 0.3, 31)
        matrices = [np.array([[1, math.tan(angle)], [0, 1]]) for angle in angles]
    else:
        angles = np.radians(np.arange(-30, 31, 2))
        matrices = [
            np.array([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]]) for a in angles
        ]
    candidates, counts = [warp(frames, matrix) for matrix in matrices], [0] * 31
    for _ in range(310):
        which, share = largest_agreement(getattr(folder.augment, operation)(frames), candidates)
        assert share > 0.97
        counts[which] += 1
    assert min(counts) > 0 and chi_square(counts, [1 / 31] * 31) < 5


@ONCE
def test_cutout(folder):
    torch.manual_seed(3)
    frames, areas, centres = torch.ones(2, 2, 128, 128), [], []
    for _ in range(1000):
        cut = folder.augment.cutout(frames)
        rows, columns = (cut[0, 0] == 0).nonzero(as_tuple=True)
        top, left, side = rows.min(), columns.min(), rows.max() - rows.min() + 1
        want = frames.clone()
        want[:, :, top : top + side, left : left + side] = 0
        assert (
            torch.equal(cut, want) and len(rows) == side**2
        )  # one whole square, in all frames and polarities
        areas.append(side.item() ** 2 / 128**2)
        centres.append(left.item() / (128 - side.item()))
    assert frames.all()
    # the share of areas below each tenth of 0.1 % .. 11 %; a side is rounded to whole pixels
    tenths = np.searchsorted(np.linspace(0.001, 0.11, 11), areas, side="right").clip(1, 10) - 1
    assert np.abs(np.bincount(tenths, minlength=10) / 1000 - 0.1).max() < 0.05
    assert (
        np.mean(areas) == pytest.approx(0.0555, abs=0.003)
        and min(areas) < 0.002
        and max(areas) > 0.107
    )
    assert (
        min(centres) == 0 and max(centres) == 1 and np.mean(centres) == pytest.approx(0.5, abs=0.03)
    )


@ONCE
def test_all_frames_alike_and_by_the_seed(folder):
    frames = torch.rand(2, 32, 32).expand(5, 2, 32, 32).contiguous()
    before = frames.clone()
    outputs = []
    for seed in [*range(60), *range(60)]:
        with folder.batches.seeded(seed):
            outputs.append(folder.augment.augment(frames))
    assert all((output == output[:1]).all() for output in outputs)
    assert all(map(torch.equal, outputs[:60], outputs[60:])) and torch.equal(frames, before)
    assert len({output.sum().item() for output in outputs}) > 20


def collate(folder, *argv, epoch=0, batch=4, T=8):
    """A training batch of samples 0 .. batch-1, pixel (t, polarity) of sample i being 100 i + 10 t
    + polarity.
    """
    cfg = resolve(folder, "--T", T, *argv)
    code = 10.0 * torch.arange(T)[:, None] + torch.arange(2.0)
    samples = [
        ((100 * i + code)[:, :, None, None].expand(T, 2, 4, 4).contiguous(), i)
        for i in range(batch)
    ]
    return folder.data.Collate(cfg, True, CLASSES[folder.name], epoch)(samples)


@ONCE
def test_T_train_is_drawn_once_for_a_batch_and_after_mixup(folder):
    np.random.seed(0)
    torch.manual_seed(0)
    draws, mixed = set(), 0
    for _ in range(40):
        frames, targets = collate(folder, "--T-train", 3, "--mixup-prob", 0.5)
        assert frames.shape == (4, 3, 2, 4, 4)
        share = (targets[0, 0] - targets[0, 2]) / (
            targets[0, 0] + targets[0, 3] - 2 * targets[0, 2]
        )
        mixed += share.item() < 1
        times = (frames[0, :, 0, 0, 0] - 300 * (1 - share)) / 10
        drawn = times.round()
        assert (
            torch.allclose(times, drawn, atol=1e-2) and (drawn.diff() > 0).all()
        )  # sorted, none twice
        sample = share * torch.arange(4.0) + (1 - share) * torch.arange(3.0, -1, -1)
        want = 100 * sample[:, None, None] + 10 * drawn[None, :, None] + torch.arange(2.0)
        assert torch.allclose(
            frames[..., 0, 0], want, atol=1e-2
        )  # the same frames of every sample, as mixed
        draws.add(tuple(drawn.tolist()))
    assert len(draws) > 10 and 8 < mixed < 32


@ONCE
def test_mixup_sees_all_frames(folder, monkeypatch):
    calls, (mixup, randperm) = [], (folder.data.Mixup.__call__, torch.randperm)
    monkeypatch.setattr(
        folder.data.Mixup, "__call__", lambda *args: calls.append(args[1].shape) or mixup(*args)
    )
    monkeypatch.setattr(torch, "randperm", lambda size: calls.append(size) or randperm(size))
    collate(folder, "--T-train", 3)
    assert calls == [(4, 2 * 8, 4, 4), 8]


@ONCE
def test_cutmix_cuts_the_same_place_from_all_frames(folder):
    np.random.seed(1)
    frames, targets = collate(
        folder, "--mixup", 0, "--cutmix", 1, "--mixup-prob", 1, "--smoothing", 0
    )
    cut = frames[0] >= 300
    assert (cut == cut[:1, :1]).all() and cut.float().mean().item() == pytest.approx(
        targets[0, 3].item(), abs=1e-6
    )


@ONCE
@pytest.mark.parametrize("batch", [3, 4])
def test_without_mixup_targets_are_smoothed_all_the_same(folder, batch):
    frames, targets = collate(folder, "--mixup", 0, batch=batch)
    classes = CLASSES[folder.name]
    want = 0.9 * torch.eye(classes)[:batch] + 0.1 / classes
    torch.testing.assert_close(targets, want)
    assert frames.shape == (batch, 8, 2, 4, 4)


class Ones(torch.utils.data.Dataset):
    classes = range(10)

    def __len__(self):
        return 32

    def __getitem__(self, index):
        return torch.ones(2, 2, 4, 4), index % 10


@ONCE
@pytest.mark.parametrize("workers", [0, 2])
def test_mixup_ends_at_its_epoch_in_the_workers_too(folder, workers):
    cfg = resolve(folder, "--mixup-prob", 1, "-b", 8, "-j", workers)
    mixed = []
    for epoch in (0, 74, 75, 100):
        targets = torch.cat(
            [t for _, t in folder.data.train_loader(cfg, Ones(), epoch, 0, cpu(folder), 0)]
        )
        mixed.append(bool((targets.max(1).values < 0.9).any()))
        assert torch.allclose(targets.sum(1), torch.ones(32))
    assert mixed == [True, True, False, False]
