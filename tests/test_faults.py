"""Faults around a run, in this process or its forks: signals, lost workers and ranks, full disks,
a second run, odd checkpoints."""

import copy
import ctypes
import json
import logging
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import load
from on_digits import SMALL, cifar10, resolve

UserError = cifar10.config.UserError
runs, runtime, engine = cifar10.runs, cifar10.runtime, cifar10.engine
Ranks, first_host = cifar10.ranks.Ranks, cifar10.ranks.first_host


def forked(function, output=None):
    """Start function() in a fork of this process, in a group of its own; returns its pid."""
    if pid := os.fork():
        return pid
    code = 99
    try:
        os.setpgid(0, 0)
        if output:
            file = os.open(output, os.O_WRONLY | os.O_CREAT)
            os.dup2(file, 1), os.dup2(file, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        code = function() or 0
    except SystemExit as error:
        code = error.code
    finally:
        os._exit(code)


def ended(pid, seconds=300):
    """The fork's exit code, or minus the signal that ended it; it has to end by itself."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("it did not end")


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.005)


# Loader workers


class Numbers(torch.utils.data.Dataset):
    """Sample i is i; at one of them, a worker does as it is told."""

    def __init__(self, odd=None, act=None):
        self.odd, self.act, self.parent = odd, act, os.getpid()

    def __getitem__(self, index):
        if index == self.odd and os.getpid() != self.parent:
            self.act()
        return torch.tensor([index])

    def __len__(self):
        return 12


def loader(dataset, collate=torch.cat):
    """Batches of two, made by two workers."""
    batches = [([i, i + 1], i) for i in range(0, len(dataset), 2)]
    return cifar10.batches.BatchLoader(dataset, collate, batches, 2, False)


def workers():
    return {child.pid for child in multiprocessing.active_children()}


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_are_deaf_to_signals(method, monkeypatch):
    """All signals that end a run leave its workers alone, however they are started."""
    if method == "forkserver":  # where what a worker is sent has to be importable
        monkeypatch.setitem(sys.modules, "batches", cifar10.batches)
        monkeypatch.syspath_prepend(str(cifar10.config.HERE))
    batches = loader(range(12), collate=sum)
    batches.multiprocessing_context = method
    found = iter(batches)
    first = next(found)
    for pid in workers():
        for number in runtime.STOP_SIGNALS:
            os.kill(pid, number)
    assert [first, *found] == [1, 5, 9, 13, 17, 21] and batches.fault is None


@pytest.mark.parametrize("act", ["kill", "shm"])
def test_lost_worker(act, caplog):
    """Its batch and all later ones are made by this process; the fault says why."""

    def full():
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </x>: No space left on device (28)"
        )

    acts = {"kill": lambda: os.kill(os.getpid(), signal.SIGKILL), "shm": full}
    batches = loader(Numbers(4, acts[act]))
    assert [batch.tolist() for batch in batches] == [[i, i + 1] for i in range(0, 12, 2)]
    assert {"kill": "exited unexpectedly", "shm": "No space left"}[act] in batches.fault
    assert "--shm-size" in caplog.text and "workers: 0" in caplog.text


@pytest.mark.parametrize("killed", [True, False])
def test_workers_end_with_their_parent(tmp_path, killed):
    """When it is killed, and when it ends while they are at work, which does not wait for them."""

    def main():
        found = iter(loader(Numbers(11, lambda: time.sleep(1 if killed else 1000))))
        next(found)
        (tmp_path / "pids").write_text(" ".join(map(str, workers())))
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        cifar10.batches.end_workers()
        multiprocessing.util._exit_function()

    assert ended(forked(main)) == (-signal.SIGKILL if killed else 0)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_within_a_call_of_c(tmp_path, monkeypatch, number):
    """The first is only noted, as is what a launcher passes on at once; a later one ends the
    process.
    """
    monkeypatch.setattr(runtime, "SAME_SIGNAL", 3)

    def main():
        with runtime.StopSignal() as stop:
            stop.__class__ = type("Told", (runtime.StopSignal,), {"__setattr__": told})
            (tmp_path / "ready").touch()
            mutex = ctypes.create_string_buffer(64)
            for _ in range(2):  # the second time without end
                ctypes.CDLL(None).pthread_mutex_lock(mutex)

    def told(stop, name, value):
        (tmp_path / "number").write_text(str(value))
        object.__setattr__(stop, name, value)

    pid = forked(main)
    wait_for((tmp_path / "ready").exists)
    os.kill(pid, number)
    wait_for((tmp_path / "number").exists)
    os.kill(pid, number)
    time.sleep(3.2)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0) and (tmp_path / "number").read_text() == str(
        int(number)
    )
    os.kill(pid, number)
    assert ended(pid) == 128 + number


def test_signal_handlers_are_put_back():
    before = [signal.getsignal(number) for number in runtime.STOP_SIGNALS]
    with runtime.StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        wait_for(lambda: stop)
        assert stop.number == signal.SIGHUP
    assert [signal.getsignal(number) for number in runtime.STOP_SIGNALS] == before


# Ranks


def two_ranks(tmp_path, function, timeout_minutes=10):
    """Two forks that are ranks of one run, function(ranks) in each; their pids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def main(rank):
        place = {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update(place)
        ranks = Ranks("cpu", timeout_minutes)
        runtime.set_up_log(ranks)
        runtime.run(lambda: function(ranks))

    return [forked(lambda rank=rank: main(rank), tmp_path / f"rank{rank}") for rank in (0, 1)]


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_lost_rank(tmp_path, number):
    """Of a rank that is stopped or killed, the other one says so in a line, within
    timeout_minutes.
    """

    def function(ranks):
        ranks.sum(torch.ones(1))
        if ranks.rank == 1:
            os.kill(os.getpid(), number)
        ranks.sum(torch.ones(1))

    one, other = two_ranks(tmp_path, function, timeout_minutes=0.25)
    assert ended(one) == 1
    os.kill(other, signal.SIGKILL)
    ended(other)
    words = {signal.SIGSTOP: "waited timeout_minutes", signal.SIGKILL: "was killed"}[number]
    assert (tmp_path / "rank0").read_text().count("error: ") == 1
    assert (
        words in (tmp_path / "rank0").read_text()
        and "Traceback" not in (tmp_path / "rank0").read_text()
    )


def test_a_rank_says_what_it_waits_for(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10.ranks, "FIRST_WORD", 0.05)
    pids = two_ranks(
        tmp_path, lambda ranks: ranks.from_main(lambda: time.sleep(1), "makes frames") or 0
    )
    assert [ended(pid) for pid in pids] == [0, 0]
    assert "rank 1 waits for rank 0, which makes frames" in (tmp_path / "rank1").read_text()


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("r[1-2]i0n[0-3]", "r1i0n0"),
        ("gpu[01-04].cluster", "gpu01.cluster"),
        ("n[1,3]-ib", "n1-ib"),
        ("a1,b2", "a1"),
        ("login,n[1-3]", "login"),
        ("n[1-3,7],login", "n1"),
        ("10.0.0.7", "10.0.0.7"),
    ],
)
def test_first_host_of_a_list(hosts, first):
    assert first_host(hosts) == first


