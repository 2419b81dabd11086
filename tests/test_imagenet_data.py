"""imagenet/: photographs and their transforms, damaged files, wrong folders."""

import io
import json
import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from conftest import Golden
from on_photos import CPU, UserError, build, imagenet, photos, resolve


def test_evaluation_transform(tmp_path):
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (300, 400, 3), dtype=np.uint8))
    mean, std = (
        np.array(value)[:, None, None] for value in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    for size, short in ((224, 256), (192, 219), (288, 288), (384, 384)):
        width = int(short * 400 / 300)
        resized = np.asarray(image.resize((width, short), Image.BICUBIC)).transpose(2, 0, 1) / 255
        top, left = round((short - size) / 2), round((width - size) / 2)
        want = (resized[:, top : top + size, left : left + size] - mean) / std
        have = imagenet.data.input_transform(resolve("--input_size", size))(image)
        np.testing.assert_allclose(have.numpy(), want, atol=1e-5)


def test_training_transform(narrow):
    crop, *others = imagenet.data.build_transform(resolve(), train=True).transforms
    names = [type(step).__name__ for step in others]
    assert names == ["RandomHorizontalFlip", "RandAugment", "MaybePILToTensor"]
    assert (crop.crop.scale, crop.crop.ratio) == ((0.08, 1.0), (3 / 4, 4 / 3))
    cfg = resolve(*narrow, "--reprob", 0.25)
    some = imagenet.data.build_dataset(cfg, True, CPU)
    erasing = imagenet.data.train_loader(cfg, some, 0, 0, CPU, 0).prefetched.random_erasing
    assert (erasing.probability, erasing.mode, erasing.max_count) == (0.25, "pixel", 1)
    assert imagenet.data.test_loader(cfg, some, CPU).prefetched.random_erasing is None


@pytest.mark.parametrize("bits", [0, 1, 4])
def test_posterize(bits):
    """Pillow of today raises for 0 bits, which timm's increasing severities come to at magnitude
    10.
    """
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    step = timm.data.auto_augment.AugmentOp(
        "PosterizeIncreasing", prob=1.0, magnitude=10 - 2.5 * bits
    )
    np.testing.assert_array_equal(
        np.asarray(step(image)), np.asarray(image) & (0xFF << (8 - bits) & 0xFF)
    )


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def test_whole_and_damaged_images(tmp_path):
    """Pixels of both readers are Pillow's; images.py itself is cifar10/'s."""
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (96, 80, 3), dtype=np.uint8))
    plain, path = jpeg(image), tmp_path / "image"
    read, read_pixels = imagenet.images.read_image, imagenet.pixels.read_pixels
    exif = b"Exif\0\0" + jpeg(image.resize((16, 16)))
    for content in (
        plain,
        jpeg(image, progressive=True),
        jpeg(image, restart_marker_blocks=2),
        jpeg(image, exif=exif, comment=b"\xff\xd9\xff\xda"),
        jpeg(image.convert("CMYK")),
        jpeg(image.convert("L")),
    ):
        path.write_bytes(content)
        want = np.asarray(Image.open(path).convert("RGB"))
        np.testing.assert_array_equal(np.asarray(read(path)), want)
        np.testing.assert_array_equal(read_pixels(path).permute(1, 2, 0), want)
    for content in (
        plain[:-2] + b"\0\0",
        plain[:-40],
        jpeg(image, exif=exif)[:-300],
        b"",
        b"<html>",
    ):
        path.write_bytes(content)
        for reader in (read, read_pixels):
            with pytest.raises(imagenet.images.BadImage) as caught:
                reader(path)
            assert str(path) in str(caught.value) and "BytesIO" not in str(caught.value)


