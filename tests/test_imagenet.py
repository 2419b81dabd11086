"""imagenet/: the model against the golden numbers, the recipe against the published curves, and the scripts as a
user runs them on real photographs (photos.py)."""

import argparse
import contextlib
import copy
import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import photos
import pytest
import timm
import torch
import yaml
from conftest import DATA, ROOT, Golden, check_golden, load, one_line, script
from PIL import Image

imagenet = load("imagenet")
CPU = imagenet.runtime.Ranks("cpu")
UserError = imagenet.config.UserError
SIZES = {"384": 16_473_688, "512": 29_079_336, "768": 64_962_760}
NARROW = {  # HST-5-64 at 32 x 32
    "base": str(ROOT / "imagenet" / "imagenet.yml"),
    "nb_classes": 2,
    "input_size": 32,
    "layer": 5,
    "dim": 64,
    "num_heads": 2,
    "batch_size": 16,
    "accum_iter": 1,
    "epochs": 8,
    "warmup_epochs": 1,
    "lr": "5e-3",
    "aa": None,
    "reprob": 0,
    "num_workers": 0,
}


def resolve(*argv):
    options = imagenet.options
    return imagenet.config.load_config(options.KEYS, options.NO_EFFECT, options.DEFAULT_CONFIG, [*map(str, argv)])[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return photos.make(tmp_path_factory.mktemp("photos") / "data")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory, data):
    """Flags of a run with a narrow model on the photographs."""
    path = tmp_path_factory.mktemp("narrow") / "narrow.yml"
    path.write_text(yaml.safe_dump(NARROW))
    return "-c", path, "--data_path", data


@pytest.fixture
def lines(capsys):
    """What main() of a script printed, called here with the given flags; its UserError too."""

    def call(main, *argv):
        capsys.readouterr()
        try:
            assert main([*map(str, argv)]) == 0
        except UserError as error:
            print(f"error: {error}")
        return capsys.readouterr().out

    return call


def log_of(folder):
    """The run's log without what depends on the clock and the machine."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    clock = ("seconds", "images_per_second", "peak_memory_mb")
    return [{name: line[name] for name in line if name not in clock} for line in lines]


def weights_of(path):
    return torch.load(path, weights_only=True)["model"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# The model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("semantics", ["per_sample", "release"])
def test_golden(size, semantics):
    golden = Golden(f"imagenet-{size}")

    def build(fused):
        return timm.create_model(
            f"QKFormer_10_{size}", T=golden.meta["T"], cross_sample_lif=semantics == "release", fused=fused
        )

    check_golden(golden, build, imagenet.lif.MultiStepLIF, semantics)


@pytest.mark.parametrize(("size", "parameters"), SIZES.items())
def test_state_dict(size, parameters):
    model = getattr(imagenet.model, f"QKFormer_10_{size}")()
    have = [[name, list(value.shape)] for name, value in model.state_dict().items()]
    assert have == Golden(f"imagenet-{size}").meta["state_dict"]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


SMALL = {"embed_dims": 32, "num_heads": 2, "depths": 5, "num_classes": 5}


@pytest.mark.parametrize("attention", [("token", "token", "ssa"), ("ssa", "channel", "token")])
@pytest.mark.parametrize("cross", [False, True])
def test_batch_independence(attention, cross):
    torch.manual_seed(1)
    model = imagenet.model.QKFormer_10_384(**SMALL, attention=attention, cross_sample_lif=cross)
    for stage, kind in zip((model.stage1, model.stage2, model.stage3), attention, strict=True):
        assert all(next(block.named_children())[0] == ("attn" if kind == "ssa" else "tssa") for block in stage)
    model = Golden.fill(model).eval()
    images = torch.randn(5, 3, 32, 48).double()
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    assert torch.allclose(together, alone, rtol=0, atol=1e-12) == (not cross)


def test_static_image_is_convolved_and_pooled_once(monkeypatch):
    """The same frames as a view of one image and as T copies of it: same features, gradients, running statistics."""
    torch.manual_seed(2)
    image = torch.randn(3, 3, 32, 16).double()
    models = [Golden.fill(imagenet.model.QKFormer_10_384(**SMALL)) for _ in range(2)]
    calls, conv2d = [], torch.nn.functional.conv2d

    def counting(x, weight, *args):
        calls.extend([len(x)] * (x.shape[1] == 3))
        return conv2d(x, weight, *args)

    monkeypatch.setattr(torch.nn.functional, "conv2d", counting)
    for model, frames in zip(models, (image.expand(4, *image.shape), image.repeat(4, 1, 1, 1, 1)), strict=True):
        model.forward_features(frames).square().sum().backward()
    assert calls == [3, 12]
    for (name, one), many in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, many.grad, rtol=1e-9, atol=1e-9, msg=name)
    for (name, one), many in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(one, many, rtol=1e-12, atol=1e-12, msg=name)


def test_sizes_and_wrong_input():
    model = imagenet.model.QKFormer_10_384(**SMALL).eval()
    shapes = []
    model.patch_embed3.register_forward_hook(lambda m, i, output: shapes.append(tuple(output.shape[3:])))
    for size in ((16, 16), (48, 32), (224, 96)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 5)
    assert shapes == [(1, 1), (3, 2), (14, 6)]
    for shape in ((3, 32, 32), (1, 1, 32, 32), (1, 3, 32, 40)):
        with pytest.raises(ValueError, match="multiples of 16"):
            model(torch.zeros(shape))
    for keywords in ({"depths": 3}, {"num_heads": 5}, {"embed_dims": 100}, {"attention": ("ssa",)}, {"T": 0}):
        with pytest.raises(ValueError, match=str(next(iter(keywords.values())))[:3].strip("(")):
            imagenet.model.QKFormer_10_384(**keywords)


# The recipe -------------------------------------------------------------------------------------------------------

IMAGES = 1_281_167


def curve(name):
    with open(DATA / "curves" / f"{name}.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("yml", "name", "peak"),
    [
        ("hst_10_768.yml", "imagenet_hst_10_768_224_json", 1.35e-3),
        ("finetune_384.yml", "imagenet_hst_10_768_384_finetune", 1.2e-3),
    ],
)
def test_mean_learning_rates_of_the_published_runs(yml, name, peak):
    cfg = resolve("-c", yml)
    micro_steps = IMAGES // (cfg.batch_size * 8)
    assert micro_steps == {"hst_10_768.yml": 6672, "finetune_384.yml": 10009}[yml]
    assert imagenet.optim.peak_lr(cfg, 8) == pytest.approx(peak, rel=1e-15)
    assert imagenet.optim.differences(cfg, 8) is None
    rows = curve(name)
    assert cfg.start_epoch == int(rows[0]["epoch"]) and cfg.epochs == int(rows[-1]["epoch"]) + 1
    for row in rows:
        mean = imagenet.optim.mean_lr(cfg, imagenet.optim.peak_lr(cfg, 8), int(row["epoch"]), micro_steps)
        assert mean == pytest.approx(float(row["lr_mean"]), rel=1e-12, abs=0), row["epoch"]


@pytest.mark.parametrize(("yml", "size"), [("imagenet.yml", 384), ("hst_10_512.yml", 512), ("hst_10_768.yml", 768)])
def test_last_learning_rates_of_the_published_runs(yml, size):
    """The release prints the last step's to six decimals."""
    cfg = resolve("-c", yml)
    micro_steps = IMAGES // (cfg.batch_size * 8)
    assert cfg.model == f"QKFormer_10_{size}" and imagenet.optim.differences(cfg, 8) is None
    for row in curve(f"imagenet_hst_10_{size}_224"):
        peak = imagenet.optim.peak_lr(cfg, 8)
        lr = imagenet.optim.learning_rate(cfg, peak, int(row["epoch"]), micro_steps - 1, micro_steps)
        assert lr == pytest.approx(float(row["lr_last"]), abs=0.51e-6), row["epoch"]


