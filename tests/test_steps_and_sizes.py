"""One checkpoint tested and trained on at 1 to 16 time steps and at several sizes; energy and
pictures from the command line of the event folders.
"""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Golden, load, on_cpu
from on_events import CLASSES, FOLDERS
from PIL import Image

STEPS = [1, 2, 4, 8, 16]
FEW = {"dvs128-gesture": {"train": 1, "test": 1, "trials": 1}, "cifar10-dvs": {"samples": 10}}
TESTED = {"dvs128-gesture": "test/*/*.npz", "cifar10-dvs": "*/*_9.npz"}  # of ten, the last


def run_test(modules, place, *argv):
    """What test.py writes for the weights in place/one.pth."""
    args = [*argv, "--checkpoint", place / "one.pth", "--workers", 0, "--cross-sample-lif", False]
    assert modules.test.main(on_cpu(args)) == 0
    return json.loads((place / "test-one.json").read_text())


@torch.no_grad()
def by_hand(model, path, samples, labels):
    """(top-1, loss) by the plain modules in float64, sample by sample."""
    model.load_state_dict(torch.load(path))
    model.double().eval()
    logits = torch.cat([model(sample[None].double()) for sample in samples])
    right = (logits.argmax(1) == labels).double().mean().item()
    return 100 * right, F.cross_entropy(logits, labels).item()


LONG = pytest.param("cifar10-dvs", marks=pytest.mark.long)


# Events -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FOLDERS)
def events(request, tmp_path_factory):
    """A folder with weights of a narrow model and few recordings of moving shapes."""
    name, place = request.param, tmp_path_factory.mktemp(request.param)
    modules = load(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules.shapes, "QUICK", FEW[name])
        modules.shapes.prepare(place / "data")
    size = {"embed_dims": 16, "num_heads": 2, "num_classes": CLASSES[name]}
    torch.save(Golden.fill(modules.model.QKFormer(**size)).float().state_dict(), place / "one.pth")
    flags = ["--dataset", "shapes", "--data-path", place / "data", "--num-heads", 2]
    return SimpleNamespace(name=name, place=place, flags=flags, size=size, **vars(modules))


def files(events, T):
    """Frames of the test samples, in the order of their labels."""
    frames = events.place / "data" / "shapes" / f"frames_number_{T}_split_by_number"
    paths = sorted(frames.glob(TESTED[events.name]), key=lambda path: path.parent.name)
    assert len({path.parent for path in paths}) == len(paths) == CLASSES[events.name]
    return paths, [torch.from_numpy(np.load(path)["frames"]) for path in paths]


@pytest.mark.parametrize("events", ["dvs128-gesture", LONG], indirect=True)
def test_events_at_each_T(events):
    losses = []
    for T in STEPS:
        result = run_test(events, events.place, *events.flags, "--T", T)
        samples = files(events, T)[1]
        assert samples[0].shape == (T, 2, 128, 128)
        model = events.model.QKFormer(**events.size, T=T, backend="torch", fused=False)
        top1, loss = by_hand(model, events.place / "one.pth", samples, torch.arange(len(samples)))
        assert (result["top1"], result["loss"]) == pytest.approx((top1, loss), rel=1e-4)
        losses.append(loss)
    assert np.diff(sorted(losses)).min() > 1e-3  # or the same T was tested twice


@torch.no_grad()
def test_energy_and_pictures_of_events(events):
    """Both from one command; a picture of a file of frames; what is no such file."""
    flags = [*events.flags, "--T", 2]
    result = run_test(events, events.place, *flags)
    assert run_test(events, events.place, *flags, "--energy", "--attend", 3)["loss"] == (
        pytest.approx(result["loss"], rel=1e-4)
    )
    paths, samples = files(events, 2)
    energy = json.loads((events.place / "energy-one.json").read_text())
    assert (energy["images"], energy["T"]) == (len(samples), 2)
    with open(events.place / "energy-one.csv") as file:
        rows = {row["layer"]: row for row in csv.DictReader(file)}
    model = events.model.QKFormer(**events.size, T=2, backend="torch", fused=False)
    model.load_state_dict(torch.load(events.place / "one.pth"))
    spikes = []
    model.patch_embed1.proj1_conv.register_forward_hook(lambda _, args, out: spikes.append(*args))
    model.double().eval()(torch.stack(samples))
    assert float(rows["patch_embed1.proj1_conv"]["rate"]) == pytest.approx(
        spikes[0].mean().item(), rel=1e-3
    )
    macs = model.patch_embed1.proj_conv.weight.numel() * 128 * 128  # a frame
    assert float(rows["patch_embed1.proj_conv"]["energy"]) == pytest.approx(4.6e-9 * 2 * macs)

    run_test(events, events.place, *flags, "--attend", paths[0])
    for name in ("test-3", paths[0].stem):
        with Image.open(events.place / "attention" / f"{name}.png") as picture:
            assert picture.width > 1000 and np.asarray(picture.convert("L")).std() > 20
    recording = next((events.place / "data" / "shapes" / "events_np").rglob("*.npz"))
    with pytest.raises(events.config.UserError, match=r"attend takes .* \[2, 2, 128, 128\]$"):
        run_test(events, events.place, *flags, "--attend", recording)
