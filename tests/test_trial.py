"""The trial of runs: killed and signalled at random moments, in every folder, again and again.

    TRIAL=100 python -m pytest -n 0 -s -m long tests/test_trial.py

TRIAL is how often each fault is provoked (default 2), SEED where the moments start (default 0). A
line for each folder and fault says how often it struck, and how the run ended. docs/faults.md has a
table of them.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import log_of, same, script, start, weights_of
from on_digits import RANDOM, cifar10
from on_events import SMALL, write

pytestmark = pytest.mark.long
COUNT, SEED = int(os.environ.get("TRIAL", 2)), int(os.environ.get("SEED", 0))
SIGNALS = cifar10.runtime.STOP_SIGNALS
FOLDERS = ("cifar10", "cifar100", "dvs128-gesture", "cifar10-dvs", "imagenet")


class Trial:
    """Runs of one folder, which are to end as a whole one that nothing befell."""

    def __init__(self, folder, place, narrow):
        self.folder, self.place, self.struck, self.saved = folder, place, 0, 0
        self.random, self.output = random.Random(f"{SEED} {place}"), "--output"
        if folder.startswith("cifar1") and folder != "cifar10-dvs":
            self.args = [*RANDOM, "--epochs", 2]
        elif folder == "imagenet":
            mixing = ["--mixup", 0.5, "--drop_path", 0.2, "--reprob", 0.5, "--save_minutes", 1e-6]
            self.args = [
                *narrow,
                *mixing,
                "--batch_size",
                8,
                "--epochs",
                2,
                "--num_workers",
                1,
                "--log_interval",
                1,
            ]
            self.output = "--output_dir"
        else:  # conversion included: each run starts from recordings
            self.output = "--output-dir"
            self.args = [
                *SMALL,
                "--epochs",
                2,
                "--warmup-epochs",
                0,
                "--cooldown-epochs",
                0,
                "--batch-size",
                8,
            ]
            self.args += ["--T-train", 1, "--drop-path", 0.2, "--workers", 1]

    def arguments(self, name):
        data = self.place / name
        if "dvs" in self.folder and not data.exists():
            write(
                self.folder,
                data,
                **({"samples": 10} if self.folder == "cifar10-dvs" else {"trials": 1}),
            )
        path = ["--data-path", data] if "dvs" in self.folder else []
        return [
            *self.args,
            *path,
            self.output,
            self.place / "out",
            "--experiment",
            name,
            "--resume",
            "auto",
        ]

    def whole(self, ranks=1):
        """Seconds that the run takes which nothing befalls."""
        begin = time.monotonic()
        script(self.folder, "train", *self.arguments("whole"), ranks=ranks, timeout=3600)
        return time.monotonic() - begin

    def strike(self, seconds, act, ranks=1):
        """Start the run, or go on with it, and act(process) at a random moment; its output."""
        process = start(self.folder, *self.arguments("tried"), ranks=ranks)
        with contextlib.suppress(Exception):
            process.wait(self.random.uniform(0, seconds))
        if process.poll() is None:
            self.struck += 1
            act(process)
        try:
            output = process.communicate(timeout=600)[0]
        finally:
            for pid in descendants(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.saved += "goes on from there" in output
        assert "Traceback" not in output.split("torch/distributed")[0], output
        return output

    def end(self, ranks=1):
        script(self.folder, "train", *self.arguments("tried"), ranks=ranks, timeout=3600)
        one, other = (self.place / "out" / name for name in ("whole", "tried"))
        assert not (self.place / "out" / "tried-2").exists()
        assert log_of(one) == log_of(other)
        for name in ("last.pth", "best.pth"):
            assert same(weights_of(one / name), weights_of(other / name)), name
        assert points(one) == points(other)


def points(folder):
    """{curve: [(x, value)]} of a run's losses and accuracies in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for path in (folder, folder / "steps"):
        board = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for name in board.Tags()["scalars"]:
            if name.startswith(("step/", "loss/", "accuracy/", "lr/")):
                found[name] = [(point.step, point.value) for point in board.Scalars(name)]
    assert found
    return found


def descendants(pid):
    """Those of a process, without itself, the nearest first."""
    with contextlib.suppress(OSError):
        children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return [below for child in children for below in (child, *descendants(child))]
    return []


def kill(process):
    """SIGKILL to a run and whatever it started."""
    for pid in (process.pid, *descendants(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def report(trial, fault):
    print(f"\n| {trial.folder} | {fault} | {trial.struck} | {trial.saved} |", end="")


@pytest.fixture(params=FOLDERS)
def trial(request, tmp_path, narrow):
    return Trial(request.param, tmp_path, narrow)


def test_killed(trial):
    seconds = trial.whole()
    for _ in range(COUNT):
        trial.strike(seconds, kill)
    trial.end()
    report(trial, "SIGKILL")


@pytest.mark.parametrize("target", ["process", "group"])
def test_signals(trial, target):
    send = os.kill if target == "process" else os.killpg
    seconds = trial.whole()
    for number in SIGNALS * COUNT:
        trial.strike(seconds, lambda process, number=number: send(process.pid, number))
    trial.end()
    report(trial, f"SIGINT, SIGTERM, SIGHUP, SIGUSR1 to the {target}")


def test_signals_to_the_launcher(tmp_path, narrow):
    trial = Trial("cifar10", tmp_path, narrow)
    seconds = trial.whole(ranks=2)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) * COUNT:
        trial.strike(seconds, lambda process, number=number: process.send_signal(number), ranks=2)
    trial.end(ranks=2)
    report(trial, "SIGINT, SIGTERM, SIGHUP to torchrun, 2 ranks")


def test_one_of_two_ranks_killed(tmp_path, narrow):
    trial = Trial("cifar10", tmp_path, narrow)

    def kill_one(process):
        if ranks := descendants(process.pid)[:2]:
            os.kill(trial.random.choice(ranks), signal.SIGKILL)

    seconds = trial.whole(ranks=2)
    for _ in range(COUNT):
        trial.strike(seconds, kill_one, ranks=2)
    trial.end(ranks=2)
    report(trial, "SIGKILL to one of 2 ranks")


def test_worker_killed(tmp_path, narrow):
    trial = Trial("cifar10", tmp_path, narrow)

    def kill_worker(process):
        for pid in descendants(process.pid)[:1]:
            os.kill(pid, signal.SIGKILL)

    seconds = trial.whole()
    for _ in range(COUNT):
        trial.strike(seconds, kill_worker)
    trial.end()
    report(trial, "SIGKILL to a loader worker")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small /dev/shm, which takes root")
def test_small_shared_memory(tmp_path, narrow):
    """As in a container without --shm-size: a line and an end, not a wait without one."""
    mount = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$0" "$@"'
    trial = Trial("cifar10", tmp_path, narrow)
    args = [
        "unshare",
        "-m",
        "sh",
        "-c",
        mount,
        sys.executable,
        "train.py",
        *map(str, trial.arguments("small")),
    ]
    done = subprocess.run(
        args, cwd=cifar10.config.HERE, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr, (
        done.stdout + done.stderr
    )
    assert "--shm-size" in done.stdout and done.stderr.count("error: ") == 1
    assert torch.load(tmp_path / "out" / "small" / "last.pth", weights_only=True)["step"] >= 0
    trial.struck = 1
    report(trial, "/dev/shm of 64 KB")
