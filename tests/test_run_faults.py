"""Faults of a run's files and numbers: full disks, any clock, odd checkpoints."""

import copy
import math
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT
from forks import ended, forked, opened
from on_digits import CPU, cifar10, resolve

UserError = cifar10.config.UserError
runs, runtime, engine = cifar10.folder, cifar10.process, cifar10.meters
read_settings = cifar10.config.read_settings
NARROW = (
    "-c quickstart.yml --dim 16 --num-heads 2 --time-step 1 --img-size 8 --batch-size 512 "
    "--warmup-epochs 0 --device cpu"
).split()


# Folders, logs and curves


def make(folder, age, **content):
    """A run's folder with two checkpoints that were written `age` seconds before another's."""
    folder.mkdir()
    (folder / "args.yaml").write_text(f"experiment: {content.pop('experiment', 'a')}\n")
    for name in ("best.pth", "last.pth"):
        torch.save({"model": {"w": torch.ones(3)}, **content}, folder / name)
        os.utime(folder / name, (10**9 - age, 10**9 - age))


def test_tested_is_the_run_written_last(tmp_path):
    """Also beside a longer one that is older; or the one that is named in one of three ways."""

    def found(*flags):
        settings = read_settings(cifar10.options, [*map(str, flags)], "test")
        return runs.find_checkpoint(settings).relative_to(tmp_path)

    make(tmp_path / "short", 0, epoch=2)
    make(tmp_path / "long", 1, epoch=9, experiment="of-a-name")
    output, long = ("--output", tmp_path), tmp_path / "long"
    assert str(found(*output)) == "short/best.pth"
    for flags in (["--checkpoint", long / "best.pth"], ["-c", long / "args.yaml"]):
        assert str(found(*output, *flags)) == "long/best.pth"
    assert str(found(*output, "--experiment", "of-a-name")) == "long/best.pth"
    with pytest.raises(UserError, match=f"no best.pth under {long}"):
        found("--output", long)
    with pytest.raises(UserError, match=r"no best\.pth of b under"):
        found(*output, "--experiment", "b")


@pytest.mark.parametrize("left", ["", "dataset: digits\ndim: 16\n", "dataset: [digits"])
def test_a_damaged_args_yaml(tmp_path, left):
    """The run behind it is still one of its experiment."""
    make(tmp_path / "a", 1)
    make(tmp_path / "a-2", 0)
    (tmp_path / "a-2" / "args.yaml").write_text(left)
    assert opened(tmp_path, resume="auto")[1] == tmp_path / "a-2" / "last.pth"


def test_the_run_to_go_on_with_is_the_one_written_last(tmp_path):
    """Of one experiment; of all where none is named."""
    for age, name in enumerate("abc"):
        make(tmp_path / name, age)
    make(tmp_path / "e", -1, experiment="e")

    def found(**settings):
        return opened(tmp_path, resume="auto", **settings)[1].parent.name

    assert found() == "a" and found(experiment="e") == "e"
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "b" / "last.pth").write_bytes(b"damaged")
    assert found() == "b"  # so that an error names it


