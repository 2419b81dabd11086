"""From a checkpoint to the network that it holds: configuration, architecture, from Python."""

import argparse
import json
import subprocess
import sys

import pytest
import torch
import yaml

from conftest import ROOT, Golden, load, log_of
from on_digits import CPU, call, cifar10

UserError = cifar10.config.UserError
FOLDERS = ("cifar10", "cifar100", "dvs128-gesture", "cifar10-dvs", "imagenet")
NETS = [(folder, "QKFormer") for folder in FOLDERS] + [
    (f, "MSQKFormer") for f in ("cifar10", "cifar100", "imagenet")
]


# What a run was trained with ----------------------------------------------------------------------


def test_a_run_is_tested_as_it_was_trained(trained_on_digits, tmp_path, capsys):
    """T, heads, width, data set and size come from the checkpoint, whatever the yml of this call
    says of them.
    """
    folder = trained_on_digits[0]
    best = max(log_of(folder), key=lambda line: line["test_acc1"])
    path, result = folder / "best.pth", folder / "test-best.json"
    for flags in ((), ("-c", "quickstart.yml")):
        text = call(cifar10.test.main, capsys, "--checkpoint", path, "--workers", 0, *flags)
        measured = json.loads(result.read_text())
        assert (measured["top1"], measured["loss"]) == (best["test_acc1"], best["test_loss"])
        assert "time_step" not in text and "error" not in text

    # a flag, an edited yml and another yml go over it, with a line; not where weights could not fit
    edited = tmp_path / "quickstart.yml"
    edited.write_text(
        yaml.safe_dump({"base": str(ROOT / "cifar10" / "quickstart.yml"), "time_step": 3})
    )
    other = tmp_path / "other.yml"
    other.write_text(yaml.safe_dump({"mean": [0.1, 0.2, 0.3], "workers": 0}))
    for flags, origin, name, said, had in (
        (("--time-step", 3), "command line", "time_step", 3, 2),
        (("-c", edited), "quickstart.yml", "time_step", 3, 2),
        (("-c", other), "other.yml", "mean", [0.1, 0.2, 0.3], None),
        (
            ("--attention", "channel", "token", "ssa"),
            "command line",
            "attention",
            ["channel", "token", "ssa"],
            None,
        ),
    ):
        text = call(cifar10.test.main, capsys, "--checkpoint", path, "--workers", 0, *flags)
        line = next(line for line in text.splitlines() if f"{name} is" in line)
        assert line.startswith(f"{origin}: {name} is {said}, but") and line.endswith(
            f"{said} is used"
        ), text
        assert had is None or f"trained with {had}" in line
        assert json.loads(result.read_text())["loss"] != best["test_loss"]
    for name, value in {
        "dim": 32,
        "layer": 4,
        "num_classes": 7,
        "mlp_ratio": 2.5,
        "attention": ["ssa", "token", "ssa"],
    }.items():
        flags = [f"--{name}", *(value if isinstance(value, list) else [value])]
        text = call(cifar10.test.main, capsys, "--checkpoint", path, *flags)
        assert text.splitlines()[-1].startswith(
            f"error: command line: {name} is {value}, but {path} is of {name} "
        ), text


def test_split_of_the_training_stays():
    folder = load("cifar10-dvs")
    cfg, _, given = folder.config.load_config(
        folder.options.KEYS,
        folder.options.NO_EFFECT,
        folder.options.DEFAULT_CONFIG,
        ["--split_seed", "5"],
    )
    model = folder.model.QKFormer(embed_dims=32, num_heads=2)
    checkpoint = {
        "model": model.state_dict(),
        "config": {**vars(resolve_of(folder)), "split_seed": 7},
    }
    with pytest.raises(
        folder.config.UserError, match=r"split_seed is 5, but a\.pth is of split_seed 7"
    ):
        folder.build.settle(cfg, given, checkpoint, "a.pth")
    cfg, _, given = folder.config.load_config(
        folder.options.KEYS, folder.options.NO_EFFECT, folder.options.DEFAULT_CONFIG, []
    )
    folder.build.settle(cfg, given, checkpoint, "a.pth")
    assert (cfg.split_seed, cfg.dim, cfg.mlp_ratio) == (7, 32, 1)


def resolve_of(folder, *argv):
    options = folder.options
    return folder.config.load_config(
        options.KEYS, options.NO_EFFECT, options.DEFAULT_CONFIG, [*argv]
    )[0]


# What shapes tell ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "family"), NETS)
def test_architecture_is_read_off_the_shapes(name, family):
    """Another width, depth, ratio and attention than the defaults, of every model."""
    folder, events = load(name), "dvs" in name
    module = folder.ms if family.startswith("MS") else folder.model
    make = getattr(module, family if name != "imagenet" else f"{family}_10_384")
    kinds = ("ssa", "token") if events else ("ssa", "token", "ssa")
    for dim, extra, ratio, classes, kind in (
        (48, 1, 2.5, 7, kinds),
        (64, 0, 4, 10, ("token",) * len(kinds)),
    ):
        depth = {True: 2, False: 4 if name == "imagenet" else 3}[events] + extra
        options = {"embed_dims": dim, "num_heads": 4, "mlp_ratios": ratio, "num_classes": classes}
        model = make(depths=depth, attention=kind, **options)
        read = folder.build.read_shapes(model.state_dict(), "a.pth", {})
        names = ("layer", "dim", "attention", "nb_classes" if name == "imagenet" else "num_classes")
        assert [read[key] for key in names] == [depth, dim, list(kind), classes], read
        assert read["model"].startswith(family)
        again = make(depths=depth, attention=kind, **{**options, "mlp_ratios": read["mlp_ratio"]})
        shapes = [(key, value.shape) for key, value in again.state_dict().items()]
        assert shapes == [(key, value.shape) for key, value in model.state_dict().items()]