def test_learning_rate_by_hand():
    cfg = resolve("--epochs", 11, "--warmup_epochs", 1, "--min_lr", 0.1, "--accum_iter", 2)
    want = {(0, 0): 0, (0, 1): 0, (0, 2): 0.5, (0, 3): 0.5, (1, 0): 1, (6, 1): 0.55, (11, 0): 0.1}
    for (epoch, step), lr in want.items():
        assert imagenet.optim.learning_rate(cfg, 1.0, epoch, step, 4) == pytest.approx(lr)
    cfg = resolve("--batch_size", 24, "--accum_iter", 3, "--blr", "1e-3")
    assert imagenet.optim.images_per_step(cfg, 4) == 288 and imagenet.optim.peak_lr(cfg, 4) == 1e-3 * 288 / 256
    assert imagenet.optim.peak_lr(resolve("--lr", 0.3), 4) == 0.3
    note = imagenet.optim.differences(resolve(), 1)
    assert "64 images a step and lr 0.00015" in note and "512 images a step and lr 0.0012" in note


def test_parameter_groups():
    """Against a table made by hand: stage 3 of HST-5 has two blocks, so what is before it gets 0.5 ** 3."""
    model = imagenet.model.QKFormer_10_384(**SMALL)
    cfg = resolve("--layer_decay", 0.5, "--weight_decay", 0.3)
    optimizer = imagenet.optim.build_optimizer(cfg, model)
    imagenet.optim.set_lr(optimizer, 8.0)
    have = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    table = {
        "patch_embed1.proj_conv.weight": (1.0, 0.3),
        "patch_embed1.proj_bn.weight": (1.0, 0.0),
        "patch_embed2.proj3_bn.bias": (1.0, 0.0),
        "patch_embed3.proj4_conv.weight": (1.0, 0.3),
        "stage1.0.tssa.q_conv.weight": (1.0, 0.3),
        "stage2.1.mlp.fc1_conv.bias": (1.0, 0.0),
        "stage3.0.attn.q_conv.weight": (8.0, 0.3),
        "stage3.0.attn.proj_conv.bias": (8.0, 0.0),
        "stage3.1.mlp.fc2_bn.weight": (8.0, 0.0),
        "head.weight": (8.0, 0.3),
        "head.bias": (8.0, 0.0),
    }
    parameters = dict(model.named_parameters())
    assert {name: have[id(parameters[name])] for name in table} == table
    assert len(have) == len(parameters)
    groups = optimizer.param_groups
    assert all(group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8 for group in groups) and len(groups) == 4


def test_fine_tuning_recipes():
    cfg = resolve("-c", "finetune_288.yml")
    assert (cfg.model, cfg.input_size) == ("QKFormer_10_768", 288)
    assert "ours" in (ROOT / "imagenet" / "finetune_288.yml").read_text()
    cfg = resolve("-c", "finetune_384.yml")
    assert (cfg.input_size, cfg.epochs, cfg.min_lr, cfg.accum_iter) == (384, 210, 5e-7, 4)


def test_release_flags():
    flags = "--batch_size 24 --accum_iter 3 --model QKFormer_10_768 --data_path /d --finetune a --resume b --eval"
    cfg, notes = imagenet.config.load_config(
        imagenet.options.KEYS,
        imagenet.options.NO_EFFECT,
        imagenet.options.DEFAULT_CONFIG,
        [*flags.split(), "--dist_eval", "--dist_url", "env://", "--world_size", "8", "--log_dir", "x"],
    )
    assert (cfg.batch_size, cfg.accum_iter, cfg.model, cfg.eval) == (24, 3, "QKFormer_10_768", True)
    assert len(notes) == 4 and any("each image counted once" in note for note in notes)
    known = {*imagenet.options.KEYS, *imagenet.options.NO_EFFECT}
    assert known >= set(
        "batch_size epochs accum_iter finetune data_path model time_step input_size drop_path clip_grad weight_decay "
        "lr blr layer_decay min_lr warmup_epochs color_jitter aa smoothing reprob remode recount resplit mixup cutmix "
        "cutmix_minmax mixup_prob mixup_switch_prob mixup_mode nb_classes global_pool cls_token output_dir log_dir "
        "device seed resume start_epoch eval dist_eval num_workers pin_mem no_pin_mem world_size local_rank "
        "dist_on_itp dist_url".split()
    )


def frozen_trainer(narrow, tmp_path, *flags, before=lambda trainer: None):
    """A Trainer in float64 with BatchNorm in eval mode and no augmentation; its loss and itself after an epoch."""
    cfg = resolve(*narrow, "--warmup_epochs", 0, "--clip_grad", 0.5, *flags)
    torch.manual_seed(0)
    model = imagenet.model.QKFormer_10_384(**SMALL | {"num_classes": 2}).double()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.train = lambda mode=True, module=module: module
    trainer = imagenet.train.Trainer(cfg, CPU, False, tmp_path, model, False)
    plain = imagenet.data.build_transform(cfg, train=False)
    trainer.train_set.transform = lambda image: plain(image).double()
    trainer.train_set.samples = trainer.train_set.samples[:70:2]  # 35 images
    trainer.micro_steps = len(trainer.train_set) // trainer.micro_batch
    trainer.steps = len(trainer.train_set) // trainer.images_per_step
    before(trainer)
    trainer.train_epoch()
    return trainer.meter.mean, trainer


