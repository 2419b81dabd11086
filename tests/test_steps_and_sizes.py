"""One checkpoint tested and trained on at 1 to 16 time steps and at several sizes; energy and
pictures from the command line of the event folders.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import attend
import energy
import sweep
from conftest import ROOT, Golden, load, on_cpu, resolve_in
from on_events import CLASSES, FOLDERS

STEPS = [1, 4, 16]
FEW = {"dvs128-gesture": {"train": 1, "test": 1, "trials": 1}, "cifar10-dvs": {"samples": 10}}
TESTED = {"dvs128-gesture": "test/*/*.npz", "cifar10-dvs": "*/*_9.npz"}  # of ten, the last


def run_test(modules, place, *argv):
    """What test.py writes for the weights in place/one.pth."""
    (place / "test-one.json").unlink(missing_ok=True)  # of other settings, it would stay
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


# Images -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """cifar10/ with weights of a narrow model, and few images of noise, 32 x 32."""
    place, modules = tmp_path_factory.mktemp("images"), load("cifar10")
    generator = np.random.default_rng(0)
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (place / "data" / name).mkdir(parents=True)
        for number in range(4 if "train" in name else 2):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / "data" / name / f"{number}.png")
    size = {"embed_dims": 16, "num_heads": 2, "num_classes": 2, "depths": 3}
    torch.save(Golden.fill(modules.model.QKFormer(**size)).float().state_dict(), place / "one.pth")
    flags = ["--dataset", "folder", "--data_dir", place / "data", "--num_heads", 2, "--workers", 0]
    flags = [*map(str, flags)]
    return SimpleNamespace(place=place, flags=flags, size=size, **vars(modules))


def image_loss(images, path, T, size):
    """(top-1, loss) of the weights at `path` on the test images, at T steps and size x size."""
    ranks, cfg = images.process.Ranks("cpu"), resolve_in(images, *images.flags, "--img_size", size)
    [(batch, labels)] = images.data.test_loader(
        cfg, images.data.build_dataset(cfg, False, ranks), ranks
    )
    assert batch.shape == (4, 3, size, size)
    model = images.model.QKFormer(**images.size, T=T, backend="torch", fused=False)
    return by_hand(model, path, batch, labels)


def test_sweep_of_T_and_size(images, capsys, monkeypatch):
    """tools/sweep.py: a row for each T and size, as counted by hand; the same in the JSON."""
    monkeypatch.chdir(ROOT)
    args = ["--checkpoint", images.place / "one.pth", "--size", 8, 12, "--T", *STEPS]
    flags = on_cpu([*images.flags, "--cross_sample_lif", "false"])
    assert sweep.main(["cifar10", *map(str, args), "--", *flags]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = json.loads((images.place / "sweep-one.json").read_text())
    assert [(row["size"], row["T"]) for row in rows] == [(s, T) for s in (8, 12) for T in STEPS]
    for row, line in zip(rows, lines[1:-1], strict=True):
        T, size = row["T"], row["size"]
        want = image_loss(images, images.place / "one.pth", T, size)
        assert (row["top1"], row["loss"]) == pytest.approx(want, rel=1e-4)
        assert [int(line[0]), int(line[1]), float(line[2])] == [T, size, round(row["top1"], 2)]
        first = 4.6e-9 * images_macs(images, size)
        assert row["energy"] == pytest.approx(first + 0.9e-9 * row["sops"])
    assert rows[-1]["ann"] == pytest.approx(rows[0]["ann"] * (12 / 8) ** 2, rel=0.01)
    with Image.open(images.place / "sweep-one.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 20
    assert not (images.place / "test-one.json").exists()  # that one is of the trained T


def images_macs(images, size):
    """Multiplications of the first convolution, which sees an image once."""
    weights = torch.load(images.place / "one.pth")["patch_embed1.proj_conv.weight"]
    return weights.numel() * size**2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["cifar10", "--T", "0"], "at least 1"),
        (["cifar10", "--rounds", "0"], "at least 1"),
        (["cifar10-dvs", "--size", "16"], "one size"),
        (["cifar10", "--checkpoint", "nowhere.pth"], "no such checkpoint"),
    ],
)
def test_sweeps_mistakes(argv, words, capsys, tmp_path):
    (tmp_path / "one.pth").touch()
    argv = argv if "--checkpoint" in argv else [*argv, "--checkpoint", str(tmp_path / "one.pth")]
    with pytest.raises(SystemExit) as end:
        sweep.main(argv)
    assert end.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(("T", "size"), [(1, 16), (16, 12)])
def test_training_on_at_another_T_and_size(images, tmp_path, T, size):
    """From one checkpoint, which knows neither; what comes out is tested as it was trained."""
    args = ["--finetune", images.place / "one.pth", "--output", tmp_path, "--experiment", "on"]
    args += ["--time_step", T, "--img_size", size, "--batch_size", 4, "--epochs", 1, "--no_aug"]
    args += ["--warmup_epochs", 0, "--cooldown_epochs", 0, "--lr", 1e-2, "--mixup", 0]
    args += ["--cross_sample_lif", False]
    assert images.train.main(on_cpu([*args, *images.flags])) == 0
    [line] = map(json.loads, (tmp_path / "on" / "log.txt").read_text().splitlines())
    flags = ["--checkpoint", tmp_path / "on" / "last.pth", "--data_dir", images.place / "data"]
    assert images.test.main(on_cpu(flags)) == 0
    result = json.loads((tmp_path / "on" / "test-last.json").read_text())
    trained = torch.load(tmp_path / "on" / "last.pth", weights_only=True)["model"]
    torch.save(trained, tmp_path / "weights.pth")
    want = image_loss(images, tmp_path / "weights.pth", T, size)
    assert (result["top1"], result["loss"]) == pytest.approx(want, rel=1e-4)
    assert line["test_loss"] == pytest.approx(want[1], rel=1e-4)
    before = torch.load(images.place / "one.pth")
    assert not torch.equal(trained["head.weight"], before["head.weight"])


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


@pytest.mark.parametrize("events", ["dvs128-gesture", LONG], indirect=True)
@torch.no_grad()
def test_energy_and_pictures_of_events(events, monkeypatch):
    """By the tools; a picture of a file of frames; what is no such file."""
    monkeypatch.chdir(ROOT)
    path = events.place / "one.pth"
    flags = ["--folder", events.name, "--", *on_cpu(events.flags), "--T", 2, "--workers", 0]
    flags += ["--cross-sample-lif", "false"]
    assert energy.main([path, *flags]) == 0
    paths, samples = files(events, 2)
    result = json.loads((events.place / "energy-one.json").read_text())
    assert (result["images"], result["T"]) == (len(samples), 2)
    rows = {row["layer"]: row for row in result["layers"]}
    model = events.model.QKFormer(**events.size, T=2, backend="torch", fused=False)
    model.load_state_dict(torch.load(path))
    spikes = []
    model.patch_embed1.proj1_conv.register_forward_hook(lambda _, args, out: spikes.append(*args))
    model.double().eval()(torch.stack(samples))
    want = spikes[0].mean().item()
    assert rows["patch_embed1.proj1_conv"]["rate"] == pytest.approx(want, rel=1e-3)
    macs = model.patch_embed1.proj_conv.weight.numel() * 128 * 128  # a frame
    assert rows["patch_embed1.proj_conv"]["energy"] == pytest.approx(4.6e-9 * 2 * macs)

    drawn = []
    monkeypatch.setattr(attend, "draw", lambda *args: drawn.append(args))
    for what in (3, paths[3]):
        assert attend.main([path, what, *flags]) == 0
    folder = events.place / "attention"
    assert [one[0] for one in drawn] == [folder / "test-3.png", folder / f"{paths[3].stem}.png"]
    assert all(torch.equal(one[1], samples[3]) for one in drawn) and "label 3" in drawn[0][3]
    recording = next((events.place / "data" / "shapes" / "events_np").rglob("*.npz"))
    with pytest.raises(SystemExit, match=r"^error: .*attend takes .* \[2, 2, 128, 128\]$"):
        attend.main([path, recording, *flags])


@pytest.mark.parametrize("events", ["dvs128-gesture", LONG], indirect=True)
@pytest.mark.parametrize("T", [1, 16])
def test_training_on_events_at_another_T(events, tmp_path, T):
    args = ["--finetune", events.place / "one.pth", "--output-dir", tmp_path, "--T", T]
    args += ["--epochs", 1, "--warmup-epochs", 0, "--cooldown-epochs", 0]
    args += ["--cross-sample-lif", False]
    args += ["--experiment", "on", "--batch-size", 4, "--workers", 0]
    assert events.train.main(on_cpu([*args, *events.flags])) == 0
    [line] = map(json.loads, (tmp_path / "on" / "log.txt").read_text().splitlines())
    trained = torch.load(tmp_path / "on" / "last.pth", weights_only=True)["model"]
    torch.save(trained, tmp_path / "weights.pth")
    samples = files(events, T)[1]
    model = events.model.QKFormer(**events.size, T=T, backend="torch", fused=False)
    top1, loss = by_hand(model, tmp_path / "weights.pth", samples, torch.arange(len(samples)))
    assert (line["test_acc1"], line["test_loss"]) == pytest.approx((top1, loss), rel=1e-4)
    before = torch.load(events.place / "one.pth")
    assert not torch.equal(trained["head.weight"], before["head.weight"])
