"""Keys and flags: what goes over what, the release's names, --help, and flags of the other script."""

import re

import pytest
import yaml
from timm.optim import optimizer_kwargs
from timm.scheduler.scheduler_factory import scheduler_kwargs

from conftest import ROOT, load
from on_digits import call, cifar10, resolve

FOLDERS = ("cifar10", "cifar100", "dvs128-gesture", "cifar10-dvs", "imagenet")
KEYS, NO_EFFECT = cifar10.options.KEYS, cifar10.options.NO_EFFECT
UserError = cifar10.config.UserError

# Every name of the release's parser and yml.
RELEASE = """
epochs time_step layer dim num_heads patch_size mlp_ratio data_dir dataset num_classes img_size mean std crop_pct scale
ratio color_jitter interpolation train_interpolation aa mixup mixup_off_epoch mixup_prob mixup_mode mixup_switch_prob
cutmix reprob remode amp batch_size val_batch_size lr min_lr sched weight_decay cooldown_epochs warmup_epochs warmup_lr
opt smoothing workers depths model input_size train_split pretrained initial_checkpoint resume no_resume_opt
gp opt_eps opt_betas momentum clip_grad clip_mode lr_noise lr_noise_pct lr_noise_std lr_cycle_mul lr_cycle_limit
epoch_repeats start_epoch decay_epochs patience_epochs decay_rate no_aug hflip vflip aug_splits jsd recount resplit
cutmix_minmax drop drop_connect drop_path drop_block bn_tf bn_momentum bn_eps sync_bn dist_bn split_bn model_ema
model_ema_force_cpu model_ema_decay seed log_interval recovery_interval checkpoint_hist save_images apex_amp native_amp
channels_last pin_mem no_prefetcher output experiment eval_metric tta local_rank use_multi_epochs_loader torchscript
log_wandb
""".split()

# The published recipe, by the release's yml.
PUBLISHED = """{
epochs: 400, time_step: 4, layer: 4, dim: 384, num_heads: 8, patch_size: 4, mlp_ratio: 4, dataset:
torch/cifar10, img_size: 32, mean: [0.4914, 0.4822, 0.4465], std: [0.2470, 0.2435, 0.2616],
crop_pct: 1.0, scale: [1.0, 1.0], ratio: [1.0, 1.0], color_jitter: 0.0, interpolation: bicubic,
train_interpolation: bicubic, aa: rand-m9-n1-mstd0.4-inc1, mixup: 0.5, mixup_prob: 1.0,
mixup_mode: batch, mixup_switch_prob: 0.5, cutmix: 0.0, reprob: 0.25, remode: const, amp: true,
batch_size: 64, val_batch_size: 64, lr: 1e-3, min_lr: 1e-5, sched: cosine, weight_decay: 6e-2,
cooldown_epochs: 10, warmup_epochs: 20, warmup_lr: 1e-5, opt: adamw, smoothing: 0.1, workers: 8
}"""


def read(*argv, folder=cifar10, script=None):
    return folder.config.read_settings(folder.options, [*map(str, argv)], script)


def test_published_recipe(tmp_path):
    assert vars(resolve()) == {name: key.default for name, key in KEYS.items()}
    assert not read().notes
    for name, value in yaml.safe_load(PUBLISHED).items():
        assert getattr(resolve(), name) == KEYS[name].convert(value), name
    cfg = resolve()
    assert (cfg.seed, cfg.mixup_off_epoch, cfg.drop_path, cfg.hflip) == (42, 0, 0.0, 0.5)
    assert (cfg.lr, cfg.weight_decay, cfg.cross_sample_lif) == (1e-3, 0.06, "auto")
    # the release's own file
    more = "data_dir: /somewhere, mixup_off_epoch: 200, depths: 4, num_classes: 10,"
    (tmp_path / "release.yml").write_text(PUBLISHED.replace("{", "{" + more))
    settings = read("-c", tmp_path / "release.yml")
    assert (settings.mixup_off_epoch, settings.data_path) == (200, "/somewhere")
    assert (settings.num_classes, settings.name) == (10, "release")
    assert len(settings.notes) == 1 and re.match(r"release.yml, line 1: depths", settings.notes[0])


