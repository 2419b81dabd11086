"""Keys and flags of cifar10/: precedence, types, the release's names, and one clear line for every
mistake.
"""

import argparse
import re

import pytest
import torch
import yaml

from conftest import ROOT, build_model, load

FOLDERS = ("cifar10", "cifar100", "dvs128-gesture", "cifar10-dvs", "imagenet")
cifar10 = load("cifar10")
UserError = cifar10.config.UserError

# Every name of the release's parser and yml.
RELEASE = """
epochs time_step layer dim num_heads patch_size mlp_ratio data_dir dataset num_classes img_size mean std crop_pct scale
ratio color_jitter interpolation train_interpolation aa mixup mixup_off_epoch mixup_prob mixup_mode mixup_switch_prob
cutmix reprob remode amp batch_size val_batch_size lr min_lr sched weight_decay cooldown_epochs warmup_epochs warmup_lr
opt smoothing workers depths model input_size train_split val_split pretrained initial_checkpoint resume no_resume_opt
gp opt_eps opt_betas momentum clip_grad clip_mode lr_noise lr_noise_pct lr_noise_std lr_cycle_mul lr_cycle_limit
epoch_repeats start_epoch decay_epochs patience_epochs decay_rate no_aug hflip vflip aug_splits jsd recount resplit
cutmix_minmax drop drop_connect drop_path drop_block bn_tf bn_momentum bn_eps sync_bn dist_bn split_bn model_ema
model_ema_force_cpu model_ema_decay seed log_interval recovery_interval checkpoint_hist save_images apex_amp native_amp
channels_last pin_mem no_prefetcher output experiment eval_metric tta local_rank use_multi_epochs_loader torchscript
log_wandb
""".split()

# The published recipe.
PUBLISHED = """
epochs: 400
time_step: 4
layer: 4
dim: 384
num_heads: 8
patch_size: 4
mlp_ratio: 4
dataset: torch/cifar10
num_classes: 10
img_size: 32
mean: [0.4914, 0.4822, 0.4465]
std: [0.2470, 0.2435, 0.2616]
crop_pct: 1.0
scale: [1.0, 1.0]
ratio: [1.0, 1.0]
color_jitter: 0.0
interpolation: bicubic
train_interpolation: bicubic
aa: rand-m9-n1-mstd0.4-inc1
mixup: 0.5
mixup_prob: 1.0
mixup_mode: batch
mixup_switch_prob: 0.5
cutmix: 0.0
reprob: 0.25
remode: const
amp: true
batch_size: 64
val_batch_size: 64
lr: 1e-3
min_lr: 1e-5
sched: cosine
weight_decay: 6e-2
cooldown_epochs: 10
warmup_epochs: 20
warmup_lr: 1e-5
opt: adamw
smoothing: 0.1
workers: 8
"""


def resolve(*argv):
    options = cifar10.options
    return cifar10.config.load_config(
        options.KEYS, options.NO_EFFECT, options.DEFAULT_CONFIG, [*map(str, argv)]
    )[:2]


def test_published_recipe():
    cfg, notes = resolve()
    defaults = {name: key.default for name, key in cifar10.options.KEYS.items()}
    assert vars(cfg) == {**defaults, "experiment": "cifar10"} and not notes
    for name, value in yaml.safe_load(PUBLISHED).items():
        assert getattr(cfg, name) == cifar10.options.KEYS[name].convert(value), name
    assert (cfg.seed, cfg.mixup_off_epoch, cfg.drop_path, cfg.hflip) == (42, 0, 0.0, 0.5)
    assert (cfg.lr, cfg.weight_decay) == (1e-3, 0.06) and cfg.cross_sample_lif == "auto"


def test_the_release_s_yml(tmp_path):
    file = tmp_path / "release.yml"
    file.write_text(PUBLISHED + "data_dir: /somewhere\nmixup_off_epoch: 200\ndepths: 4\n")
    cfg, notes = resolve("-c", file)
    assert (
        cfg.mixup_off_epoch == 200 and cfg.data_dir == "/somewhere" and cfg.experiment == "release"
    )
    assert len(notes) == 1 and "depths" in notes[0] and "release.yml" in notes[0]


@pytest.mark.parametrize("name", RELEASE)
def test_every_name_of_the_release(name, tmp_path):
    keys, no_effect = cifar10.options.KEYS, cifar10.options.NO_EFFECT
    keys = keys | {alias: key for key in keys.values() for alias in key.aliases}
    assert (name in keys) != (name in no_effect)
    value = "1" if name in no_effect else keys[name].default
    if value is None:
        return
    flag = [str(item) for item in value] if isinstance(value, list) else [str(value)]
    for spelling in {f"--{name}", f"--{name.replace('_', '-')}"}:
        cfg, notes = resolve(spelling, *flag)
        assert len(notes) == (name in no_effect)
        assert name in no_effect or getattr(cfg, name) == value
    (tmp_path / "one.yml").write_text(yaml.safe_dump({name: value}))
    assert len(resolve("-c", tmp_path / "one.yml")[1]) == (name in no_effect)


