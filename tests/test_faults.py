"""Faults of processes, in forks of this one: signals, lost workers and ranks, a second run."""

import ctypes
import logging
import multiprocessing
import os
import resource
import signal
import socket
import time

import pytest
import torch

from conftest import ROOT, on_cpu
from forks import ended, forked, opened, wait_for
from on_digits import SMALL, cifar10

UserError = cifar10.config.UserError
runtime = cifar10.process
Ranks = cifar10.process.Ranks


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
def test_workers_are_deaf_to_signals(method, monkeypatch, tmp_path):
    """All signals that end a run leave its workers alone, however they are started."""
    if method == "forkserver":  # where what a worker is sent has to be importable
        (tmp_path / "qkformer_cifar10").symlink_to(ROOT / "cifar10")
        monkeypatch.syspath_prepend(tmp_path)
    batches = loader(range(12), collate=sum)
    batches.multiprocessing_context = method
    found = iter(batches)
    first = next(found)
    for pid in workers():
        for number in runtime.STOP_SIGNALS:
            os.kill(pid, number)
    assert [first, *found] == [1, 5, 9, 13, 17, 21]


@pytest.mark.parametrize("act", [pytest.param("kill", marks=pytest.mark.long), "shm", "files"])
def test_lost_worker(act):
    """Batches come up to its own; then an error says why, without a wait for it."""

    def too_many():
        """One file more: the memory of the batch; none to send it."""
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, free + 1))

    def full():
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </x>: No space left on device (28)"
        )

    acts = {"kill": lambda: os.kill(os.getpid(), signal.SIGKILL), "shm": full, "files": too_many}
    found, error = [], None
    try:
        for batch in loader(Numbers(4, acts[act])):
            found.append(batch.tolist())
    except cifar10.batches.LostWorker as lost:
        error = str(lost)
    assert found == [[i, i + 1] for i in range(0, 2 * len(found), 2)]
    if act == "files" and error is None:
        return  # a file of another thread's was closed in time, and all batches were sent
    assert "--shm-size" in error and "workers: 0" in error and "\n" not in error and len(found) < 6
    assert act != "kill" or "exited unexpectedly" in error
    assert act != "shm" or "No space" in error


def test_a_run_that_lost_a_worker(tmp_path, monkeypatch):
    """It is saved as of its last step, and the line says how to go on."""
    words = "-c quickstart.yml --dim 16 --num-heads 2 --time-step 1 --img-size 8 --batch-size 128"
    args = on_cpu(
        [*words.split(), "--warmup-epochs", 0, "--workers", 1, "--epochs", 1, "--output", tmp_path]
    )
    make, parent, odd = cifar10.batches.make_batch, os.getpid(), []

    def lost(dataset, collate, key):
        if key in odd and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(dataset, collate, key)

    real = cifar10.batches.train_batches

    def chosen(*call):
        found = real(*call)
        odd[:] = found[5:6] if call[3] == 0 else []
        return found

    monkeypatch.setattr(cifar10.batches, "make_batch", lost)
    monkeypatch.setattr(cifar10.data, "train_batches", chosen)
    with pytest.raises(UserError, match="a worker of the loader was lost") as error:
        cifar10.train.main(args)
    step = torch.load(tmp_path / "quickstart" / "last.pth", weights_only=True)["step"]
    assert 0 < step <= 5 and f"stopped in epoch 0 after step {step}; to go on: " in str(error.value)


@pytest.mark.parametrize("killed", [True, False])
def test_workers_end_with_their_parent(tmp_path, killed):
    """When it is killed, and when it ends while they are at work, without a wait for them."""

    def main():
        found = iter(loader(Numbers(11, lambda: time.sleep(0.3 if killed else 1000))))
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


# Signals, and a compiler


def test_signals_within_a_call_of_c(tmp_path, monkeypatch):
    """The first is only noted, as is what a launcher passes on at once; a later one ends the
    process.
    """
    monkeypatch.setattr(runtime, "SAME_SIGNAL", 1)
    number = signal.SIGUSR1

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
    time.sleep(1.2)
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