def test_accumulation_equals_one_step(narrow, tmp_path):
    """Up to BatchNorm's statistics, which are held here: same losses, same weights, leftover micro-steps dropped."""
    runs = {}
    for batch, accum in ((16, 1), (8, 2), (4, 4)):
        runs[accum] = frozen_trainer(narrow, tmp_path, "--batch_size", batch, "--accum_iter", accum)
    assert all(trainer.meter.steps == 2 and trainer.micro_steps == 2 * accum for accum, (_, trainer) in runs.items())
    dropped = imagenet.data.train_loader(resolve(*narrow, "--batch_size", 4, "--accum_iter", 3), range(35), 0, 0, CPU)
    assert len(dropped) == 6  # of 8 micro-steps
    start = torch.nn.utils.parameters_to_vector(frozen_trainer(narrow, tmp_path, "--lr", 0)[1].model.parameters())
    whole = torch.nn.utils.parameters_to_vector(runs[1][1].model.parameters())
    assert (whole - start).abs().max() > 1e-3
    for accum in (2, 4):
        loss, trainer = runs[accum]
        assert loss == pytest.approx(runs[1][0], rel=1e-7)  # the meter is in float32
        for one, many in zip(runs[1][1].optimizer.state.values(), trainer.optimizer.state.values(), strict=True):
            assert one["step"] == many["step"] == 2
        parts = torch.nn.utils.parameters_to_vector(trainer.model.parameters())
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-7)

    # two ranks with two micro-steps each: the same again, and the ranks meet once a step
    two_ranks = "import sys; sys.path.insert(0, sys.argv[1]); import test_imagenet; test_imagenet.on_two_ranks()"
    (tmp_path / "two_ranks.py").write_text(two_ranks)
    done = script("imagenet", tmp_path / "two_ranks", ROOT / "tests", tmp_path, *narrow, ranks=2)
    result = torch.load(tmp_path / "two_ranks.pth", weights_only=True)
    assert result["calls"] == ["gradients", "sum"] * 2, done.stdout
    assert result["loss"] == pytest.approx(runs[1][0], rel=1e-7)
    torch.testing.assert_close(result["weights"], whole, rtol=1e-6, atol=1e-7)