def test_every_name_of_the_release(tmp_path):
    """As a key and, in both spellings, as a flag: it means what it says, or a line says why not."""
    names = {spelled: name for name, key in KEYS.items() for spelled in (name, *key.aliases)}
    assert all((name in names) != (name in NO_EFFECT) for name in RELEASE)
    values = {name: KEYS[names[name]].default if name in names else "1" for name in RELEASE}
    values = {name: value for name, value in values.items() if value is not None}
    (tmp_path / "all.yml").write_text(yaml.safe_dump(values))
    words = {n: map(str, v if isinstance(v, list) else [v]) for n, v in values.items()}
    flags = [(f"--{name}", *value) for name, value in words.items()]
    for argv in (
        ["-c", tmp_path / "all.yml"],
        sum(flags, ()),
        [word for flag, *rest in flags for word in (flag.replace("_", "-"), *rest)],
    ):
        settings = read(*argv)
        silent = [note.split(": ")[1].split(" has no effect")[0] for note in settings.notes]
        assert sorted(silent) == sorted(NO_EFFECT.keys() & values.keys())
        for name in values.keys() & names.keys():
            assert settings.said[names[name]][0] == values[name], name


def test_every_key_is_used():
    """No key that nothing reads, but for one that the launcher sets."""
    here = ROOT / "cifar10"
    files = [*here.glob("*.py"), *(here / "harness").glob("*.py")]
    code = "".join(file.read_text() for file in files if file.name != "options.py")
    read_by_timm = set()

    class Spy(cifar10.config.Config):
        def __getattribute__(self, name):
            read_by_timm.add(name)
            return super().__getattribute__(name)

    cfg = Spy()
    vars(cfg).update(vars(resolve()))
    optimizer_kwargs(cfg)
    scheduler_kwargs(cfg)
    used = {n for n in KEYS if re.search(rf'(cfg|settings)(\.{n}\b|, "{n}")', code)}
    read_by_timm |= {*cifar10.data.SAME, *cifar10.build.KEYWORDS}
    assert KEYS.keys() - used - read_by_timm == {"local_rank"}


def test_short_forms(tmp_path):
    (tmp_path / "mine.yml").write_text("batch-size: 32\nlr: 5e-4\ntime_step: '6'\n")
    cfg = resolve("-c", tmp_path / "mine.yml", "-b", 16)
    assert (cfg.batch_size, cfg.lr, cfg.time_step, cfg.dim) == (16, 5e-4, 6, 384)
    flags = "-b 2 -vb 3 -T 5 -L 6 -j 7 -d digits -data-dir x --amp false"
    cfg = resolve(*flags.split())
    assert (cfg.batch_size, cfg.val_batch_size, cfg.time_step) == (2, 3, 5)
    assert (cfg.layer, cfg.workers, cfg.dataset, cfg.data_path) == (6, 7, "digits", "x")
    assert cfg.amp is False
    flags = "--input-size none --mean 0.5,0.4,0.3 --aa none --opt-betas 0.8 0.9 --lr-noise 0.4"
    cfg = resolve(*flags.split(), "--cross-sample-lif", "true")
    assert (cfg.input_size, cfg.mean, cfg.aa) == (None, [0.5, 0.4, 0.3], None)
    assert (cfg.opt_betas, cfg.lr_noise, cfg.cross_sample_lif) == ([0.8, 0.9], [0.4], "true")


# What goes over what ------------------------------------------------------------------------------

DEFAULT = {"tau": 2.0, "crop_pct": 1.0, "lr": 1e-3}  # of the network, the data, the run
RECORDED = {"tau": 3.0, "crop_pct": 0.5, "lr": 0.3}
YML = {"tau": 4.0, "crop_pct": 0.6, "lr": 0.4}