def test_a_signal_that_is_ignored_stays_so():
    """As nohup leaves SIGHUP; the others still stop a run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with runtime.StopSignal() as stop:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(lambda: stop)
            assert stop.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_compiler_is_deaf_to_signals(tmp_path, monkeypatch):
    """Kernels that a step asks for first are built although the signal goes to the whole group."""
    slow = tmp_path / "slow"
    slow.write_text(f'#!/bin/sh\ntouch {tmp_path}/ready\nsleep 1\nexec g++ "$@"\n')
    slow.chmod(0o700)
    monkeypatch.setenv("CXX", str(slow))

    def main():
        with runtime.StopSignal() as stop:
            build = cifar10.compiler.Build(torch.float64, 7)  # of no other test
            library = cifar10.compiler.host_library(build)
            return 0 if stop and library.statistics else 1

    pid = forked(main)
    wait_for((tmp_path / "ready").exists)
    os.killpg(pid, signal.SIGTERM)
    assert ended(pid) == 0


def test_kernels_that_do_not_compile_for_a_T(monkeypatch, caplog):
    """Other numbers of steps run fused; this one module by module, with a line, and the same
    result.
    """
    library = cifar10.compiler.host_library

    def broken(build):
        if build.T == 3:
            raise OSError("ptxas ran out of registers")
        return library(build)

    monkeypatch.setattr(cifar10.compiler, "host_library", broken)
    cifar10.compiler.fault.cache_clear()
    cifar10.native.available.cache_clear()
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
            not cifar10.native.available("cpu", torch.float32, "auto", 3)
            and "registers" in caplog.text
        )
        assert cifar10.native.available("cpu", torch.float32, "auto", 2)
    finally:
        cifar10.compiler.fault.cache_clear()
        cifar10.native.available.cache_clear()


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
        cifar10.log.set_up_log(ranks)
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

    one, other = two_ranks(tmp_path, function, timeout_minutes=0.08)
    assert ended(one) == 1
    os.kill(other, signal.SIGKILL)
    ended(other)
    words = {signal.SIGSTOP: "waited timeout_minutes", signal.SIGKILL: "was killed"}[number]
    assert (tmp_path / "rank0").read_text().count("error: ") == 1
    assert (
        words in (tmp_path / "rank0").read_text()
        and "Traceback" not in (tmp_path / "rank0").read_text()
    )


def test_averaged_weights_are_alike_on_all_ranks(tmp_path):
    """Each rank's own start, from a seed of its own, is in no average."""

    def function(ranks):
        cifar10.run.enter = lambda settings: ranks
        flags = [*map(str, SMALL), "--model-ema", "--output", str(tmp_path)]
        settings = cifar10.config.read_settings(cifar10.options, flags)
        trainer = cifar10.train.Trainer(settings, cifar10.data, cifar10.options)
        sums = [
            sum(weight.double().abs().sum().item() for weight in model.parameters())
            for model in (trainer.model, trainer.ema.module)
        ]
        assert len({number for both in ranks.gather(sums) for number in both}) == 1
        return 0

    pids = two_ranks(tmp_path, function)
    assert [ended(pid) for pid in pids] == [0, 0], (tmp_path / "rank0").read_text()


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
    env = {"SLURM_STEP_NODELIST": hosts, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    assert runtime.slurm_ranks(env)["MASTER_ADDR"] == first


# Two runs


def test_two_runs_of_one_name(tmp_path):
    """The second gets a number; to go on beside the live one is an error, until that
    one is killed.
    """

    def main():
        assert opened(tmp_path)[0].name == "a"
        found = iter(loader(Numbers(11, lambda: time.sleep(1))))  # workers have no part in the lock
        next(found)
        (tmp_path / "ready").touch()
        signal.pause()

    pid = forked(main)
    wait_for((tmp_path / "ready").exists)
    assert opened(tmp_path)[0].name == "a-2"
    with pytest.raises(UserError, match="in use by another run"):
        opened(tmp_path, resume="auto")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "args.yaml").write_text("experiment: a\n")
    (tmp_path / "a" / "last.pth").touch()
    with pytest.raises(UserError, match="in use by another run"):
        opened(tmp_path, resume="auto")
    with pytest.raises(UserError, match="in use"):
        opened(tmp_path, resume=str(tmp_path / "a" / "last.pth"))
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    assert opened(tmp_path, resume="auto")[0].name == "a"
