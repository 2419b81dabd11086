"""Files of weights: their layouts, damage, and runs that start from them or average them."""

import hashlib
import json
import logging

import pytest
import safetensors.torch
import torch
from timm.utils import ModelEmaV3

from conftest import log_of, same, weights_of
from on_digits import call, cifar10
from on_images import TINY

UserError = cifar10.config.UserError
load_checkpoint = cifar10.checkpoint.load_checkpoint


def small_model():
    return cifar10.model.QKFormer(embed_dims=32, num_heads=2)


# Layouts of files ---------------------------------------------------------------------------------


def layouts(weights):
    """{name: content} of the ways in which others save weights."""

    def prefixed(prefix):
        return {prefix + name: value for name, value in weights.items()}

    lacking = {name: value for name, value in weights.items() if "num_batches" not in name}
    return {
        "bare": weights,
        "ddp": {"state_dict": prefixed("module.")},
        "compiled": {"model": prefixed("_orig_mod.")},
        "both": prefixed("module._orig_mod."),
        "lightning": {
            "state_dict": prefixed("model."),
            "pytorch-lightning_version": "2.5",
            "epoch": 3,
        },
        "deepspeed": {"module": weights, "dp_world_size": 8},
        "net": {"net": weights, "acc": 93.1, "epoch": 7},
        "ema only": {"state_dict_ema": prefixed("module.")},
        "counted": {
            "model": {
                **weights,
                "total_ops": torch.zeros(1),
                "stage1.0.total_params": torch.zeros(1),
            }
        },
        "old": {"model": lacking},
    }


def test_layouts(tmp_path):
    weights = small_model().state_dict()
    paths = []
    for name, content in layouts(weights).items():
        paths.append(tmp_path / f"{name}.pth")
        torch.save(content, paths[-1])
    paths.append(tmp_path / "weights.safetensors")
    safetensors.torch.save_file(weights, paths[-1])
    for path in paths:
        model = small_model()
        cifar10.checkpoint.load_weights(model, load_checkpoint(path)["model"], path)
        assert same(model.state_dict(), weights), path


def test_damaged_weights(tmp_path):
    """An entry that is no finite number of a plain tensor is named."""
    weights, path = (small_model().state_dict(), tmp_path / "a.pth")
    name = "stage1.0.mlp.mlp1_bn.running_var"
    value = weights[name]
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with_nan, with_inf = value.clone(), value.clone()
    with_nan[3], with_inf[0] = float("nan"), float("inf")
    wrong = [
        with_nan,
        with_inf,
        value.int(),
        value.bool(),
        value.cfloat(),
        value.to_sparse(),
        value.to("meta"),
        nested,
    ]
    for bad in [*wrong, "text", 3.0]:
        torch.save({"model": {**weights, name: bad}}, path)
        with pytest.raises(UserError, match=r"a\.pth"):
            load_checkpoint(path)
    for bad in wrong[:5]:
        torch.save({"model": {**weights, name: bad}}, path)
        with pytest.raises(UserError, match=name):
            load_checkpoint(path)


def test_flipped_bits(tmp_path):
    """A bit that flips in a file is never loaded as another weight."""
    weights, path = (small_model().state_dict(), tmp_path / "a.pth")
    torch.save({"model": weights}, path)
    whole, generator, loaded = path.read_bytes(), torch.Generator().manual_seed(0), 0
    for at in torch.randint(len(whole) * 8, (80,), generator=generator).tolist():
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << at % 8
        path.write_bytes(flipped)
        try:
            read = load_checkpoint(path)["model"]
        except UserError as error:
            assert str(path) in str(error)
        else:
            loaded += 1
            assert same(read, weights), at
    assert loaded < 40  # most bits are weights'


# Starting from weights, averages ------------------------------------------------------------------


@pytest.fixture
def train(capsys, image_data, tmp_path):
    """Calls cifar10/train.py on the folder of images; what it printed."""
    flags = *TINY, "--data-path", image_data, "--output", tmp_path
    return lambda *argv: call(cifar10.train.main, capsys, *flags, *argv)