def on_two_ranks():
    """Run on both ranks of test_accumulation_equals_one_step, where CPU is one of two."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    folder, *flags = sys.argv[2:]
    calls = []

    def hook(state, bucket):
        calls.extend(["gradients"] * bucket.is_last())
        return allreduce_hook(state, bucket)

    def before(trainer):
        trainer.ddp.register_comm_hook(None, hook)
        add = CPU.sum
        CPU.sum = lambda tensor: (calls.append("sum"), add(tensor))[1]

    flags = [*flags, "--batch_size", 4, "--accum_iter", 2]
    loss, trainer = frozen_trainer(flags, Path(folder), before=before)
    if CPU.main:
        weights = torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach()
        torch.save({"calls": calls, "loss": loss, "weights": weights}, Path(folder) / "two_ranks.pth")
    torch.distributed.destroy_process_group()


# Data -------------------------------------------------------------------------------------------------------------


def test_evaluation_transform(tmp_path):
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (300, 400, 3), dtype=np.uint8))
    mean, std = (np.array(value)[:, None, None] for value in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    for size, short in ((224, 256), (192, 219), (288, 288), (384, 384)):
        width = int(short * 400 / 300)
        resized = np.asarray(image.resize((width, short), Image.BICUBIC)).transpose(2, 0, 1) / 255
        top, left = round((short - size) / 2), round((width - size) / 2)
        want = (resized[:, top : top + size, left : left + size] - mean) / std
        have = imagenet.data.build_transform(resolve("--input_size", size), train=False)(image)
        np.testing.assert_allclose(have.numpy(), want, atol=1e-5)


def test_training_transform():
    steps = imagenet.data.build_transform(resolve(), train=True).transforms
    names = [type(step).__name__ for step in steps]
    assert names[:3] == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "RandAugment"]
    assert names[-2:] == ["Normalize", "RandomErasing"]
    assert (steps[0].scale, steps[0].ratio) == ((0.08, 1.0), (3 / 4, 4 / 3)) and "bicubic" in str(steps[0])
    assert (steps[-1].probability, steps[-1].mode) == (0.25, "pixel")


@pytest.mark.parametrize("bits", [0, 1, 4])
def test_posterize(bits):
    """Pillow of today raises for 0 bits, which timm's increasing severities come to at magnitude 10."""
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    step = timm.data.auto_augment.AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10 - 2.5 * bits)
    np.testing.assert_array_equal(np.asarray(step(image)), np.asarray(image) & (0xFF << (8 - bits) & 0xFF))


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def test_whole_and_damaged_images(tmp_path):
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (96, 80, 3), dtype=np.uint8))
    thumbnail = jpeg(image.resize((16, 16)))
    plain, read = jpeg(image), imagenet.data.read_image
    path = tmp_path / "image"
    whole = [
        plain,
        jpeg(image, progressive=True),
        jpeg(image, restart_marker_blocks=2),
        jpeg(image, exif=b"Exif\0\0" + thumbnail, comment=b"\xff\xd9\xff\xda"),
        jpeg(image.convert("CMYK")),
        plain + b"camera's tail \xff\xda" + thumbnail[:-2],  # what follows the end does not count
    ]
    for content in whole:
        path.write_bytes(content)
        np.testing.assert_array_equal(np.asarray(read(path)), np.asarray(Image.open(path).convert("RGB")))
    middle = len(plain) // 2
    damaged = {
        plain[:-2] + b"\0\0": "not a whole image",
        jpeg(image, exif=b"Exif\0\0" + thumbnail)[:-300]: "not a whole image",
        jpeg(image, exif=b"Exif\0\0" + thumbnail)[:-300] + bytes(300): "not a whole image",
        jpeg(image, progressive=True)[: middle // 2] + bytes(middle): "not a whole image",
        plain[:middle] + b"\xff\x05" + plain[middle + 2 :]: "not a whole image",
        b"<html>404</html>": "(unknown format)",
    }
    assert [*map(imagenet.data.jpeg_fault, damaged)].count("a JPEG with an illegal marker, FF 05") == 1
    file = io.BytesIO()
    image.save(file, "PNG")
    png = bytearray(file.getvalue())
    path.write_bytes(png)
    assert np.array_equal(np.asarray(read(path)), np.asarray(image))
    png[png.index(b"IEND") - 5] ^= 1  # the checksum of the pixels
    damaged[bytes(png)] = "not a whole image"
    for content, words in damaged.items():
        path.write_bytes(content)
        assert not content.startswith(plain[:2]) or imagenet.data.jpeg_fault(content)  # whatever the decoder takes
        with pytest.raises(imagenet.data.BadImage) as caught:
            read(path)
        assert words in str(caught.value) and str(path) in str(caught.value) and "BytesIO" not in str(caught.value)


def test_mixup_and_workers(narrow):
    cfg = resolve(*narrow, "--mixup", 0.8, "--cutmix", 1.0, "--aa", "rand-m9-mstd0.5-inc1", "--reprob", 0.5)
    train_set, classes = imagenet.data.build_dataset(cfg, train=True)
    assert classes == list(photos.CLASSES)
    runs = []
    for cfg.num_workers, first in ((0, 0), (2, 0), (1, 5)):
        runs.append(list(imagenet.data.train_loader(cfg, train_set, 1, first, CPU)))
    assert len(runs[0]) == 8 and runs[0][0][0].shape == (16, 3, 32, 32)
    for one, other in zip([*runs[0], *runs[0][5:]], [*runs[1], *runs[2]], strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    targets = torch.cat([targets for _, targets in runs[0]])
    assert torch.allclose(targets.sum(1), torch.ones(len(targets)))
    assert ((targets > 0.06) & (targets < 0.94)).any()


@pytest.mark.parametrize("cut", ["truncated", "few bytes", "zeros", "text", "empty", "gone"])
def test_bad_images(tmp_path, lines, cut, narrow):
    folder = photos.make(tmp_path / "data", train=8, val=4, size=64)
    bad = sorted((folder / "val" / photos.CLASSES[0]).iterdir())[1]
    content = bad.read_bytes()
    wrong = {
        "truncated": content[: len(content) // 2],
        "few bytes": content[:-40],
        "zeros": content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
        "text": b"<html>404</html>",
        "empty": b"",
        "gone": None,
    }[cut]
    bad.write_bytes(wrong) if wrong is not None else (bad.unlink(), bad.symlink_to("nowhere"))
    torch.manual_seed(0)
    checkpoint = tmp_path / "weights.pth"
    model = Golden.fill(imagenet.build.build_model(resolve(*narrow), False, CPU)).float()
    torch.save(model.state_dict(), checkpoint)
    args = (*narrow[:2], "--data_path", folder, "--checkpoint", checkpoint, "--val_batch_size", 3)
    text = lines(imagenet.test.main, *args, "--num_workers", 1)
    errors = [line for line in text.splitlines() if "error" in line]
    assert len(errors) == 1 and str(bad) in errors[0] and "on_bad_image: skip" in errors[0]

    # skipped: the others keep their batches, and the figure is that of the seven
    for cross in ("false", "true"):
        text = lines(imagenet.test.main, *args, "--on_bad_image", "skip", "--cross_sample_lif", cross)
        assert sum(str(bad) in line for line in text.splitlines()) == 1
        loss = json.loads((tmp_path / "test.json").read_text())["loss"]
        model = imagenet.build.build_model(resolve(*narrow), cross == "true", CPU)
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
        transform = imagenet.data.build_transform(resolve(*narrow), train=False)
        samples = [(p, c) for c, name in enumerate(photos.CLASSES) for p in sorted((folder / "val" / name).iterdir())]
        batches = [[sample for sample in samples[i : i + 3] if sample[0] != bad] for i in (0, 3, 6)]
        losses = []
        for batch in batches:
            images = torch.stack([transform(Image.open(path).convert("RGB")) for path, _ in batch])
            with torch.no_grad():
                logits = model.eval()(images).double()
            labels = torch.tensor([label for _, label in batch])
            losses += torch.nn.functional.cross_entropy(logits, labels, reduction="none").tolist()
        assert len(losses) == 7 and loss == pytest.approx(math.fsum(losses) / 7, rel=1e-6)


def test_bad_training_image_is_replaced(tmp_path, narrow):
    folder = photos.make(tmp_path / "data", train=4, val=1, size=64)
    bad = sorted((folder / "train" / photos.CLASSES[1]).iterdir())[-1]
    bad.write_bytes(bad.read_bytes()[:-300])
    args = (*narrow[:2], "--data_path", folder, "--batch_size", 8)
    with pytest.raises(UserError, match=bad.name):
        list(
            imagenet.data.train_loader(resolve(*args), imagenet.data.build_dataset(resolve(*args), True)[0], 0, 0, CPU)
        )
    cfg = resolve(*args, "--on_bad_image", "skip")
    dataset, _ = imagenet.data.build_dataset(cfg, True)
    dataset.transform = imagenet.data.build_transform(cfg, train=False)
    batches = [list(imagenet.data.train_loader(cfg, dataset, 0, 0, CPU)) for cfg.num_workers in (0, 1)]
    assert torch.equal(batches[0][0][0], batches[1][0][0])
    assert torch.equal(dataset[7][0], dataset[0][0]) and sorted(batches[0][0][1].tolist()) == [0] * 5 + [1] * 3
    for path in (folder / "train").rglob("*.JPEG"):
        path.write_bytes(b"no")
    with pytest.raises(UserError, match="none of the 8"):
        dataset[3]


def test_bad_layouts(tmp_path, lines, narrow):
    args = (*narrow[:2], "--output_dir", tmp_path / "out", "--data_path", tmp_path / "data")
    assert "data/train" in lines(imagenet.train.main, *args).splitlines()[-1]
    photos.make(tmp_path / "data", train=2, val=1, size=32)
    last = lines(imagenet.train.main, *args, "--nb_classes", 3).splitlines()[-1]
    assert "2 classes" in last and "nb_classes is 3" in last
    last = lines(imagenet.train.main, *args, "--cutmix_minmax", 0.5, 0.2).splitlines()[-1]
    assert last == "error: cutmix_minmax is [0.5, 0.2]; the first must be smaller than the second"
    last = lines(imagenet.train.main, *args, "--start_epoch", 3, "--resume", "auto").splitlines()[-1]
    assert last == "error: start_epoch is 3, but neither finetune nor resume names weights to go on from"
    last = lines(imagenet.train.main, *args, "--batch_size", 1, "--input_size", 16, "--time_step", 1).splitlines()[-1]
    (tmp_path / "out" / "narrow" / "log.txt.tmp").mkdir(parents=True)
    full = lines(imagenet.train.main, *args, "--batch_size", 4).splitlines()[-1]
    assert full.startswith(f"error: {tmp_path / 'out' / 'narrow'}: can't be written: ")
    assert "BatchNorm a single value" in last and last.startswith("error: batch_size 1 at input_size 16")
    last = lines(imagenet.train.main, *args).splitlines()[-1]
    assert last == "error: batch_size 16 x accum_iter 1 x 1 ranks is more than the 4 training images"
    (tmp_path / "data" / "val" / photos.CLASSES[0]).rename(tmp_path / "data" / "val" / "n9")
    assert "train/ and val/ are of different classes" in lines(imagenet.train.main, *args).splitlines()[-1]
    (tmp_path / "data" / "train" / "n3").mkdir()
    last = lines(imagenet.train.main, *args, "--nb_classes", 3).splitlines()[-1]
    assert last.startswith("error: ") and "n3" in last
    last = lines(imagenet.train.main, *args, "--input_size", 40).splitlines()[-1]
    assert "input_size is 40" in last
    assert "QKFormer_10_768" in lines(imagenet.train.main, *args, "--model", "resnet50").splitlines()[-1]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)


# Runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, narrow):
    output = tmp_path_factory.mktemp("output")
    done = script("imagenet", "train", *narrow, "--output_dir", output, "--experiment", "one")
    return output / "one", done.stdout


def test_trains_on_photographs(trained, narrow):
    folder, text = trained
    for words in ("16 images a step", "lr 0.005", "204,778 parameters", "cross_sample_lif: false", "torch backend"):
        assert words in text, words
    assert "images/s" in text and "left" in text
    log = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    best = max(log, key=lambda line: line["test_acc1"])
    assert len(log) == 8 and best["test_acc1"] >= 95
    fields = "train_lr train_loss test_loss test_acc1 test_acc5 epoch n_parameters seconds images_per_second"
    assert all(set(fields.split()) <= set(line) for line in log) and log[0]["n_parameters"] == 204_778
    script("imagenet", "test", *narrow, "--checkpoint", folder / "best.pth")
    result = json.loads((folder / "test.json").read_text())
    assert (result["top1"], result["loss"]) == (best["test_acc1"], best["test_loss"])


def test_curves_for_tensorboard(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    boards = [EventAccumulator(str(path)).Reload() for path in (trained[0], trained[0] / "steps")]
    log = log_of(trained[0])
    values = [event.value for event in boards[0].Scalars("perf/test_acc1")]
    assert values == pytest.approx([line["test_acc1"] for line in log])
    rates = boards[1].Scalars("lr")
    assert [event.step for event in rates] == list(range(64))
    assert max(event.value for event in rates) == pytest.approx(5e-3, rel=1e-6)
    losses = boards[1].Scalars("loss")
    assert [event.step for event in losses] == list(range(64))
    for line, first in zip(log, range(0, 64, 8), strict=True):
        mean = math.fsum(event.value for event in losses[first : first + 8]) / 8
        assert mean == pytest.approx(line["train_loss"], rel=1e-5)


def slurm(*args):
    """Two tasks as srun starts them; their outputs."""
    processes = []
    for rank in range(2):
        env = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_NUM_TASKS": 2, "SLURM_JOB_ID": os.getpid()}
        env = {name: str(value) for name, value in env.items()} | {"SLURM_STEP_NODELIST": "localhost"}
        processes.append(start(*args, env=env))
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs[0]


def start(*args, ranks=1, env=None):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, "train.py", *map(str, args)],
        cwd=ROOT / "imagenet",
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_at(process, words):
    """SIGKILL to a run and its ranks (in sessions of their own under torchrun) once a line starts with `words`."""
    for line in process.stdout:
        if line.startswith(words):
            break
    else:
        raise AssertionError("the run ended before it could be killed")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal.SIGKILL)
    for child in map(int, children):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    process.wait()


def test_slurm_variables():
    convert = imagenet.runtime.slurm_ranks
    env = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "123456"}
    hosts = {"node[03-06,9]": "node03", "a1,b2": "a1", "gpu-7": "gpu-7", "rack2-[1,4]": "rack2-1"}
    for nodes, first in hosts.items():
        have = convert({**env, "SLURM_STEP_NODELIST": nodes})
        assert (have["RANK"], have["WORLD_SIZE"], have["MASTER_ADDR"]) == ("5", "16", first)
    have = convert({**env, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "99"})
    assert (have["MASTER_ADDR"], have["MASTER_PORT"]) == ("10.0.0.1", "99")


