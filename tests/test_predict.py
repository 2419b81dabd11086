"""tools/predict.py: classes of images without labels, against the model by hand."""

import csv
import logging
import os
import shutil
import types

import pytest
import torch
from PIL import Image

import predict
from conftest import ROOT, load
from on_digits import cifar10
from on_images import CLASSES
from on_photos import imagenet, photos
from test_imagenet_checkpoints import golden_file, probabilities


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # from where the tool goes to the checkpoint's folder


def rows_of(path):
    with open(path, errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def fault(*argv):
    with pytest.raises(SystemExit) as end:
        predict.main([*argv, "--device", "cpu"])
    assert end.value.code.startswith("error: ") and "\n" not in end.value.code
    return end.value.code


def test_predict(trained_on_images, image_data, tmp_path, capsys):
    """Classes and probabilities of every image, by hand, with the names of the run's classes."""
    path, folder, csv_path = (
        trained_on_images / "best.pth",
        tmp_path / "all",
        tmp_path / "found.csv",
    )
    shutil.copytree(image_data / "train", folder)
    odd = os.fsdecode(b'\xff\n,"\x1b[2J.png')  # its bytes come back
    shutil.copy(folder / "red" / "0.png", folder / odd)
    argv = [path, folder, "--predictions", csv_path, "--folder", "cifar10", "--", "--amp", "false"]
    assert predict.main([*argv, "--device", "cpu"]) == 0
    assert f"13 images: {csv_path}\n" in capsys.readouterr().out
    model, transform, classes = cifar10.build.load(cifar10.options, cifar10.data, path)
    rows = rows_of(csv_path)
    names = [f"{title}{k}" for k in (1, 2, 3) for title in ("class", "name", "probability")]
    assert [*rows[0]] == ["file", *names] and classes == [*CLASSES]
    there = [image.relative_to(folder) for image in sorted(folder.rglob("*.png"))]
    assert [row["file"] for row in rows] == [*map(str, there)] and odd in map(str, there)
    for row in rows:
        image = Image.open(folder / row["file"])
        with torch.no_grad():
            want = model(transform(image)[None]).softmax(1)[0]
        order = [int(row[f"class{k}"]) for k in (1, 2, 3)]
        found = [float(row[f"probability{k}"]) for k in (1, 2, 3)]
        assert found == pytest.approx(want[order].tolist(), abs=1e-5) and sorted(order) == [0, 1, 2]
        assert found == sorted(found, reverse=True)
        assert [row[f"name{k}"] for k in (1, 2, 3)] == [CLASSES[number] for number in order]
    before = csv_path.read_bytes()
    assert "is there already" in fault(*argv) and csv_path.read_bytes() == before
    csv_path.unlink()
    (folder / "bad.png").write_bytes(b"")
    assert f"{folder}/bad.png: not a whole image" in fault(*argv) and not csv_path.exists()


def test_a_released_file(tmp_path, narrow, photo_data, capsys):
    """Of 1,000 classes, with the release's semantics; names are of a label file, here one with a
    byte-order mark, or ImageNet's.
    """
    path, model = golden_file(tmp_path / "released.pth", narrow, 1000)
    labels = tmp_path / "labels.txt"
    text = "".join(f"n{number:08d} word, other word\n" for number in range(1000))
    labels.write_bytes(text.encode("utf-8-sig"))
    photographs = sorted((photo_data / "val").rglob("*.JPEG"))[:3]
    some = tmp_path / "some" / "below"
    some.mkdir(parents=True)
    for number, photo in enumerate(photographs):
        (some / f"{number}.jpg").write_bytes(photo.read_bytes())
    argv = [path, some.parent, "--folder", "imagenet", "--predictions", tmp_path / "predict.csv"]
    flags = "-- --input_size 32 --num_heads 2 --num_workers 0 --fused no --device cpu".split()
    assert predict.main([*argv, "--labels", labels, *flags]) == 0
    text = capsys.readouterr().out
    assert "warning" in text and "cross_sample_lif: true" in text
    rows = rows_of(tmp_path / "predict.csv")
    assert [row["file"] for row in rows] == [f"below/{number}.jpg" for number in range(3)]
    assert [*rows[0]][:5] == ["file", "class1", "name1", "probability1", "class2"]
    for row, want in zip(rows, probabilities(model, photographs), strict=True):
        assert [int(row[f"class{k}"]) for k in range(1, 6)] == want.topk(5).indices.tolist()
        assert float(row["probability1"]) == pytest.approx(want.max().item(), abs=1e-6)
        assert all(row[f"name{k}"] == f"n{int(row[f'class{k}']):08d}" for k in range(1, 6))
    (tmp_path / "predict.csv").unlink()
    predict.main([*argv, *flags])
    names = imagenet.data.class_names()
    for row in rows_of(tmp_path / "predict.csv"):
        assert all(row[f"name{k}"] == names[int(row[f"class{k}"])] for k in range(1, 6))


def test_batches(tmp_path, narrow, photo_data):
    """Under the release's semantics they count; names are of the checkpoint's classes."""
    _, model = golden_file(tmp_path / "released.pth", narrow)
    path = tmp_path / "best.pth"
    content = {"model": model.state_dict(), "classes": [*photos.CLASSES], "config": {}}
    torch.save({**content, "cross_sample_lif": True}, path)
    argv = [path, photo_data / "val", "--folder", "imagenet", "--predictions", tmp_path / "2.csv"]
    flags = "--val_batch_size 5 --fused no --device cpu".split()
    assert predict.main([*argv, "--", *narrow, *flags]) == 0
    rows, names = rows_of(tmp_path / "2.csv"), imagenet.data.class_names(photos.CLASSES)
    paths = [photo_data / "val" / row["file"] for row in rows]
    assert paths == sorted((photo_data / "val").rglob("*.JPEG")) and len(paths) == 48
    want = [probabilities(model, paths[at : at + 5]) for at in range(0, 48, 5)]
    for row, values in zip(rows, torch.cat(want), strict=True):
        assert int(row["class1"]) == values.argmax()
        assert float(row["probability1"]) == pytest.approx(values.max().item(), abs=1e-6)
        assert row["name1"] == names[int(row["class1"])]


def test_names_of_classes():
    """A stranger's, which are no names or too few, are as if there were none."""

    def names(modules, classes, total=2):
        model = types.SimpleNamespace(num_classes=total)
        return predict.class_names(
            modules, modules.build.Tested(*[None] * 3, model, {}, classes), None
        )

    for modules in (imagenet, cifar10):
        for classes in (None, [["1"], ["2"]], "ab", {"a": 1, "b": 2}, ["a"]):
            assert names(modules, classes) == []
        assert names(modules, ["a", "b"]) == ["a", "b"]
    assert names(imagenet, ["a", "n01440764"])[1].startswith("n01440764 tench")
    assert names(cifar10, ["a", "n01440764"])[1] == "n01440764"
    assert len(names(imagenet, None, 1000)) == 1000 and names(cifar10, None, 1000) == []


def test_errors(tmp_path, narrow):
    best, _ = golden_file(tmp_path / "best.pth", narrow)
    folder, free = tmp_path / "photos", tmp_path / "predict.csv"
    folder.mkdir()

    def said(images=folder, into=free, flags=(), more=()):
        argv = [best, images, "--predictions", into, "--folder", "imagenet", *more]
        return fault(*argv, "--", *narrow, *flags)

    assert "not a folder" in said(tmp_path / "none")
    assert "holds no images" in said()
    gone = tmp_path / "gone" / "predict.csv"
    assert f"{gone}: can't be written" in said(into=gone)
    (folder / "a.JPEG").write_bytes(b"")
    assert "on_bad_image: skip leaves such files out" in said()
    none = said(flags=["--on_bad_image", "skip"])
    assert none == f"error: predict: no image in {folder} can be read" and not free.exists()
    free.write_text("of before")
    assert "is there already" in said()
    assert free.read_text() == "of before"
    free.unlink()
    (tmp_path / "labels.txt").write_text("n1\n")
    assert "1 lines" in said(more=["--labels", tmp_path / "labels.txt"])
    assert "labels: " in said(more=["--labels", tmp_path / "none.txt"])
    gesture = load("dvs128-gesture").model.QKFormer(embed_dims=32, num_heads=2, num_classes=11)
    torch.save(gesture.state_dict(), best)
    argv = [best, folder, "--folder", "dvs128-gesture", "--", "--num_heads", "2"]
    assert "of event data, which are no images" in fault(*argv)


def test_files_that_are_not_predicted(tmp_path, caplog):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    (tmp_path / "2.heic").touch()
    caplog.set_level(logging.INFO, "qkformer")
    assert len(predict.list_images(imagenet, tmp_path)) == 1
    assert caplog.messages == [f"{tmp_path}: 1 files are left out (1 .heic)"]


def test_name_of_predictions(tmp_path):
    """The whole name is tried, before the work, and leaves nothing."""

    def refused(path):
        with pytest.raises(imagenet.log.UserError) as error:
            predict.check_predictions(imagenet, path)
        return str(error.value)

    assert "File name too long" in refused(tmp_path / ("x" * 300))
    assert "No such file" in refused(tmp_path / "none" / "x.csv")
    (tmp_path / "there").touch()
    assert "is there already" in refused(tmp_path / "there")
    predict.check_predictions(imagenet, tmp_path / "x.csv")
    assert os.listdir(tmp_path) == ["there"]
