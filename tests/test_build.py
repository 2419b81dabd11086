"""From a checkpoint to the network that it holds: configuration, architecture, from Python."""

import argparse
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, load, log_of, on_cpu
from on_digits import CPU, call, cifar10, resolve
from on_images import TINY, write_images

UserError = cifar10.config.UserError
NETS = [("cifar10", "QKFormer"), ("cifar10-dvs", "QKFormer"), ("imagenet", "QKFormer_10_384")]
NETS += [("cifar10", "MSQKFormer"), ("imagenet", "MSQKFormer_10_384")]
HERE = ("--workers", 0, "--fused", "false")  # as trained_on_images ran


def read(folder, *argv):
    return folder.config.read_settings(folder.options, [*map(str, argv)])


def recorded(folder, checkpoint, path="a.pth"):
    return folder.build.recorded_values(folder.options, checkpoint, path)


# What a run was trained with ----------------------------------------------------------------------


@pytest.fixture
def runs(trained_on_images, tmp_path):
    """A folder with two copies of that run, a and the newer b, and the epoch of their best.pth."""
    for number, name in enumerate("ab"):
        ignore = shutil.ignore_patterns("test-*")  # of other tests
        run = shutil.copytree(trained_on_images, tmp_path / name, ignore=ignore)
        args = (run / "args.yaml").read_text()
        (run / "args.yaml").write_text(args.replace("experiment: tiny", f"experiment: {name}"))
        os.utime(run / "best.pth", (number, number))
    return tmp_path, max(log_of(tmp_path / "a"), key=lambda line: line["test_acc1"])


@pytest.fixture
def test(capsys):
    """Calls test.py; what it printed."""
    return lambda *argv: call(cifar10.test.main, capsys, *argv, *HERE)


def result(run):
    """The one result there, which is removed."""
    (file,) = run.glob("test-*.json")
    content = json.loads(file.read_text())
    file.unlink()
    return content


def test_a_run_is_tested_as_it_was_trained(runs, test):
    """T, heads, width, data set, size and precision come from the checkpoint, however it is named."""
    output, best = runs
    path = output / "a" / "best.pth"
    for flags, run in (
        (("--checkpoint", path), "a"),
        (("--finetune", path), "a"),
        (("--resume", path), "a"),
        (("-c", output / "a" / "args.yaml"), "a"),
        (("--output", output, "--experiment", "a"), "a"),
        (("--output", output), "b"),
    ):
        text = test(*flags)
        assert "error" not in text, text
        measured = result(output / run)
        assert (measured["top1"], measured["loss"]) == (best["test_acc1"], best["test_loss"])
        assert " is used" not in text, text
    assert not [*output.glob("*/test-*")]  # none was written elsewhere
    text = test("--checkpoint", output / "a" / "last.pth", "--model_ema")
    assert result(output / "a")["top1"] == log_of(output / "a")[-1]["ema_acc1"], text
    text = test("--checkpoint", path, "--batch_size", 1)
    assert result(output / "a")["loss"] == pytest.approx(best["test_loss"], rel=0.02)
    text = test("--output", output, "--experiment", "c")
    assert text.endswith(
        f"error: no checkpoint: there is no best.pth of c under {output}; train first, or name one "
        "with --checkpoint"
    )


def test_flags_against_a_run(runs, test, tmp_path):
    """A flag and an edited yml go over it, with a line; not where weights could not fit."""
    output, best = runs
    path = output / "a" / "best.pth"
    (tmp_path / "cifar10.yml").write_text("time_step: 3\n")
    for flags, origin, name, value, had in (
        (("--time-step", 3), "command line", "time_step", 3, 2),
        (("-c", tmp_path / "cifar10.yml"), "cifar10.yml", "time_step", 3, 2),
        (("--amp", "false"), "command line", "amp", False, True),
        (("--amp-dtype", "float16"), "command line", "amp_dtype", "float16", "bfloat16"),
        (("--v-threshold", 0.3), "command line", "v_threshold", 0.3, 0.2),
    ):
        text = test("--checkpoint", path, *flags)
        line = f"{origin}: {name} is {value}, but {path} was trained with {had}; {value} is used"
        assert line in text.splitlines(), text
        assert result(output / "a")["loss"] != best["test_loss"]
    kinds = ["ssa", "token", "ssa"]
    for name, words in {"dim": [32], "num_classes": [7], "attention": kinds}.items():
        text = test("--checkpoint", path, f"--{name}", *words)
        value = words if name == "attention" else words[0]
        line = f"error: command line: {name} is {value}, but {path} is of {name} "
        assert text.splitlines()[-1].startswith(line), text