def test_curves_after_kills(tmp_path, monkeypatch):
    """A run killed between any two points has each of them once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    clock, first = time.time(), 0
    for done in (4, 4, 9, 7, 12):
        monkeypatch.setattr(time, "time", lambda now=clock: now)
        log, clock = runs.RunLog(tmp_path, first // 3, first), clock + 10
        for step in range(first, done):
            log.step("step/loss", math.sqrt(step), step)
            if step % 3 == 2:
                log.epoch({"epoch": step // 3, "lr": float(step)})
                log.flush()
        first = done // 3 * 3  # of the checkpoint that it goes on from
    curves = [EventAccumulator(str(path)).Reload() for path in (tmp_path / "steps", tmp_path)]
    points = curves[0].Scalars("step/loss")
    assert [point.step for point in points] == list(range(12))
    assert [point.value for point in points] == pytest.approx(
        [math.sqrt(step) for step in range(12)]
    )
    assert [(point.step, point.value) for point in curves[1].Scalars("epoch/lr")] == [
        (0, 2),
        (1, 5),
        (2, 8),
        (3, 11),
    ]


def test_full_disk(tmp_path, monkeypatch):
    """A line that names the folder."""

    def opening(path, mode, **kwargs):
        return open("/dev/full" if path.name == "log.txt" else path, mode, **kwargs)

    monkeypatch.setattr(runs, "open", opening, raising=False)
    with pytest.raises(UserError, match=f"{tmp_path}: can't be written: No space left"):
        runs.RunLog(tmp_path, 0, 0).epoch({"epoch": 0, "lr": 0.1})


def test_names_of_any_bytes(tmp_path, capfd):
    """A folder and a class whose names are no UTF-8."""
    folder = tmp_path / os.fsdecode(b"run-\xff")
    folder.mkdir()
    config = {**vars(resolve()), "output": str(folder)}
    runs.write_args(folder, config, (os.fsdecode(b"\xe4rger"), "b"))
    assert runs.read_args(folder) == config
    assert (folder / "classes.txt").read_bytes() == b"\xe4rger\nb\n"
    state = {"model": {"w": torch.ones(1)}, "config": config}
    cifar10.checkpoint.save_checkpoint(state, folder / "last.pth")
    read = cifar10.checkpoint.load_checkpoint(folder / "last.pth")
    assert str(read["config"]["output"]) == str(folder)

    def main():
        cifar10.log.set_up_log(CPU)
        cifar10.log.logger.info(f"writing to {folder}")

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
    assert "Too many open files" in runtime.explain(OSError(24, "Too many open files"))
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
from harness.process import run

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
    words = "--model-ema --dist-bn reduce --experiment run --output"
    args = [*NARROW, *words.split(), str(output)]
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
    "statistics": lambda c: c["rng"][0].update(statistics=[torch.tensor(math.nan)]),
    "rng  ": lambda c: c["rng"][0].update(statistics=3),
    "given": lambda c: c.update(given={"yml": 3}),
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
    """A scaler that leaves out step after step ends the run, at the epoch's end; some are usual."""
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
    scaler, before = torch.amp.GradScaler("cpu"), model.weight.item()
    run = SimpleNamespace(model=model, scaler=scaler, meter=SimpleNamespace(steps=7))
    for step in range(60):
        scaler.scale(model.weight.sum() * math.inf).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 30:
            cifar10.run.Run.check_weights(run)
    assert model.weight.item() == before
    with pytest.raises(FloatingPointError, match="gradients are not finite any more at step 7"):
        cifar10.run.Run.check_weights(run)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_scale_of_mixed_precision_finds_its_way_down(bad):
    """Gradients that overflow at a large scale cost their steps and nothing else: the weights are
    those of the steps that were done."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    steps = 0
    while steps < 3:
        before = weight.item()
        scaler.scale(weight.sum()).backward()
        if scaler.get_scale() > 2.0**20:  # as float16 would
            weight.grad.fill_(bad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        steps += weight.item() != before
    assert weight.item() == pytest.approx(0.7) and scaler.get_scale() == 2.0**20


def test_an_epoch_without_a_step(tmp_path):
    args = [*NARROW, "--output", str(tmp_path)]
    with pytest.raises(UserError, match=r"^batch_size 1438 is more than the 1437 training samples"):
        cifar10.train.main([*args, "--batch-size", "1438"])


@pytest.mark.parametrize("name", ["adamw", "lookahead_adamw", "adafactor", "sgd", "novograd"])
def test_states_of_other_optimizers(name):
    from timm.optim import create_optimizer_v2

    model = torch.nn.Linear(2, 2)
    optimizer = create_optimizer_v2(model, name, lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    cifar10.checkpoint.check_optimizer(optimizer)


def test_deterministic(tmp_path, monkeypatch):
    """The key makes PyTorch deterministic, and two runs equal to the bit, which plain ones are on a
    CPU.
    """
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # to be put back
    args = [*NARROW, "--epochs", "1", "--deterministic", "--output", str(tmp_path)]
    try:
        for name in ("a", "b"):
            assert cifar10.train.main([*args, "--experiment", name]) == 0
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
    one, other = (torch.load(tmp_path / name / "last.pth")["model"] for name in ("a", "b"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_peak_memory_is_in_megabytes(monkeypatch):
    """The system counts KB, macOS bytes."""
    usage = type("Usage", (), {"ru_maxrss": 3 * 2**20})()
    monkeypatch.setattr(engine.resource, "getrusage", lambda who: usage)
    for platform, want in (("linux", 3 * 2**10), ("darwin", 3)):
        monkeypatch.setattr(sys, "platform", platform)
        assert engine.peak_memory_mb(torch.device("cpu")) == want


def test_ranks_read_a_stop_at_the_same_steps(monkeypatch):
    """A line that one rank's clock asks for leaves the meter alone, which may hold a stop."""
    monkeypatch.setattr(cifar10.meters, "SECONDS", -1)
    flushed, names = [], {"epoch": 0, "num_epochs": 1, "steps": 6, "global_batch": 1}
    names["cfg"] = SimpleNamespace(log_interval=4)
    meter = SimpleNamespace(steps=0, mean=0.0, flush=lambda: flushed.append(step))
    run = SimpleNamespace(**names, samples="images", meter=meter, ranks=CPU)
    progress = cifar10.meters.Progress(run)
    for step in range(1, 7):
        progress.show(step, 0.1)
    assert flushed == [1, 4, 6]


def test_half_written_files_of_a_killed_run(tmp_path):
    """They hinder no later one, and do not pile up."""
    for name in ("last.pth", "log.txt"):
        (tmp_path / f".{name}.tmp").write_bytes(b"half")
    cifar10.checkpoint.save_checkpoint({"epoch": 1}, tmp_path / "last.pth")
    cifar10.folder.write_whole(tmp_path / "log.txt", b"whole")
    assert {path.name for path in tmp_path.iterdir()} == {"last.pth", "log.txt"}
    assert torch.load(tmp_path / "last.pth") == {"epoch": 1}
    assert (tmp_path / "log.txt").read_bytes() == b"whole"


def test_ctrl_c_while_a_fault_is_told(monkeypatch):
    """As where torchrun passes Ctrl-C on, and another rank has ended already."""

    def explain(error):
        raise KeyboardInterrupt

    monkeypatch.setattr(cifar10.process, "explain", explain)
    with pytest.raises(SystemExit) as end:
        cifar10.process.run(lambda: 1 / 0)
    assert end.value.code == 130
