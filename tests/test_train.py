"""Training and testing with cifar10/'s scripts, as a user runs them, on the embedded digits."""

import argparse
import copy
import csv
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import DATA, ROOT, load, one_line, script
from PIL import Image

cifar10 = load("cifar10")
CPU = cifar10.runtime.Ranks("cpu")
SMALL = ["-c", "quickstart.yml", "--dim", 16, "--num-heads", 2, "--time-step", 2, "--batch-size", 64]
# randomness in every place: mixup and flips in a worker, random erasing and drop path in the main process
RANDOM = [*SMALL, "--mixup", 0.5, "--hflip", 0.5, "--reprob", 0.5, "--drop-path", 0.2, "--epochs", 3, "--workers", 1]


def resolve(*argv):
    options = cifar10.options
    return cifar10.config.load_config(options.KEYS, options.NO_EFFECT, options.DEFAULT_CONFIG, [*map(str, argv)])[0]


def ranks(rank, world_size):
    place = copy.copy(CPU)
    place.rank, place.world_size = rank, world_size
    return place


def log_of(folder):
    """The run's log without what depends on the clock and the machine."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [
        {name: line[name] for name in line if name not in ("seconds", "images_per_second", "peak_memory_mb")}
        for line in lines
    ]


def weights_of(path):
    return torch.load(path, weights_only=True)["model"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# The recipe -------------------------------------------------------------------------------------------------------


def test_learning_rates_of_the_published_run():
    model = torch.nn.Linear(2, 2)
    optimizer, scheduler, num_epochs = cifar10.train.build_optimizer(resolve(), model)
    with open(DATA / "curves" / "cifar10.csv") as file:
        published = [float(row["lr"]) for row in csv.DictReader(file)]
    assert num_epochs == len(published) == 410
    for epoch, want in enumerate(published):
        scheduler.step(epoch)
        assert f"{optimizer.param_groups[0]['lr']:.4g}" == f"{want:.4g}", epoch


def test_weight_decay_groups():
    model = cifar10.model.QKFormer(embed_dims=32, num_heads=2)
    optimizer, *_ = cifar10.train.build_optimizer(resolve(), model)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.06 if parameter.ndim > 1 else 0.0), name
    assert all(group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8 for group in optimizer.param_groups)


def make_cifar(folder, monkeypatch, train=40, test=10):
    """CIFAR-10 in its own format, small and random."""
    import torchvision

    generator = np.random.RandomState(0)
    base = folder / "cifar-10-batches-py"
    base.mkdir(parents=True)
    for name, size in [(f"data_batch_{i}", train // 5) for i in range(1, 6)] + [("test_batch", test)]:
        images = generator.randint(0, 256, (size, 3072), dtype=np.uint8)
        labels = [int(label) for label in generator.randint(0, 10, size)]
        (base / name).write_bytes(pickle.dumps({"data": images, "labels": labels}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)


def test_cifar_batches(tmp_path, monkeypatch):
    make_cifar(tmp_path, monkeypatch)
    cfg = resolve("--data-dir", tmp_path, "-b", 8, "-j", 0)
    train_set, test_set = (cifar10.data.build_dataset(cfg, train, CPU) for train in (True, False))
    names = [type(step).__name__ for step in train_set.transform.transforms]
    names.remove("RandomResizedCropAndInterpolation")  # of the whole image, to its own size
    assert names[:2] == ["RandomHorizontalFlip", "RandAugment"] and len(names) == 3
    assert torch.as_tensor(train_set[0][0]).dtype == torch.uint8  # not yet normalised: mixup comes first
    batches = list(cifar10.data.train_loader(cfg, train_set, 0, 0, CPU))
    assert len(batches) == 5 and batches[0][0].shape == (8, 3, 32, 32)
    assert all(torch.allclose(targets.sum(1), torch.ones(8)) for _, targets in batches)

    images, labels = zip(*cifar10.data.test_loader(cfg, test_set, CPU), strict=True)
    raw = torch.from_numpy(test_set.data).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (cfg.mean, cfg.std))
    torch.testing.assert_close(torch.cat(images), (raw - mean) / std, rtol=1e-5, atol=1e-5)
    assert torch.cat(labels).tolist() == test_set.targets


@pytest.mark.parametrize("bits", [0, 1, 2, 4])
def test_posterize(bits):
    """timm's increasing severities come to 0 bits at magnitude 10, for which today's Pillow raises."""
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    step = timm.data.auto_augment.AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10 - 2.5 * bits)
    np.testing.assert_array_equal(np.asarray(step(image)), np.asarray(image) & (0xFF << (8 - bits) & 0xFF))


@pytest.mark.parametrize("workers", [0, 2])
def test_mixup_off_epoch_reaches_the_workers(workers):
    cfg = resolve("-c", "quickstart.yml", "--mixup", 0.5, "--mixup-off-epoch", 2, "--smoothing", 0.1, "-j", workers)
    dataset = cifar10.data.build_dataset(cfg, True, CPU)
    for epoch in range(4):
        targets = torch.cat([targets for _, targets in cifar10.data.train_loader(cfg, dataset, epoch, 0, CPU)])
        two_classes = ((targets > 0.011).sum(1) == 2).float().mean()
        assert two_classes > 0.5 if epoch < 2 else two_classes == 0
        assert targets.min().item() == pytest.approx(0.01)  # smoothed in either case
    cfg.mixup_off_epoch = 0
    targets = torch.cat([targets for _, targets in cifar10.data.train_loader(cfg, dataset, 399, 0, CPU)])
    assert ((targets > 0.011).sum(1) == 2).float().mean() > 0.5


def test_shares_of_the_ranks():
    for size, batch, world in ((101, 8, 3), (64, 8, 2), (50000, 64, 1)):
        parts = [cifar10.engine.train_batches(size, batch, 7, 3, ranks(rank, world)) for rank in range(world)]
        indices = [index for part in parts for batch_indices, _ in part for index in batch_indices]
        assert len(indices) == len(set(indices)) == size // (batch * world) * batch * world
        assert len({seed for part in parts for _, seed in part}) == len(parts) * len(parts[0])
        whole = [cifar10.engine.test_batches(size, batch, ranks(rank, world)) for rank in range(world)]
        order = [whole[i % world][i // world][0] for i in range(-(-size // batch))]
        assert [index for indices in order for index in indices] == list(range(size))
        assert all(len(indices) == batch for indices in order[:-1])
    first, second = (cifar10.engine.train_batches(101, 8, 7, epoch, CPU) for epoch in (0, 1))
    assert first != second and len(first) == 12


def test_batches_do_not_depend_on_what_came_before():
    cfg = resolve("-c", "quickstart.yml", "--mixup", 0.5, "--hflip", 0.5, "--aa", "rand-m9-n1-mstd0.4-inc1")
    dataset = cifar10.data.build_dataset(cfg, True, CPU)
    state = torch.get_rng_state()
    runs = []
    for workers, first in ((0, 0), (2, 0), (1, 40)):
        cfg.workers = workers
        runs.append(list(cifar10.data.train_loader(cfg, dataset, 1, first, CPU)))
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(runs[0], runs[1], strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    for one, other in zip(runs[0][40:], runs[2], strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize(
    ("env", "want"),
    [
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # python in a batch script
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "MASTER_ADDR": "a"}, ("1", "2", "a")),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "gpu[03-04]"}, ("3", "4", "gpu03")),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NODELIST": "x1,x2"}, ("0", "4", "x1")),
    ],
)
def test_tasks_of_slurm(env, want):
    assert cifar10.runtime.started_by_srun(env) == (want is not None)
    if want:
        ranks = cifar10.runtime.slurm_ranks(env)
        assert (ranks["RANK"], ranks["WORLD_SIZE"], ranks["MASTER_ADDR"]) == want


# Runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of RANDOM that nothing interrupts."""
    output = tmp_path_factory.mktemp("output")
    done = script("cifar10", "train", *RANDOM, "--output", output, "--experiment", "whole")
    return output / "whole", done.stdout


