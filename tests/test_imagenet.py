"""imagenet/: the model against the golden numbers, the recipe against the published curves."""

import csv
import gc
import sys
from itertools import chain
from pathlib import Path
from unittest import mock

import pytest
import timm
import torch

from conftest import ROOT, Golden, script
from on_golden import LONG, OURS, RELEASE, check_golden
from on_photos import CPU, imagenet, resolve

SIZES = {"384": 16_473_688, "512": 29_079_336, "768": 64_962_760}

# The model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "semantics", "fused", "losses"),
    [
        (384, *OURS),
        (384, *RELEASE),
        *(pytest.param(size, *case.values, marks=case.marks) for size in SIZES for case in LONG),
    ],
)
def test_golden(size, semantics, fused, losses):
    golden = Golden(f"imagenet-{size}")

    def build():
        return timm.create_model(
            f"QKFormer_10_{size}",
            T=golden.meta["T"],
            cross_sample_lif=semantics == "release",
            fused=fused,
        )

    check_golden(golden, build, imagenet.neuron.MultiStepLIF, semantics, fused, losses)


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
        assert all(
            next(block.named_children())[0] == ("attn" if kind == "ssa" else "tssa")
            for block in stage
        )
    model = Golden.fill(model).eval()
    images = torch.randn(3, 3, 32, 48).double()
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    assert torch.allclose(together, alone, rtol=0, atol=1e-12) == (not cross)


def test_static_image_is_convolved_and_pooled_once(monkeypatch):
    """The same frames as a view of one image and as T copies of it: same features, gradients,
    running statistics.
    """
    torch.manual_seed(2)
    image = torch.randn(3, 3, 32, 16).double()
    models = [Golden.fill(imagenet.model.QKFormer_10_384(events=False, **SMALL)) for _ in (1, 2)]
    calls, plan_of = [], imagenet.native.plan_of

    def counting(*args):
        *_, shape, _, _ = args
        calls.extend([shape[0] * shape[1]] * (shape[2] == 3))
        return plan_of(*args)

    monkeypatch.setattr(imagenet.native, "plan_of", counting)
    for model, frames in zip(
        models, (image.expand(4, *image.shape), image.repeat(4, 1, 1, 1, 1)), strict=True
    ):
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
    model.patch_embed3.register_forward_hook(
        lambda m, i, output: shapes.append(tuple(output.shape[3:]))
    )
    for size in ((16, 16), (48, 32), (224, 96)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 5)
    assert shapes == [(1, 1), (3, 2), (14, 6)]
    for shape in ((3, 32, 32), (1, 1, 32, 32), (1, 3, 32, 40)):
        with pytest.raises(ValueError, match="multiples of 16"):
            model(torch.zeros(shape))
    for keywords in (
        {"depths": 3},
        {"num_heads": 5},
        {"embed_dims": 100},
        {"attention": ("ssa",)},
        {"T": 0},
    ):
        with pytest.raises(ValueError, match=str(next(iter(keywords.values())))[:3].strip("(")):
            imagenet.model.QKFormer_10_384(**keywords)


# The recipe ---------------------------------------------------------------------------------------

IMAGES = 1_281_167


def curve(name):
    with open(ROOT / "imagenet" / "curves" / f"{name}.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("yml", "name", "peak"),
    [
        ("hst_10_768.yml", "hst_10_768", 1.35e-3),
        ("finetune_384.yml", "finetune_384", 1.2e-3),
    ],
)
def test_mean_learning_rates_of_the_published_runs(yml, name, peak):
    cfg = resolve("-c", yml)
    micro_steps = IMAGES // (cfg.batch_size * 8)
    assert micro_steps == {"hst_10_768.yml": 6672, "finetune_384.yml": 10009}[yml]
    assert imagenet.optim.peak_lr(cfg, 8) == pytest.approx(peak, rel=1e-15)
    assert imagenet.optim.differences(cfg, 8) is None
    rows = curve(name)
    assert (cfg.start_epoch or 0) == int(rows[0]["epoch"]) and cfg.epochs == int(
        rows[-1]["epoch"]
    ) + 1
    for row in rows:
        mean = imagenet.optim.mean_lr(
            cfg, imagenet.optim.peak_lr(cfg, 8), int(row["epoch"]), micro_steps
        )
        assert mean == pytest.approx(float(row["lr_mean"]), rel=1e-12, abs=0), row["epoch"]


