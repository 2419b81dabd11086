"""tools/loading.py: three loaders of one recipe, each of which does the whole of it."""

import re

import pytest
import torch

import loading
from on_photos import resolve


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(loading, "FILES", 2)


def test_loading(few, capsys, monkeypatch):
    """On processor time as a clock that counts its calls, since real ones differ each time."""
    now = iter(range(10**6))
    monkeypatch.setattr(loading.time, "process_time", lambda: next(now))
    monkeypatch.setattr(loading, "seconds", lambda: (n := next(now), 2 * n))
    assert loading.main(["--images", "64", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^(\D+?) +([\d.]+) +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
    assert len(rows) == 8 and all(row[1:] == ("250.000",) * 3 for row in rows)  # 4 files
    rows = re.findall(r"^(release|timm|ours) +([\d.]+) +(\d+) +([\d.]+) +(\d+)$", printed, re.M)
    want = ("31.25", "32", "15.62", "21")  # 64 images in 2 s of the worker and 1 s of this process
    assert [row[0] for row in rows] == ["release", "timm", "ours"]
    assert all(row[1:] == want for row in rows)


def test_loaders_are_of_one_recipe(few, tmp_path):
    """As many batches, normalised alike, and each image with a part erased."""
    torch.manual_seed(0)
    assert loading.make_photographs(tmp_path, 90) > 10_000
    (tmp_path / "val").symlink_to("train")
    flags = ("--data_path", tmp_path, "--workers", 1, "--batch_size", 16, "--reprob", 1)
    cfg = resolve(*flags)
    noise = []
    for name, make in loading.loaders_of(cfg, tmp_path, 64):
        batches = [batch for batch, _ in make(0)]
        images = torch.cat(batches).float()
        assert images.shape == (64, 3, 224, 224), name
        assert len(batches) == 4 and abs(images.mean()) < 1.5 and 0.5 < images.std() < 2, name
        noise.append((images.amax((1, 2, 3)) > 2.7).float().mean())  # none is so bright
    assert min(noise) > 0.9
    steps = loading.steps_of(cfg, sorted(map(str, tmp_path.rglob("train/*/*.JPEG"))))
    assert all(len(functions) == 3 for functions in steps.values())
