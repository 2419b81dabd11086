"""Faults of a run's files and numbers: full disks, any clock, odd checkpoints."""

import copy
import json
import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT, load
from forks import ended, forked, opened
from on_digits import CPU, SMALL, cifar10, resolve

UserError = cifar10.config.UserError
runs, runtime, engine = cifar10.folder, cifar10.process, cifar10.meters


# Folders, logs and curves


def test_folder_of_a_run_that_did_not_come_to_be(tmp_path):
    def main():
        opened(tmp_path / "runs")
        runs.leave()

    assert ended(forked(main)) == 0 and not list((tmp_path / "runs").iterdir())


def test_tested_is_the_run_written_last(tmp_path):
    """Also beside a longer one that is older; and none but what is asked for."""
    for age, (name, epoch) in enumerate((("short", 2), ("long", 9))):
        (tmp_path / name).mkdir()
        torch.save({"epoch": epoch, "model": {}}, tmp_path / name / "best.pth")
        os.utime(tmp_path / name / "best.pth", (100 - age, 100 - age))
    cfg = SimpleNamespace(checkpoint=None)
    assert runs.find_checkpoint(cfg, tmp_path) == tmp_path / "short" / "best.pth"
    cfg.checkpoint = tmp_path / "long" / "best.pth"
    assert runs.find_checkpoint(cfg, tmp_path) == cfg.checkpoint
    with pytest.raises(cifar10.config.UserError, match=f"no best.pth under {tmp_path / 'long'}"):
        runs.find_checkpoint(SimpleNamespace(checkpoint=None), tmp_path / "long")


def test_newest_by_what_files_say(tmp_path):
    """Epoch and step count, not the clock; of equal ones, the one written last."""
    places = {"a": (3, 0), "b": (2, 9), "c": (3, 1), "d": (3, 1)}
    for age, (name, (epoch, step)) in enumerate(places.items()):
        torch.save({"epoch": epoch, "step": step, "model": {"w": torch.ones(3)}}, tmp_path / name)
        os.utime(tmp_path / name, (100 - age, 100 - age))
    paths = [tmp_path / name for name in places]
    assert runs.newest(paths) == tmp_path / "c" and runs.newest(paths[:2]) == tmp_path / "a"
    assert runs.newest([]) is None
    (tmp_path / "b").write_bytes(b"damaged")
    assert runs.newest(paths) == tmp_path / "b"  # so that an error names it


def test_curves_after_kills_and_with_any_clock(tmp_path, monkeypatch):
    """A run killed between any two points has each of them once, though the clock is set back each
    time.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "events.out.tfevents.4102441200.host.1.0").touch()  # of the year 2100
    clock, first = 2e9, 0
    for done in (4, 4, 9, 7, 12):
        monkeypatch.setattr(time, "time", lambda now=clock: now)
        log, clock = runs.RunLog(tmp_path, first // 3, first), clock - 1e8
        for step in range(first, done):
            log.point("loss", math.sqrt(step), step)
            if step % 3 == 2:
                log.epoch({"epoch": step // 3, "lr": float(step)})
        first = done // 3 * 3  # of the checkpoint that it goes on from
    curves = [EventAccumulator(str(path)).Reload() for path in (tmp_path / "steps", tmp_path)]
    points = curves[0].Scalars("step/loss")
    assert [point.step for point in points] == list(range(12))
    assert [point.value for point in points] == pytest.approx(
        [math.sqrt(step) for step in range(12)]
    )
    assert [(point.step, point.value) for point in curves[1].Scalars("lr/epoch")] == [
        (0, 2),
        (1, 5),
        (2, 8),
        (3, 11),
    ]


@pytest.mark.parametrize("full", ["log.txt", "events.out.tfevents.0000000001"])
def test_full_disk(tmp_path, full, monkeypatch):
    """At any file that a run writes, a line that names its folder."""

    def opened(path, *args, **kwargs):
        return open("/dev/full" if path.name == full else path, *args, **kwargs)

    monkeypatch.setattr(runs, "open", opened, raising=False)
    with pytest.raises(UserError, match=f"{tmp_path}: can't be written: No space left"):
        runs.RunLog(tmp_path, 0, 0).epoch({"epoch": 0, "lr": 0.1})


def test_names_of_any_bytes(tmp_path, capfd):
    """A folder and a class whose names are no UTF-8."""
    folder = tmp_path / os.fsdecode(b"run-\xff")
    folder.mkdir()
    cfg = resolve()
    cfg.output = str(folder)
    runs.make_folder(folder, cfg, (os.fsdecode(b"\xe4rger"), "b"))
    assert (folder / "classes.txt").read_bytes() == b"\xe4rger\nb\n"
    cifar10.checkpoint.save_checkpoint(
        {"model": {"w": torch.ones(1)}, "config": vars(cfg)}, folder / "last.pth"
    )
    read = cifar10.checkpoint.load_checkpoint(folder / "last.pth")
    assert str(read["config"]["output"]) == str(folder)

    def main():
        runtime.set_up_log(CPU)
        runtime.logger.info(f"writing to {folder}")

    assert ended(forked(main, tmp_path / "out")) == 0
    assert (tmp_path / "out").read_text() == f"writing to {tmp_path}/run-\\udcff\n"


def test_faults_of_the_machine_are_a_line():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**55, dtype=torch.uint8)
    assert "not enough memory" in runtime.explain(error.value)
    assert "not enough memory" in runtime.explain(MemoryError())
    assert "not enough memory" in runtime.explain(RuntimeError("can't start new thread"))
    assert "not enough GPU memory" in runtime.explain(
        torch.OutOfMemoryError("CUDA out of memory. Tried")
    )
    assert "ulimit -n" in runtime.explain(OSError(24, "Too many open files"))
    assert "--shm-size" in runtime.explain(OSError(28, "No space left on device"))
    assert (
        runtime.explain(OSError(30, "Read-only file system", "/x/y"))
        == "/x/y: Read-only file system"
    )
    assert (
        runtime.explain(RuntimeError("shapes differ")) is None
        and runtime.explain(KeyError("a")) is None
    )


RANK = """
import os, threading, time
import torch, torch.distributed
from runtime import run

