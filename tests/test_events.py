"""dvs128-gesture/ and cifar10-dvs/: models and recipes."""

import csv
import math

import pytest
import torch
import yaml

from conftest import ROOT, Golden, build_model, load
from on_events import FOLDERS, PARAMETERS, resolve, small_model
from on_golden import LONG, OURS, PLAIN, RELEASE, check_golden

# Model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "semantics", "fused", "losses"),
    [
        ("dvs128-gesture", *OURS),
        *(("cifar10-dvs", *case) for case in (OURS, RELEASE, PLAIN)),
        *(pytest.param(name, *c.values, marks=c.marks) for name in FOLDERS for c in LONG),
    ],
    indirect=["folder"],
)
def test_golden(folder, semantics, fused, losses):
    golden = Golden(folder.name)

    def build():
        return folder.model.QKFormer(
            T=golden.meta["T"], cross_sample_lif=semantics == "release", fused=fused
        )

    check_golden(golden, build, folder.neuron.MultiStepLIF, semantics, fused, losses)


def test_the_recipe_builds_the_published_model(folder):
    model = build_model(folder, resolve(folder))
    meta = Golden(folder.name).meta
    assert [[name, list(value.shape)] for name, value in model.state_dict().items()] == meta[
        "state_dict"
    ]
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[folder.name]
    assert model.T == 16
    cfg = resolve(
        folder, "--num-classes", 3, "--mlp-ratio", 2, "--dim", 64, "--attention", "channel", "token"
    )
    model = build_model(folder, cfg)
    assert model.head.weight.shape == (3, 64) and model.stage2[0].mlp.mlp1_conv.out_channels == 128
    assert type(model.stage1[0].tssa).__name__ == "ChannelQKAttention"
    assert type(model.stage2[0].tssa).__name__ == "TokenQKAttention"


@pytest.mark.parametrize("cross", [False, True])
def test_batch_independence(folder, cross):
    model = small_model(folder, cross_sample_lif=cross)
    events = torch.poisson(torch.full((4, 3, 2, 32, 48), 0.5, dtype=torch.float64))
    with torch.no_grad():
        together, alone = model(events), torch.cat([model(sample[None]) for sample in events])
    assert torch.allclose(together, alone, rtol=0, atol=1e-12) == (not cross)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_counts_of_any_type_and_any_T(folder, dtype):
    model = small_model(folder)
    for T in (1, 5):
        events = torch.randint(0, 4, (2, T, 2, 32, 16))
        assert torch.equal(model(events.to(dtype)), model(events.double()))
        assert model.forward_features(events.double().transpose(0, 1)).shape[:3] == (T, 2, 32)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"num_heads": 7}, ["num_heads is 7", "128"]),
        ({"embed_dims": 100}, ["100", "multiple of 16"]),
        ({"attention": ("token", "token", "ssa")}, ["attention", "2 stages"]),
        ({"attention": ("token", "sssa")}, ["sssa"]),
        ({"depths": 1}, ["1", "2 blocks"]),
        ({"T": 0}, ["T is 0"]),
    ],
)
def test_wrong_keywords(folder, keywords, words):
    with pytest.raises(ValueError) as error:
        folder.model.QKFormer(**keywords)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "shape", [(2, 2, 32, 32), (2, 4, 3, 32, 32), (2, 4, 2, 32, 40), (2, 0, 2, 32, 32)]
)
def test_wrong_input(folder, shape):
    with pytest.raises(ValueError) as error:
        small_model(folder)(torch.zeros(shape))
    assert str(list(shape)) in str(error.value)


# Recipe -------------------------------------------------------------------------------------------


def learning_rates(folder):
    optimizer, scheduler, num_epochs = folder.train.build_optimizer(
        resolve(folder), torch.nn.Linear(2, 2)
    )
    for epoch in range(num_epochs):
        scheduler.step(epoch)
        yield optimizer.param_groups[0]["lr"]