@pytest.mark.parametrize(
    ("yml", "size"), [("imagenet.yml", 384), ("hst_10_512.yml", 512), ("hst_10_768.yml", 768)]
)
def test_last_learning_rates_of_the_published_runs(yml, size):
    """The release prints the last step's to six decimals."""
    cfg = resolve("-c", yml)
    micro_steps = IMAGES // (cfg.batch_size * 8)
    assert cfg.model == f"QKFormer_10_{size}" and imagenet.optim.differences(cfg, 8) is None
    for row in curve(f"hst_10_{size}"):
        peak = imagenet.optim.peak_lr(cfg, 8)
        lr = imagenet.optim.learning_rate(
            cfg, peak, int(row["epoch"]), micro_steps - 1, micro_steps
        )
        assert lr == pytest.approx(float(row["lr_last"]), abs=0.51e-6), row["epoch"]


def test_learning_rate_by_hand():
    cfg = resolve("--epochs", 11, "--warmup_epochs", 1, "--min_lr", 0.1, "--accum_iter", 2)
    want = {(0, 0): 0, (0, 1): 0, (0, 2): 0.5, (0, 3): 0.5, (1, 0): 1, (6, 1): 0.55, (11, 0): 0.1}
    for (epoch, step), lr in want.items():
        assert imagenet.optim.learning_rate(cfg, 1.0, epoch, step, 4) == pytest.approx(lr)
    cfg = resolve("--batch_size", 24, "--accum_iter", 3, "--blr", "1e-3")
    assert (
        imagenet.optim.images_per_step(cfg, 4) == 288
        and imagenet.optim.peak_lr(cfg, 4) == 1e-3 * 288 / 256
    )
    assert imagenet.optim.peak_lr(resolve("--lr", 0.3), 4) == 0.3
    note = imagenet.optim.differences(resolve(), 1)
    assert "64 images a step and lr 0.00015" in note and "512 images a step and lr 0.0012" in note


def test_parameter_groups():
    """Against a table made by hand: stage 3 of HST-5 has two blocks, so what is before it gets 0.5
    ** 3.
    """
    model = imagenet.model.QKFormer_10_384(**SMALL)
    cfg = resolve("--layer_decay", 0.5, "--weight_decay", 0.3)
    optimizer = imagenet.optim.build_optimizer(cfg, model)
    imagenet.optim.set_lr(optimizer, 8.0)
    have = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
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
    assert (
        all(group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8 for group in groups)
        and len(groups) == 4
    )


def test_fine_tuning_recipes():
    cfg = resolve("-c", "finetune_288.yml")
    assert (cfg.model, cfg.img_size) == ("QKFormer_10_768", 288)
    assert "ours" in (ROOT / "imagenet" / "finetune_288.yml").read_text()
    cfg = resolve("-c", "finetune_384.yml")
    assert (cfg.img_size, cfg.epochs, cfg.min_lr, cfg.accum_iter) == (384, 210, 5e-7, 4)


def test_release_flags():
    flags = "--batch_size 24 --accum_iter 3 --model QKFormer_10_768 --data_path /d --finetune a --resume b --eval"
    others = "--dist_eval --dist_url env:// --world_size 8 --log_dir x"
    settings = imagenet.config.read_settings(imagenet.options, f"{flags} {others}".split())
    cfg, notes = settings.resolve(), settings.notes
    assert (cfg.batch_size, cfg.accum_iter, cfg.model, cfg.eval) == (24, 3, "QKFormer_10_768", True)
    assert len(notes) == 4 and any("shared by the ranks" in note for note in notes)
    keys = imagenet.options.KEYS
    known = {*keys, *imagenet.options.NO_EFFECT, *chain(*(key.aliases for key in keys.values()))}
    assert known >= set(
        "batch_size epochs accum_iter finetune data_path model time_step input_size drop_path "
        "clip_grad weight_decay "
        "lr blr layer_decay min_lr warmup_epochs color_jitter aa smoothing reprob remode recount "
        "resplit mixup cutmix "
        "cutmix_minmax mixup_prob mixup_switch_prob mixup_mode nb_classes global_pool cls_token "
        "output_dir log_dir "
        "device seed resume start_epoch eval dist_eval num_workers pin_mem no_pin_mem world_size "
        "local_rank "
        "dist_on_itp dist_url".split()
    )