def sort():
    numbers = torch.rand(100_000)
    while True:
        numbers.sort()

def main():
    threading.Thread(target=sort, daemon=True).start()  # comes back to Python as it ends
    time.sleep(0.1)
    print("done", end="")
    return 3

run(main)
"""


def test_a_rank_ends_though_threads_of_torch_do_not():
    """Gloo's threads outlive the last collective call at will; Python's end would abort."""
    env = {**os.environ, "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", RANK]
    done = subprocess.run(command, cwd=ROOT / "cifar10", env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "done", "")


# Checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint in the middle of an epoch."""
    output = tmp_path_factory.mktemp("trained")
    args = [
        *map(
            str,
            [*SMALL, "--batch-size", 512, "--model-ema", "--dist-bn", "reduce"],
        ),
        *map(str, ["--output", output, "--experiment", "run"]),
    ]
    assert cifar10.train.main([*args, "--epochs", "1"]) == 0
    content = torch.load(output / "run" / "last.pth", weights_only=True)
    content.update(epoch=0, step=1, loss_total=2.0)
    return args, content


def moments(checkpoint, name, value):
    checkpoint["optimizer"]["state"][0][name] = value


ODD = {
    "epoch": lambda c: c.update(epoch="3"),
    "epoch ": lambda c: c.update(epoch=-7),
    "step": lambda c: c.update(step=1.5),
    "step ": lambda c: c.update(step=999),
    "global_batch": lambda c: c.update(global_batch=-64),
    "loss_total": lambda c: c.update(loss_total=math.nan),
    "best": lambda c: c.update(best=[1]),
    "optimizer": lambda c: c.update(optimizer=[]),
    "exp_avg": lambda c: moments(
        c, "exp_avg", torch.full_like(c["optimizer"]["state"][0]["exp_avg"], math.inf)
    ),
    "exp_avg_sq": lambda c: moments(c, "exp_avg_sq", torch.ones(3)),
    "optimizer state": lambda c: moments(c, "step", "abc"),
    "optimizer state (": lambda c: c["optimizer"]["state"][0].pop("step"),
    "scaler": lambda c: c.update(scaler={"scale": math.nan}),
    "rng": lambda c: c.update(rng=["x"]),
    "rng ": lambda c: c.update(rng=7),
    "statistics": lambda c: c.update(statistics=[{}]),
    "statistics ": lambda c: c.update(statistics=3),
    "given": lambda c: c.update(given={"yml": 3}),
    "optimizer state ": lambda c: c.update(config=[1]),
    "cross_sample_lif": lambda c: c.update(cross_sample_lif="true"),
    "missing": lambda c: c["model_ema"].pop("head.bias"),
}


@pytest.mark.parametrize("word", ODD)
def test_resume_from_odd_fields(trained, tmp_path, word):
    """Each is a line that names the file and the field; the run that was there is as it was."""
    args, content = trained[0], copy.deepcopy(trained[1])
    ODD[word](content)
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(UserError) as error:
        cifar10.train.main([*args, "--epochs", "3", "--resume", str(tmp_path / "odd.pth")])
    assert "odd.pth" in str(error.value) and word.strip() in str(error.value)