def values(cfg):
    return {name: getattr(cfg, name) for name in DEFAULT}


@pytest.mark.parametrize(
    ("purpose", "back"),
    [
        ("train", []),
        ("finetune", ["tau"]),
        ("test", ["tau", "crop_pct"]),
        ("resume", ["tau", "crop_pct", "lr"]),
    ],
)
def test_defaults_checkpoint_yml_flags(purpose, back, tmp_path, caplog):
    """Each goes over the one before; a line says what goes over a checkpoint."""
    caplog.set_level("INFO", logger="qkformer")
    file = tmp_path / "mine.yml"
    file.write_text(yaml.safe_dump(YML))

    def check(argv, want, origin):
        caplog.clear()
        assert values(read(*argv).resolve(purpose, RECORDED, "a.pth")) == want
        assert sorted(caplog.messages) == sorted(
            f"{origin[name]}: {name} is {want[name]}, but a.pth was trained with {RECORDED[name]}; "
            f"{want[name]} is used"
            for name in {*back} & {*origin}
        )

    check([], {**DEFAULT, **{name: RECORDED[name] for name in back}}, {})
    check(["-c", file], YML, dict.fromkeys(YML, "mine.yml"))
    for name, value in {"tau": 5.0, "crop_pct": 0.7, "lr": 0.7}.items():
        origin = {**dict.fromkeys(YML, "mine.yml"), name: "command line"}
        check(["-c", file, f"--{name}", value], {**YML, name: value}, origin)


def test_what_a_yml_said_at_training_too_is_nothing_new(tmp_path, caplog):
    """Of a file that was edited since, only the edit is new."""
    caplog.set_level("INFO", logger="qkformer")
    file, then = tmp_path / "mine.yml", {"file": "mine.yml", "yml": YML}
    file.write_text(yaml.safe_dump(YML))
    assert values(read("-c", file).resolve("resume", RECORDED, "a.pth", then)) == RECORDED
    assert not caplog.messages
    file.write_text(yaml.safe_dump({**YML, "tau": 5}))
    cfg = read("-c", file).resolve("resume", RECORDED, "a.pth", then)
    assert values(cfg) == {**RECORDED, "tau": 5.0} and len(caplog.messages) == 1
    # a flag is always meant; and so is a file of another name
    cfg = read("-c", file, "--lr", YML["lr"]).resolve("resume", RECORDED, "a.pth", then)
    assert cfg.lr == YML["lr"]
    file.rename(tmp_path / "other.yml")
    cfg = read("-c", tmp_path / "other.yml").resolve("resume", RECORDED, "a.pth", then)
    assert values(cfg) == {**YML, "tau": 5.0}


@pytest.mark.parametrize("purpose", ["finetune", "test", "resume"])
def test_a_default_yml_that_was_edited_since(purpose, caplog):
    """It does not go over the checkpoint; where a run goes on, a line says so."""
    caplog.set_level("INFO", logger="qkformer")
    then = {"file": "cifar10.yml", "yml": {"lr": 0.3}}
    cfg = read().resolve(purpose, RECORDED, "a.pth", then)
    assert cfg.lr == (0.3 if purpose == "resume" else 1e-3)
    lines = ["cifar10.yml: lr is 0.001, but a.pth has 0.3, which is used"]
    cut = [message.partition(" (")[0] for message in caplog.messages]
    assert cut == (lines if purpose == "resume" else [])


def test_what_must_not_differ_from_the_checkpoint():
    for name, value in {"dim": 32, "layer": 4, "num_classes": 7, "mlp_ratio": 2.5}.items():
        settings = read(f"--{name}", value)
        line = f"command line: {name} is {value}, but a.pth is of {name} 16; leave it out"
        with pytest.raises(UserError, match=line):
            settings.resolve("resume", {name: 16}, "a.pth")
        assert getattr(settings.resolve("resume", {name: value}, "a.pth"), name) == value


