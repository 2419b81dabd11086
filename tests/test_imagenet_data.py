"""imagenet/: photographs and their transforms, damaged files, wrong folders."""

import io
import json
import math
import signal

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from conftest import Golden
from on_photos import CPU, UserError, imagenet, photos, resolve


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
    erasing = imagenet.data.train_loader(cfg, range(70), 0, 0, CPU).prefetched.random_erasing
    assert (erasing.probability, erasing.mode, erasing.max_count) == (0.25, "pixel", 1)
    assert imagenet.data.test_loader(cfg, range(70), CPU).prefetched.random_erasing is None


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
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (96, 80, 3), dtype=np.uint8))
    thumbnail = jpeg(image.resize((16, 16)))
    plain, read, read_pixels = jpeg(image), imagenet.images.read_image, imagenet.pixels.read_pixels
    path = tmp_path / "image"
    whole = [
        plain,
        jpeg(image, progressive=True),
        jpeg(image, restart_marker_blocks=2),
        jpeg(image, exif=b"Exif\0\0" + thumbnail, comment=b"\xff\xd9\xff\xda"),
        jpeg(image.convert("CMYK")),
        plain + b"camera's tail \xff\xda" + thumbnail[:-2],  # what follows the end does not count
    ]
    for content in whole:
        path.write_bytes(content)
        np.testing.assert_array_equal(
            np.asarray(read(path)), np.asarray(Image.open(path).convert("RGB"))
        )
        np.testing.assert_array_equal(read_pixels(path).permute(1, 2, 0), read(path))
    middle = len(plain) // 2
    damaged = {
        plain[:-2] + b"\0\0": "not a whole image",
        jpeg(image, exif=b"Exif\0\0" + thumbnail)[:-300]: "not a whole image",
        jpeg(image, exif=b"Exif\0\0" + thumbnail)[:-300] + bytes(300): "not a whole image",
        jpeg(image, progressive=True)[: middle // 2] + bytes(middle): "not a whole image",
        plain[:middle] + b"\xff\x05" + plain[middle + 2 :]: "not a whole image",
        b"<html>404</html>": "(unknown format)",
    }
    assert [*map(imagenet.images.jpeg_fault, damaged)].count(
        "a JPEG with an illegal marker, FF 05"
    ) == 1
    file = io.BytesIO()
    image.save(file, "PNG")
    png = bytearray(file.getvalue())
    path.write_bytes(png)
    assert np.array_equal(np.asarray(read(path)), np.asarray(image))
    png[png.index(b"IEND") - 5] ^= 1  # the checksum of the pixels
    damaged[bytes(png)] = "not a whole image"
    for content, words in damaged.items():
        path.write_bytes(content)
        assert not content.startswith(plain[:2]) or imagenet.images.jpeg_fault(
            content
        )  # whatever the decoder takes
        for reader in (read, read_pixels):
            with pytest.raises(imagenet.images.BadImage) as caught:
                reader(path)
            text = str(caught.value)
            assert words in text and str(path) in text and "BytesIO" not in text


def test_mixup_and_workers(narrow):
    cfg = resolve(
        *narrow, "--mixup", 0.8, "--cutmix", 1.0, "--aa", "rand-m9-mstd0.5-inc1", "--reprob", 0.5
    )
    train_set = imagenet.data.build_dataset(cfg, True, CPU)
    assert train_set.classes == list(photos.CLASSES)
    runs = []
    for cfg.num_workers, first in ((0, 0), (2, 0), (1, 5)):
        runs.append(list(imagenet.data.train_loader(cfg, train_set, 1, first, CPU)))
    assert len(runs[0]) == 8 and runs[0][0][0].shape == (16, 3, 32, 32)
    for one, other in zip([*runs[0], *runs[0][5:]], [*runs[1], *runs[2]], strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    targets = torch.cat([targets for _, targets in runs[0]])
    assert torch.allclose(targets.sum(1), torch.ones(len(targets)))
    assert ((targets > 0.06) & (targets < 0.94)).any()


@pytest.mark.parametrize("cut", ["truncated", "few bytes", "zeros", "text", "empty", "gone"])
def test_bad_images(tmp_path, lines, cut, narrow):
    folder = photos.make(tmp_path / "data", train=8, val=4, size=64)
    bad = sorted((folder / "val" / photos.CLASSES[0]).iterdir())[1]
    content = bad.read_bytes()
    wrong = {
        "truncated": content[: len(content) // 2],
        "few bytes": content[:-40],
        "zeros": content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
        "text": b"<html>404</html>",
        "empty": b"",
        "gone": None,
    }[cut]
    bad.write_bytes(wrong) if wrong is not None else (bad.unlink(), bad.symlink_to("nowhere"))
    torch.manual_seed(0)
    checkpoint = tmp_path / "weights.pth"
    model = Golden.fill(imagenet.build.build_model(resolve(*narrow), False, CPU)).float()
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
        loss = json.loads((tmp_path / "test-weights.json").read_text())["loss"]
        model = imagenet.build.build_model(resolve(*narrow), cross == "true", CPU)
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
    with pytest.raises(UserError, match=bad.name):
        list(
            imagenet.data.train_loader(
                resolve(*args), imagenet.data.build_dataset(resolve(*args), True, CPU), 0, 0, CPU
            )
        )
    cfg = resolve(*args, "--on_bad_image", "skip")
    dataset = imagenet.data.build_dataset(cfg, True, CPU)
    dataset.read = imagenet.images.read_image
    dataset.transform = imagenet.data.build_transform(cfg, train=False)
    batches = [
        list(imagenet.data.train_loader(cfg, dataset, 0, 0, CPU)) for cfg.num_workers in (0, 1)
    ]
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
    args = (*narrow[:2], "--output_dir", tmp_path / "out", "--data_path", tmp_path / "data")
    assert "data/train" in lines(imagenet.train.main, *args).splitlines()[-1]
    photos.make(tmp_path / "data", train=2, val=1, size=32)
    last = lines(imagenet.train.main, *args, "--nb_classes", 3).splitlines()[-1]
    assert "2 classes" in last and "nb_classes is 3" in last and "--nb_classes 2" in last
    last = lines(imagenet.train.main, *args, "--cutmix_minmax", 0.5, 0.2).splitlines()[-1]
    assert "cutmix_minmax is [0.5, 0.2]" in last and "smaller" in last
    last = lines(imagenet.train.main, *args, "--start_epoch", 3, "--resume", "auto").splitlines()[
        -1
    ]
    assert (
        last
        == "error: start_epoch is 3, but neither finetune nor resume names weights to go on from"
    )
    last = lines(
        imagenet.train.main, *args, "--batch_size", 1, "--input_size", 16, "--time_step", 1
    ).splitlines()[-1]
    (tmp_path / "out" / "narrow" / "log.txt.tmp").mkdir(parents=True)
    full = lines(imagenet.train.main, *args, "--batch_size", 4).splitlines()[-1]
    assert full.startswith(f"error: {tmp_path / 'out' / 'narrow'}: can't be written: ")
    assert "BatchNorm a single value" in last and last.startswith(
        "error: batch_size 1 at input_size 16"
    )
    last = lines(imagenet.train.main, *args).splitlines()[-1]
    assert (
        last == "error: batch_size 16 x accum_iter 1 x 1 ranks is more than the 4 training images; "
        "make batch_size or accum_iter smaller"
    )
    (tmp_path / "data" / "val" / photos.CLASSES[0]).rename(tmp_path / "data" / "val" / "n9")
    assert (
        "train/ and val/ are of different classes"
        in lines(imagenet.train.main, *args).splitlines()[-1]
    )
    (tmp_path / "data" / "val" / "n9").rename(tmp_path / "data" / "val" / photos.CLASSES[0])
    for split in ("train", "val"):
        (tmp_path / "data" / split / "n3").mkdir()
    last = lines(imagenet.train.main, *args, "--nb_classes", 3).splitlines()[-1]
    assert last.startswith("error: ") and "n3 holds no images" in last
    last = lines(imagenet.train.main, *args, "--input_size", 40).splitlines()[-1]
    assert "input_size is 40" in last
    assert (
        "QKFormer_10_768"
        in lines(imagenet.train.main, *args, "--model", "resnet50").splitlines()[-1]
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler
        )


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