# Folders, logs and curves


def opened(tmp_path, **settings):
    cfg = resolve("--output", tmp_path, "--experiment", "a")
    vars(cfg).update(settings)
    return runs.open_run(cfg, cfg.output)[0].name


def test_two_runs_of_one_name(tmp_path):
    """The second gets a number; to go on beside the live one is an error, until that
    one is killed.
    """

    def main():
        assert opened(tmp_path) == "a"
        found = iter(loader(Numbers(11, lambda: time.sleep(3))))  # workers have no part in the lock
        next(found)
        (tmp_path / "ready").touch()
        signal.pause()

    pid = forked(main)
    wait_for((tmp_path / "ready").exists)
    assert opened(tmp_path) == "a-2"
    with pytest.raises(UserError, match="in use by another run"):
        opened(tmp_path, resume="auto")
    (tmp_path / "a" / "args.yaml").write_text("experiment: a\n")
    with pytest.raises(UserError, match="in use by another run"):
        opened(tmp_path, resume="auto")
    (tmp_path / "a" / "last.pth").touch()
    with pytest.raises(UserError, match="in use"):
        opened(tmp_path, resume=str(tmp_path / "a" / "last.pth"))
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    assert opened(tmp_path, resume="auto") == "a"


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
        runtime.set_up_log(Ranks("cpu"))
        runtime.logger.info(f"writing to {folder}")

    assert ended(forked(main, tmp_path / "out")) == 0
    assert (tmp_path / "out").read_text() == f"writing to {tmp_path}/run-\\udcff\n"


