"""A model taken to a program of one's own: model.py with spiking/plain.py, or with all of spiking/."""

import shutil
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, load

MODELS = {
    "cifar10": ("QKFormer", {"depths": 3}, (2, 3, 16, 8)),
    "imagenet": ("QKFormer_10_384", {"depths": 4}, (2, 3, 32, 16)),
    "dvs128-gesture": ("QKFormer", {}, (2, 3, 2, 16, 32)),
}
RUN = """
import sys, torch, warnings
warnings.simplefilter("ignore")
{before}
from {module} import {entry}
torch.manual_seed(0)
model = {entry}(embed_dims=32, num_heads=2, **{options}).eval()
x = torch.rand({shape})
with torch.no_grad():
    logits = model(x)
model.train()(x).square().sum().backward()
grads = [p.grad for p in model.parameters()]
{after}
torch.save([model.eval().state_dict(), logits, grads], "found.pt")
"""


def run(folder, name, **words):
    entry, options, shape = MODELS[name]
    text = RUN.format(entry=entry, options=options, shape=shape, **words)
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def ours(name, **options):
    entry, more, shape = MODELS[name]
    torch.manual_seed(0)
    model = getattr(load(name).model, entry)(embed_dims=32, num_heads=2, **more, **options).eval()
    x = torch.rand(shape)
    with torch.no_grad():
        logits = model(x)
    model.train()(x).square().sum().backward()
    return model.eval().state_dict(), logits, [p.grad for p in model.parameters()]


FEW = ["cifar10", *(pytest.param(n, marks=pytest.mark.long) for n in MODELS if n != "cifar10")]


@pytest.mark.parametrize("name", FEW)
def test_two_files(tmp_path, name):
    """model.py and spiking.py, a copy of plain.py, without spikingjelly: to the bit the plain path."""
    shutil.copy(ROOT / name / "model.py", tmp_path)
    shutil.copy(ROOT / name / "spiking" / "plain.py", tmp_path / "spiking.py")
    run(tmp_path, name, module="model", before="sys.modules['spikingjelly'] = None", after="")
    found, want = torch.load(tmp_path / "found.pt"), ours(name, fused=False, backend="torch")
    assert [*found[0]] == [*want[0]] and torch.equal(found[1], want[1])
    for one, other in zip(
        (*found[0].values(), *found[2]), (*want[0].values(), *want[2]), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", FEW)
def test_in_a_package(tmp_path, name):
    """mypkg/model.py with mypkg/spiking/ runs fused; the same folder with one file runs too."""
    package = tmp_path / "mypkg"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / name / "spiking", package / "spiking", ignore=ignored)
    for file in ("model.py", "ms.py"):
        if (ROOT / name / file).exists():
            shutil.copy(ROOT / name / file, package)
    log = "import logging; logging.basicConfig(filename='log', level='INFO')"
    other = "import mypkg.ms" if (package / "ms.py").exists() else ""
    run(tmp_path, name, module="mypkg.model", before=log, after=other)
    found, want = torch.load(tmp_path / "found.pt"), ours(name)
    assert torch.equal(found[1], want[1]) and [*found[0]] == [*want[0]]
    if load(name).compiler.available("cpu", torch.float32, "auto"):
        assert (tmp_path / "log").read_text().count("fused kernels on the CPU") == 1
    shutil.rmtree(package / "spiking")
    shutil.copy(ROOT / name / "spiking" / "plain.py", package / "spiking.py")
    none = "sys.modules['spikingjelly'] = None"
    run(tmp_path, name, module="mypkg.model", before=none, after=other)