def test_run_and_its_folder(trained):
    folder, text = trained
    assert "cross_sample_lif: false" in text and "torch backend" in text and "parameters" in text
    log = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [0, 1, 2]
    fields = "epoch lr train_loss test_loss test_acc1 test_acc5 seconds images_per_second peak_memory_mb"
    assert all(set(fields.split()) <= set(line) for line in log)
    assert list(folder.glob("events.out.tfevents.*"))
    args = yaml.safe_load((folder / "args.yaml").read_text())
    assert args["dim"] == 16 and args["mixup"] == 0.5 and set(args) == set(cifar10.options.KEYS)
    assert sorted(path.name for path in folder.iterdir() if path.suffix == ".pth") == ["best.pth", "last.pth"]
    checkpoint = torch.load(folder / "last.pth", weights_only=True)
    assert {"model", "optimizer", "scheduler", "scaler", "epoch", "best", "rng", "config"} <= set(checkpoint)
    assert checkpoint["cross_sample_lif"] is False and checkpoint["epoch"] == 2

    done = script("cifar10", "test", "-c", folder / "args.yaml")
    result = json.loads((folder / "test.json").read_text())
    best = max(log, key=lambda line: line["test_acc1"])
    assert result["top1"] == best["test_acc1"] and result["top5"] == best["test_acc5"]
    assert result["loss"] == best["test_loss"] and f"top-1 {result['top1']:.2f} %" in done.stdout
    assert Path(result["checkpoint"]).name == "best.pth"


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end and process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.01)


