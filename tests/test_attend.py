"""Pictures of attention show what the model computes."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import load

cifar10, gesture = load("cifar10"), load("dvs128-gesture")
ALONE = SimpleNamespace(main=True)


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
def probed(modules, model, x):
    with modules.attend.Probe(model) as probe:
        model(x)
    return {stage: probe.of(stage) for stage in probe.blocks}


@pytest.mark.parametrize("kind", ["token", "channel", "ssa"])
def test_what_is_drawn_is_what_goes_on(kind):
    """Masked k, and SSA's weights times v, are what the attention's own code makes of the same
    spikes.
    """
    attend = cifar10.attend
    model = small(cifar10, depths=4, attention=("token", "token", kind))
    stages = probed(cifar10, model, batch(model)[:1])
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
    picture = cifar10.attend.tile(frame, weights)
    lit = picture[..., 0] > picture[..., 2] + 0.1
    height, width = lit.shape
    assert height * 3 == width * 2 and width >= cifar10.attend.TILE
    assert lit[height // 2 :, 2 * width // 3 :].all() and lit.sum() == height * width // 6
    assert (
        np.abs(cifar10.attend.tile(frame, weights, (0, 0))[0, 0] - cifar10.attend.MARK).max() == 0
    )


@pytest.mark.parametrize("modules", [cifar10, gesture])
def test_a_png_for_each_sample(tmp_path, modules):
    model = small(modules)
    samples = SimpleNamespace(names=["one", "two"], label=3)
    loader = [(batch(model)[:1], torch.tensor([1]))]
    modules.attend.picture(model, loader, samples, tmp_path / "attention", ALONE, torch.no_grad)
    (path,) = (tmp_path / "attention").iterdir()
    assert path.name == "two.png"
    with Image.open(path) as image:
        assert image.width > 1000 and np.asarray(image.convert("L")).std() > 20
    assert not any(module._forward_hooks for module in model.modules())


def test_what_attend_names(tmp_path):
    find, UserError = cifar10.attend.find, cifar10.config.UserError
    for name in ("b.png", "a.PNG", "note.txt"):
        (tmp_path / name).write_text("")
    dataset = [(torch.zeros(1), 4), (torch.ones(1), 5)]
    chosen = find("1", lambda: dataset, None, (".png",))
    assert (
        chosen.label == 5 and chosen.names == ["test-1"] and chosen[0][0] == 1 and chosen[0][1] == 0
    )
    folder = find(str(tmp_path), None, lambda path: path.suffix, (".png",))
    assert folder.names == ["a", "b"] and folder[0] == (".PNG", 0) and folder.label == -1
    assert find(str(tmp_path / "note.txt"), None, lambda path: path.name, ())[0] == ("note.txt", 0)
    for wrong, word in (
        ("2", "sample 1"),
        (str(tmp_path / "no"), "attend is"),
        ("-1", "attend is"),
    ):
        with pytest.raises(UserError, match=word):
            find(wrong, lambda: dataset, None, (".png",))
    with pytest.raises(UserError, match="b can't be read"):
        cifar10.attend.Numbered([None, None], ["a", "b"])[1]


def test_matplotlib_is_asked_for_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(cifar10.config.UserError, match="pip install matplotlib"):
        cifar10.attend.picture(small(cifar10), [], None, tmp_path, ALONE, torch.no_grad)
