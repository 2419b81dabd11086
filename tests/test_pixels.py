"""imagenet/pixels.py: what training sees is what timm's transforms make of Pillow's images."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation

from on_photos import CPU, imagenet, photos, resolve

MEAN, STD = (
    torch.tensor(value)[:, None, None] for value in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
)
PHOTO = load_sample_images().images[0][:375, :500]


def tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)


def weights(length, size):
    """[size, length]: bicubic interpolation, widened where it makes smaller, as Pillow defines it."""
    scale = length / size
    wide = max(scale, 1)
    x = np.abs(np.arange(length) + 0.5 - (np.arange(size)[:, None] + 0.5) * scale) / wide
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    found = np.where(x < 1, near, np.where(x < 2, far, 0))
    return found / found.sum(1, keepdims=True)


def resized(array, size):
    """First the rows, then the columns, each rounded to 8 bits, in float64."""
    rows = np.einsum("ow,hwc->hoc", weights(array.shape[1], size), array.astype(float))
    rows = rows.round().clip(0, 255)
    return np.einsum("oh,hwc->owc", weights(array.shape[0], size), rows).round().clip(0, 255)


@pytest.mark.parametrize("shape", [(375, 500), (341, 265), (224, 224), (90, 130), (100, 70)])
def test_resized_as_defined(shape):
    noise = np.random.RandomState(0).randint(0, 256, (*shape, 3), dtype=np.uint8)
    whole = RandomResizedCropAndInterpolation(224, interpolation="bicubic")
    whole.get_params = lambda *_: (0, 0, *shape)
    have = np.asarray(imagenet.pixels.Crop(whole)(tensor(noise))).astype(int)
    off = np.abs(have - resized(noise, 224))
    assert off.max() <= 2 and off.mean() < 0.02


def seed(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def test_same_draws_as_timm():
    """From one seed, crop, flip and RandAugment are timm's: boxes, order, operations."""
    cfg = resolve()
    ours = imagenet.data.build_transform(cfg, train=True)
    theirs = create_transform(
        224,
        is_training=True,
        use_prefetcher=True,
        color_jitter=None,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
    )
    photo, pixels, off = Image.fromarray(PHOTO), tensor(PHOTO), []
    for number in range(40):
        seed(number)
        want = theirs(photo).int()
        seed(number)
        have = ours(pixels)
        assert have.shape == (3, 224, 224) and have.dtype == torch.uint8
        off.append((have - want).abs().float().mean().item())
    # Pillow's rounding, which changes from version to version; equalize and posterize enlarge it
    assert np.median(off) < 0.2 and max(off) < 6, sorted(off)


def test_crops_are_spread_as_the_recipe_says():
    """Area uniform from 0.08 to 1, log of the ratio uniform: where nothing is cut off at the edges.

    A column of the image that counts from left to right tells the box, a row that counts down too.
    """
    across, down = np.meshgrid(np.linspace(0, 255, 500), np.linspace(0, 255, 500))
    ramp = tensor(np.stack([across, down, across], 2).astype(np.uint8))
    crop, area, ratio = imagenet.data.build_transform(resolve(), True).transforms[0], [], []
    random.seed(0)
    for _ in range(600):
        found = np.asarray(crop(ramp)).astype(float)
        width = (found[:, 200, 0] - found[:, 23, 0]).mean() / 177 * 224 / 255
        height = (found[200, :, 1] - found[23, :, 1]).mean() / 177 * 224 / 255
        area.append(width * height)
        ratio.append(math.log(width / height))
    area, ratio = np.sort(area), np.array(ratio)
    assert 0.07 < area[0] < 0.1 and np.abs(ratio).max() < math.log(4 / 3) + 0.05
    small = area[area < 0.7]  # larger ones have to be tried again for some ratios
    uniform = (small - 0.08) / 0.62
    assert np.abs(uniform - np.linspace(0, 1, len(small))).max() < 1.63 / len(small) ** 0.5
    assert abs(ratio.mean()) < 0.03 and abs(ratio.std() - math.log(4 / 3) / 3**0.5) < 0.03


