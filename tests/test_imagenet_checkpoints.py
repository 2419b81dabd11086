"""imagenet/: the release's checkpoints, fine-tuning and test.py."""

import json
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import Golden, log_of, same, script
from on_photos import UserError, build, imagenet, load_weights, photos, release_file, resolve

checkpoints, released = imagenet.checkpoint, imagenet.released


def golden_file(path, narrow, classes=2):
    """One of the release's, of a narrow network whose neurons fire."""
    model = Golden.fill(build(resolve(*narrow), True, classes)).float()
    return release_file(path, model), model.eval()


@torch.no_grad()
def probabilities(model, paths):
    """By hand, of all images in one batch."""
    transform = imagenet.data.input_transform(resolve("--input_size", 32))
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    return model(images).double().softmax(1)


def test_finetune(tmp_path, narrow, lines):
    """Without a learning rate the weights stay; a head of other classes is made new."""
    path, model = golden_file(tmp_path / "released.pth", narrow)
    args = [*narrow, "--finetune", path, "--epochs", 202, "--start_epoch", 201, "--lr", 1e-10]
    args += ["--min_lr", 0, "--batch_size", 64, "--fused", "no", "--output_dir", tmp_path]
    text = lines(imagenet.train.main, *args)
    assert "its head fits and is kept" in text and "cross_sample_lif: true" in text
    checkpoint = torch.load(tmp_path / "narrow" / "last.pth", weights_only=True)
    assert checkpoint["cross_sample_lif"] is True and checkpoint["epoch"] == 201
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(checkpoint["model"][name], parameter, rtol=0, atol=1e-7)
    assert [line["epoch"] for line in log_of(tmp_path / "narrow")] == [201]

    other, cross = load_weights(resolve(*narrow), path, 7, new_head=True)
    assert cross is True and other.head.weight.shape == (7, 64)
    assert torch.equal(other.stage3[1].attn.q_conv.weight, model.stage3[1].attn.q_conv.weight)
    with pytest.raises(UserError, match=r"head.weight \[2, 64\] instead of \[7, 64\]"):
        load_weights(resolve(*narrow), path, 7)
    with pytest.raises(UserError, match=r"patch_embed1.*instead of"):  # its head is not wrong
        load_weights(resolve(*narrow, "--dim", 32), path, new_head=True)

    # --eval measures the file that is named, without the need of a train/ folder
    plain = (*narrow, "--fused", "no")
    text = lines(imagenet.train.main, *plain, "--eval", "--finetune", path, "--resume", "auto")
    (measured,) = (line for line in text.splitlines() if "top-1" in line)
    tested = lines(imagenet.test.main, *plain, "--checkpoint", path)
    assert measured.rsplit(",", 1)[0] in tested
    assert "eval needs the path" in lines(imagenet.train.main, *narrow, "--eval")


