"""tools/bench.py: every path of every kind of model is timed, and the paths compute the same
function.
"""

import json
import sys

import pytest
import torch

import bench
import rates
from conftest import Golden, load


def run(monkeypatch, capsys, *argv):
    """What bench.py prints of a command line for the CPU."""
    monkeypatch.setattr(sys, "argv", [*map(str, ("bench.py", "--device", "cpu", *argv))])
    bench.main()
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "size", "paths"),
    [
        pytest.param("QKFormer_10_384", 64, 4, marks=pytest.mark.long),
        pytest.param("cifar10", 32, 3, marks=pytest.mark.long),
    ],
)
def test_table(tmp_path, model, size, paths, monkeypatch, capsys):
    args = ["--model", model, "--size", size, "--rounds", 1, "--T", 2, "--batch", 2]
    files = ["--json", tmp_path / "b.json", "--profile", tmp_path / "t.json"]
    text = run(monkeypatch, capsys, *args, *files)
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert len(rows) == 2 * paths and all(row["images_per_second"] > 0 for row in rows)
    assert {row["path"] for row in rows} == set(bench.PATHS[:paths]) and "spread" in text
    memory = {row["path"]: row["train_memory_mb"] for row in rows}
    assert memory["fast"] < 0.9 * memory["release-like"]
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("name", "folder"), [("QKFormer_10_384", "imagenet"), ("MSQKFormer", "cifar10")]
)
def test_paths_compute_the_same(name, folder):
    x = torch.randn(2, 3, 32, 32).double()
    logits = []
    for path in ("fast", "plain", "release-like"):
        model = bench.build(name, path, 2, load(folder)).eval()
        Golden.fill(model)
        with torch.no_grad():
            logits.append(model(x))
    assert logits[0].std() > 0
    for other in logits[1:]:
        torch.testing.assert_close(logits[0], other, rtol=1e-9, atol=1e-9)


@pytest.mark.long
def test_bytes(tmp_path, monkeypatch, capsys):
    """The counted table of the parts of two models: less is saved everywhere, and less moved where
    images come in.
    """
    args = ["--bytes", "--model", "QKFormer_10_384", "cifar10-dvs", "--size", 64]
    text = run(monkeypatch, capsys, *args, "--json", tmp_path / "b.json")
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    kinds = {row["kind"] for row in rows if row["model"] == "QKFormer_10_384"}
    assert kinds == {f"SPEDS-{i}" for i in (1, 2, 3)} | {
        f"stage{i} {k}" for i in (1, 2, 3) for k in ("attention", "MLP")
    }
    by_part = {(row["model"], row["path"], row["kind"]): row for row in rows}
    for (model, path, kind), row in by_part.items():
        if path == "fast":  # at this size weights are much of what moves, but not in front
            release = by_part[model, "release-like", kind]
            if kind != "stage3 attention":  # weights of q, k and v, joined
                assert 0 < row["saved_mb"] < release["saved_mb"]
            assert kind != "SPEDS-1" or 0 < row["moved_mb"] < release["moved_mb"]
    assert "saved MB" in text and "per image" in text


def test_bytes_are_those_of_the_operators():
    """Counted by hand: a convolution, BatchNorm, and a view that moves nothing."""
    x, weight = torch.zeros(2, 3, 4, 4), torch.zeros(5, 3, 1, 1)
    with bench.traffic.Moved() as moved:
        torch.nn.functional.conv2d(x, weight).flatten(1)
    assert moved.total == 4 * (x.numel() + weight.numel() + 2 * 5 * 16)
    bn = torch.nn.BatchNorm2d(3)
    with bench.traffic.Moved() as moved:
        bn(x)
    channels = (
        4 * 3
    )  # weight, bias and running statistics, twice; the batch's count; its mean and 1 / std, written
    assert moved.total == 4 * 3 * x.numel() + 4 * (2 * channels + 2 * 3) + 2 * 8
    leaf = x.clone().requires_grad_()
    with bench.traffic.Saved(bn) as saved:
        (leaf.exp() * 2).sigmoid()
        assert saved.total == 4 * 2 * x.numel()  # the results of exp and sigmoid


def test_time_against_firing_rate(tmp_path, capsys):
    """Higher thresholds leave fewer inputs and operations; the figures and the picture are kept."""
    figure = tmp_path / "rates.png"
    words = f"--model cifar10 --batch 1 --T 2 --size 16 --scales 0.5 2 --rounds 1 --figure {figure}"
    assert rates.main(words.split()) == 0
    often, seldom = json.loads(figure.with_suffix(".json").read_text())
    assert 0 < seldom["nonzero"] < often["nonzero"] < 1 and 0 < seldom["sops"] < often["sops"]
    assert all(row["fast"] > 0 and row["dense"] > 0 for row in (often, seldom))
    assert figure.stat().st_size > 10_000 and "spikingjelly" not in often
