"""tools/leak.py: models whose samples mix, and models whose samples do not, are told apart, and the
module that mixes is named.
"""

import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from spikingjelly.activation_based.model import qkformer
from torch import nn

import leak
from conftest import ROOT, load


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def ours(folder="cifar10", **keywords):
    modules = load(folder)
    kind = modules.ms.MSHST if keywords.pop("ms", False) else modules.model.HST
    width = {"embed_dims": 64, "num_heads": 4} if folder != "imagenet" else {"embed_dims": 64}
    return kind(**{**width, "num_heads": 4, "depths": 4, **keywords})


class Neuron(nn.Module):
    """Integrates over the first dimension, with a memory of its own where `keeps`."""

    def __init__(self, keeps=False):
        super().__init__()
        self.keeps, self.v = keeps, 0.0

    def forward(self, x):
        v, spikes = self.v, []
        for step in x:
            v = v / 2 + step
            spikes.append((v >= 0.5).to(x))
            v = v * (1 - spikes[-1])
        self.v = v if self.keeps else 0.0
        return torch.stack(spikes)


class Small(nn.Module):
    """T = 4 steps: convolution, BatchNorm, neuron; `fault` says what is done wrong."""

    def __init__(self, fault="", time_first=False):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.lif, self.head = Neuron(fault == "state"), nn.Linear(8, 5)
        self.fault, self.time_first = fault, time_first

    def forward(self, x):
        x = x if self.time_first else x.expand(4, *x.shape)
        T, B = x.shape[:2]
        x = self.bn(self.conv(x.flatten(0, 1)))
        x = (
            self.lif(x).unflatten(0, (T, B))
            if self.fault == "neuron"
            else self.lif(x.unflatten(0, (T, B)))
        )
        x = self.head(x.mean((0, 3, 4)))
        if self.fault == "own forward":
            x = x - x.mean(0)
        if self.fault == "training" and self.training:
            x = 0.9 * x + 0.1 * x.flip(0)
        return x.detach() * 0 if self.fault == "deaf" else x


def batch_norm_in_training():
    model = torchvision.models.resnet18().eval()
    model.layer1[0].bn2.train()
    return model


IMAGES = (3, 3, 16, 16)
EVENTS = (3, 4, 2, 32, 32)
CLEAN = {
    "cifar10": (ours, IMAGES),
    "imagenet": (lambda: ours("imagenet"), (2, 3, 48, 32)),
    "events": (lambda: ours("dvs128-gesture", depths=2), EVENTS),
    "membrane shortcuts": (lambda: ours(ms=True), IMAGES),
    "spikingjelly": (
        lambda: qkformer.QKFormer(embed_dims=64, num_heads=(2, 2, 4), depths=(1, 1, 1)),
        (2, 3, 64, 64),
    ),
    "resnet": (torchvision.models.resnet18, (3, 3, 32, 32)),
    "vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, drop_rate=0.1),
        (3, 3, 32, 32),
    ),
    "small": (Small, IMAGES),
}
LEAKY = {  # what makes it, input, checks, module, dimension of its input
    "cifar10": (
        lambda: ours(cross_sample_lif=True),
        IMAGES,
        "companions order size",
        "stage3.0.ssa.proj_lif",
        0,
    ),
    "imagenet": (
        lambda: ours("imagenet", cross_sample_lif=True),
        (2, 3, 48, 32),
        "companions order size",
        "stage3.0.attn.proj_lif",
        0,
    ),
    "events": (
        lambda: ours("dvs128-gesture", depths=2, cross_sample_lif=True),
        EVENTS,
        "companions order size",
        "stage2.0.ssa.proj_lif",
        0,
    ),
    "BatchNorm in training": (
        batch_norm_in_training,
        (3, 3, 32, 32),
        "companions size",
        "layer1.0.bn2",
        0,
    ),
    "neuron": (lambda: Small("neuron"), IMAGES, "companions order size", "lif", 0),
    "state": (lambda: Small("state"), IMAGES, "state", "lif", None),
    "own forward": (
        lambda: Small("own forward"),
        IMAGES,
        "companions size",
        "the model's own forward",
        0,
    ),
}


@pytest.mark.parametrize("name", CLEAN)
def test_no_leak(name):
    make, shape = CLEAN[name]
    model, inputs = make(), torch.randn(shape)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if name == "spikingjelly":  # its neurons keep their state until they are reset
        found = leak.leaks(model, inputs)
        assert [(f.checks, f.module) for f in found] == [(("state",), "patch_embed1.lif1")]
    else:
        assert leak.leaks(model, inputs) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "proj_lif" not in " ".join(leak.unreached(model, inputs))


@pytest.mark.parametrize("name", LEAKY)
def test_leak(name):
    make, shape, checks, module, dimension = LEAKY[name]
    (found,) = leak.leaks(make(), torch.randn(shape))
    assert (" ".join(found.checks), found.module) == (checks, module)
    assert found.dimension == dimension and found.mode.startswith("evaluation")
    assert found.change > 1e-3 and (found.share > 0 or name in ("state", "own forward"))
    assert module in str(found) and f"{found.change:.3g}" in str(found)


def test_steps_first():
    inputs = torch.randn(4, 3, 3, 16, 16)
    assert leak.leaks(Small(time_first=True), inputs, time_first=True) == []
    (found,) = leak.leaks(Small("neuron", time_first=True), inputs, time_first=True)
    assert found.module == "lif" and found.shape == (12, 8, 16, 16)


def test_in_training_alone():
    (found,) = leak.leaks(Small("training"), torch.randn(IMAGES))
    assert (found.mode, found.module) == ("training", "the model's own forward")


def test_can_not_be_told():
    with pytest.raises(leak.Unclear, match="give two or more"):
        leak.leaks(Small(), torch.randn(1, 3, 16, 16))
    with pytest.raises(leak.Unclear, match="the same for another input"):
        leak.leaks(Small("deaf"), torch.randn(IMAGES))


def test_script(tmp_path, capsys):
    """A copy of the file works beside a model, without this project."""
    script = tmp_path / "leak.py"
    script.write_bytes((ROOT / "tools" / "leak.py").read_bytes())
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, mixes=False):\n"
        "        super().__init__()\n"
        "        self.line, self.mixes = torch.nn.Linear(6, 3), mixes\n"
        "    def forward(self, x):\n"
        "        return self.line(x).cumsum(0) if self.mixes else self.line(x)\n"
    )
    start = "leak: in evaluation and training, a sample's output changes by"
    command = [sys.executable, script, "net.py:Net(mixes=True)", "--input", "4", "6"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.startswith(start) and not done.stderr
    for expression, code, start in (
        ("Net", 0, "no leak: "),
        ("None_such", 2, "can't tell: name 'None_such' is not defined"),
    ):
        assert leak.main([f"{tmp_path}/net.py:{expression}", "--input", "4", "6"]) == code
        said = "".join(capsys.readouterr())
        assert said.startswith(start) and said.count("\n") == 1