def test_two_ranks_through_each_launcher(tmp_path, narrow):
    """Gradients accumulate without synchronisation in between; all launchers give the same run."""
    args = (*narrow, "--batch_size", 4, "--accum_iter", 2, "--epochs", 5, "--output_dir", tmp_path)
    for launcher in ("torchrun", "launch"):
        done = script("imagenet", "train", *args, "--experiment", launcher, ranks=2, launcher=launcher)
        assert "2 rank(s)" in done.stdout and "16 images a step" in done.stdout
    slurm(*args, "--experiment", "slurm")
    log = log_of(tmp_path / "torchrun")
    assert len(log) == 5 and log == log_of(tmp_path / "launch") == log_of(tmp_path / "slurm")
    assert max(line["test_acc1"] for line in log) >= 95


# randomness in every place, in the workers and in the main process
RANDOM = ["--aa", "rand-m9-mstd0.5-inc1", "--reprob", 0.5, "--mixup", 0.5, "--drop_path", 0.2, "--accum_iter", 2]
RANDOM += ["--batch_size", 8, "--epochs", 3, "--num_workers", 1, "--log_interval", 1]


def test_killed_and_resumed(tmp_path, narrow):
    """SIGKILL within an epoch: the same command goes on from save_minutes' last.pth, to the same weights and log."""
    args = (*narrow, *RANDOM, "--output_dir", tmp_path, "--resume", "auto", "--save_minutes", 1e-6)
    script("imagenet", "train", *args, "--experiment", "whole")
    process = start(*args, "--experiment", "killed")
    kill_at(process, "epoch 1, step 6/8")
    folder = tmp_path / "killed"
    checkpoint = torch.load(folder / "last.pth", weights_only=True)
    assert checkpoint["epoch"] == 0 and checkpoint["step"] in (5, 6)
    done = script("imagenet", "train", *args, "--experiment", "killed")
    assert f"at epoch 1, step {checkpoint['step']}" in done.stdout
    assert log_of(folder) == log_of(tmp_path / "whole")
    assert same(*(weights_of(tmp_path / name / "last.pth") for name in ("killed", "whole")))
    moments = [torch.load(tmp_path / name / "last.pth")["optimizer"]["state"] for name in ("killed", "whole")]
    assert all(torch.equal(one["exp_avg"], moments[1][index]["exp_avg"]) for index, one in moments[0].items())