def test_which_yml(tmp_path, monkeypatch):
    """A file where you are goes over the one beside the script, but never by itself."""
    monkeypatch.chdir(tmp_path)
    assert read("-c", "quickstart.yml").dataset == "digits"  # beside the script
    (tmp_path / "quickstart.yml").write_text("dim: 64\n")
    (tmp_path / "cifar10.yml").write_text("dim: 32\n")
    settings = read("-c", "quickstart.yml")
    assert (settings.dataset, settings.dim) == ("torch/cifar10", 64)
    assert read("-c", "cifar10.yml").dim == 32
    assert (read().dim, read().name) == (384, "cifar10")


def test_base(tmp_path):
    (tmp_path / "a.yml").write_text("dim: 64\nlr: 2e-3\n")
    (tmp_path / "b.yml").write_text("base: a.yml\nlr: 3e-3\n")
    settings = read("-c", tmp_path / "b.yml")
    assert (settings.dim, settings.lr, settings.name) == (64, 3e-3, "b")
    (tmp_path / "a.yml").write_text("base: b.yml\n")
    with pytest.raises(UserError, match=r"a.yml, line 1: base is b.yml: it leads back"):
        read("-c", tmp_path / "b.yml")


# The scripts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("script", ["train", "test"])
def test_help(folder, script, monkeypatch, capsys):
    """Groups in the table's order; each key of this script once, in one spelling, with its kind."""
    options = load(folder).options
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        read("--help", folder=load(folder), script=script)
    text = capsys.readouterr().out
    shown = [name for name, key in options.KEYS.items() if script in key.scripts]
    assert end.value.code == 0 and text.isascii() and "-c FILE, --config FILE" in text
    groups = [title for title, keys in options.GROUPS.items() if {*keys} & {*shown}]
    assert re.findall(r"^(\w+):$", text, re.MULTILINE)[1:] == groups
    flags = re.findall(r"^  (?:-[\w-]+ .+, )?--(\w+)(?: (.+?))?(?:  .*)?$", text, re.MULTILINE)
    assert [name for name, _ in flags] == ["config", *shown]
    for (_, kind), name in zip(flags[1:], shown, strict=True):
        key = options.KEYS[name]
        if key.choices and not key.length:
            assert kind == "{" + ",".join(filter(None, key.choices)) + "}"
        assert " ".join(key.help.split()) in " ".join(text.split())
    assert script == "train" or {"lr", "epochs", "aa", "resume"}.isdisjoint(shown)


def test_test_py_uses_what_its_help_shows(trained_on_images, monkeypatch, capsys):
    used = set()

    def spy(kind, method):
        had = getattr(kind, method)

        def get(self, name):
            used.add(name)
            return had(self, name)

        monkeypatch.setattr(kind, method, get)

    spy(cifar10.config.Config, "__getattribute__")
    spy(cifar10.config.Settings, "__getattribute__")
    flags = "--output", trained_on_images.parent, "--experiment", "tiny", "--fused", "false"
    assert "top-1" in call(cifar10.test.main, capsys, *flags)
    shown = {name for name, key in KEYS.items() if "test" in key.scripts}
    used &= KEYS.keys()
    assert shown - used == set()
    # What the functions that build model and transforms are handed, and use in training.
    train = {"drop_path", "surrogate", "surrogate_alpha", "memory"}
    assert used - shown <= {*train, *cifar10.options.AUGMENTATION}