def test_weights_of_another_folder():
    """Each folder names the architecture of the others' weights."""
    small = {"embed_dims": 32, "num_heads": 2}
    imagenet, events = load("imagenet"), load("cifar10-dvs")
    for folder, weights, words in (
        (cifar10, imagenet.model.QKFormer_10_384(**small), "QKFormer for ImageNet"),
        (cifar10, imagenet.ms.MSQKFormer_10_384(**small), "MSQKFormer for ImageNet"),
        (cifar10, events.model.QKFormer(**small), "QKFormer for event data"),
        (imagenet, cifar10.model.QKFormer(**small), "QKFormer for CIFAR"),
        (events, cifar10.ms.MSQKFormer(**small), "MSQKFormer for CIFAR"),
    ):
        with pytest.raises(
            folder.config.UserError,
            match=rf"a.pth: {words}, another architecture than this folder's",
        ):
            folder.build.read_shapes(weights.state_dict(), "a.pth", {})


def test_weights_of_another_network():
    weights = cifar10.model.QKFormer(embed_dims=32, num_heads=2).state_dict()
    with pytest.raises(
        UserError, match=r"\d+ keys begin with `backbone.`.* without it they would fit"
    ):
        cifar10.build.read_shapes(
            {f"backbone.{name}": value for name, value in weights.items()}, "a.pth", {}
        )
    other = {
        "layer1.0.conv1.weight": torch.ones(2),
        "fc.weight": torch.ones(3),
        "layer1.0.bn1.weight": torch.ones(2),
    }
    with pytest.raises(UserError) as error:
        cifar10.build.read_shapes(other, "a.pth", {})
    assert all(
        word in str(error.value)
        for word in ("`layer1.`", "HST", "3 are unknown", "layer1.0.conv1", "missing")
    )


def test_T_of_a_file(capsys):
    steps_of = cifar10.weights.steps_of
    for args in (argparse.Namespace(time_step=6), {"time_step": 6}, argparse.Namespace(T=6)):
        assert steps_of({"args": args}, "ms_qk_10-384_T4.pth.tar") == 6
    assert steps_of({"args": argparse.Namespace(time_step="6")}, "ms_qk_10-384_T4.pth.tar") == 4
    assert steps_of({}, "a/ms_qk_10-768_T1.pth.tar") == 1
    assert steps_of({}, "weights.pth") is None


def test_a_file_of_membrane_shortcuts_needs_no_flag(tmp_path):
    """In MaxFormer's layout, with the golden weights: model, T and classes come from the file."""
    imagenet, golden, path = (
        load("imagenet"),
        Golden("imagenet-ms-384"),
        tmp_path / "ms_qk_10-384_T4.pth.tar",
    )
    options, T = imagenet.options, golden.meta["T"]
    model = golden.fill(imagenet.ms.MSQKFormer_10_384(num_classes=golden.meta["num_classes"]))
    args = argparse.Namespace(time_step=T, model="ms_qkformer", lr=None)
    torch.save(
        {"model": model.state_dict(), "optimizer": {}, "epoch": 199, "scaler": {}, "args": args},
        path,
    )
    cfg, _, given = imagenet.config.load_config(
        options.KEYS, options.NO_EFFECT, options.DEFAULT_CONFIG, []
    )
    torch.set_default_dtype(torch.float64)
    try:
        tested = imagenet.build.load_tested(cfg, given, CPU, path)
        with torch.no_grad():
            logits = tested.model.eval()(golden.input()).numpy()
    finally:
        torch.set_default_dtype(torch.float32)
    want = golden.arrays["per_sample/eval_logits"]
    assert abs(logits - want).max() <= 1e-9 * abs(want).max()
    assert (cfg.model, cfg.time_step, tested.cross_sample_lif) == ("MSQKFormer_10_384", T, False)
    cfg.cross_sample_lif = "true"
    with pytest.raises(
        imagenet.config.UserError, match="cross_sample_lif is true, which has no meaning for MSQK"
    ):
        imagenet.build.load_tested(cfg, given, CPU, path)


def test_from_python(trained_on_digits, tmp_path):
    """Any working directory, several folders in one process: three lines that the README has."""
    code = f"""
import copy, pickle, torch
hub = lambda folder, name, *a, **k: torch.hub.load(r"{ROOT}/" + folder, name, *a, source="local", **k)
model, transform, classes = hub("cifar10", "load", r"{trained_on_digits[0] / "best.pth"}")
from PIL import Image
picture = Image.new("RGB", (40, 30), (200, 0, 90))
image = transform(picture).unsqueeze(0)
assert torch.equal(transform(picture.convert("RGBA"))[None], image)
grey = picture.convert("L")
assert torch.equal(transform(grey), transform(grey.convert("RGB")))
small = dict(embed_dims=32, num_heads=2)
others = [hub("imagenet", "MSQKFormer_10_384", **small), hub("cifar10-dvs", "QKFormer", **small)]
again, *_ = hub("cifar10", "load", r"{trained_on_digits[0] / "last.pth"}")
with torch.no_grad():
    logits = model(image)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(image), logits)
    print(classes, tuple(logits.shape), tuple(others[0](torch.rand(1, 3, 32, 48)).shape), type(others[1]).__mro__[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0 and "['0', '1', '2'" in done.stdout, done.stderr
    assert "(1, 10) (1, 1000)" in done.stdout and "UserWarning" not in done.stderr