def test_ranks_and_resumption_share_the_order_of_images(narrow):
    """Every step has the same images on 2 ranks and on 1, from the first and from any other on."""

    def steps(world_size, batch, accum, first):
        cfg, found = resolve(*narrow, "--batch_size", batch, "--accum_iter", accum), []
        for rank in range(world_size):
            ranks = argparse.Namespace(rank=rank, world_size=world_size, device=torch.device("cpu"))
            loader = imagenet.data.train_loader(cfg, range(70), 3, first, ranks).loader
            found.append([indices for indices, _ in loader.sampler])
        assert all(len(batches) % accum == 0 for batches in found)
        return [
            sorted(index for batches in found for indices in batches[start : start + accum] for index in indices)
            for start in range(0, len(found[0]), accum)
        ]

    whole = steps(2, 8, 1, 0)
    assert [len(step) for step in whole] == [16] * 4
    for world_size, batch, accum in ((1, 8, 2), (1, 16, 1), (2, 4, 2), (4, 2, 2)):
        assert steps(world_size, batch, accum, 0) == whole and steps(world_size, batch, accum, 3) == whole[3:]


def test_started_on_two_ranks_resumed_on_one(tmp_path, narrow):
    args = (*narrow, "--batch_size", 8, "--output_dir", tmp_path, "--resume", "auto", "--log_interval", 1)
    process = start(*args, "--epochs", 8, "--save_minutes", 1e-6, ranks=2)
    kill_at(process, "epoch 1, step 5/8")
    folder = tmp_path / "narrow"
    checkpoint = torch.load(folder / "last.pth", weights_only=True)
    assert checkpoint["step"] in (4, 5) and checkpoint["global_batch"] == 16
    copied = copy.deepcopy(checkpoint)
    done = script("imagenet", "train", *args, "--epochs", 8, "--accum_iter", 2)
    assert f"at epoch 1, step {checkpoint['step']}" in done.stdout and "warning" not in done.stdout
    log = log_of(folder)
    assert [line["epoch"] for line in log] == list(range(8)) and log[-1]["test_acc1"] >= 80
    torch.save(copied, folder / "last.pth")
    done = script("imagenet", "train", *args, "--epochs", 2)
    assert f"at epoch 1, step {2 * checkpoint['step']}" in done.stdout
    assert "warning: 8 images a step" in done.stdout and "had 16; accum_iter: 2 would keep that" in done.stdout
    assert [line["epoch"] for line in log_of(folder)] == [0, 1]


def test_signal_within_an_accumulation(tmp_path, narrow):
    args = (*narrow, *RANDOM, "--output_dir", tmp_path)
    process = start(*args)
    for line in process.stdout:
        if line.startswith("epoch 0, step 2/"):
            break
    process.send_signal(signal.SIGTERM)
    assert "resume: auto goes on from there" in process.stdout.read() and process.wait() == 128 + signal.SIGTERM
    checkpoint = torch.load(tmp_path / "narrow" / "last.pth")
    assert checkpoint["global_batch"] == 16 and {int(s["step"]) for s in checkpoint["optimizer"]["state"].values()} == {
        checkpoint["step"]
    }


def test_non_finite_loss(tmp_path, narrow):
    done = script(
        "imagenet", "train", *narrow, "--lr", "1e30", "--warmup_epochs", 0, "--output_dir", tmp_path, check=False
    )
    one_line(done, "the loss is", "epoch 0", "learning rate")


def test_one_step_of_hst_10_384(tmp_path, capsys):
    """A training step and an evaluation at 224 x 224 through train.py; prints time and peak memory."""
    data = photos.make(tmp_path / "data", train=1, val=1, size=256)
    args = ("--data_path", data, "--nb_classes", 2, "--batch_size", 2, "--accum_iter", 1, "--epochs", 1)
    done = script("imagenet", "train", *args, "--num_workers", 0, "--output_dir", tmp_path)
    assert "note: 2 images a step" in done.stdout
    (line,) = [json.loads(line) for line in (tmp_path / "imagenet" / "log.txt").read_text().splitlines()]
    assert line["train_loss"] > 0 and line["n_parameters"] == 16_473_688 - 998 * 385
    with capsys.disabled():
        print(
            f"\nHST-10-384 at 224, CPU: a step of 2 images at {line['images_per_second']:.2f} images/s; with an "
            f"evaluation of 2 images {line['seconds']:.1f} s; peak memory {line['peak_memory_mb']} MB"
        )


# Checkpoints ------------------------------------------------------------------------------------------------------


def release_file(path, model, optimizer=None):
    """A file with the keys of the release's checkpoints, its optimizer's groups as torch 1.12 writes them."""
    optimizer = (optimizer or imagenet.optim.build_optimizer(resolve(), model)).state_dict()
    kept = "lr betas eps weight_decay amsgrad foreach maximize capturable lr_scale params".split()
    groups = [{name: group[name] for name in kept} for group in optimizer["param_groups"]]
    args = argparse.Namespace(model="QKFormer_10_384", batch_size=32, device="cuda", lr=None, distributed=True)
    content = {
        "model": model.state_dict(),
        "optimizer": {"state": optimizer["state"], "param_groups": groups},
        "epoch": 199,
        "scaler": {},
        "args": args,
    }
    torch.save(content, path)
    return path


