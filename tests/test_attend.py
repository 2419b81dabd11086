"""Pictures of attention show what the model computes."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

import attend
from conftest import ROOT, Golden, load

cifar10, gesture = load("cifar10"), load("dvs128-gesture")


def small(modules, **kwargs):
    """A narrow model that fires, since its BatchNorms have seen a batch."""
    torch.manual_seed(0)
    model = modules.model.HST(embed_dims=32, num_heads=2, mlp_ratios=2, num_classes=4, **kwargs)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            torch.nn.init.constant_(module.bias, 1.2)
    with torch.no_grad():
        model.train()(batch(model))
    return model.eval()


def batch(model):
    generator = torch.Generator().manual_seed(1)
    if model.in_channels == 3:
        return torch.randn(2, 3, 32, 48, generator=generator)
    return torch.poisson(torch.full((2, 5, 2, 32, 48), 0.4), generator)


@torch.no_grad()
def probed(model, x):
    with attend.Probe(model) as probe:
        model(x)
    return {stage: probe.of(stage) for stage in probe.blocks}


@pytest.mark.parametrize("kind", ["token", "channel", "ssa"])
def test_what_is_drawn_is_what_goes_on(kind):
    """Masked k, and SSA's weights times v, are what the attention's own code makes of the same
    spikes.
    """
    model = small(cifar10, depths=4, attention=("token", "token", kind))
    stages = probed(model, batch(model)[:1])
    assert [*stages] == ["stage1", "stage2", "stage3"]
    spikes, attention = stages["stage3"], next(model.stage3[1].children())  # the last block
    x = []
    hook = attention.register_forward_pre_hook(lambda module, args: x.append(args[0]))
    with torch.no_grad():
        model(batch(model)[:1])
        want = attention.attend(x[0])
    if kind != "ssa":
        want = cifar10.plain.masked(*want)
    want = want[:, 0].unflatten(1, (2, -1))
    hook.remove()
    if kind != "ssa":
        assert spikes["mask"].any() and spikes["mask"].size < spikes["k"].size
        np.testing.assert_array_equal(spikes["k"] * spikes["mask"], want.numpy())
        assert kind in attend.describe(spikes)[0]
        return
    (row, column), weights = attend.looked_at(spikes["q"], spikes["k"])
    mixed = np.einsum("thyx,thcyx->thc", weights, spikes["v"])
    fired = cifar10.neuron.MultiStepLIF(v_threshold=0.5)(torch.tensor(mixed * 0.125))
    assert fired.any()
    np.testing.assert_array_equal(fired.numpy(), want[..., row, column].numpy())


def test_tiles_are_lit_where_the_mask_is_on():
    frame = np.full((8, 12, 3), 0.5)
    weights = np.zeros((2, 3))
    weights[1, 2] = 1
    picture = attend.tile(frame, weights)
    lit = picture[..., 0] > picture[..., 2] + 0.1
    height, width = lit.shape
    assert height * 3 == width * 2 and width >= attend.TILE
    assert lit[height // 2 :, 2 * width // 3 :].all() and lit.sum() == height * width // 6
    assert np.abs(attend.tile(frame, weights, (0, 0))[0, 0] - attend.MARK).max() == 0


def check_picture(path):
    with Image.open(path) as image:
        assert image.width > 1000 and np.asarray(image.convert("L")).std() > 20


@pytest.mark.parametrize("modules", [cifar10, pytest.param(gesture, marks=pytest.mark.long)])
def test_a_png_for_each_sample(tmp_path, modules, capsys):
    model = small(modules)
    attend.picture(model, [("two", batch(model)[1], 3)], tmp_path / "attention", torch.no_grad)
    (path,) = (tmp_path / "attention").iterdir()
    assert capsys.readouterr().out == f"written: {tmp_path}/attention/two.png\n"
    check_picture(path)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Of a narrow network, in the folder of a run of cifar10/'s."""
    monkeypatch.chdir(ROOT)
    path = tmp_path / "cifar10" / "output" / "run" / "best.pth"
    path.parent.mkdir(parents=True)
    model = cifar10.model.QKFormer(embed_dims=16, num_heads=2, num_classes=10, depths=3)
    torch.save(Golden.fill(model).float().state_dict(), path)
    return path


FLAGS = "--device cpu --dataset digits --img_size 16 --workers 0 --num_heads 2 --time_step 1"
FLAGS = ["--", *FLAGS.split()]


def test_what_is_drawn(checkpoint, tmp_path, monkeypatch):
    """A test sample with its label, a file, the files of a folder; each as the network gets it."""
    drawn = []
    monkeypatch.setattr(attend, "draw", lambda *args: drawn.append(args))
    Image.new("L", (16, 16), 255).save(tmp_path / "white.PNG")
    (tmp_path / "note.txt").touch()
    for what in (5, tmp_path / "white.PNG", tmp_path):
        assert attend.main([checkpoint, what, *FLAGS]) == 0
    folder = checkpoint.parent / "attention"
    assert [one[0] for one in drawn] == [folder / f"{n}.png" for n in ("test-5", "white", "white")]
    settings = cifar10.config.read_settings(cifar10.options, FLAGS[1:])
    cfg, ranks = settings.resolve(), cifar10.process.Ranks("cpu")
    image, label = cifar10.data.build_dataset(cfg, False, ranks)[5]
    mean, std = (torch.tensor(values)[:, None, None] for values in (cfg.mean, cfg.std))
    torch.testing.assert_close(drawn[0][1], (torch.as_tensor(image) / 255 - mean) / std)
    assert drawn[0][3].endswith(f"%, label {label}") and "label" not in drawn[1][3]
    torch.testing.assert_close(drawn[1][1], ((1 - mean) / std).expand(3, 16, 16))


def test_mistakes(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "bad.png").write_text("")
    for what, words in (
        (360, "the test set ends with sample 359"),
        (tmp_path / "no", "nor a file or folder of .jpg"),
        (tmp_path, "bad.png"),
    ):
        with pytest.raises(SystemExit, match="^error: .*" + words):
            attend.main([checkpoint, what, *FLAGS])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"^error: .*pip install matplotlib"):
        attend.main([checkpoint, 5, *FLAGS])