def test_moments_of_a_released_optimizer(tmp_path, narrow):
    """Loaded from a file, they take the very next step that the optimizer takes which wrote them;
    the settings of the groups stay this run's.
    """
    torch.manual_seed(0)
    cfg, scaler = resolve(*narrow), torch.amp.GradScaler("cpu", enabled=False)
    model = build(cfg)
    optimizer = imagenet.optim.build_optimizer(cfg, model)

    def step(model, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        imagenet.optim.set_lr(optimizer, 1e-2)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        return torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    step(model, optimizer, 1)
    path = release_file(tmp_path / "released.pth", model, optimizer)
    checkpoint = checkpoints.load_checkpoint(path)
    other, _ = load_weights(cfg, path)
    loaded = imagenet.optim.build_optimizer(cfg, other)
    checkpoints.load_optimizer(loaded, scaler, checkpoint, path, "adamw")
    for one, two in zip(optimizer.state.values(), loaded.state.values(), strict=True):
        assert same(one, two) and one["step"] == 1 and one["exp_avg"].abs().max() > 0
    assert torch.equal(step(model, optimizer, 2), step(other, loaded, 2))

    decayed = imagenet.optim.build_optimizer(resolve(*narrow, "--layer_decay", 0.5), other)
    checkpoint["optimizer"]["param_groups"][0] |= {"lr_scale": 9, "weight_decay": 9}
    checkpoints.load_optimizer(decayed, scaler, checkpoint, path, "adamw")
    group = decayed.param_groups[0]
    assert (group["lr_scale"], group["weight_decay"]) == (0.5**3, 0.05)
    checkpoint["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(UserError, match="another shape"):
        checkpoints.load_optimizer(decayed, scaler, checkpoint, path, "adamw")


def test_released_run_is_resumed(tmp_path, narrow, lines):
    """--resume with one of the release's goes on with its next epoch, optimizer included."""
    path, _ = golden_file(tmp_path / "released.pth", narrow)
    args = (*narrow, "--epochs", 201, "--batch_size", 64, "--fused", "no")
    args += ("--start_epoch", 5, "--output_dir", tmp_path, "--resume")  # which is finetune's
    assert "at epoch 200, step 0" in lines(imagenet.train.main, *args, path)
    assert [line["epoch"] for line in log_of(tmp_path / "narrow")] == [200]
    wrong = tmp_path / "wrong.pth"
    for name, value in {"optimizer": None, "epoch": "199"}.items():
        torch.save({**torch.load(path, weights_only=False), name: value}, wrong)
        last = lines(imagenet.train.main, *args, wrong).splitlines()[-1]
        assert last.startswith(f"error: {wrong}: ") and name in last and "finetune" in last


def test_golden_weights_from_a_released_file(tmp_path):
    golden = Golden("imagenet-384")
    path = release_file(tmp_path / "golden.pth", golden.fill(imagenet.model.QKFormer_10_384()))
    cfg = resolve("--input_size", 64, "--time_step", golden.meta["T"])
    model, cross = load_weights(cfg, path, 1000)
    assert cross is True
    model = golden.fill(model)  # the file's, in float64 as the numbers
    with torch.no_grad():
        logits = model.eval()(golden.input()).numpy()
    want = golden.arrays["release/eval_logits"]
    scale = np.abs(want).max()
    assert np.abs(logits - want).max() <= 1e-9 * scale
    assert np.abs(logits - golden.arrays["per_sample/eval_logits"]).max() > 1e-3 * scale


def test_known_by_md5(tmp_path, narrow, monkeypatch, lines):
    """A file of the release is tested at its size, in its batch and with its semantics, and its
    published figure stands beside the measured one.
    """
    path, model = golden_file(tmp_path / "released.pth", narrow)
    md5 = subprocess.check_output(["md5sum", path], text=True).split()[0]
    known = released.Released("QKFormer_10_384", 32, 78.80, 24)
    monkeypatch.setitem(released.RELEASED, md5, known)
    data, batches = narrow[3], []
    test_batches = imagenet.data.test_batches
    monkeypatch.setattr(
        imagenet.data,
        "test_batches",
        lambda *args: batches.append(args[1]) or test_batches(*args),
    )
    args = [
        "--checkpoint",
        path,
        "--num_heads",
        2,
        "--data_path",
        data,
        "--num_workers",
        0,
        "--fused",
        "no",
    ]
    text = lines(imagenet.test.main, *args)  # neither flag nor yml says size or batch
    result = json.loads((tmp_path / "test-released.json").read_text())
    figures = f"measured {result['top1']:.2f} %, published 78.80 %"
    assert figures in text and "warning" not in text and batches == [24]
    assert "the release's QKFormer_10_384 at 32, 78.80 % in the paper" in text
    assert (result["input"], result["cross_sample_lif"]) == ([3, 32, 32], True)
    assert result["published_top1"] == 78.80
    paths = [sorted((data / "val" / name).iterdir()) for name in photos.CLASSES]
    want = torch.cat([probabilities(model, of) for of in paths])  # 24 of each
    right = want.argmax(1) == torch.arange(2).repeat_interleave(24)
    assert result["top1"] == 100 * right.double().mean().item()
    assert figures in lines(imagenet.train.main, "--eval", "--finetune", *args[1:])

    flags = ("--input_size=48", "--cross_sample_lif", "false")
    text = lines(imagenet.test.main, *args, *flags)
    assert "input_size is 48" in text.replace("img_size", "input_size")
    assert "warning: cross_sample_lif: false" in text and "measured" not in text
    results = [json.loads(file.read_text()) for file in tmp_path.glob("test-released*.json")]
    (result,) = (result for result in results if result["input"] == [3, 48, 48])
    assert result["cross_sample_lif"] is False and "published_top1" not in result


def test_released_files():
    assert {md5: tuple(entry) for md5, entry in released.RELEASED.items()} == {
        "60df416983ae326bb14bdb4566444320": ("QKFormer_10_384", 224, 78.80, 32),
        "85dd1f94c87ba5ec908fed5d0a3f7f69": ("QKFormer_10_512", 224, 82.04, 32),
        "dc1595408ed1bd40346be2bdaf5015d5": ("QKFormer_10_768", 224, 84.22, 24),
        "ba20af8eb450d4ec9c71009fde8e7125": ("QKFormer_10_768", 288, 85.25, None),
        "99a671118f67a680aa38b6ac5aae449a": ("QKFormer_10_768", 384, 85.65, None),
    }


@pytest.mark.long
def test_101_images_on_two_ranks(tmp_path, narrow):
    """Each image once and in its batch: one rank and two give the same figures, under both
    semantics.
    """
    data = photos.make(tmp_path / "data", train=0, val=51, size=48)
    next((data / "val" / photos.CLASSES[1]).iterdir()).unlink()
    path, _ = golden_file(tmp_path / "weights.pth", narrow)
    args = (*narrow[:2], "--data_path", data, "--checkpoint", path, "--val_batch_size", 8)
    results = {}
    for cross in ("false", "true"):
        for number in (1, 2):
            script("imagenet", "test", *args, "--cross_sample_lif", cross, ranks=number)
            files = sorted(tmp_path.glob("test-*.json"), key=lambda file: file.stat().st_mtime)
            result = json.loads(files[-1].read_text())
            results[cross, number] = [result[name] for name in ("loss", "top1", "top5")]
            right = result["top1"] * 101 / 100
            assert right == pytest.approx(round(right), abs=1e-9)
    assert results["false", 1] == results["false", 2] != results["true", 1] == results["true", 2]


def test_width_of_a_checkpoint(tmp_path, narrow, lines):
    best, _ = golden_file(tmp_path / "best.pth", narrow)
    said = lines(imagenet.test.main, *narrow, "--checkpoint", best, "--dim", 32)
    assert "best.pth is of dim 64" in said.splitlines()[-1]


def test_names_of_keys(tmp_path):
    """The release's, today's, and a yml that mixes them."""
    for names in ("nb_classes input_size num_workers", "num_classes img_size workers"):
        yml = tmp_path / f"{len(names)}.yml"
        values = dict(zip(names.split(), (7, 48, 3), strict=True))
        yml.write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
        flags = [word for name, value in values.items() for word in (f"--{name}", value)]
        for argv in (("-c", yml), flags):
            cfg = resolve(*argv)
            assert (cfg.num_classes, cfg.img_size, cfg.workers) == (7, 48, 3)
    cfg = resolve("-c", yml, "--input_size", 64)
    assert (cfg.num_classes, cfg.img_size) == (7, 64) and not hasattr(cfg, "input_size")
    assert resolve().num_classes is None  # as many as the data has
    with pytest.raises(UserError, match="img_size and input_size are one key"):
        resolve("--img_size", 48, "--input_size", 64)