def test_released_checkpoint(tmp_path, data):
    """One of full size, with 1,000 classes: taken for the release's, and its head is kept where it fits."""
    torch.manual_seed(0)
    model = imagenet.model.QKFormer_10_384()
    path = release_file(tmp_path / "released.pth", model)
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"n{number:08d} word, other word\n" for number in range(1000)))
    some = tmp_path / "some" / "below"
    some.mkdir(parents=True)
    for number, photo in enumerate(sorted((data / "val").rglob("*.JPEG"))[:3]):
        (some / f"{number}.jpg").write_bytes(photo.read_bytes())
    args = ("--checkpoint", path, "--predict", some.parent, "--labels", labels, "--input_size", 32, "--num_workers", 0)
    args += ("--predictions", tmp_path / "predict.csv")
    done = script("imagenet", "test", *args)
    assert "warning" in done.stdout and "cross_sample_lif: true" in done.stdout
    with open(tmp_path / "predict.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"below/{number}.jpg" for number in range(3)]
    model.eval()
    for stage in (model.stage1, model.stage2, model.stage3):
        for block in stage:
            if hasattr(block, "attn"):
                block.attn.cross_sample_lif = True
    transform = imagenet.data.build_transform(resolve("--input_size", 32), train=False)
    with torch.no_grad():
        images = torch.stack([transform(Image.open(some / f"{number}.jpg")) for number in range(3)])
        probabilities = model(images).double().softmax(1)
    for row, want in zip(rows, probabilities, strict=True):
        assert [int(row[f"class{k}"]) for k in range(1, 6)] == want.topk(5).indices.tolist()
        assert float(row["probability1"]) == pytest.approx(want.max().item(), abs=1e-6)
        assert row["wnid2"] == f"n{int(row['class2']):08d}"


def test_finetune(tmp_path, narrow, lines):
    narrow_model = imagenet.build.build_model(resolve(*narrow), False, CPU)
    path = release_file(tmp_path / "released.pth", narrow_model)
    args = (*narrow, "--finetune", path, "--epochs", 203, "--start_epoch", 201, "--lr", 0, "--min_lr", 0)
    done = script("imagenet", "train", *args, "--output_dir", tmp_path)
    assert "its head fits and is kept" in done.stdout and "cross_sample_lif: true" in done.stdout
    checkpoint = torch.load(tmp_path / "narrow" / "last.pth", weights_only=True)
    assert checkpoint["cross_sample_lif"] is True and checkpoint["epoch"] == 202
    for name, parameter in narrow_model.named_parameters():
        assert torch.equal(checkpoint["model"][name], parameter), name
    assert [line["epoch"] for line in log_of(tmp_path / "narrow")] == [201, 202]

    loaded = imagenet.checkpoint.load_checkpoint(path)
    cfg = resolve(*narrow, "--nb_classes", 7)
    model, cross = imagenet.build.load_model(cfg, CPU, loaded, path, new_head=True)
    assert cross is True and model.head.weight.shape == (7, 64)
    assert torch.equal(model.stage3[1].attn.q_conv.weight, narrow_model.stage3[1].attn.q_conv.weight)
    with pytest.raises(UserError, match=r"head.weight \[2, 64\] instead of \[7, 64\]"):
        imagenet.build.load_model(cfg, CPU, loaded, path)
    with pytest.raises(UserError, match=r"patch_embed1.*instead of"):  # its head is of 2 classes, so not what is wrong
        imagenet.build.load_model(resolve(*narrow, "--dim", 32), CPU, loaded, path, new_head=True)

    # --eval measures the file that is named, without the need of a train/ folder
    text = lines(imagenet.train.main, *narrow, "--eval", "--finetune", path, "--resume", "auto")
    measured = next(line for line in text.splitlines() if "top-1" in line)
    tested = lines(imagenet.test.main, *narrow, "--checkpoint", path)
    assert measured.split(" images/s")[0].rsplit(",", 1)[0] in tested
    assert "eval needs the path" in lines(imagenet.train.main, *narrow, "--eval")


def test_moments_of_a_released_optimizer(tmp_path, narrow):
    """Loaded from a file, they take the very next step that the optimizer takes which wrote them."""
    torch.manual_seed(0)
    model = imagenet.build.build_model(resolve(*narrow), False, CPU)
    optimizer = imagenet.optim.build_optimizer(resolve(*narrow), model)

    def step(model, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        imagenet.optim.set_lr(optimizer, 1e-2)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        return torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    step(model, optimizer, 1)
    path = release_file(tmp_path / "released.pth", model, optimizer)
    checkpoint = imagenet.checkpoint.load_checkpoint(path)
    other, _ = imagenet.build.load_model(resolve(*narrow), CPU, checkpoint, path)
    loaded = imagenet.optim.build_optimizer(resolve(*narrow), other)
    imagenet.optim.load_optimizer(loaded, checkpoint["optimizer"])
    for one, two in zip(optimizer.state.values(), loaded.state.values(), strict=True):
        assert same(one, two) and one["step"] == 1 and one["exp_avg"].abs().max() > 0
    assert torch.equal(step(model, optimizer, 2), step(other, loaded, 2))


def test_released_optimizer_is_resumed(tmp_path, narrow, lines):
    """--resume with one of the release's goes on with its next epoch, optimizer included."""
    model = imagenet.build.build_model(resolve(*narrow), False, CPU)
    path = release_file(tmp_path / "released.pth", model)
    done = script("imagenet", "train", *narrow, "--resume", path, "--epochs", 201, "--output_dir", tmp_path)
    assert "at epoch 200, step 0" in done.stdout and [line["epoch"] for line in log_of(tmp_path / "narrow")] == [200]
    for name, value in {"optimizer": None, "epoch": "199", "step": 1.5, "best": [1]}.items():
        torch.save({**torch.load(path, weights_only=False), name: value}, tmp_path / "wrong.pth")
        flags = (*narrow, "--resume", tmp_path / "wrong.pth", "--output_dir", tmp_path)
        last = lines(imagenet.train.main, *flags).splitlines()[-1]
        assert last.startswith(f"error: {tmp_path / 'wrong.pth'}: ") and name in last and "finetune" in last
    optimizer = imagenet.optim.build_optimizer(resolve("--layer_decay", 0.5), model)
    state = optimizer.state_dict()
    state["param_groups"][0]["lr_scale"], state["param_groups"][0]["weight_decay"] = 9, 9
    imagenet.optim.load_optimizer(optimizer, state)
    assert (optimizer.param_groups[0]["lr_scale"], optimizer.param_groups[0]["weight_decay"]) == (0.5**3, 0.05)
    state["state"] = {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}}
    with pytest.raises(ValueError, match="other shapes"):
        imagenet.optim.load_optimizer(optimizer, state)


def test_golden_weights_from_a_released_file(tmp_path):
    golden = Golden("imagenet-384")
    path = release_file(tmp_path / "golden.pth", golden.fill(imagenet.model.QKFormer_10_384()))
    checkpoint = imagenet.checkpoint.load_checkpoint(path)
    cfg = resolve("--input_size", 64, "--time_step", golden.meta["T"])
    cross, line = imagenet.checkpoint.resolve_semantics("auto", checkpoint, path)
    assert cross is True and line.startswith("warning")
    model = imagenet.build.build_model(cfg, cross, CPU).double()
    imagenet.checkpoint.load_weights(model, checkpoint, path)
    with torch.no_grad():
        logits = model.eval()(golden.input()).numpy()
    want = golden.arrays["release/eval_logits"]
    assert np.abs(logits - want).max() <= 1e-9 * np.abs(want).max()
    assert np.abs(logits - golden.arrays["per_sample/eval_logits"]).max() > 1e-3 * np.abs(want).max()


def test_known_by_md5(tmp_path, narrow, monkeypatch, lines, data):
    """A released file sets model, input size and semantics, and its published figure stands beside the measured one."""
    build = imagenet.build
    path = release_file(tmp_path / "released.pth", imagenet.model.QKFormer_10_512())
    assert build.md5(path) == subprocess.check_output(["md5sum", path], text=True).split()[0]
    monkeypatch.setitem(build.RELEASED, build.md5(path), build.Released("QKFormer_10_512", 32, 82.04))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "photo.jpg").write_bytes(next((data / "val").rglob("*.JPEG")).read_bytes())
    flags = ("--checkpoint", path, "--predict", tmp_path / "one", "--predictions", tmp_path / "predict.csv")
    text = lines(imagenet.test.main, *flags, "--num_workers", 0)
    assert "the release's QKFormer_10_512 at 32, 82.04 % in the paper" in text and "warning" not in text
    assert len(list(csv.DictReader((tmp_path / "predict.csv").read_text().splitlines()))) == 1

    # the narrow yml's input size is not the default, so it stays
    path = release_file(tmp_path / "narrow.pth", build.build_model(resolve(*narrow), False, CPU))
    monkeypatch.setitem(build.RELEASED, build.md5(path), build.Released("QKFormer_10_512", 32, 78.80))
    text = lines(imagenet.test.main, *narrow, "--checkpoint", path)
    result = json.loads((tmp_path / "test.json").read_text())
    figures = f"measured {result['top1']:.2f} %, published 78.80 %"
    assert figures in text and "warning" not in text
    assert (result["input_size"], result["cross_sample_lif"], result["published_top1"]) == (32, True, 78.80)
    assert figures in lines(imagenet.train.main, *narrow, "--eval", "--finetune", path)
    text = lines(imagenet.test.main, *narrow, "--checkpoint", path, "--input_size=48", "--cross_sample_lif", "false")
    result = json.loads((tmp_path / "test.json").read_text())
    assert (result["input_size"], result["cross_sample_lif"]) == (48, False)
    assert "tested at 48, since input_size says so" in text and "warning: cross_sample_lif: false" in text
    assert "published_top1" not in result and "measured" not in text


