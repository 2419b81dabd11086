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


def copy_models(name, package):
    """The line that imports MS-QKFormer where a folder has it."""
    found = [file for file in ("model.py", "ms.py") if (ROOT / name / file).exists()]
    for file in found:
        shutil.copy(ROOT / name / file, package)
    return "import mypkg.ms" if "ms.py" in found else ""


FEW = ["cifar10", *(pytest.param(n, marks=pytest.mark.long) for n in MODELS if n != "cifar10")]


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("package", ["mypkg", pytest.param("", marks=pytest.mark.long)])
def test_two_files(tmp_path, package, name):
    """model.py and spiking.py, a copy of plain.py, in a package or not, without spikingjelly: to
    the bit the plain path.
    """
    (tmp_path / package).mkdir(exist_ok=True)
    other = copy_models(name, tmp_path / package)
    shutil.copy(ROOT / name / "spiking" / "plain.py", tmp_path / package / "spiking.py")
    module, none = f"{package}.model".strip("."), "sys.modules['spikingjelly'] = None"
    run(tmp_path, name, module=module, before=none, after=other if package else "")
    found, want = torch.load(tmp_path / "found.pt"), ours(name, fused=False, backend="torch")
    assert [*found[0]] == [*want[0]] and torch.equal(found[1], want[1])
    for one, other in zip(
        (*found[0].values(), *found[2]), (*want[0].values(), *want[2]), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", FEW)
def test_in_a_package(tmp_path, name):
    """mypkg/model.py with mypkg/spiking/ runs fused."""
    package = tmp_path / "mypkg"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / name / "spiking", package / "spiking", ignore=ignored)
    other = copy_models(name, package)
    log = "import logging; logging.basicConfig(filename='log', level='INFO')"
    run(tmp_path, name, module="mypkg.model", before=log, after=other)
    found, want = torch.load(tmp_path / "found.pt"), ours(name)
    assert torch.equal(found[1], want[1]) and [*found[0]] == [*want[0]]
    if load(name).native.available("cpu", torch.float32, "auto"):
        assert (tmp_path / "log").read_text().count("fused kernels on the CPU") == 1