def test_erasing_is_timm_s_from_the_seed_of_each_batch():
    cfg = resolve()
    erasing = imagenet.pixels.Erasing(cfg, [5, 6], CPU.device)
    before = random.getstate(), torch.get_rng_state()
    batches = [erasing(torch.full((8, 3, 64, 64), 7.0)) for _ in range(3)]
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    for batch, number in zip(batches, (5, 6, 5), strict=True):
        seed(number)
        want = RandomErasing(0.25, mode="pixel", max_count=1, device="cpu")
        assert torch.equal(batch, want(torch.full((8, 3, 64, 64), 7.0)))
    assert not torch.equal(batches[0], batches[1])


def test_erased_share_and_noise():
    erasing = imagenet.pixels.Erasing(resolve(), range(40), CPU.device)
    images = torch.cat([erasing(torch.full((32, 3, 48, 48), 7.0)) for _ in range(40)])
    erased = images[:, 0] != 7
    share = erased.float().mean((1, 2))
    assert abs((share > 0).float().mean() - 0.25) < 4 * (0.25 * 0.75 / len(share)) ** 0.5
    share = share[share > 0]
    assert 0.015 < share.min() and share.max() < 0.35  # 0.02 to 1/3 before its sides are rounded
    assert abs(share.mean() - (0.02 + 1 / 3) / 2) < 4 * 0.0904 / len(share) ** 0.5
    noise = images[:, 1][erased]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_batches_are_normalised_then_erased_then_mixed(narrow):
    plain = resolve(*narrow, "--num_workers", 0)
    dataset = imagenet.data.build_dataset(plain, True, CPU)
    (images, labels), *_ = imagenet.data.train_loader(plain, dataset, 0, 0, CPU, 0)
    loader = imagenet.data.train_loader(plain, dataset, 0, 0, CPU, 0).loader
    raw, same_labels = next(iter(loader))
    assert raw.dtype == torch.uint8 and torch.equal(labels, same_labels)
    torch.testing.assert_close(images, (raw / 255 - MEAN) / STD, rtol=1e-5, atol=1e-5)

    erased = resolve(*narrow, "--reprob", 1, "--remode", "const")
    (changed, _), *_ = imagenet.data.train_loader(erased, dataset, 0, 0, CPU, 0)
    gone = changed != images
    assert gone.any((1, 2, 3)).all() and (changed[gone] == 0).all()

    both = resolve(*narrow, "--reprob", 1, "--remode", "const", "--mixup", 1.0)
    (mixed, targets), *_ = imagenet.data.train_loader(both, dataset, 0, 0, CPU, 0)
    part = (mixed - changed.flip(0)).flatten(1)[0]
    whole = (changed - changed.flip(0)).flatten(1)[0]
    rate = (part @ whole) / (whole @ whole)
    torch.testing.assert_close(mixed, rate * changed + (1 - rate) * changed.flip(0))
    assert targets.shape == (16, 2) and targets.sum(1).allclose(torch.ones(16))


def test_a_test_batch_of_which_nothing_can_be_read(tmp_path, narrow):
    folder = photos.make(tmp_path / "data", train=1, val=3, size=40)
    for path in sorted((folder / "val" / photos.CLASSES[0]).iterdir())[:2]:
        path.write_bytes(b"")
    flags = (*narrow[:2], "--data_path", folder, "--on_bad_image", "skip", "--val_batch_size", 2)
    for workers in (0, 1):
        cfg = resolve(*flags, "--num_workers", workers)
        test_set = imagenet.data.build_dataset(cfg, False, CPU)
        found = list(imagenet.data.test_loader(cfg, test_set, CPU))
        assert [len(images) for images, _ in found] == [2, 2]
        assert [targets.tolist() for _, targets in found] == [[0, 1], [1, 1]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_erasing_on_a_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    before = torch.cuda.get_rng_state()
    runs = []
    for _ in range(2):
        torch.randn(3, device=device)
        erasing = imagenet.pixels.Erasing(resolve(), range(4), device)
        torch.cuda.set_rng_state(before)
        runs.append([erasing(torch.full((8, 3, 64, 64), 7.0, device=device)) for _ in range(4)])
        assert torch.equal(torch.cuda.get_rng_state(), before)
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    assert not torch.equal(*runs[0][:2])