def test_classes_of_the_data(trained_on_images, test, tmp_path, capsys):
    """The same names in the same order, in testing and in resuming."""
    run, data = trained_on_images, tmp_path / "data"

    def refused(line):
        train = call(cifar10.train.main, capsys, *flags, "--resume", run / "last.pth")
        for text in train, test("--checkpoint", run / "last.pth", "--data-path", data):
            assert text.splitlines()[-1] == f"error: {run / 'last.pth'}{line}"

    flags = ["--data-path", data, "--output", tmp_path / "more", *HERE]
    write_images(data, ("green things", "über", "red"))  # which sort as in training
    assert "top-1" in test("--checkpoint", run / "last.pth", "--data-path", data)
    for split in ("train", "val"):
        (data / split / "red").rename(data / split / "rot")
    refused(": class 1 is 'red', but in the data it is 'rot'")
    write_images(data, ("zebra",))
    refused(" has 3 classes, but the data has 4")


@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
def test_numbers_of_classes_that_sort_otherwise(name, tmp_path):
    """1, 2, 10 sort as 1, 10, 2: weights of such a run do not fit 01, 02, 10."""
    folder, path = load(name), tmp_path / "a.pth"
    entry = folder.model.QKFormer if name == "cifar10" else folder.model.QKFormer_10_384
    model, listed = entry(T=1, embed_dims=32, num_heads=2, num_classes=3), []
    for names in ("1", "2", "10"), ("01", "02", "10"):
        place = write_images(tmp_path / names[0], names)
        size = ["--img-size", 32, *(["--dataset", "folder"] if name == "cifar10" else [])]
        flags = [
            *size,
            "--data-path",
            place,
            "--num-heads",
            2,
            "-T",
            1,
            *HERE,
            "--checkpoint",
            path,
        ]
        cfg = read(folder, *flags).resolve()
        listed.append(folder.data.build_dataset(cfg, False, CPU).classes)
        content = {"model": model.state_dict(), "cross_sample_lif": False, "classes": listed[0]}
        torch.save(content, path)
        if names[0] == "1":
            assert folder.test.main(on_cpu(flags)) == 0
    assert listed == [["1", "10", "2"], ["01", "02", "10"]]
    with pytest.raises(
        folder.config.UserError, match=r"class 0 is '1', but in the data it is '01'"
    ):
        folder.test.main(on_cpu(flags))
    # a file without names has a number alone: another one would test other classes
    check, content = folder.build.check_classes, {"model": model.state_dict()}
    check(content, path, listed[1])
    for classes in ("ab", "abcd"):
        wrong = f"a.pth has 3 classes, but the data has {len(classes)}"
        with pytest.raises(folder.config.UserError, match=wrong):
            check(content, path, classes)


def test_split_of_the_training_stays():
    folder = load("cifar10-dvs")
    model = folder.model.QKFormer(embed_dims=32, num_heads=2)
    checkpoint = {"model": model.state_dict(), "config": {"split_seed": 7}}
    back = recorded(folder, checkpoint)
    for argv in ((), ("--split_seed", 7), ("--num-classes", "none")):
        cfg = read(folder, *argv).resolve("test", back, "a.pth")
        assert (cfg.split_seed, cfg.dim, cfg.mlp_ratio) == (7, 32, 1)
    for other in ("5", "None"):
        wrong = rf"split_seed is {other}, but a\.pth is of split_seed 7"
        with pytest.raises(folder.config.UserError, match=wrong):
            read(folder, "--split_seed", other).resolve("test", back, "a.pth")


def test_folders_come_from_args_yaml_alone(trained_on_images, image_data, tmp_path, caplog):
    """A file from elsewhere has no say in what is read; a line says what is not."""
    caplog.set_level("INFO", "qkformer")
    checkpoint = cifar10.checkpoint.load_checkpoint(trained_on_images / "last.pth")
    assert checkpoint["config"]["data_path"] == str(image_data)
    beside = recorded(cifar10, checkpoint, trained_on_images / "last.pth")
    assert beside["data_path"] == str(image_data) and "data_path" not in caplog.text
    assert "data_path" not in recorded(cifar10, checkpoint, tmp_path / "last.pth")
    assert f"last.pth: its data_path is {image_data}, which is not there" in caplog.text
    (tmp_path / "args.yaml").write_text(f"data_path: {tmp_path}/no-such-folder\n")
    assert "data_path" not in recorded(cifar10, checkpoint, tmp_path / "last.pth")
    (tmp_path / "args.yaml").write_text(f"data_path: {tmp_path}\nworkers: 3\ndim: 99\n")
    back = recorded(cifar10, checkpoint, tmp_path / "last.pth")
    assert (back["data_path"], back["workers"], back["dim"]) == (str(tmp_path), 0, 16)