def frozen_trainer(narrow, tmp_path, *flags, before=lambda trainer: None):
    """A Trainer in float64 with BatchNorm in eval mode and no augmentation; its loss and itself
    after an epoch.
    """
    flags = [*narrow, "--warmup_epochs", 0, "--clip_grad", 0.5, *flags, "--output", tmp_path]
    settings = imagenet.config.read_settings(imagenet.options, [*map(str, flags)])
    torch.manual_seed(0)
    model = imagenet.model.QKFormer_10_384(T=2, **SMALL | {"num_classes": 2}).double()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.train = lambda mode=True, module=module: module
    with mock.patch.object(imagenet.run, "load_model", lambda *args, **how: (model, False)):
        trainer = imagenet.train.Trainer(settings, imagenet.data, imagenet.options)
    trainer.train_set.read = imagenet.images.read_image
    trainer.train_set.transform = imagenet.data.build_transform(trainer.cfg, train=False)
    model.register_forward_pre_hook(lambda _, inputs: inputs[0].double())
    trainer.train_set.samples = trainer.train_set.samples[:70:2]  # 35 images
    trainer.micro_steps = len(trainer.train_set) // trainer.micro_batch
    trainer.steps = len(trainer.train_set) // trainer.global_batch
    trainer.stop = False
    before(trainer)
    trainer.train_epoch()
    return trainer.meter.mean, trainer


def vector(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def test_accumulation_equals_one_step(narrow, tmp_path):
    """Up to BatchNorm's statistics, which are held here: same losses, same weights, leftover
    micro-steps dropped.
    """
    runs = {}
    for batch, accum in ((16, 1), (4, 4)):
        flags = ("--batch_size", batch, "--accum_iter", accum)
        runs[accum] = loss, trainer = frozen_trainer(narrow, tmp_path, *flags)
        assert trainer.meter.steps == 2 and trainer.micro_steps == 2 * accum
        assert all(state["step"] == 2 for state in trainer.optimizer.state.values())
    cfg = resolve(*narrow, "--batch_size", 4, "--accum_iter", 3)
    dropped = imagenet.data.train_loader(cfg, trainer.train_set, 0, 0, CPU, 0)
    assert len(dropped) == 6  # of 8 micro-steps
    still = frozen_trainer(narrow, tmp_path, "--lr", 1e-10, "--min_lr", 0)[1].model
    whole = vector(runs[1][1].model)
    assert (whole - vector(still)).abs().max() > 1e-3
    assert loss == pytest.approx(runs[1][0], rel=1e-7)  # the meter is in float32
    torch.testing.assert_close(vector(trainer.model), whole, rtol=1e-6, atol=1e-7)


@pytest.mark.long
def test_accumulation_on_two_ranks(narrow, tmp_path):
    """The same step, for which they meet once."""
    loss, trainer = frozen_trainer(narrow, tmp_path, "--batch_size", 16)
    code = "import sys; sys.path[:0] = sys.argv[1:3]; import test_imagenet as test; "
    (tmp_path / "two_ranks.py").write_text(f"{code}test.on_two_ranks()")
    paths = (ROOT / "tests", ROOT / "tools", tmp_path)
    done = script("imagenet", tmp_path / "two_ranks", *paths, *narrow, ranks=2)
    result = torch.load(tmp_path / "two_ranks.pth", weights_only=True)
    assert result["calls"] == ["gradients", "sum"] * 2, done.stdout
    assert result["loss"] == pytest.approx(loss, rel=1e-7)
    torch.testing.assert_close(result["weights"], vector(trainer.model), rtol=1e-6, atol=1e-7)


def on_two_ranks():
    """Run on both ranks of test_accumulation_on_two_ranks, where CPU is one of two."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    folder, *flags = sys.argv[3:]
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
        result = {"calls": calls, "loss": loss, "weights": vector(trainer.model)}
        torch.save(result, Path(folder) / "two_ranks.pth")
    # DDP before its group, whose threads the hook may otherwise keep waiting for Python's lock
    del trainer
    gc.collect()
    torch.distributed.destroy_process_group()