# Numbers


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_that_stay_not_finite(fused):
    """A scaler that leaves out step after step ends the run; one step that is done starts the count
    anew. A fused optimizer leaves them out itself.
    """
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    skips = engine.Skips(optimizer)

    def step(value):
        scaler.scale(weight.sum() * value).backward()
        skips.step(scaler, optimizer)
        scaler.update()
        optimizer.zero_grad()

    for value in [*[math.inf] * (engine.SKIPPED - 1), 1.0, *[math.inf] * (engine.SKIPPED - 1)]:
        step(value)
    assert weight.item() == pytest.approx(0.9)
    with pytest.raises(FloatingPointError, match=r"in \d\d steps in a row"):
        for _ in range(engine.SKIPPED if fused else 1):  # whose count is read now and then
            step(math.inf)
    assert weight.item() == pytest.approx(0.9)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_scale_of_mixed_precision_finds_its_way_down(bad):
    """Gradients that overflow at a large scale cost their steps and nothing else: the weights are
    those of the steps that were done."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], 0.1)
    scaler, skips = torch.amp.GradScaler("cpu", init_scale=2.0**60), engine.Skips(optimizer)
    steps = 0
    while steps < 3:
        before = weight.item()
        scaler.scale(weight.sum()).backward()
        if scaler.get_scale() > 2.0**20:  # as float16 would
            weight.grad.fill_(bad)
        skips.step(scaler, optimizer)
        scaler.update()
        optimizer.zero_grad()
        steps += weight.item() != before
    assert weight.item() == pytest.approx(0.7) and scaler.get_scale() == 2.0**20


def test_a_test_without_a_batch_has_no_rates():
    """As of rank 0, where none of its images can be read."""
    peek = cifar10.firing.Peek([])
    assert not list(peek) and peek.rates(torch.nn.Identity(), None) == {}


def test_an_epoch_without_a_step():
    batches = cifar10.batches.train_batches
    with pytest.raises(
        UserError, match=r"^batch_size 16 is more than the 15 training samples; mak"
    ):
        batches(15, 16, 0, 0, CPU)
    two = copy.copy(CPU)
    two.world_size = 2
    with pytest.raises(UserError, match=r"^batch_size 8 x 2 ranks is more than the 15 training"):
        batches(15, 8, 0, 0, two)
    assert len(batches(15, 5, 0, 0, CPU)) == 3


@pytest.mark.parametrize("name", ["adamw", "lookahead_adamw", "adafactor", "sgd", "novograd"])
def test_steps_of_other_optimizers_count(name):
    from timm.optim import create_optimizer_v2

    model = torch.nn.Linear(2, 2)
    optimizer = create_optimizer_v2(model, name, lr=0.1)
    skips = engine.Skips(optimizer)
    model(torch.ones(1, 2)).sum().backward()
    skips.step(torch.amp.GradScaler("cpu", enabled=False), optimizer)
    assert skips.count == 0
    cifar10.checkpoint.check_optimizer(optimizer, {})


def test_deterministic(tmp_path, monkeypatch):
    """The key makes PyTorch deterministic, and two runs equal to the bit, which plain ones are on a
    CPU.
    """
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # to be put back
    args = [*SMALL, "--batch-size", 512, "--epochs", 1, "--deterministic", "--output", tmp_path]
    try:
        for name in ("a", "b"):
            assert cifar10.train.main([*map(str, args), "--experiment", name]) == 0
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
    one, other = (torch.load(tmp_path / name / "last.pth")["model"] for name in ("a", "b"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_peak_memory_is_in_megabytes(monkeypatch):
    """The system counts KB, macOS bytes."""
    usage = type("Usage", (), {"ru_maxrss": 3 * 2**20})()
    monkeypatch.setattr(runtime.resource, "getrusage", lambda who: usage)
    for platform, want in (("linux", 3 * 2**10), ("darwin", 3)):
        monkeypatch.setattr(sys, "platform", platform)
        assert runtime.peak_memory_mb(torch.device("cpu")) == want


def test_every_folder_has_the_keys():
    for folder in ("cifar10", "cifar100", "dvs128-gesture", "cifar10-dvs", "imagenet"):
        keys = load(folder).options.KEYS
        assert keys["timeout_minutes"].default == 10 and keys["deterministic"].default is False
        assert json.dumps(keys["deterministic"].help)