def test_every_key_is_used():
    """No key that nothing reads: each stands as cfg.NAME in a script, or is one that timm's helpers
    read.
    """
    code = "".join(
        (ROOT / "cifar10" / f"{name}.py").read_text()
        for name in ("train", "build", "data", "engine", "graph")
    )
    code += "".join((ROOT / "cifar10" / f"{name}.py").read_text() for name in ("test", "runs"))
    from timm.optim import optimizer_kwargs
    from timm.scheduler.scheduler_factory import scheduler_kwargs

    read = set()

    class Spy(argparse.Namespace):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    cfg = Spy(**vars(resolve()[0]))
    optimizer_kwargs(cfg)
    scheduler_kwargs(cfg)
    unused = {
        name for name in cifar10.options.KEYS if not re.search(rf"cfg\.{name}\b", code)
    } - read
    assert unused == {"local_rank"}  # the launcher's, which is told by the environment


def test_precedence_and_short_forms(tmp_path):
    file = tmp_path / "mine.yml"
    file.write_text("batch-size: 32\nlr: 5e-4\ntime_step: '6'\n")
    cfg, _ = resolve("-c", file, "-b", 16)
    assert (cfg.batch_size, cfg.lr, cfg.time_step, cfg.dim) == (16, 5e-4, 6, 384)
    cfg, _ = resolve(
        *"-b 2 -vb 3 -T 5 -L 6 -j 7 -d digits -data-dir x --amp false --channels-last".split()
    )
    assert (cfg.batch_size, cfg.val_batch_size, cfg.time_step, cfg.layer, cfg.workers) == (
        2,
        3,
        5,
        6,
        7,
    )
    assert (cfg.dataset, cfg.data_dir, cfg.amp, cfg.channels_last) == ("digits", "x", False, True)
    cfg, _ = resolve("--input-size", "none", "--mean", "0.5,0.4,0.3")
    assert cfg.input_size is None and cfg.mean == [0.5, 0.4, 0.3]
    cfg, _ = resolve(
        "--aa",
        "none",
        "--opt-betas",
        "0.8",
        "0.9",
        "--lr-noise",
        "0.4",
        "--cross-sample-lif",
        "true",
    )
    assert (cfg.aa, cfg.opt_betas, cfg.lr_noise, cfg.cross_sample_lif) == (
        None,
        [0.8, 0.9],
        [0.4],
        "true",
    )


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("script", ["train", "test"])
def test_help(folder, script, monkeypatch, capsys):
    """Groups in the table's order; each key of this script once, in one spelling, with its kind."""
    options, config = load(folder).options, load(folder).config
    monkeypatch.setattr("sys.argv", [f"/some/where/{script}.py"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        config.load_config(options.KEYS, options.NO_EFFECT, options.DEFAULT_CONFIG, ["--help"])
    text = capsys.readouterr().out
    shown = [name for name, key in options.KEYS.items() if script in key.scripts]
    assert end.value.code == 0 and max(map(len, text.splitlines())) <= 100 and text.isascii()
    assert re.findall(r"^(\w+):$", text, re.MULTILINE)[1:] == list(
        dict.fromkeys(options.KEYS[name].group for name in shown)
    )
    flags = re.findall(r"^  (?:-\w+, )*--([\w-]+)(?: (.+?))?(?:  .*)?$", text, re.MULTILINE)
    assert [name.replace("-", "_") for name, _ in flags] == ["help", "config", *shown]
    for (_, kind), name in zip(flags[2:], shown, strict=True):
        key = options.KEYS[name]
        if key.choices and not isinstance(key.kind, list):
            assert kind == "{" + ",".join(filter(None, key.choices)) + "}"
        assert kind.startswith("{") or set(kind.split()) <= {"N", "X", "WORD", "PATH", "..."}
        assert " ".join(key.help.split()) in " ".join(text.split())
    assert "likewise" not in text and "VALUE ..." in text and text.count("VALUE") == 1
    assert script == "train" or {"lr", "epochs", "aa", "resume"}.isdisjoint(shown)


def test_test_py_uses_what_its_help_shows(tmp_path, monkeypatch):
    small = "-c quickstart.yml --dim 16 --num-heads 2 --time-step 1 --device cpu".split()
    model = build_model(cifar10, resolve(*small)[0])
    torch.save({"model": model.state_dict()}, tmp_path / "best.pth")
    read = set()

    class Spy(argparse.Namespace):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    def load_config(*args):
        cfg, *rest = cifar10.config.load_config(*args)
        return Spy(**vars(cfg)), *rest

    monkeypatch.setattr(cifar10.test, "load_config", load_config)
    assert cifar10.test.main([*small, "--checkpoint", str(tmp_path / "best.pth")]) == 0
    used = read & cifar10.options.KEYS.keys()
    shown = {name for name, key in cifar10.options.KEYS.items() if "test" in key.scripts}
    assert shown - used == {"data_dir"}  # the digits come without a folder
    # What the functions that build model and transforms are handed, and use in training.
    train = {"drop_path", "checkpoint_stages", "surrogate_alpha", "byte_spikes"}
    assert used - shown <= {*train, *cifar10.options.AUGMENTATION}


def test_cross_sample_lif_as_a_truth_value(tmp_path):
    (tmp_path / "a.yml").write_text("cross_sample_lif: false\n")
    assert resolve("-c", tmp_path / "a.yml")[0].cross_sample_lif == "false"


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("-c", "quickstart.yml")[0].dataset == "digits"  # beside the script
    (tmp_path / "quickstart.yml").write_text("dim: 64\n")
    assert (
        resolve("-c", "quickstart.yml")[0].dataset == "torch/cifar10"
    )  # where you are comes first


def test_base(tmp_path):
    (tmp_path / "a.yml").write_text("dim: 64\nlr: 2e-3\n")
    (tmp_path / "b.yml").write_text("base: a.yml\nlr: 3e-3\n")
    cfg, _ = resolve("-c", tmp_path / "b.yml")
    assert (cfg.dim, cfg.lr, cfg.experiment) == (64, 3e-3, "b")
    (tmp_path / "a.yml").write_text("base: b.yml\n")
    with pytest.raises(UserError, match="base"):
        resolve("-c", tmp_path / "b.yml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batchsize: 3", ["mine.yml", "batchsize", "batch_size"]),
        ("epochs: many", ["mine.yml", "epochs", "'many'", "whole number"]),
        ("epochs: 1.5", ["epochs", "1.5"]),
        ("epochs: true", ["epochs", "whole number"]),
        ("lr: [1, 2]", ["lr", "a number"]),
        ("lr: .nan", ["lr", "a number"]),
        ("amp: 3", ["amp", "true or false"]),
        ("batch_size: 0", ["batch_size is 0", "from 1 to 65536"]),
        ("mean: [0.5, 0.5]", ["mean", "3 numbers", "colour channel"]),
        ("sched: cosin", ["sched", "cosine"]),
        ("cross_sample_lif: maybe", ["cross_sample_lif", "auto, true, false"]),
        ("dim: null", ["dim"]),
        ("- a list", ["mine.yml", "key: value"]),
        ("a: [1", ["mine.yml", "not a yml"]),
        ("base: none.yml", ["mine.yml", "base", "none.yml"]),
    ],
)
def test_wrong_yml(tmp_path, text, words):
    (tmp_path / "mine.yml").write_text(text + "\n")
    with pytest.raises(UserError) as error:
        resolve("-c", tmp_path / "mine.yml")
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), str(
        error.value
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--learning-rate", "1"], ["--learning-rate", "is lr meant"]),
        (["--batchsize=3"], ["--batchsize", "batch_size"]),
        (["3"], ["no flag stands before 3"]),
        (["--mean", "0.5"], ["mean is [0.5]", "one per colour channel"]),
        (["--aa", "m9"], ["aa is 'm9'", "a policy of timm's, as in rand-m9-n1-mstd0.4-inc1"]),
        (["--epochs", "x"], ["command line", "epochs", "'x'"]),
        (["--epochs"], ["epochs", "argument"]),
        (["-c", "none.yml"], ["none.yml", "quickstart.yml"]),
    ],
)
def test_wrong_flags(flags, words):
    with pytest.raises(UserError) as error:
        resolve(*flags)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("spikingjelly", "0.0.0.0.14"),
        ("torch", "1.12.1+cu113"),
        ("timm", "0.6.12"),
        ("timm", "1.0.9"),
    ],
)
def test_old_libraries_are_named(name, version, monkeypatch):
    have = cifar10.config.importlib.metadata.version
    monkeypatch.setattr(
        cifar10.config.importlib.metadata, "version", lambda n: version if n == name else have(n)
    )
    with pytest.raises(
        cifar10.config.UserError,
        match=rf"{name} {re.escape(version)} is too old, .* requirements.txt",
    ):
        resolve()
    monkeypatch.undo()
    resolve()


