"""tools/curves.py: runs over the release's curves, from logs made by hand."""

import csv
import json

import numpy as np
import pytest
import yaml
from PIL import Image

import curves
from conftest import ROOT


def write_run(folder, accuracies, config=None, tail="", **more):
    """A run's folder as train.py leaves it."""
    folder.mkdir()
    if config is not None:
        (folder / "args.yaml").write_text(yaml.safe_dump(config))
    lines = [
        json.dumps(
            {
                "epoch": epoch,
                "train_loss": 2.5,
                "test_loss": 1.5,
                "test_acc1": value,
                "seconds": 90.0,
            }
            | more
        )
        for epoch, value in enumerate(accuracies)
    ]
    (folder / "log.txt").write_text("".join(line + "\n" for line in lines) + tail)
    return folder


CIFAR = {
    "model": "QKFormer",
    "dataset": "torch/cifar10",
    "img_size": 32,
    "num_classes": 10,
    "epochs": 400,
    "dim": 384,
}
KNOWN = {  # what an args.yaml has, and the run it belongs to
    "cifar10": CIFAR,
    "cifar100": CIFAR | {"dataset": "torch/cifar100", "num_classes": 100},
    "cifar10-dvs": {"model": "QKFormer", "time_step": 16, "num_classes": 10, "split_seed": None},
    "dvs128-gesture": {"model": "QKFormer", "T": 16, "num_classes": 11},
    "hst_10_384": {"model": "QKFormer_10_384", "input_size": 224, "start_epoch": 0},
    "hst_10_768": {"model": "QKFormer_10_768", "input_size": 384, "start_epoch": 0},
    "finetune_384": {"model": "QKFormer_10_768", "img_size": 384, "start_epoch": 201},
}


def test_what_differs_from_the_published_run(tmp_path):
    run = curves.Run(
        "run",
        {},
        {"model": "MSQKFormer_10_512", "dataset": "photos", "dim": 64, "lr": None, "T": 2},
    )
    assert curves.recognise(run) == "hst_10_512"
    want = [
        "dataset photos (imagenet)",
        "model MSQKFormer_10_512 (QKFormer_10_512)",
        "dim 64",
        "time_step 2 (4)",
    ]
    assert curves.differences(run, curves.PUBLISHED["hst_10_512"]) == want
    published = yaml.safe_load((ROOT / "cifar10" / "cifar10.yml").read_text()) | {
        "model": "QKFormer",
        "lr": 0.001,
    }
    assert curves.differences(curves.Run("run", {}, published), curves.PUBLISHED["cifar10"]) == []


@pytest.mark.parametrize("name", KNOWN)
def test_the_run_it_belongs_to(name, tmp_path):
    assert curves.recognise(curves.read_run(write_run(tmp_path / "run", [], KNOWN[name]))) == name


def test_published_runs_have_their_curves():
    """The best of each log, as published; and the paper's figures."""
    best = {
        "hst_10_384": 78.85,
        "hst_10_512": 82.08,
        "cifar10": 96.21,
        "cifar100": 81.22,
        "cifar10-dvs": 84.1,
    }
    for name, published in curves.PUBLISHED.items():
        assert (ROOT / published.folder / published.yml).is_file()
        file = ROOT / published.folder / "curves" / f"{name}.csv"
        assert file.is_file() == (name != "dvs128-gesture")
        if name in best:
            with open(file) as rows:
                column = max(float(row["test_acc1"]) for row in csv.DictReader(rows))
            assert round(column, 2) == round(curves.read_run(file).best, 2) == best[name]


def test_table_and_picture(tmp_path, capsys):
    run = write_run(tmp_path / "mine", [20.0, 40.0, 60.0, 61.25], CIFAR | {"epochs": 10, "dim": 64})
    assert curves.main([str(run)]) == 0
    text = capsys.readouterr().out
    with open(ROOT / "cifar10" / "curves" / "cifar10.csv") as file:
        release = [float(row["test_acc1"]) for row in csv.DictReader(file)]
    rows = [line.split() for line in text.splitlines() if line.strip()[:1].isdigit()]
    assert [[float(row[0]), float(row[5]), float(row[6])] for row in rows] == [
        [epoch + 1, mine, pytest.approx(release[epoch], abs=0.006)]
        for epoch, mine in enumerate((20, 40, 60, 61.25))
    ]
    first = next(epoch + 1 for epoch, value in enumerate(release) if value >= 61.25)
    assert (
        f"after 4 epochs you have 61.25 %, the release had {release[3]:.2f} %; it had yours after "
        f"{first}" in text
    )
    assert "dim 64 (384)" in text and "epochs 10 (400)" in text and "dataset" not in text
    assert "yours takes 1.5 min an epoch, 15.0 min for 10" in text
    picture = np.asarray(Image.open(run / "curves.png").convert("RGB")).astype(int)
    assert picture.shape == (600, 1500, 3)
    red = (picture[..., 0] > 150) & (picture[..., 1] < 90)
    assert red[:, :750].sum() > 100 and red[:, 750:].sum() > 100  # on both sides