def test_learning_rates_of_the_published_run():
    with open(ROOT / "cifar10-dvs" / "curves" / "cifar10-dvs.csv") as file:
        published = [float(row["lr"]) for row in csv.DictReader(file)]
    assert len(published) == 106
    assert list(learning_rates(load("cifar10-dvs"))) == published


def test_learning_rates_of_gesture():
    rates = list(learning_rates(load("dvs128-gesture")))
    warm = [1e-5 + (1e-3 - 1e-5) * epoch / 10 for epoch in range(10)]
    cosine = [
        2e-5 + (1e-3 - 2e-5) * (1 + math.cos(math.pi * epoch / 192)) / 2 for epoch in range(10, 192)
    ]
    assert rates == pytest.approx(warm + cosine + [2e-5] * 10, rel=1e-9)


def test_the_recipes(folder):
    """Each yml says what the defaults are; the two folders' keys differ only where the
    recipes do.
    """
    cfg = vars(resolve(folder))
    values = yaml.safe_load((ROOT / folder.name / f"{folder.name}.yml").read_text())
    for name, key in folder.options.KEYS.items():
        if name in values and name != "num_classes":  # said again, for a person
            assert key.convert(values[name]) == key.default == cfg[name], name
    assert cfg["eval_amp"] is False and cfg["amp"] is True
    assert (cfg["time_step"], cfg["batch_size"], cfg["seed"], cfg["mixup_off_epoch"]) == (
        16,
        16,
        2021,
        75,
    )

    one, other = (load(name).options for name in FOLDERS)
    assert set(other.KEYS) - set(one.KEYS) == {"split_seed"} and set(one.KEYS) <= set(other.KEYS)
    defaults = [{name: key.default for name, key in table.KEYS.items()} for table in (one, other)]
    own = {name for name, value in defaults[0].items() if value != defaults[1][name]}
    assert own == {"dataset", "mlp_ratio", "epochs", "lr", "min_lr"}


def test_the_published_recipes(folder):
    text = """time_step 16, batch_size 16, workers 4, seed 2021, amp true, eval_amp false, dim 256,
    sync_bn false, num_heads 16, layer 2, attention token ssa, drop_path 0, cooldown_epochs 10,
    warmup_epochs 10, warmup_lr 1e-5, sched cosine, opt adamw, opt_eps 1e-8, opt_betas 0.9 0.999,
    weight_decay 0.06, momentum 0.9, smoothing 0.1, mixup 0.5, cutmix 0, cutmix_minmax none,
    mixup_prob 0.5, mixup_switch_prob 0.5, mixup_mode batch, mixup_off_epoch 75, T_train none"""
    pairs = (pair.split(maxsplit=1) for pair in text.split(","))
    published = {name: folder.options.KEYS[name].convert(value) for name, value in pairs}
    if folder.name == "dvs128-gesture":
        published |= {"epochs": 192, "lr": 1e-3, "min_lr": 2e-5, "mlp_ratio": 4}
    else:
        published |= {"epochs": 96, "lr": 5e-3, "min_lr": 1e-5, "mlp_ratio": 1, "split_seed": None}
    cfg = vars(resolve(folder))
    assert {name: cfg[name] for name in published} == published


def test_every_name_of_the_release_is_known(folder):
    names = """model dataset num-classes data-path device batch-size epochs workers print-freq output-dir resume
    start-epoch sync-bn test-only amp world-size dist-url tb T T_train connect_f opt opt-eps opt-betas weight-decay
    momentum sched lr lr-noise lr-noise-pct lr-noise-std lr-cycle-mul lr-cycle-limit warmup-lr min-lr epoch-repeats
    decay-epochs warmup-epochs cooldown-epochs patience-epochs decay-rate smoothing mixup cutmix cutmix-minmax
    mixup-prob mixup-switch-prob mixup-mode mixup-off-epoch seed""".split()
    keys = folder.options.KEYS
    known = {*keys, *folder.options.NO_EFFECT, *(a for key in keys.values() for a in key.aliases)}
    assert [name for name in names if name.replace("-", "_") not in known] == []