def test_mixup_and_workers(narrow):
    cfg = resolve(
        *narrow, "--mixup", 0.8, "--cutmix", 1.0, "--aa", "rand-m9-mstd0.5-inc1", "--reprob", 0.5
    )
    train_set = imagenet.data.build_dataset(cfg, True, CPU)
    assert train_set.classes == list(photos.CLASSES)
    runs = []
    for workers, first in ((0, 0), (2, 0), (1, 5)):
        vars(cfg).update(workers=workers)
        runs.append(list(imagenet.data.train_loader(cfg, train_set, 1, first, CPU, 0)))
    assert len(runs[0]) == 8 and runs[0][0][0].shape == (16, 3, 32, 32)
    for one, other in zip([*runs[0], *runs[0][5:]], [*runs[1], *runs[2]], strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    targets = torch.cat([targets for _, targets in runs[0]])
    assert torch.allclose(targets.sum(1), torch.ones(len(targets)))
    assert ((targets > 0.06) & (targets < 0.94)).any()


@pytest.mark.parametrize("cut", ["truncated", "gone"])
def test_bad_images(tmp_path, lines, cut, narrow):
    folder = photos.make(tmp_path / "data", train=8, val=4, size=64)
    bad = sorted((folder / "val" / photos.CLASSES[0]).iterdir())[1]
    content = bad.read_bytes()
    bad.unlink()
    bad.symlink_to("nowhere") if cut == "gone" else bad.write_bytes(content[: len(content) // 2])
    torch.manual_seed(0)
    checkpoint = tmp_path / "weights.pth"
    model = Golden.fill(build(resolve(*narrow))).float()
    torch.save(model.state_dict(), checkpoint)
    args = (*narrow[:2], "--data_path", folder, "--checkpoint", checkpoint, "--val_batch_size", 3)
    text = lines(imagenet.test.main, *args, "--num_workers", 1)
    errors = [line for line in text.splitlines() if "error" in line]
    assert len(errors) == 1 and str(bad) in errors[0] and "on_bad_image: skip" in errors[0]

    # skipped: the others keep their batches, and the figure is that of the seven
    for cross in ("false", "true"):
        text = lines(
            imagenet.test.main, *args, "--on_bad_image", "skip", "--cross_sample_lif", cross
        )
        assert sum(str(bad) in line for line in text.splitlines()) == 1
        file = max(tmp_path.glob("test-*.json"), key=lambda file: file.stat().st_mtime_ns)
        loss = json.loads(file.read_text())["loss"]
        model = build(resolve(*narrow), cross == "true")
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
        transform = imagenet.data.input_transform(resolve(*narrow))
        samples = [
            (p, c)
            for c, name in enumerate(photos.CLASSES)
            for p in sorted((folder / "val" / name).iterdir())
        ]
        batches = [[sample for sample in samples[i : i + 3] if sample[0] != bad] for i in (0, 3, 6)]
        losses = []
        for batch in batches:
            images = torch.stack([transform(Image.open(path).convert("RGB")) for path, _ in batch])
            with torch.no_grad():
                logits = model.eval()(images).double()
            labels = torch.tensor([label for _, label in batch])
            losses += torch.nn.functional.cross_entropy(logits, labels, reduction="none").tolist()
        assert len(losses) == 7 and loss == pytest.approx(math.fsum(losses) / 7, rel=1e-6)


def test_bad_training_image_is_replaced(tmp_path, narrow):
    folder = photos.make(tmp_path / "data", train=4, val=1, size=64)
    bad = sorted((folder / "train" / photos.CLASSES[1]).iterdir())[-1]
    bad.write_bytes(bad.read_bytes()[:-300])
    args = (*narrow[:2], "--data_path", folder, "--batch_size", 8)
    cfg = resolve(*args)
    dataset = imagenet.data.build_dataset(cfg, True, CPU)
    with pytest.raises(UserError, match=bad.name):
        list(imagenet.data.train_loader(cfg, dataset, 0, 0, CPU, 0))
    batches = []
    for workers in (0, 1):
        cfg = resolve(*args, "--on_bad_image", "skip", "--workers", workers)
        dataset = imagenet.data.build_dataset(cfg, True, CPU)
        dataset.read = imagenet.images.read_image
        dataset.transform = imagenet.data.build_transform(cfg, train=False)
        batches.append(list(imagenet.data.train_loader(cfg, dataset, 0, 0, CPU, 0)))
    assert torch.equal(batches[0][0][0], batches[1][0][0])
    assert (
        torch.equal(dataset[7][0], dataset[0][0])
        and sorted(batches[0][0][1].tolist()) == [0] * 5 + [1] * 3
    )
    for path in (folder / "train").rglob("*.JPEG"):
        path.write_bytes(b"no")
    with pytest.raises(UserError, match="none of the 8"):
        dataset[3]


def test_bad_layouts(tmp_path, lines, narrow):
    data = tmp_path / "data"
    args = (*narrow[:2], "--output_dir", tmp_path / "out", "--data_path", data)

    def last(*flags):
        return lines(imagenet.train.main, *args, *flags).splitlines()[-1]

    assert "data/train" in last()
    photos.make(data, train=2, val=1, size=32)
    assert last("--nb_classes", 1) == "error: num_classes is 1, but the data has 2 classes"
    assert "cutmix_minmax" in last("--cutmix_minmax", 0.5, 0.2)
    said = last("--start_epoch", 3, "--resume", "auto", "--batch_size", 2)
    assert said == "error: start_epoch is 3; finetune or resume must name weights"
    said = last("--batch_size", 1, "--input_size", 16, "--time_step", 1)
    assert "BatchNorm a single value" in said and said.startswith("error: batch_size 1, img_size")
    assert last() == "error: batch_size 16 is more than the 4 training samples"
    said = last("--batch_size", 2, "--accum_iter", 3)
    assert said.startswith("error: batch_size 2 x accum_iter 3 is more than the 4 ")
    assert "40" in last("--input_size", 40)
    assert "QKFormer_10_768" in last("--model", "resnet50")
    first = data / "val" / photos.CLASSES[0]
    first.rename(data / "val" / "n9")
    assert "data: only train/ has class n0" in last()
    (data / "val" / "n9").rename(first)
    for split in ("train", "val"):
        (data / split / "n3").mkdir()
    assert last().startswith("error: ") and "n3 holds no images" in last()


def test_class_names():
    """Of wnids with their words, and ImageNet's 1,000 in the order of the labels; others as they
    are.
    """
    names = imagenet.data.class_names()
    assert len(names) == 1000 and names == sorted(names)
    assert names[0] == "n01440764 tench, Tinca tinca" and names[285].split()[1:] == [
        "Egyptian",
        "cat",
    ]
    assert names[999] == "n15075141 toilet tissue, toilet paper, bathroom tissue"
    assert imagenet.data.class_names(["my cat", "n02124075", "n1"]) == ["my cat", names[285], "n1"]
    wnids = [name.split()[0] for name in names]
    assert imagenet.data.class_names(wnids) == names


def test_a_dataset_knows_its_classes(narrow):
    dataset = imagenet.data.build_dataset(resolve(*narrow), False, CPU)
    assert dataset.classes == list(photos.CLASSES)


def test_prepare(narrow, lines, tmp_path):
    flags = [*narrow, "--prepare", "--output", tmp_path / "out", "--device", "cpu"]
    assert " training and 48 test samples are ready in " in lines(imagenet.train.main, *flags)
    assert not (tmp_path / "out").exists()