def test_cost_and_two_runs(tmp_path, capsys):
    config = KNOWN["hst_10_384"] | {"epochs": 200}
    runs = [
        write_run(tmp_path / name, [4.0] * 12, config, seconds=1800.0) for name in ("one", "two")
    ]
    assert curves.main([*map(str, runs), "--out", str(tmp_path / "both.png")]) == 0
    text = capsys.readouterr().out
    assert (
        text.count(
            "the published run took 4 d 12 h on 8 V100 of 32 GB; yours takes 30.0 min an epoch, "
            "4.2 d"
        )
        == 2
    )
    assert (tmp_path / "both.png").is_file() and not (runs[0] / "curves.png").exists()


def test_other_logs(tmp_path, capsys):
    """timm's summary, one of the release's logs, and a curve itself: the same epochs, the same
    table.
    """
    (tmp_path / "summary.csv").write_text(
        "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n0,2.5,1.5,20.0,60.0,1e-5\n1,2.4,1.4,30.0,70.0,6e-5\n"
    )
    log = {
        "train_lr": 1e-4,
        "train_loss": 2.5,
        "test_loss": 1.5,
        "test_acc1": 20.0,
        "test_acc5": 60.0,
        "epoch": 0,
    }
    last = log | {"train_loss": 2.4, "test_loss": 1.4, "test_acc1": 30.0, "epoch": 1}
    (tmp_path / "log.txt").write_text(f"{json.dumps(log)}\n{json.dumps(last)}\n")
    for name in ("summary.csv", "log.txt"):
        run = curves.read_run(tmp_path / name)
        assert [run.series(key) for key in ("top1", "train_loss", "test_loss")] == [
            ([1, 2], [20.0, 30.0]),
            ([1, 2], [2.5, 2.4]),
            ([1, 2], [1.5, 1.4]),
        ]
    curve = ROOT / "cifar10-dvs" / "curves" / "cifar10-dvs.csv"
    assert (
        curves.main([str(curve), "--curve", "cifar10-dvs", "--out", str(tmp_path / "a.png")]) == 0
    )
    assert "after 106 epochs you have 83.30 %, the release had 83.30 %" in capsys.readouterr().out


def test_runs_that_go_on(tmp_path, capsys):
    """A line that is being written does not count; a run without an epoch says so, with nothing
    drawn.
    """
    run = curves.read_run(
        write_run(tmp_path / "torn", [20.0, 30.0], CIFAR, tail='{"epoch": 2, "train_lo')
    )
    assert run.series("top1") == ([1, 2], [20.0, 30.0])
    (tmp_path / "summary.csv").write_text(
        "epoch,train_loss,eval_loss,eval_top1\n0,2.5,1.5,20.0\n1,2.4,1"
    )
    assert list(curves.read_run(tmp_path / "summary.csv").epochs) == [0]
    young = write_run(tmp_path / "young", [], CIFAR)
    (young / "log.txt").unlink()
    assert curves.main([str(young)]) == 0
    assert (
        "no complete epoch yet" in capsys.readouterr().out and not (young / "curves.png").exists()
    )
    assert curves.main([str(young), str(tmp_path / "torn")]) == 0
    assert (young / "curves.png").is_file()


def test_mistakes(tmp_path, capsys):
    run = write_run(tmp_path / "run", [20.0], CIFAR)
    other = write_run(tmp_path / "other", [20.0], KNOWN["cifar100"])
    bare = write_run(tmp_path / "bare", [20.0])
    broken = write_run(tmp_path / "broken", [20.0, 30.0], CIFAR)
    (broken / "log.txt").write_text("no log\n" + (broken / "log.txt").read_text())
    lacking = write_run(tmp_path / "lacking", [], CIFAR, tail='{"epoch": 0, "loss": 3}\n')
    (tmp_path / "empty").mkdir()
    for args, words in (
        ([tmp_path / "empty"], ["empty: not a run"]),
        ([tmp_path / "nowhere"], ["no such run", "nowhere"]),
        ([run, "--curve", "cifar"], ["no curve cifar", "cifar100"]),
        ([run, other], ["belong to cifar10, cifar100", "--curve"]),
        ([bare], ["--curve hst_10_384"]),
        ([broken], ["log.txt, line 1"]),
        ([lacking], ["lacking", "train_loss"]),
        ([run, "--out", tmp_path / "none" / "a.png"], ["a.png: can't be written"]),
        ([run, "--out", tmp_path / "a.txt"], ["a.txt: can't be written"]),
    ):
        assert curves.main([*map(str, args)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert all(word in error for word in words), (words, error)
