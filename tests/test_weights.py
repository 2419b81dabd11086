"""Files of weights: their layouts, damage, and runs that start from them or average them."""

import signal

import pytest
import safetensors.torch
import torch

from conftest import log_of, same, weights_of
from on_digits import CPU, RANDOM, SMALL, call, cifar10

UserError = cifar10.config.UserError


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


def test_layouts(tmp_path, capsys):
    weights = cifar10.model.QKFormer(embed_dims=32, num_heads=2).state_dict()
    paths = []
    for name, content in layouts(weights).items():
        paths.append(tmp_path / f"{name}.pth")
        torch.save(content, paths[-1])
    paths.append(tmp_path / "weights.safetensors")
    safetensors.torch.save_file(weights, paths[-1])
    for path in paths:
        loaded = cifar10.checkpoint.load_checkpoint(path)
        model = cifar10.model.QKFormer(embed_dims=32, num_heads=2)
        cifar10.checkpoint.load_weights(model, loaded, path)
        assert same(model.state_dict(), weights), path


def test_damaged_weights(tmp_path):
    """An entry that is no finite number of a plain tensor is named."""
    weights, path = (
        cifar10.model.QKFormer(embed_dims=32, num_heads=2).state_dict(),
        tmp_path / "a.pth",
    )
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
            cifar10.checkpoint.load_checkpoint(path)
    for bad in wrong[:5]:
        torch.save({"model": {**weights, name: bad}}, path)
        with pytest.raises(UserError, match=name):
            cifar10.checkpoint.load_checkpoint(path)


def test_flipped_bits(tmp_path):
    """A bit that flips in a file is never loaded as another weight."""
    weights, path = (
        cifar10.model.QKFormer(embed_dims=32, num_heads=2).state_dict(),
        tmp_path / "a.pth",
    )
    torch.save({"model": weights}, path)
    whole, generator, loaded = path.read_bytes(), torch.Generator().manual_seed(0), 0
    for at in torch.randint(len(whole) * 8, (80,), generator=generator).tolist():
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << at % 8
        path.write_bytes(flipped)
        try:
            read = cifar10.checkpoint.load_checkpoint(path)["model"]
        except UserError as error:
            assert str(path) in str(error)
        else:
            loaded += 1
            assert same(read, weights), at
    assert loaded < 40  # most bits are weights'


# Starting from weights, averages ------------------------------------------------------------------


@pytest.fixture
def train(monkeypatch, capsys):
    """Calls main() of cifar10/train.py and gives what it printed; this process keeps its signal
    handlers.
    """
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    return lambda *argv: call(cifar10.train.main, capsys, *SMALL, "--workers", 0, *argv)


def test_finetune(trained_on_digits, tmp_path, train):
    """A head that fits is kept, another is new; the rest of the weights and T are the
    checkpoint's.
    """
    path = trained_on_digits[0] / "last.pth"
    still = (
        "--epochs",
        1,
        "--cooldown-epochs",
        0,
        "--warmup-epochs",
        0,
        "--lr",
        1e-9,
        "--min-lr",
        0,
    )
    for classes, words in (
        (10, "its head fits and is kept"),
        (12, "a head of 10 classes, but num_classes is 12"),
    ):
        name = f"tuned{classes}"
        flags = (
            "--finetune",
            path,
            "--num-classes",
            classes,
            "--output",
            tmp_path,
            "--experiment",
            name,
        )
        text = train(*still, *flags)
        assert words in text and "T = 2" in text, text
        old, new = weights_of(path), weights_of(tmp_path / name / "last.pth")
        assert torch.allclose(
            old["stage3.0.ssa.q_conv.weight"], new["stage3.0.ssa.q_conv.weight"], atol=1e-6
        )
        assert (new["head.weight"].shape == (classes, 16)) and (
            (new["head.weight"][:10] - old["head.weight"]).abs().max() < 1e-6
        ) == (classes == 10)
    text = train(
        "--initial-checkpoint", path, "--dim", 32, "--output", tmp_path, "--experiment", "x"
    )
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
    flags = (
        *RANDOM[len(SMALL) :],
        "--workers",
        0,
        "--output",
        tmp_path,
        "--epochs",
        2,
        "--cooldown-epochs",
        0,
    )
    flags = (*flags, "--model-ema", "--model-ema-decay", 0.9, "--experiment", "run")
    assert "averaged weights" in train(*flags)
    train(*flags, "--resume", first)
    whole, part = (
        torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("run", "run-2")
    )
    assert same(whole["model_ema"], part["model_ema"]) and same(whole["model"], part["model"])
    assert log_of(tmp_path / "run")[1:] == log_of(tmp_path / "run-2")
    assert not torch.equal(whole["model_ema"]["head.weight"], whole["model"]["head.weight"])
    assert (tmp_path / "run-2" / "best.pth").is_file()  # of the first epoch, or of the second

    plain, averaged = (
        cifar10.checkpoint.load_checkpoint(tmp_path / "run" / "last.pth", ema)
        for ema in (False, True)
    )
    assert same(plain["model"], whole["model"]) and same(averaged["model"], whole["model_ema"])
    del whole["model_ema"]
    torch.save(whole, first)
    with pytest.raises(UserError, match="no averaged weights"):
        cifar10.checkpoint.load_checkpoint(first, use_ema=True)
    # by hand: an average over one step
    model = cifar10.model.QKFormer(T=1, embed_dims=16, num_heads=2)
    average = cifar10.train.ModelEmaV3(model, decay=0.75)
    old = model.head.weight.detach().clone()
    with torch.no_grad():
        model.head.weight.add_(1)
    average.update(model)
    assert torch.allclose(average.module.head.weight, old + 0.25)


def test_fine_tuning_says_what_the_yml_had(trained_on_digits, capsys):
    """A yml that nobody named does not stand against the weights; a line has both values."""
    path = trained_on_digits[0] / "last.pth"
    cfg, _, given = cifar10.config.load_config(
        cifar10.options.KEYS, cifar10.options.NO_EFFECT, cifar10.options.DEFAULT_CONFIG, []
    )
    cifar10.log.set_up_log(CPU)
    cifar10.build.settle(cfg, given, cifar10.checkpoint.load_checkpoint(path), path, "finetune")
    lines = capsys.readouterr().out.splitlines()
    for name, had, value in (
        ("dim", 384, 16),
        ("layer", 4, 3),
        ("num_heads", 8, 2),
        ("time_step", 4, 2),
    ):
        assert f"cifar10.yml: {name} is {had}, but {path} has {value}, which is used" in lines
        assert getattr(cfg, name) == value
    assert (cfg.dataset, cfg.img_size) == ("torch/cifar10", 32)  # the input is the run's own
