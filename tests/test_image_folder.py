"""cifar10/ on a folder of images, without code; cifar100/ has a copy of it."""

import json

import numpy as np
import pytest
from PIL import Image

from conftest import on_cpu
from on_digits import CPU, cifar10, resolve
from on_images import CLASSES, NET, TINY, write_images

UserError = cifar10.config.UserError


@pytest.fixture
def data(tmp_path):
    return write_images(tmp_path / "data")


def build(data, train, *argv):
    cfg = resolve(*TINY, "--data-path", data, *argv)
    return cfg, cifar10.data.build_dataset(cfg, train, CPU)


@pytest.mark.parametrize("size", [12, 32])
def test_images_labels_and_names(data, size):
    for train, count in ((True, 4), (False, 1)):
        _, dataset = build(data, train, "--img-size", size, "--no-aug")
        assert dataset.classes == list(CLASSES)
        assert [label for _, label in dataset] == sorted([*range(3)] * count)
        for image, label in dataset:
            image = np.asarray(image)
            assert image.shape == (3, size, size) and image.dtype == np.uint8
            assert image.mean((1, 2)).argmax() == (1, 0, 2)[label]
    # the shorter side to `size`, then the centre
    for (path, _), (have, _) in zip(dataset.samples, dataset, strict=True):
        wide = Image.open(path).resize((int(size * 20 / 16), size), Image.BICUBIC)
        left = round((wide.width - size) / 2)
        want = np.asarray(wide.crop((left, 0, left + size, size))).transpose(2, 0, 1)
        assert np.abs(np.asarray(have).astype(int) - want).max() <= 1


def test_other_classes_in_val(data):
    (data / "val" / "red").rename(data / "val" / "blue")
    for train in (True, False):
        with pytest.raises(UserError, match="only val/ has class blue"):
            build(data, train)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(data, workers):
    bad = data / "train" / "red" / "2.png"
    bad.write_bytes(bad.read_bytes()[:-20])
    cfg, dataset = build(data, True, "--workers", workers)
    with pytest.raises(UserError, match=f"^{bad}: not a whole image") as error:
        list(cifar10.data.train_loader(cfg, dataset, 0, 0, CPU, 7))
    assert "\n" not in str(error.value)


def test_a_run(data, tmp_path, capsys):
    """The number of classes is the data's; a larger one is the user's choice, a smaller one wrong."""
    flags = ["--data-path", data, "--output", tmp_path / "out"]
    for number, more in ((3, []), (5, ["--num-classes", 5])):
        capsys.readouterr()
        assert cifar10.train.main(on_cpu([*TINY, *flags, *more])) == 0
        assert "12 training and 3 test images of 3 classes" in capsys.readouterr().out
        run = tmp_path / "out" / ("cifar10" if number == 3 else "cifar10-2")
        [line] = (run / "log.txt").read_text().splitlines()
        assert (run / "classes.txt").read_text().splitlines() == list(CLASSES)
        weights = cifar10.checkpoint.load_checkpoint(run / "last.pth")["model"]
        assert len(weights["head.weight"]) == number
        test = ["--data-path", data, "--checkpoint", run / "last.pth"]
        assert cifar10.test.main(on_cpu([*NET, *test])) == 0
        assert f"top-1 {json.loads(line)['test_acc1']:.2f} %" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"num_classes is 2, but the data has 3 classes"):
        cifar10.train.main(on_cpu([*TINY, *flags, "--num-classes", 2]))


def test_prepare(data, tmp_path, capsys):
    """It looks at the data and makes no run; a fault there is an error."""
    flags = on_cpu([*TINY, "--data-path", data, "--output", tmp_path / "out", "--prepare"])
    assert cifar10.train.main(flags) == 0 and not (tmp_path / "out").exists()
    said = f"folder: 12 training and 3 test samples are ready in {data}"
    assert said in capsys.readouterr().out
    (data / "val" / "red").rename(data / "val" / "blue")
    with pytest.raises(UserError, match="only val/ has class blue"):
        cifar10.train.main(flags)