@pytest.mark.parametrize(
    ("folder", "script", "flag", "line"),
    [
        ("cifar10", "train", "--checkpoint", "train.py$"),
        ("imagenet", "train", "--use-ema", "train.py$"),
        ("cifar10", "test", "--epochs", "test.py$"),
        ("imagenet", "test", "--blr", "test.py$"),
        ("cifar10-dvs", "test", "--surrogate-alpha", "test.py$"),
    ],
)
def test_a_flag_of_the_other_script(folder, script, flag, line, tmp_path):
    """An error: else a run would begin without the weights that its user named. A yml is for both
    scripts.
    """
    folder, name = load(folder), flag.lstrip("-").replace("-", "_")
    value = "true" if name == "use_ema" else "1"
    with pytest.raises(folder.config.UserError, match=f"--{name} is not read by {line}"):
        read(flag, value, folder=folder, script=script)
    (tmp_path / "both.yml").write_text(f"{name}: {value}\n")
    assert name in read("-c", tmp_path / "both.yml", folder=folder, script=script).said
    assert name in read(flag, value, folder=folder).said


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_a_tool_now(name, tmp_path):
    """An error: else a plain test would pass for it. What an older run's args.yaml has is not."""
    folder, yml = load(name), tmp_path / "a.yml"
    tools = {"energy": "energy", "test_path": "shifted"}
    tools |= {"severity": "shifted"} if "cifar1" in name and name != "cifar10-dvs" else {}
    tools |= {"predict": "predict"} if hasattr(folder, "images") else {}
    for flag, tool in tools.items():
        yml.write_text(f"{flag}: 3\n")
        told = f"{flag} has no effect: it is a tool now: python tools/{tool}.py CHECKPOINT"
        assert (ROOT / "tools" / f"{tool}.py").is_file()
        for script, *argv in (
            ("test", f"--{flag}", "x"),
            ("train", f"--{flag}=x"),
            ("test", "-c", yml),
        ):
            with pytest.raises(folder.config.UserError, match=f": {told}$"):
                read(*argv, folder=folder, script=script)
        assert read("-c", yml, folder=folder, script="train").notes == [f"a.yml, line 1: {told}"]
    yml.write_text("energy: false\ntest_path: null\n")
    assert len(read("-c", yml, folder=folder, script="test").notes) == 2
    if "predict" in tools:
        yml.write_text("predict: null\npredictions: predict.csv\n")
        assert len(read("-c", yml, folder=folder, script="test").notes) == 2


@pytest.mark.parametrize("name", FOLDERS)
def test_flags_of_train_py_that_test_py_understands(name, tmp_path):
    """As the release's scripts have them; in a yml they are what they are."""
    folder = load(name)
    plain, meant = read(folder=folder), {"batch_size": "val_batch_size", "model_ema": "use_ema"}
    meant |= {"finetune": "checkpoint", "resume": "checkpoint", "initial_checkpoint": "checkpoint"}
    for flag, key in meant.items():
        value = {"batch_size": 7, "model_ema": True}.get(flag, "x.pth")
        settings = read(f"--{flag}", value, folder=folder, script="test")
        assert {name: said for name, (said, _) in settings.said.items()} == {key: value}
        assert getattr(settings, key) == value != getattr(plain, key)
    (tmp_path / "a.yml").write_text("batch_size: 7\n")
    settings = read("-c", tmp_path / "a.yml", folder=folder, script="test")
    assert (settings.batch_size, settings.val_batch_size) == (7, plain.val_batch_size)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--learning-rat", "1"], "unknown flag --learning_rat"),
        (["--batchsize=3"], "unknown flag --batchsize=3; is batch_size meant?"),
        (["3"], "no flag stands before 3"),
        (["--mean", "0.5"], "mean is [0.5]; it must be 3 numbers from 0 to 1"),
        (["--aa", "m9"], "aa is m9; it must be a policy of timm's, as in rand-m9-n1-mstd0.4-inc1"),
        (["--epochs", "x"], "command line: epochs is x; it must be a whole number"),
        (["--epochs"], "epochs: expected one argument"),
        (["--batch-size", "3", "--val-batch-size", "4"], "are one key, but their values differ"),
        (
            ["-c", "none.yml"],
            "-c none.yml: no such file (beside the script: cifar10.yml, ms.yml, q",
        ),
    ],
)
def test_wrong_flags(flags, words):
    with pytest.raises(UserError) as error:
        read(*flags, script="test" if "--val-batch-size" in flags else None)
    assert words in str(error.value)
