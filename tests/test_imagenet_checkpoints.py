"""imagenet/: the release's checkpoints, fine-tuning, test.py and its predictions."""

import csv
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import Golden, log_of, same, script
from on_photos import CPU, UserError, imagenet, photos, release_file, resolve


def test_released_checkpoint(tmp_path, photo_data):
    """One of full size, with 1,000 classes: taken for the release's, and its head is kept where it
    fits.
    """
    torch.manual_seed(0)
    model = imagenet.model.QKFormer_10_384()
    path = release_file(tmp_path / "released.pth", model)
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"n{number:08d} word, other word\n" for number in range(1000)))
    some = tmp_path / "some" / "below"
    some.mkdir(parents=True)
    for number, photo in enumerate(sorted((photo_data / "val").rglob("*.JPEG"))[:3]):
        (some / f"{number}.jpg").write_bytes(photo.read_bytes())
    args = (
        "--checkpoint",
        path,
        "--predict",
        some.parent,
        "--labels",
        labels,
        "--input_size",
        32,
        "--num_workers",
        0,
    )
    args += ("--predictions", tmp_path / "predict.csv")
    done = script("imagenet", "test", *args)
    assert "warning" in done.stdout and "cross_sample_lif: true" in done.stdout
    with open(tmp_path / "predict.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"below/{number}.jpg" for number in range(3)]
    model.eval()
    for stage in (model.stage1, model.stage2, model.stage3):
        for block in stage:
            if hasattr(block, "attn"):
                block.attn.cross_sample_lif = True
    transform = imagenet.data.input_transform(resolve("--input_size", 32))
    with torch.no_grad():
        images = torch.stack([transform(Image.open(some / f"{number}.jpg")) for number in range(3)])
        probabilities = model(images).double().softmax(1)
    for row, want in zip(rows, probabilities, strict=True):
        assert [int(row[f"class{k}"]) for k in range(1, 6)] == want.topk(5).indices.tolist()
        assert float(row["probability1"]) == pytest.approx(want.max().item(), abs=1e-6)
        assert row["wnid2"] == f"n{int(row['class2']):08d}"
    (tmp_path / "predict.csv").unlink()
    script("imagenet", "test", *args[:4], *args[6:])  # without the labels
    with open(tmp_path / "predict.csv") as file:
        named = [row[f"name{k}"] for row in csv.DictReader(file) for k in range(1, 6)]
    known = {name.split()[0] for name in named}
    assert all(len(name.split()) > 1 and name[0] == "n" for name in named) and len(known) <= 1000
    assert (
        imagenet.data.class_names()[0] == "n01440764 tench, Tinca tinca"
        and len(imagenet.data.class_names()) == 1000
    )


def test_finetune(tmp_path, narrow, lines):
    narrow_model = imagenet.build.build_model(resolve(*narrow), False, CPU)
    path = release_file(tmp_path / "released.pth", narrow_model)
    args = (
        *narrow,
        "--finetune",
        path,
        "--epochs",
        203,
        "--start_epoch",
        201,
        "--lr",
        1e-10,
        "--min_lr",
        0,
    )
    done = script("imagenet", "train", *args, "--output_dir", tmp_path)
    assert "its head fits and is kept" in done.stdout and "cross_sample_lif: true" in done.stdout
    checkpoint = torch.load(tmp_path / "narrow" / "last.pth", weights_only=True)
    assert checkpoint["cross_sample_lif"] is True and checkpoint["epoch"] == 202
    for name, parameter in narrow_model.named_parameters():
        torch.testing.assert_close(
            checkpoint["model"][name], parameter.data, rtol=0, atol=1e-7, msg=name
        )
    assert [line["epoch"] for line in log_of(tmp_path / "narrow")] == [201, 202]

    loaded = imagenet.checkpoint.load_checkpoint(path)
    cfg = resolve(*narrow, "--nb_classes", 7)
    model, cross = imagenet.build.load_model(cfg, CPU, loaded, path, new_head=True)
    assert cross is True and model.head.weight.shape == (7, 64)
    assert torch.equal(
        model.stage3[1].attn.q_conv.weight, narrow_model.stage3[1].attn.q_conv.weight
    )
    with pytest.raises(UserError, match=r"head.weight \[2, 64\] instead of \[7, 64\]"):
        imagenet.build.load_model(cfg, CPU, loaded, path)
    with pytest.raises(
        UserError, match=r"patch_embed1.*instead of"
    ):  # its head is of 2 classes, so not what is wrong
        imagenet.build.load_model(resolve(*narrow, "--dim", 32), CPU, loaded, path, new_head=True)

    # --eval measures the file that is named, without the need of a train/ folder
    text = lines(imagenet.train.main, *narrow, "--eval", "--finetune", path, "--resume", "auto")
    measured = next(line for line in text.splitlines() if "top-1" in line)
    tested = lines(imagenet.test.main, *narrow, "--checkpoint", path)
    assert measured.split(" images/s")[0].rsplit(",", 1)[0] in tested
    assert "eval needs the path" in lines(imagenet.train.main, *narrow, "--eval")


def test_moments_of_a_released_optimizer(tmp_path, narrow):
    """Loaded from a file, they take the very next step that the optimizer takes which
    wrote them.
    """
    torch.manual_seed(0)
    model = imagenet.build.build_model(resolve(*narrow), False, CPU)
    optimizer = imagenet.optim.build_optimizer(resolve(*narrow), model)

    def step(model, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        imagenet.optim.set_lr(optimizer, 1e-2)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        return torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    step(model, optimizer, 1)
    path = release_file(tmp_path / "released.pth", model, optimizer)
    checkpoint = imagenet.checkpoint.load_checkpoint(path)
    other, _ = imagenet.build.load_model(resolve(*narrow), CPU, checkpoint, path)
    loaded = imagenet.optim.build_optimizer(resolve(*narrow), other)
    imagenet.optim.load_optimizer(loaded, checkpoint["optimizer"])
    for one, two in zip(optimizer.state.values(), loaded.state.values(), strict=True):
        assert same(one, two) and one["step"] == 1 and one["exp_avg"].abs().max() > 0
    assert torch.equal(step(model, optimizer, 2), step(other, loaded, 2))


def test_released_optimizer_is_resumed(tmp_path, narrow, lines):
    """--resume with one of the release's goes on with its next epoch, optimizer included."""
    model = imagenet.build.build_model(resolve(*narrow), False, CPU)
    path = release_file(tmp_path / "released.pth", model)
    done = script(
        "imagenet", "train", *narrow, "--resume", path, "--epochs", 201, "--output_dir", tmp_path
    )
    assert "at epoch 200, step 0" in done.stdout and [
        line["epoch"] for line in log_of(tmp_path / "narrow")
    ] == [200]
    for name, value in {"optimizer": None, "epoch": "199", "step": 1.5, "best": [1]}.items():
        torch.save({**torch.load(path, weights_only=False), name: value}, tmp_path / "wrong.pth")
        flags = (*narrow, "--resume", tmp_path / "wrong.pth", "--output_dir", tmp_path)
        last = lines(imagenet.train.main, *flags).splitlines()[-1]
        assert (
            last.startswith(f"error: {tmp_path / 'wrong.pth'}: ")
            and name in last
            and "finetune" in last
        )
    optimizer = imagenet.optim.build_optimizer(resolve("--layer_decay", 0.5), model)
    state = optimizer.state_dict()
    state["param_groups"][0]["lr_scale"], state["param_groups"][0]["weight_decay"] = 9, 9
    imagenet.optim.load_optimizer(optimizer, state)
    assert (optimizer.param_groups[0]["lr_scale"], optimizer.param_groups[0]["weight_decay"]) == (
        0.5**3,
        0.05,
    )
    state["state"] = {
        0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    }
    with pytest.raises(ValueError, match="other shapes"):
        imagenet.optim.load_optimizer(optimizer, state)


def test_golden_weights_from_a_released_file(tmp_path):
    golden = Golden("imagenet-384")
    path = release_file(tmp_path / "golden.pth", golden.fill(imagenet.model.QKFormer_10_384()))
    checkpoint = imagenet.checkpoint.load_checkpoint(path)
    cfg = resolve("--input_size", 64, "--time_step", golden.meta["T"])
    cross, line = imagenet.checkpoint.resolve_semantics("auto", checkpoint, path)
    assert cross is True and line.startswith("warning")
    model = imagenet.build.build_model(cfg, cross, CPU).double()
    imagenet.checkpoint.load_weights(model, checkpoint, path)
    with torch.no_grad():
        logits = model.eval()(golden.input()).numpy()
    want = golden.arrays["release/eval_logits"]
    assert np.abs(logits - want).max() <= 1e-9 * np.abs(want).max()
    assert (
        np.abs(logits - golden.arrays["per_sample/eval_logits"]).max() > 1e-3 * np.abs(want).max()
    )


def test_known_by_md5(tmp_path, narrow, monkeypatch, lines, photo_data):
    """A released file sets model, input size and semantics, and its published figure stands beside
    the measured one.
    """
    build = imagenet.build
    path = release_file(tmp_path / "released.pth", imagenet.model.QKFormer_10_512())
    assert build.md5(path) == subprocess.check_output(["md5sum", path], text=True).split()[0]
    monkeypatch.setitem(
        build.RELEASED, build.md5(path), build.Released("QKFormer_10_512", 32, 82.04, 32)
    )
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "photo.jpg").write_bytes(
        next((photo_data / "val").rglob("*.JPEG")).read_bytes()
    )
    flags = (
        "--checkpoint",
        path,
        "--predict",
        tmp_path / "one",
        "--predictions",
        tmp_path / "predict.csv",
    )
    text = lines(imagenet.test.main, *flags, "--num_workers", 0)
    assert (
        "the release's QKFormer_10_512 at 32, 82.04 % in the paper" in text
        and "warning" not in text
    )
    assert len(list(csv.DictReader((tmp_path / "predict.csv").read_text().splitlines()))) == 1

    # the narrow yml's input size is not the default, so it stays
    path = release_file(tmp_path / "narrow.pth", build.build_model(resolve(*narrow), False, CPU))
    monkeypatch.setitem(
        build.RELEASED, build.md5(path), build.Released("QKFormer_10_384", 32, 78.80, 24)
    )
    text = lines(imagenet.test.main, *narrow, "--checkpoint", path)
    result = json.loads((tmp_path / f"test-{path.stem}.json").read_text())
    figures = f"measured {result['top1']:.2f} %, published 78.80 %"
    assert figures in text and "warning" not in text
    assert (result["input_size"], result["cross_sample_lif"], result["published_top1"]) == (
        32,
        True,
        78.80,
    )
    assert figures in lines(imagenet.train.main, *narrow, "--eval", "--finetune", path)
    text = lines(
        imagenet.test.main,
        *narrow,
        "--checkpoint",
        path,
        "--input_size=48",
        "--cross_sample_lif",
        "false",
    )
    result = json.loads((tmp_path / f"test-{path.stem}.json").read_text())
    assert (result["input_size"], result["cross_sample_lif"]) == (48, False)
    assert (
        "tested at 48, since input_size says so" in text
        and "warning: cross_sample_lif: false" in text
    )
    assert "published_top1" not in result and "measured" not in text


def test_released_files():
    assert {md5: tuple(entry) for md5, entry in imagenet.build.RELEASED.items()} == {
        "60df416983ae326bb14bdb4566444320": ("QKFormer_10_384", 224, 78.80, 32),
        "85dd1f94c87ba5ec908fed5d0a3f7f69": ("QKFormer_10_512", 224, 82.04, 32),
        "dc1595408ed1bd40346be2bdaf5015d5": ("QKFormer_10_768", 224, 84.22, 24),
        "ba20af8eb450d4ec9c71009fde8e7125": ("QKFormer_10_768", 288, 85.25, None),
        "99a671118f67a680aa38b6ac5aae449a": ("QKFormer_10_768", 384, 85.65, None),
    }


def test_101_images_on_two_ranks(tmp_path, narrow):
    """Each image once and in its batch: one rank and two give the same figures, under both
    semantics.
    """
    data = photos.make(tmp_path / "data", train=0, val=51, size=48)
    next((data / "val" / photos.CLASSES[1]).iterdir()).unlink()
    model = Golden.fill(imagenet.build.build_model(resolve(*narrow), False, CPU)).float()
    path = release_file(tmp_path / "weights.pth", model)
    args = (
        *narrow[:2],
        "--data_path",
        data,
        "--checkpoint",
        path,
        "--val_batch_size",
        8,
        "--dist_eval",
    )
    results = {}
    for cross in ("false", "true"):
        for number in (1, 2):
            script("imagenet", "test", *args, "--cross_sample_lif", cross, ranks=number)
            result = json.loads((tmp_path / f"test-{path.stem}.json").read_text())
            results[cross, number] = [result[name] for name in ("loss", "top1", "top5")]
            right = result["top1"] * 101 / 100
            assert right == pytest.approx(round(right), abs=1e-9)
    assert results["false", 1] == results["false", 2] and results["true", 1] == results["true", 2]
    assert results["false", 1] != results["true", 1]


def test_predictions_of_two_ranks(tmp_path, narrow, trained_narrow, photo_data):
    args = (
        *narrow,
        "--checkpoint",
        tmp_path / "best.pth",
        "--predict",
        photo_data / "val",
        "--val_batch_size",
        5,
    )
    (tmp_path / "best.pth").write_bytes((trained_narrow[0] / "best.pth").read_bytes())
    texts = []
    for number in (1, 2):
        script("imagenet", "test", *args, "--predictions", tmp_path / f"{number}.csv", ranks=number)
        texts.append((tmp_path / f"{number}.csv").read_text())
    assert texts[0] == texts[1]
    rows = list(csv.DictReader(texts[0].splitlines()))
    assert all(
        row[f"name{k}"] == photos.CLASSES[int(row[f"class{k}"])] for row in rows for k in (1, 2)
    )
    right = [row["class1"] == str(photos.CLASSES.index(Path(row["file"]).parts[0])) for row in rows]
    assert len(rows) == 48 and 100 * sum(right) / 48 == max(
        line["test_acc1"] for line in log_of(trained_narrow[0])
    )


def test_nothing_to_predict(tmp_path, narrow, lines, trained_narrow):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.JPEG").write_bytes(b"")
    flags = ("--checkpoint", trained_narrow[0] / "best.pth", "--on_bad_image", "skip")
    paths = ("--predict", folder, "--predictions", tmp_path / "a.csv")
    said = lines(imagenet.test.main, *narrow, *flags, *paths).splitlines()[-1]
    assert said == f"error: predict: no image in {folder} can be read"
    assert not (tmp_path / "a.csv").exists()


def test_test_errors(tmp_path, narrow, lines, trained_narrow):
    def last(*args):
        return lines(imagenet.test.main, *narrow, *args).splitlines()[-1]

    assert "no best.pth" in last("--output_dir", tmp_path)
    best = trained_narrow[0] / "best.pth"
    assert "best.pth is of dim 64" in last("--checkpoint", best, "--dim", 32)
    free = ("--predictions", tmp_path / "predict.csv")
    assert "not a folder" in last("--checkpoint", best, "--predict", tmp_path / "none", *free)
    assert "holds no images" in last("--checkpoint", best, "--predict", tmp_path, *free)
    gone = tmp_path / "gone" / "predict.csv"
    assert f"{gone} can't be written" in last(
        "--checkpoint", best, "--predict", tmp_path, "--predictions", gone
    )
    free[1].write_text("of before")
    assert "is there already" in last("--checkpoint", best, "--predict", tmp_path, *free)
    assert free[1].read_text() == "of before"
    (tmp_path / "labels.txt").write_text("n1\n")
    assert "1 lines" in last(
        "--checkpoint", best, "--predict", tmp_path, "--labels", tmp_path / "labels.txt"
    )