def test_released_files():
    assert {md5: tuple(entry) for md5, entry in imagenet.build.RELEASED.items()} == {
        "60df416983ae326bb14bdb4566444320": ("QKFormer_10_384", 224, 78.80),
        "85dd1f94c87ba5ec908fed5d0a3f7f69": ("QKFormer_10_512", 224, 82.04),
        "dc1595408ed1bd40346be2bdaf5015d5": ("QKFormer_10_768", 224, 84.22),
        "ba20af8eb450d4ec9c71009fde8e7125": ("QKFormer_10_768", 288, 85.25),
        "99a671118f67a680aa38b6ac5aae449a": ("QKFormer_10_768", 384, 85.65),
    }


def test_101_images_on_two_ranks(tmp_path, narrow):
    """Each image once and in its batch: one rank and two give the same figures, under both semantics."""
    data = photos.make(tmp_path / "data", train=0, val=51, size=48)
    next((data / "val" / photos.CLASSES[1]).iterdir()).unlink()
    model = Golden.fill(imagenet.build.build_model(resolve(*narrow), False, CPU)).float()
    path = release_file(tmp_path / "weights.pth", model)
    args = (*narrow[:2], "--data_path", data, "--checkpoint", path, "--val_batch_size", 8, "--dist_eval")
    results = {}
    for cross in ("false", "true"):
        for number in (1, 2):
            script("imagenet", "test", *args, "--cross_sample_lif", cross, ranks=number)
            result = json.loads((tmp_path / "test.json").read_text())
            results[cross, number] = [result[name] for name in ("loss", "top1", "top5")]
            right = result["top1"] * 101 / 100
            assert right == pytest.approx(round(right), abs=1e-9)
    assert results["false", 1] == results["false", 2] and results["true", 1] == results["true", 2]
    assert results["false", 1] != results["true", 1]


def test_predictions_of_two_ranks(tmp_path, narrow, trained, data):
    args = (*narrow, "--checkpoint", tmp_path / "best.pth", "--predict", data / "val", "--val_batch_size", 5)
    (tmp_path / "best.pth").write_bytes((trained[0] / "best.pth").read_bytes())
    texts = []
    for number in (1, 2):
        script("imagenet", "test", *args, "--predictions", tmp_path / f"{number}.csv", ranks=number)
        texts.append((tmp_path / f"{number}.csv").read_text())
    assert texts[0] == texts[1]
    rows = list(csv.DictReader(texts[0].splitlines()))
    right = [row["class1"] == str(photos.CLASSES.index(Path(row["file"]).parts[0])) for row in rows]
    assert len(rows) == 48 and 100 * sum(right) / 48 == max(line["test_acc1"] for line in log_of(trained[0]))


def test_test_errors(tmp_path, narrow, lines, trained):
    def last(*args):
        return lines(imagenet.test.main, *narrow, *args).splitlines()[-1]

    assert "no best.pth" in last("--output_dir", tmp_path)
    best = trained[0] / "best.pth"
    assert "of another architecture" in last("--checkpoint", best, "--dim", 32)
    free = ("--predictions", tmp_path / "predict.csv")
    assert "not a folder" in last("--checkpoint", best, "--predict", tmp_path / "none", *free)
    assert "holds no images" in last("--checkpoint", best, "--predict", tmp_path, *free)
    gone = tmp_path / "gone" / "predict.csv"
    assert f"{gone} can't be written" in last("--checkpoint", best, "--predict", tmp_path, "--predictions", gone)
    free[1].write_text("of before")
    assert "is there already" in last("--checkpoint", best, "--predict", tmp_path, *free)
    assert free[1].read_text() == "of before"
    (tmp_path / "labels.txt").write_text("n1\n")
    assert "1 lines" in last("--checkpoint", best, "--predict", tmp_path, "--labels", tmp_path / "labels.txt")
