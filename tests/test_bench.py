"""tools/bench.py: every path of every kind of model is timed, and the paths compute the same function."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, Golden, load

spec = importlib.util.spec_from_file_location("bench", ROOT / "tools" / "bench.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


@pytest.mark.parametrize(("model", "size", "paths"), [("QKFormer_10_384", 32, 4), ("cifar10", 16, 3)])
def test_table(tmp_path, model, size, paths):
    args = ["--model", model, "--size", size, "--rounds", 2, "--T", 2, "--json", tmp_path / "b.json"]
    command = [sys.executable, ROOT / "tools" / "bench.py", "--device", "cpu", *args, "--profile", tmp_path / "t.json"]
    text = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert len(rows) == 2 * paths and all(row["images_per_second"] > 0 for row in rows)
    assert {row["path"] for row in rows} == set(bench.PATHS[:paths]) and "spread" in text
    memory = {row["path"]: row["train_memory_mb"] for row in rows}
    assert memory["ours"] < memory["release-like"]  # the first convolution of T copies is saved T times
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


def test_paths_compute_the_same():
    models = load("imagenet").model
    x = torch.randn(2, 3, 32, 32).double()
    logits = []
    for path in ("ours", "torch", "release-like"):
        model = bench.build("QKFormer_10_384", path, 2, models).eval()
        Golden.fill(getattr(model, "model", model))
        with torch.no_grad():
            logits.append(model(x))
    assert logits[0].std() > 0
    for other in logits[1:]:
        torch.testing.assert_close(logits[0], other, rtol=1e-9, atol=1e-9)
