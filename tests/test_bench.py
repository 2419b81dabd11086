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


def test_saved_bytes():
    """The results of exp and sigmoid, and not the parameters; counted by hand."""
    bn, leaf = torch.nn.BatchNorm2d(3), torch.zeros(2, 3, 4, 4, requires_grad=True)
    with bench.Saved(bn) as saved:
        (leaf.exp() * 2).sigmoid()
        assert saved.total == 4 * 2 * leaf.numel()
        bn(leaf)
        # its input, and mean, 1 / std and running statistics of each channel
        assert saved.total == 4 * 3 * leaf.numel() + 4 * 4 * 3


def test_time_against_firing_rate(tmp_path, capsys):
    """Higher thresholds leave fewer inputs and operations; the figures and the picture are kept."""
    figure = tmp_path / "rates.png"
    words = f"--model cifar10 --batch 1 --T 2 --size 16 --scales 0.5 2 --rounds 1 --figure {figure}"
    assert rates.main(words.split()) == 0
    often, seldom = json.loads(figure.with_suffix(".json").read_text())
    assert 0 < seldom["nonzero"] < often["nonzero"] < 1 and 0 < seldom["sops"] < often["sops"]
    assert all(row["fast"] > 0 and row["dense"] > 0 for row in (often, seldom))
    assert figure.stat().st_size > 10_000 and "spikingjelly" not in often
