"""tools/memory.py: what is counted is what autograd keeps, and grows as the paper says;
tools/segment.py: the masks are what was drawn; tools/host.py: layers in one call spare time.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import memory
import segment
from conftest import ROOT
from test_layer import compiled


def test_memory(tmp_path, capsys):
    figure = tmp_path / "memory.png"
    sizes = "--device cpu --side 16 32 48 --channels 64 --heads 2 --T 2".split()
    assert memory.main([*sizes, "--figure", str(figure)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[float(cell) for cell in line.split()] for line in lines if line[:7].strip().isdigit()]
    assert [row[0] for row in rows] == [256, 1024, 2304] and figure.stat().st_size > 10_000
    for _, token, token_measured, line, line_measured, square, square_measured in rows:
        assert (token, line, square) == (token_measured, line_measured, square_measured)
    small, large = rows[1:]  # 2.25 times the tokens
    assert abs(large[2] / small[2] - 2.25) < 0.02 and 2 < large[4] / small[4] < 2.25
    assert large[6] / small[6] > 4 and large[6] > 10 * large[2]


def test_segment(tmp_path, capsys, monkeypatch):
    make = segment.make
    monkeypatch.setattr(segment, "make", lambda count, *args: make(min(count, 60), *args))
    figure = tmp_path / "segment.png"
    assert segment.main(["--steps", "1", "--figure", str(figure)]) == 0
    said = capsys.readouterr().out
    assert "step 1/1: loss 1." in said and "mean IoU" in said  # chance is log(4) = 1.39
    assert Image.open(figure).size == (2 * 8 * segment.SIZE, 2 * 3 * segment.SIZE)
    grey = np.full((200, 200, 3), 128, np.uint8)
    for seed in range(5):
        image, mask = segment.draw(np.random.default_rng(seed), grey)
        assert ((image != 128).any(2) <= (mask > 0)).all() and 0 < (mask > 0).mean() < 0.9
        assert (mask > 0).mean() - (image != 128).any(2).mean() < 0.01
    one, other = torch.tensor([0, 0, 1, 2, 3]), torch.tensor([0, 1, 1, 2, 1])
    mean, ious = segment.mean_iou(one, other)
    assert [*ious, mean] == pytest.approx([50, 100 / 3, 100, 0, (150 + 100 / 3) / 4])


@compiled
def test_host():
    command = [sys.executable, ROOT / "tools" / "host.py", "--rounds", "25"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()[1:]]
    ratios = {(kind, path): float(ratio[:-1]) for kind, path, *_, ratio in found}
    assert len(ratios) == 4
    for kind in ("step", "inference"):
        assert ratios[kind, "fast"] < 0.8, "0.51 and 0.53 where nothing else runs"