def test_a_key_of_the_user_s_own(monkeypatch, trained_on_images, tmp_path):
    """One line in options.py: it is a flag, is saved, and comes back in testing."""
    Key, keys = cifar10.config.Key, cifar10.options.KEYS
    key = Key(float, 1.0, "of my own filter", low=0, high=9)
    for table in keys, cifar10.options.DATA:
        monkeypatch.setitem(table, "sharpness", key)
    flags = [*TINY, "--data-path", trained_on_images / "nowhere", "--sharpness", 3]
    start = {"sharpness": resolve(*flags).sharpness}
    checkpoint = cifar10.checkpoint.load_checkpoint(trained_on_images / "last.pth")
    checkpoint["config"].update(start)
    back = recorded(cifar10, checkpoint)
    assert read(cifar10).resolve("test", back, "a.pth").sharpness == 3.0
    assert read(cifar10).resolve("finetune", back, "a.pth").sharpness == 1.0
    assert read(cifar10, "--sharpness", 2).resolve("test", back, "a.pth").sharpness == 2.0


# What shapes tell ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "entry"), NETS)
def test_architecture_is_read_off_the_shapes(name, entry):
    """Another width, depth, ratio and attention than the defaults, of every model."""
    folder, events = load(name), "dvs" in name
    make = getattr(folder.ms if entry.startswith("MS") else folder.model, entry)
    kinds = ("ssa", "token") if events else ("ssa", "token", "ssa")
    for dim, extra, ratio, classes, kind in (
        (48, 1, 2.5, 7, kinds),
        (64, 0, 4, 10, ("token",) * len(kinds)),
    ):
        depth = {True: 2, False: 4 if name == "imagenet" else 3}[events] + extra
        options = {"embed_dims": dim, "num_heads": 4, "mlp_ratios": ratio, "num_classes": classes}
        model = make(depths=depth, attention=kind, **options)
        read = folder.build.read_shapes(folder.options, model.state_dict(), "a.pth", {})
        names = ("layer", "dim", "attention", "num_classes", "model", "neuron")
        assert [read[key] for key in names] == [depth, dim, list(kind), classes, entry, "lif"], read
        again = make(depths=depth, attention=kind, **{**options, "mlp_ratios": read["mlp_ratio"]})
        shapes = [(key, value.shape) for key, value in again.state_dict().items()]
        assert shapes == [(key, value.shape) for key, value in model.state_dict().items()]


def test_variants_of_ones_own(monkeypatch, tmp_path):
    """A model under a name of its own comes back by that name; names of a fork's weights are
    replaced.
    """
    small = {"embed_dims": 32, "num_heads": 2, "depths": 3}
    mini = functools.partial(cifar10.model.QKFormer, mlp_ratios=1)
    monkeypatch.setitem(cifar10.options.MODELS, "Mini_QKFormer_32", mini)
    key = cifar10.options.KEYS["model"]  # as with the variant in model.py
    known = dataclasses.replace(key, choices=(*cifar10.options.MODELS,))
    monkeypatch.setitem(cifar10.options.KEYS, "model", known)
    model = mini(**small)
    config = {"model": "Mini_QKFormer_32", "dim": 32, "num_heads": 2, "layer": 3, "mlp_ratio": 1}
    file = {"model": model.state_dict(), "config": config}
    assert recorded(cifar10, file)["model"] == "Mini_QKFormer_32"
    weights = {name.replace("tssa", "cssa"): value for name, value in file["model"].items()}
    torch.save({"config": config, "model": weights}, path := tmp_path / "a.pth")
    load = functools.partial(cifar10.build.load, cifar10.options, cifar10.data, path)
    with pytest.raises(UserError, match=r"stage1.0.cssa"):
        load()
    loaded = load(rename={"cssa": "tssa"})[0]
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded(x), model.eval()(x))


def test_weights_of_another_folder():
    """Each folder names the architecture of the others' weights, whatever the file says besides."""
    small = {"embed_dims": 32, "num_heads": 2}
    imagenet, events = load("imagenet"), load("cifar10-dvs")
    for folder, weights, words in (
        (cifar10, imagenet.model.QKFormer_10_384(**small), "QKFormer for ImageNet"),
        (cifar10, imagenet.ms.MSQKFormer_10_384(**small), "MSQKFormer for ImageNet"),
        (cifar10, events.model.QKFormer(**small), "QKFormer for event data"),
        (imagenet, cifar10.model.QKFormer(**small), "QKFormer for CIFAR"),
        (events, cifar10.ms.MSQKFormer(**small), "MSQKFormer for CIFAR"),
    ):
        wrong = rf"a.pth: {words}, but this folder is for"
        for config in ({}, {"input_size": 48, "img_size": "none"}):
            with pytest.raises(folder.config.UserError, match=wrong):
                recorded(folder, {"model": weights.state_dict(), "config": config})