def test_faults_of_the_machine_are_a_line():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**55, dtype=torch.uint8)
    assert "not enough memory" in runtime.explain(error.value)
    assert "not enough memory" in runtime.explain(MemoryError())
    assert "not enough GPU memory" in runtime.explain(
        torch.OutOfMemoryError("CUDA out of memory. Tried")
    )
    assert "ulimit -n" in runtime.explain(OSError(24, "Too many open files"))
    assert (
        runtime.explain(OSError(30, "Read-only file system", "/x/y"))
        == "/x/y: Read-only file system"
    )
    assert (
        runtime.explain(RuntimeError("shapes differ")) is None
        and runtime.explain(KeyError("a")) is None
    )


# Checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint in the middle of an epoch."""
    output = tmp_path_factory.mktemp("trained")
    args = [
        *map(
            str,
            [*SMALL, "--batch-size", 512, "--model-ema", "--output", output, "--experiment", "run"],
        )
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


def test_gradients_that_stay_not_finite():
    """A scaler that leaves out step after step ends the run; one step that is done starts the count
    anew.
    """
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer, scaler = torch.optim.SGD([weight], 0.1), torch.amp.GradScaler("cpu")
    skips = engine.Skips(optimizer)

    def step(value):
        scaler.scale(weight.sum() * value).backward()
        skips.step(scaler, optimizer)
        scaler.update()
        optimizer.zero_grad()

    for value in [*[math.inf] * (engine.SKIPPED - 1), 1.0, *[math.inf] * (engine.SKIPPED - 1)]:
        step(value)
    assert weight.item() == pytest.approx(0.9)
    with pytest.raises(FloatingPointError, match=f"in {engine.SKIPPED} steps in a row"):
        step(math.inf)


@pytest.mark.parametrize("name", ["adamw", "lookahead_adamw", "adafactor", "sgd"])
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


def test_kernels_that_do_not_compile_for_a_T(monkeypatch, caplog):
    """Other numbers of steps run fused; this one module by module, with a line, and the same
    result.
    """
    library = cifar10.kernels.host_library

    def broken(build):
        if build.T == 3:
            raise OSError("ptxas ran out of registers")
        return library(build)

    monkeypatch.setattr(cifar10.kernels, "host_library", broken)
    cifar10.kernels.host_error.cache_clear()
    caplog.set_level(logging.INFO)
    try:
        model = cifar10.model.QKFormer(
            T=3, img_size_h=16, img_size_w=16, embed_dims=16, num_heads=2, depths=3
        ).eval()
        x = torch.rand(2, 3, 16, 16)
        with torch.no_grad():
            found = model(x)
            model.apply(
                lambda module: setattr(module, "fused", False) if hasattr(module, "fused") else None
            )
            assert torch.equal(found, model(x)) or torch.allclose(found, model(x), atol=1e-5)
        assert (
            not cifar10.kernels.available("cpu", torch.float32, "auto", 3)
            and "registers" in caplog.text
        )
        assert cifar10.kernels.available("cpu", torch.float32, "auto", 2)
    finally:
        cifar10.kernels.host_error.cache_clear()


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