def test_finetune(trained_on_images, tmp_path, train):
    """A head that fits is kept, another is new; T and the rest of the weights are the
    checkpoint's, the number of classes is the data's.
    """
    path = trained_on_images / "last.pth"
    for classes, words in (
        (None, "its head fits and is kept"),
        (5, "has a head of 3 classes, here there are 5; a new one is made"),
    ):
        more = ("--num-classes", classes) if classes else ()
        text = train(
            "--finetune",
            path,
            "--lr",
            1e-9,
            "--min-lr",
            0,
            "--experiment",
            f"tuned{classes}",
            *more,
        )
        assert f"{path}: {words}" in text and "T = 2" in text, text
        old, new = weights_of(path), weights_of(tmp_path / f"tuned{classes}" / "last.pth")
        name = "stage3.0.ssa.q_conv.weight"
        assert torch.allclose(old[name], new[name], atol=1e-6)
        assert new["head.weight"].shape == (classes or 3, 16)
        kept = torch.allclose(new["head.weight"][:3], old["head.weight"], atol=1e-6)
        assert kept == (classes is None)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "classes": ["red", "green things", "über"]}, tmp_path / "other.pth")
    text = train("--finetune", tmp_path / "other.pth", "--experiment", "other")
    assert "other.pth: class 0 is 'red', but in the data it is 'green things'; its head is" in text
    text = train("--initial-checkpoint", path, "--dim", 32)
    assert text.splitlines()[-1].startswith("error: command line: dim is 32"), text


def test_averaged_weights(tmp_path, train, monkeypatch):
    """Kept, tested and saved; a run that goes on in a new folder ends with the same ones, and takes
    its best along.
    """
    save, first = cifar10.run.save_checkpoint, tmp_path / "first" / "last.pth"
    first.parent.mkdir()

    def saves(state, path):
        save(state, path)
        if state["epoch"] == 0:
            save(state, first.with_name(path.name))

    monkeypatch.setattr(cifar10.run, "save_checkpoint", saves)
    flags = "--drop-path", 0.2, "--epochs", 2, "--model-ema", "--model-ema-decay", 0.9
    flags = *flags, "--experiment", "run"
    assert "averaged weights" in train(*flags)
    train(*flags, "--resume", first)
    whole, part = (
        torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("run", "run-2")
    )
    assert same(whole["model_ema"], part["model_ema"]) and same(whole["model"], part["model"])
    assert log_of(tmp_path / "run")[1:] == log_of(tmp_path / "run-2")
    assert not torch.equal(whole["model_ema"]["head.weight"], whole["model"]["head.weight"])
    assert (tmp_path / "run-2" / "best.pth").is_file()  # of the first epoch, or of the second

    plain, averaged = (load_checkpoint(tmp_path / "run" / "last.pth", ema) for ema in (0, 1))
    assert same(plain["model"], whole["model"]) and same(averaged["model"], whole["model_ema"])
    del whole["model_ema"]
    torch.save(whole, first)
    with pytest.raises(UserError, match="no averaged weights"):
        load_checkpoint(first, use_ema=True)
    # by hand: an average over one step
    model = small_model()
    average = ModelEmaV3(model, decay=0.75)
    old = model.head.weight.detach().clone()
    with torch.no_grad():
        model.head.weight.add_(1)
    average.update(model)
    assert torch.allclose(average.module.head.weight, old + 0.25)


def test_checksum_of_an_exported_file(tmp_path, caplog):
    """config.json of tools/export.py has the SHA-256 of the weights beside it."""
    path, weights = tmp_path / "model.safetensors", {"head.weight": torch.ones(3, 4)}
    safetensors.torch.save_file(weights, path)
    known = {"qkformer": {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}}
    (tmp_path / "config.json").write_text(json.dumps(known))
    with caplog.at_level(logging.INFO, logger="qkformer"):
        assert torch.equal(load_checkpoint(path)["model"]["head.weight"], torch.ones(3, 4))
    assert "no checksums" not in caplog.text
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="its SHA-256 is not that in"):
        load_checkpoint(path)
