"""cifar10/ and cifar100/ on a folder of images, without code."""

import json

import numpy as np
import pytest
from PIL import Image

from conftest import load, on_cpu

CLASSES = ("green things", "red", "über")
SMALL = [
    "--dataset",
    "folder",
    "--dim",
    "16",
    "--num-heads",
    "2",
    "--time-step",
    "1",
    "--img-size",
    "12",
]
SMALL += [
    "--batch-size",
    "4",
    "--workers",
    "0",
    "--epochs",
    "1",
    "--warmup-epochs",
    "0",
    "--cooldown-epochs",
    "0",
]


@pytest.fixture(params=["cifar10", "cifar100"])
def folder(request):
    return load(request.param)


@pytest.fixture
def data_dir(tmp_path):
    """12 training and 3 test images of noise, 16 x 20; the class adds to one channel."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 1)):
        for label, name in enumerate(CLASSES):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 100, (16, 20, 3), dtype=np.uint8)
                pixels[..., (1, 0, 2)[label]] += 150
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{number}.png")
    return tmp_path / "data"


def resolve(folder, data_dir, *argv):
    options = folder.options
    argv = [*SMALL, "--data-dir", str(data_dir), *map(str, argv)]
    return folder.config.load_config(options.KEYS, options.NO_EFFECT, options.DEFAULT_CONFIG, argv)[
        0
    ]


def build(folder, cfg, train):
    return folder.data.build_dataset(cfg, train, folder.process.Ranks("cpu"))


@pytest.mark.parametrize("size", [12, 32])
def test_images_labels_and_names(folder, data_dir, size):
    cfg = resolve(folder, data_dir, "--img-size", size, "--no-aug")
    for train, count in ((True, 4), (False, 1)):
        dataset = build(folder, cfg, train)
        assert dataset.classes == list(CLASSES) and cfg.num_classes == 3
        assert [label for _, label in dataset] == [
            label for label in range(3) for _ in range(count)
        ]
        for image, label in dataset:
            image = np.asarray(image)
            assert image.shape == (3, size, size) and image.dtype == np.uint8
            assert image.mean((1, 2)).argmax() == (1, 0, 2)[label]
    images = [Image.open(path).convert("RGB") for path, _ in dataset.samples]
    for image, (have, _) in zip(
        images, dataset, strict=True
    ):  # the shorter side to `size`, then the centre
        wide = image.resize((int(size * 20 / 16), size), Image.BICUBIC)
        left = round((wide.width - size) / 2)
        want = np.asarray(wide.crop((left, 0, left + size, size))).transpose(2, 0, 1)
        assert np.abs(np.asarray(have).astype(int) - want).max() <= 1


def test_the_number_of_classes(folder, data_dir, caplog):
    caplog.set_level("INFO")
    cfg = resolve(folder, data_dir)
    build(folder, cfg, True)
    assert cfg.num_classes == 3 and "num_classes is 3" in caplog.text
    for number, train in ((4, True), (2, True), (4, False), (cfg.num_classes + 1, False)):
        with pytest.raises(
            folder.config.UserError, match=f"num_classes is {number}, but .* has 3 classes"
        ):
            build(folder, resolve(folder, data_dir, "--num-classes", number), train)
    standard = resolve(folder, data_dir).num_classes
    with pytest.raises(
        folder.config.UserError, match=f"num_classes is {standard}, but .* has 3 classes"
    ):
        folder.data.build_dataset(
            resolve(folder, data_dir), True, folder.process.Ranks("cpu"), fixed=True
        )
    (data_dir / "val" / "red").rename(data_dir / "val" / "blue")
    for train in (True, False):
        with pytest.raises(folder.config.UserError, match="different classes; only val/ has blue"):
            build(folder, cfg, train)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(folder, data_dir, workers):
    bad = data_dir / "train" / "red" / "2.png"
    bad.write_bytes(bad.read_bytes()[:-20])
    cfg = resolve(folder, data_dir, "--workers", workers)
    loader = folder.data.train_loader(
        cfg, build(folder, cfg, True), 0, 0, folder.process.Ranks("cpu")
    )
    with pytest.raises(folder.config.UserError, match=f"^{bad}: not a whole image") as error:
        list(loader)
    assert "\n" not in str(error.value)


def test_a_run(data_dir, tmp_path, capsys):
    folder = load("cifar10")
    args = on_cpu([*SMALL, "--data-dir", data_dir, "--output", tmp_path / "out", "--lr", "1e-2"])
    assert folder.train.main(args) == 0
    run = tmp_path / "out" / "cifar10"
    [line] = (run / "log.txt").read_text().splitlines()
    assert "num_classes is 3" in capsys.readouterr().out
    assert (run / "classes.txt").read_text().splitlines() == list(CLASSES)
    assert folder.test.main([*args, "--checkpoint", str(run / "last.pth")]) == 0
    assert f"top-1 {json.loads(line)['test_acc1']:.2f} %" in capsys.readouterr().out
    with pytest.raises(folder.config.UserError, match=r"num_classes is 10, but .* has 3 classes"):
        folder.train.main([*args, "--num-classes", "10"])
