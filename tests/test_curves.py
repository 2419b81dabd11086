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


# As the release's scripts print: CIFAR's by timm, ImageNet's, the event data sets'.
PRINTED = {
    "cifar10": """INFO:train:Train: {e} [   0/781 (  0%)]  Loss:  2.398279 (2.3983)  Time: 5.436s,   11.77/s  (5.436s,   11.77/s)  LR: 1.000e-05  Data: 1.023 (1.023)
Train: {e} [ 780/781 (100%)]  Loss:  2.298279 ({train})  Time: 0.136s,  411.77/s  (0.156s,  409.77/s)  LR: 1.000e-05  Data: 0.023 (0.023)
Test: [   0/156]  Time: 0.636 (0.636)  Loss:  1.9222 (1.9222)  Acc@1: 32.8125 (32.8125)  Acc@5: 82.8125 (82.8125)
Test: [ 156/156]  Time: 0.036 (0.066)  Loss:  1.8222 ({test})  Acc@1: 37.5000 ({top1})  Acc@5: 87.5000 (83.5200)
""",
    "hst_10_384": """Epoch: [{e}]  [   0/5004]  eta: 10:29:28  lr: 0.000000  loss: 6.9556 (6.9556)  time: 7.5476  data: 4.3  max mem: 15811
Epoch: [{e}] Total time: 0:29:09 (0.3495 s / it)
Averaged stats: lr: 0.000240  loss: 6.3127 ({train})
Test:  [   0/1563]  eta: 1:29:28  loss: 4.1000 (4.1000)  acc1: 12.5000 (12.5000)  acc5: 25.0000 (25.0000)  time: 3.4  data: 3.1  max mem: 17867
* Acc@1 {top1} Acc@5 12.688 loss {test}
""",
    "cifar10-dvs": """Epoch: [{e}]  [  0/562]  eta: 0:38:35  lr: 1e-05  img/s: 4.153  loss: 2.3012 (2.3012)  acc1: 12.5000 (12.5000)  time: 4.1  max mem: 3290
Epoch: [{e}]  [512/562]  eta: 0:00:05  lr: 1e-05  img/s: 164.153  loss: 2.2000 ({train})  acc1: 12.5000 (16.3499)  time: 0.1  max mem: 3290
Test:  [ 0/63]  eta: 0:01:00  loss: 2.1000 (2.1000)  acc1: 25.0000 (25.0000)  time: 1.0  max mem: 3290
 * Acc@1 = {top1}, Acc@5 = 76.2, loss = {test}
""",
}


@pytest.mark.parametrize("name", PRINTED)
def test_what_the_release_prints(name, tmp_path, capsys):
    epochs = [(2.2741, 2.2037172941934493, 22.4), (2.0587, 1.822283184717572, 31.7)]
    text = "".join(
        PRINTED[name].format(e=e, train=train, test=test, top1=top1)
        for e, (train, test, top1) in enumerate(epochs)
    )
    text += PRINTED[name].format(e=2, train=1, test=1, top1=1).splitlines()[0]  # not done yet
    (tmp_path / "train.log").write_text("a line of something else\n" + text)
    run = curves.read_run(tmp_path / "train.log")
    assert [tuple(values.values()) for values in run.epochs.values()] == epochs
    picture = tmp_path / "a.png"
    assert curves.main([str(tmp_path / "train.log"), "--curve", name, "--out", str(picture)]) == 0
    assert "after 2 epochs you have 31.70 %, the release had" in capsys.readouterr().out


def test_another_data_set_is_compared_with_nothing(tmp_path, capsys):
    run = write_run(tmp_path / "run", [20.0, 99.0], CIFAR | {"dataset": "digits"})
    assert curves.main([str(run)]) == 0
    text = capsys.readouterr().out
    assert "dataset digits (torch/cifar10)" in text and "nothing to compare it with" in text
    assert "after 2 epochs you have 99.00 %\n" in text and "the release had" not in text

    def grey():
        picture = np.asarray(Image.open(run / "curves.png").convert("RGB"))
        return (picture == 0x8A).all(-1).sum()  # the colour of the release's curves

    without = grey()
    same = write_run(tmp_path / "same", [20.0, 30.0], CIFAR)
    assert curves.main([str(run), str(same)]) == 0
    text = capsys.readouterr().out
    assert text.count("the release had") == 1 and text.count("nothing to compare") == 1
    assert grey() > without + 500


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