@pytest.mark.parametrize(
    ("folder", "script", "flag", "read"),
    [
        ("cifar10", "train", "checkpoint", "--finetune"),
        ("imagenet", "train", "predict", "--finetune"),
        ("cifar100", "test", "finetune", "--checkpoint"),
        ("cifar10-dvs", "test", "resume", "--checkpoint"),
        ("dvs128-gesture", "train", "checkpoint", "--resume"),
    ],
)
def test_a_file_that_the_script_does_not_read(folder, script, flag, read, monkeypatch):
    """Else a run would begin without the weights that its user named."""
    options, config = load(folder).options, load(folder).config

    def resolved(*argv):
        table = options.KEYS, options.NO_EFFECT, options.DEFAULT_CONFIG
        return vars(config.load_config(*table, list(argv))[0])

    monkeypatch.setattr("sys.argv", [f"{script}.py"])
    with pytest.raises(config.UserError, match=f"--{flag} is not read here; {script}.py .*{read}"):
        resolved(f"--{flag}", "x.pth")
    if folder == "dvs128-gesture":  # where train.py can test, too
        assert resolved(f"--{flag}", "x.pth", "--test_only")[flag] == "x.pth"
    monkeypatch.setattr("sys.argv", [{"train": "test.py", "test": "train.py"}[script]])
    assert resolved(f"--{flag}", "x.pth")[flag] == "x.pth"