def start(*args, ranks=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, "train.py", *map(str, args)],
        cwd=ROOT / "cifar10",
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_killed_and_resumed(trained, tmp_path):
    """SIGKILL within an epoch: the same command goes on from the last epoch's end, to the same weights."""
    args = [*RANDOM, "--output", tmp_path, "--experiment", "killed", "--resume", "auto", "--log-interval", 1]
    process = start(*args)
    for line in process.stdout:
        if line.startswith("epoch 1, step 7/"):
            break
    process.kill()
    process.wait()
    folder = tmp_path / "killed"
    assert torch.load(folder / "last.pth", weights_only=True)["epoch"] == 0
    done = script("cifar10", "train", *args)
    assert "at epoch 1, step 0" in done.stdout
    assert log_of(folder) == log_of(trained[0])
    assert same(weights_of(folder / "last.pth"), weights_of(trained[0] / "last.pth"))
    assert same(weights_of(folder / "best.pth"), weights_of(trained[0] / "best.pth"))
    done = script("cifar10", "train", *args)
    assert "nothing to do" in done.stdout and log_of(folder) == log_of(trained[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_and_resume(trained, tmp_path, number):
    """A signal ends the run after the step at hand with last.pth written; it goes on with the very next step."""
    args = [*RANDOM, "--output", tmp_path, "--experiment", "stopped", "--log-interval", 1]
    process = start(*args)
    for line in process.stdout:
        if line.startswith("epoch 1, step 9/"):
            break
    process.send_signal(number)
    rest = process.stdout.read()
    assert process.wait() == 128 + number and "Traceback" not in rest and number.name in rest
    folder = tmp_path / "stopped"
    checkpoint = torch.load(folder / "last.pth", weights_only=True)
    assert checkpoint["epoch"] == 0 and 9 <= checkpoint["step"] < 22
    done = script("cifar10", "train", *args, "--resume", folder / "last.pth", "--workers", 0)
    assert f"at epoch 1, step {checkpoint['step']}" in done.stdout
    assert log_of(folder) == log_of(trained[0])
    assert same(weights_of(folder / "last.pth"), weights_of(trained[0] / "last.pth"))


@pytest.mark.parametrize("launcher", ["torchrun", "launch"])
def test_two_ranks(tmp_path, launcher):
    args = [*SMALL, "--epochs", 2, "--output", tmp_path, "--experiment", "two"]
    done = script("cifar10", "train", *args, ranks=2, launcher=launcher)
    assert "2 rank(s), 128 images a step" in done.stdout
    log = log_of(tmp_path / "two")
    assert len(log) == 2
    best = max(log, key=lambda line: line["test_acc1"])
    for number in (1, 2):
        path = tmp_path / "two" / "best.pth"
        script("cifar10", "test", *SMALL, "--checkpoint", path, ranks=number, launcher=launcher)
        result = json.loads((tmp_path / "two" / "test.json").read_text())
        assert (result["top1"], result["loss"]) == (best["test_acc1"], best["test_loss"])


def test_two_ranks_stop_together_and_resume(tmp_path):
    args = [*SMALL, "--epochs", 3, "--log-interval", 1, "--output", tmp_path]
    script("cifar10", "train", *args, "--experiment", "whole", ranks=2)
    process = start(*args, "--experiment", "stopped", ranks=2)
    for line in process.stdout:
        if line.startswith("epoch 1, step 3/"):
            break
    process.send_signal(signal.SIGTERM)
    process.stdout.read()
    assert process.wait() != 0
    assert torch.load(tmp_path / "stopped" / "last.pth", weights_only=True)["step"] >= 3
    script("cifar10", "train", *args, "--experiment", "stopped", "--resume", "auto", ranks=2)
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "whole")
    assert same(*(weights_of(tmp_path / name / "last.pth") for name in ("stopped", "whole")))


def test_101_samples_on_two_ranks():
    """Each sample once and in its batch: one rank and two give the same figures, under both semantics."""
    results = {}
    for cross in ("false", "true"):
        for number in (1, 2):
            args = (ROOT / "tests", cross, "-c", "quickstart.yml", "--val-batch-size", 8)
            done = script("cifar10", "../tests/eval_101", *args, ranks=number, env={"PYTHONPATH": "."})
            line = next(line for line in done.stdout.splitlines() if line.startswith("METRICS"))
            results[cross, number] = json.loads(line.partition(" ")[2])
    assert results["false", 1] == results["false", 2] and results["true", 1] == results["true", 2]
    assert results["false", 1] != results["true", 1]


def test_folders(tmp_path):
    """A run's folder is written to only by going on from its last.pth."""

    def opened(**settings):
        cfg = resolve("--output", tmp_path, "--experiment", "a")
        vars(cfg).update({name: str(value) for name, value in settings.items()})
        folder, resume = cifar10.checkpoint.open_run(cfg, cfg.output)
        return folder.name, resume and str(resume.relative_to(tmp_path))

    def make(name, *files):
        (tmp_path / name).mkdir(exist_ok=True)
        for file in ("args.yaml", *files):
            (tmp_path / name / file).touch()

    assert opened() == opened(resume="auto") == ("a", None) and not list(tmp_path.iterdir())
    make("a")  # ended before its first checkpoint
    assert opened() == ("a-2", None) and opened(resume="auto") == ("a", None)
    make("a", "last.pth", "best.pth")
    assert opened() == ("a-2", None) and opened(resume="auto") == ("a", "a/last.pth")
    make("a-b", "last.pth")
    make("b", "last.pth")
    os.utime(tmp_path / "a" / "last.pth", (1, 1))
    assert opened(resume="auto") == ("a", "a/last.pth")
    make("a-2", "last.pth")
    assert opened() == ("a-3", None) and opened(resume="auto") == ("a-2", "a-2/last.pth")
    assert opened(resume=tmp_path / "a" / "last.pth") == ("a", "a/last.pth")
    assert opened(resume=tmp_path / "a" / "best.pth") == ("a-3", "a/best.pth")
    assert opened(resume=tmp_path / "b" / "last.pth") == ("b", "b/last.pth")


def test_log_with_a_torn_line(tmp_path):
    lines = [json.dumps({"epoch": epoch}) for epoch in range(4)]
    (tmp_path / "log.txt").write_text("\n".join([*lines, '{"epoch": 4, "lr']))
    log, _ = cifar10.checkpoint.open_log(tmp_path, 3)
    assert log.read_text().splitlines() == lines[:3]


def test_failed_resume_changes_nothing(trained):
    folder, _ = trained
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    args = [*RANDOM, "--output", folder.parent, "--experiment", "whole", "--resume", "auto"]
    one_line(script("cifar10", "train", *args, "--dim", 32, check=False), "another architecture")
    one_line(script("cifar10", "train", *args, "--opt", "sgd", check=False), "last.pth", "adamw", "sgd")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_resume_on_another_number_of_ranks(tmp_path):
    """Within an epoch: it goes on behind the samples that were seen, in the same order of the epoch."""
    args = [*SMALL, "--epochs", 2, "--log-interval", 1, "--output", tmp_path, "--experiment", "ranks"]
    process = start(*args, ranks=2)
    for line in process.stdout:
        if line.startswith("epoch 1, step 4/"):
            break
    process.send_signal(signal.SIGTERM)
    process.stdout.read()
    process.wait()
    step = torch.load(tmp_path / "ranks" / "last.pth", weights_only=True)["step"]
    assert 4 <= step < 11
    done = script("cifar10", "train", *args, "--resume", "auto")
    assert f"epoch 1, step {2 * step}" in done.stdout and "64 images a step" in done.stdout
    assert f"epoch 1, step {2 * step + 1}/22" in done.stdout and len(log_of(tmp_path / "ranks")) == 2


def test_start_epoch(tmp_path):
    script("cifar10", "train", *SMALL, "--output", tmp_path, "--epochs", 3, "--start-epoch", 2)
    (line,) = log_of(tmp_path / "quickstart")
    assert line["epoch"] == 2 and 1e-5 < line["lr"] < 4e-3  # far down the cosine


def test_signal_during_evaluation(trained, tmp_path):
    args = [*RANDOM, "--output", tmp_path, "--experiment", "stopped", "--log-interval", 1]
    process = start(*args, "--val-batch-size", 1)
    for line in process.stdout:
        if line.startswith("epoch 1, step 22/22"):
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: stopped in epoch 1 after step 22" in process.stdout.read()
    assert process.wait() == 143
    script("cifar10", "train", *args, "--resume", "auto")
    assert same(*(weights_of(path / "last.pth") for path in (tmp_path / "stopped", trained[0])))


@pytest.mark.parametrize("batch", [64, 1024])
def test_divergence(tmp_path, batch):
    """In the middle of an epoch, and in its only step, when no loss shows it yet."""
    args = [*SMALL, "--output", tmp_path, "--batch-size", batch, "--warmup-epochs", 0, "--experiment", "wild"]
    script("cifar10", "train", *args, "--epochs", 1)
    before = (tmp_path / "wild" / "last.pth").read_bytes()
    wild = ["--lr", "1e38", "--min-lr", "1e38", "--weight-decay", "1e3", "--opt", "sgd", "--no-resume-opt"]
    done = script("cifar10", "train", *args, *wild, "--epochs", 2, "--resume", "auto", check=False)
    one_line(done, "step", "epoch 1", "learning rate 1e+38", "last.pth is as it was")
    assert (tmp_path / "wild" / "last.pth").read_bytes() == before


# Checkpoints ------------------------------------------------------------------------------------------------------


def small_model(**kwargs):
    return cifar10.model.QKFormer(T=2, embed_dims=16, num_heads=2, depths=3, mlp_ratios=4, **kwargs)


def run_test(path, *args, **kwargs):
    return script("cifar10", "test", *SMALL, "--checkpoint", path, *args, **kwargs)


def test_kinds_of_checkpoints(tmp_path):
    """The release's, timm's with DDP's prefixes and a bare state dict: same figures, and taken for the release's."""
    torch.manual_seed(0)
    weights = small_model().state_dict()
    args = argparse.Namespace(lr=1e-3, betas=(0.9, 0.999), output=Path("x"), best=np.float64(0.5), top=np.float32(1))
    kinds = {
        "release": {"model": weights, "optimizer": {}, "epoch": 3, "scaler": None, "args": args},
        "timm": {"state_dict": {f"module.{name}": value for name, value in weights.items()}, "arch": "x", "args": args},
        "bare": weights,
    }
    results = []
    for name, content in kinds.items():
        (tmp_path / name).mkdir()
        torch.save(content, tmp_path / name / "weights.pth")
        done = run_test(tmp_path / name / "weights.pth")
        assert "warning" in done.stdout and "cross_sample_lif: true" in done.stdout
        results.append(json.loads((tmp_path / name / "test.json").read_text()))
    assert all(result["cross_sample_lif"] is True and result["loss"] == results[0]["loss"] for result in results)
    done = run_test(tmp_path / "timm" / "weights.pth", "--cross-sample-lif", "false")
    assert "cross_sample_lif: false" in done.stdout
    assert json.loads((tmp_path / "timm" / "test.json").read_text())["cross_sample_lif"] is False


def test_semantics_rule():
    resolve_semantics = cifar10.checkpoint.resolve_semantics
    assert resolve_semantics("auto", None, None)[0] is False
    for recorded in (False, True):
        value, line = resolve_semantics("auto", {"cross_sample_lif": recorded}, "a.pth")
        assert value is recorded and "a.pth records" in line
    value, line = resolve_semantics("auto", {"model": {}}, "a.pth")
    assert value is True and line.startswith("warning") and "a.pth" in line and "other images" in line
    for setting, value in (("true", True), ("false", False)):
        assert resolve_semantics(setting, None, None)[0] is value
        assert resolve_semantics(setting, {"model": {}}, "a.pth")[0] is value
        got, line = resolve_semantics(setting, {"cross_sample_lif": not value}, "a.pth")
        assert got is value and line.startswith("warning")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_bad_checkpoints(trained, tmp_path):
    folder, _ = trained
    load_checkpoint, load_weights = cifar10.checkpoint.load_checkpoint, cifar10.checkpoint.load_weights
    UserError = cifar10.config.UserError
    whole = (folder / "last.pth").read_bytes()
    for size in (0, 10, 1000, len(whole) // 2, len(whole) - 30):
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.pth: not a checkpoint, or not whole"):
            load_checkpoint(tmp_path / "cut.pth")
    torch.save(small_model().state_dict(), tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    legacy, generator = (tmp_path / "legacy.pth").read_bytes(), np.random.RandomState(0)
    assert load_checkpoint(tmp_path / "legacy.pth")["model"].keys() == small_model().state_dict().keys()
    for _ in range(40):
        (tmp_path / "legacy.pth").write_bytes(legacy[: generator.randint(len(legacy) // 10)])
        with pytest.raises(UserError, match=r"legacy\.pth"):
            load_checkpoint(tmp_path / "legacy.pth")
    for content in ({"model": {}}, [1, 2], {"epoch": 3}, {"model": {"a": 3}}, {1: torch.ones(2)}):
        torch.save(content, tmp_path / "empty.pth")
        with pytest.raises(UserError, match=r"empty\.pth"):
            load_checkpoint(tmp_path / "empty.pth")
    trace = tmp_path / "ran"
    for zipped in (True, False):
        torch.save({"model": {"a": Evil(trace)}}, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=r"evil\.pth"):
            load_checkpoint(tmp_path / "evil.pth")
        assert not trace.exists()
    weights = small_model().state_dict()
    with pytest.raises(UserError) as error:
        load_weights(cifar10.model.QKFormer(T=2, embed_dims=32, num_heads=2, depths=4), {"model": weights}, "a.pth")
    assert all(word in str(error.value) for word in ("missing", "stage3.1.ssa", "of another shape", "instead of"))


def test_bad_input_to_the_scripts(trained, tmp_path):
    """Through the scripts: one line, exit code 1, nothing lost or run."""
    folder, _ = trained
    before = (folder / "last.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(before[:5000])
    one_line(run_test(tmp_path / "cut.pth", check=False), "cut.pth", "not whole")
    one_line(run_test(tmp_path / "none.pth", check=False), "none.pth", "no such checkpoint")
    one_line(run_test(folder / "best.pth", "--dim", 32, check=False), "another architecture", "[", "args.yaml")
    torch.save({"model": {"a": Evil(tmp_path / "ran")}}, tmp_path / "evil.pth")
    one_line(run_test(tmp_path / "evil.pth", check=False), "evil.pth", "could run code")
    assert not (tmp_path / "ran").exists()
    args = ["--output", folder.parent, "--resume", tmp_path / "cut.pth"]
    one_line(script("cifar10", "train", *SMALL, *args, check=False), "cut.pth", "not whole")
    one_line(script("cifar10", "train", "--batchsize", 3, check=False), "--batchsize", "batch_size")
    assert (folder / "last.pth").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num-heads", 5], ["num_heads is 5"]),
        (["--img-size", 18], ["18", "multiple of 4"]),
        (["--mixup", 0.5, "-b", 3], ["batch_size is 3", "even"]),
        (["-b", 4000], ["batch_size 4000", "1437"]),
        (["--num-classes", 7], ["num_classes is 7", "10 classes"]),
        (["--aa", "nonsense"], ["aa is 'nonsense'"]),
        (["--opt", "nonsense"], ["nonsense"]),
        (["--opt", "adahessian"], ["adahessian"]),
        (["--cutmix-minmax", 0.9, 0.1], ["cutmix_minmax"]),
        (["--input-size", 1, 16, 16], ["input_size", "3 channels"]),
        (["--mlp-ratio", 0.1, "--dim", 16], ["mlp_ratios is 0.1"]),
        (["--experiment", "a/b"], ["experiment is 'a/b'"]),
        (["--device", "meta"], ["device is 'meta'"]),
        (["--model", "resnet18"], ["resnet18", "QKFormer"]),
        (["--device", "cuda:77"], ["cuda:77"]),
        (["--device", "gpu"], ["device is 'gpu'"]),
        (["--attention", "token", "ssa"], ["attention", "3 values"]),
        (["--attention", "token", "ssa", "sas"], ["sas"]),
        (["--backend", "cupy", "--device", "cpu"], ["cupy backend", "CUDA"]),
        (["--initial-checkpoint", "none.pth"], ["none.pth"]),
    ],
)
def test_one_line_for_each_mistake(flags, words, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    with pytest.raises(cifar10.config.UserError) as error:
        cifar10.train.main([str(word) for word in [*SMALL, "--output", tmp_path, *flags]])
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), str(error.value)


def test_no_data_and_no_network(tmp_path):
    offline = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    args = ["--data-dir", tmp_path / "data", "--output", tmp_path]
    one_line(
        script("cifar10", "train", *args, check=False, env=offline),
        tmp_path / "data",
        "cifar-10-python.tar.gz",
        "quickstart.yml",
    )


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    cifar10.checkpoint.save_checkpoint({"a": torch.ones(3)}, path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(cifar10.config.UserError, match=r"last\.pth: can't be written .*No space"):
        cifar10.checkpoint.save_checkpoint({"a": torch.zeros(3)}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