def test_weights_of_another_network():
    weights = cifar10.model.QKFormer(embed_dims=32, num_heads=2).state_dict()
    for content in (
        {f"backbone.{n}": v for n, v in weights.items()},
        {"fc.weight": weights["head.bias"]},
    ):
        wrong = f"a.pth: weights of another network: {next(iter(content))}, "
        with pytest.raises(UserError, match=wrong):
            recorded(cifar10, {"model": content})


def test_T_of_a_file():
    steps_of = cifar10.build.steps_of
    for args in (argparse.Namespace(time_step=6), {"time_step": 6}, argparse.Namespace(T=6)):
        assert steps_of({"args": args}, "ms_qk_10-384_T4.pth.tar") == {"time_step": 6}
    text = {"args": argparse.Namespace(time_step="6")}
    assert steps_of(text, "ms_qk_10-384_T4.pth.tar") == {"time_step": 4}
    assert steps_of({}, "a/ms_qk_10-768_T1.pth.tar") == {"time_step": 1}
    assert steps_of({}, "weights.pth") == {}
    weights = cifar10.model.QKFormer(embed_dims=32, num_heads=2).state_dict()
    with pytest.raises(UserError, match="its time_step is 9999; it must be a whole number from 1"):
        recorded(cifar10, {"model": weights}, "a_T9999.pth")


def test_a_file_of_membrane_shortcuts_needs_no_flag(tmp_path):
    """In MaxFormer's layout: model, T and classes come from the file."""
    imagenet, path = load("imagenet"), tmp_path / "ms_qk_10-384_T4.pth.tar"
    torch.manual_seed(0)
    model = imagenet.ms.MSQKFormer_10_384(embed_dims=96, num_classes=7, T=3)
    for name, parameter in model.named_parameters():
        if "_bn" in name:  # with which about half of the neurons fire
            torch.nn.init.normal_(parameter, 0.5, 0.8)
    args = argparse.Namespace(time_step=3, model="ms_qkformer", lr=None)
    content = {"model": model.state_dict(), "optimizer": {}, "epoch": 199, "scaler": {}}
    torch.save({**content, "args": args}, path)
    ranks, images = imagenet.process.Ranks("cpu"), 3 * torch.rand(2, 3, 32, 32)
    parts = imagenet.options, imagenet.data, ranks, path
    tested = imagenet.build.load_tested(read(imagenet), *parts)
    with torch.no_grad():
        logits = tested.model.eval()(images)
        assert logits.std() > 0 and torch.equal(logits, model.eval()(images))
    assert (tested.cfg.model, tested.cfg.time_step) == ("MSQKFormer_10_384", 3)
    assert tested.settings["cross_sample_lif"] is False
    wrong = "cross_sample_lif is true, which has no meaning for MSQK"
    with pytest.raises(imagenet.config.UserError, match=wrong):
        imagenet.build.load_tested(read(imagenet, "--cross-sample-lif", "true"), *parts)


def test_from_python(trained_on_images, tmp_path):
    """Any working directory, several folders in one process: three lines that the README has."""
    code = f"""
import copy, pickle, torch
hub = lambda folder, name, *a, **k: torch.hub.load(r"{ROOT}/" + folder, name, *a, source="local", **k)
model, transform, classes = hub("cifar10", "load", r"{trained_on_images / "best.pth"}")
from PIL import Image
picture = Image.new("RGB", (40, 30), (200, 0, 90))
image = transform(picture).unsqueeze(0)
assert torch.equal(transform(picture.convert("RGBA"))[None], image)
grey = picture.convert("L")
assert torch.equal(transform(grey), transform(grey.convert("RGB")))
small = dict(embed_dims=32, num_heads=2)
others = [hub("imagenet", "MSQKFormer_10_384", **small), hub("cifar10-dvs", "QKFormer", **small)]
again, *_ = hub("cifar10", "load", r"{trained_on_images / "last.pth"}")
with torch.no_grad():
    logits = model(image)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(image), logits)
    print(classes, tuple(logits.shape), tuple(others[0](torch.rand(1, 3, 32, 48)).shape), type(others[1]).__mro__[0])
"""
    command = [sys.executable, "-c", code]
    env = {**os.environ, "CXX": "no-such-compiler"}  # layers run plain, without waiting for one
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0 and "['green things', 'red', 'über']" in done.stdout, done.stderr
    assert "(1, 3) (1, 1000)" in done.stdout and "UserWarning" not in done.stderr
