"""The trial of runs: killed and signalled at random moments, in every folder, again and again.

    TRIAL=100 python -m pytest -n 0 -s -m long tests/test_trial.py

TRIAL is how often a run is killed in each folder (default 5); each signal, and each fault of two
ranks or a worker, strikes a fifth as often. SEED is where the moments start (default 0). A line for
each folder and fault says how often it struck and what came of it; docs/faults.md has a table.
"""

import contextlib
import functools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import ROOT, Fork, environment, log_of, on_cpu
from forks import equal
from on_digits import cifar10
from on_events import write

pytestmark = pytest.mark.long
KILLS, SEED = int(os.environ.get("TRIAL", 5)), int(os.environ.get("SEED", 0))
FEW = max(KILLS // 5, 1)
SIGNALS = cifar10.process.STOP_SIGNALS
FOLDERS = ("cifar10", "cifar100", "dvs128-gesture", "cifar10-dvs", "imagenet")


class Launched:
    """A run of two ranks, by torchrun."""

    def __init__(self, folder, flags, output):
        numbers = ",".join(signal.Signals(number).name for number in SIGNALS)
        launcher = ["--standalone", "--nproc_per_node=2", f"--signals-to-handle={numbers}"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *launcher, "train.py", *flags],
            cwd=ROOT / folder,
            env=environment(),
            stdout=open(output, "w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.pid, self.pids = self.process.pid, [self.process.pid]

    def wait(self, seconds):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None


# Small models with randomness in every place, in a worker and in the main process.
COMMON = (
    "--epochs 2 --drop_path 0.2 --workers 1 --log_interval 1 --timeout_minutes 1 --resume auto "
)
CIFAR = "-c quickstart.yml --dim 16 --num_heads 2 --time_step 1 --img_size 8 --batch_size 128 "
FLAGS = {
    "cifar1": COMMON + CIFAR + "--mixup 0.5 --hflip 0.5 --reprob 0.5",
    "dvs": COMMON + "--T 2 --T_train 1 --dim 16 --num_heads 2 --batch_size 8 "
    "--warmup_epochs 0 --cooldown_epochs 0",
    "imagenet": COMMON + "--time_step 1 --batch_size 16 --mixup 0.5 --reprob 0.5 "
    "--save_minutes 1e-6",
}


class Trial:
    """Runs of one folder that are struck until they end, each as the one that nothing befell."""

    def __init__(self, folder, place, narrow, maker=Fork):
        self.folder, self.place, self.maker = folder, place, maker
        self.random = random.Random(f"{SEED} {folder} {place.name}")
        self.starts = self.struck = self.saved = self.round = 0
        self.reached, self.per_epoch, self.lost, self.wrong = (0, 0), 1, [], []
        self.flags = FLAGS["dvs" if "dvs" in folder else folder.rstrip("0")].split()
        if folder == "imagenet":
            self.flags += narrow
        elif "dvs" in folder:  # conversion included: each run starts from recordings
            number = {"samples": 10} if folder == "cifar10-dvs" else {"trials": 1}
            write(folder, place / "recordings", **number)
        self.flags += ["--output", place / "out", "--experiment"]
        for name in ("whole", "again"):  # again without compiler
            process, output = self.start(name)
            while (code := process.wait(0.005)) is None and not size(output):
                begin = time.monotonic()
            while code is None and not done(output):
                code = process.wait(0.005)
            self.seconds = time.monotonic() - begin
            assert (process.wait(3600) if code is None else code) == 0, output.read_text()
        self.compare("again")

    def start(self, name):
        """A run begins, or goes on. Returns (process, the file that its output goes to)."""
        self.starts += 1
        flags, output = [*self.flags, name], self.place / f"{self.starts}.txt"
        if "dvs" in self.folder:
            data = self.place / f"data-{name}"
            if not data.exists():
                shutil.copytree(self.place / "recordings", data)
            flags += ["--data-path", data]
        return self.maker(self.folder, on_cpu(flags), output), output

    def strike(self, act, *numbers):
        """Start the run, or go on with it, and act(process) at a random moment, which ends it with
        one of the signals `numbers` or in a line.
        """
        name = f"tried{self.round}"
        process, output = self.start(name)
        if self.random.random() < 0.9:  # else while it starts, too
            while (code := process.wait(0.005)) is None and not size(output):
                pass
        code = process.wait(self.random.uniform(0, self.seconds))
        struck = code is None and not done(output) and act(process) is not False
        self.struck += struck
        if code is None and (code := process.wait(300)) is None:
            self.wrong.append(f"it did not end\n{output.read_text()}")
            kill(process)
        self.judge(output.read_text(), code, numbers if struck else ())
        if code == 0:
            self.compare(name)
            self.round, self.reached = self.round + 1, (0, 0)

    def judge(self, text, code, numbers):
        """Of what a run said: no traceback but torchrun's own, and no step lost by a signal that
        can be heard.
        """
        for block in text.split("Traceback (most recent call last)")[1:]:
            if "torch/distributed/run.py" not in block:
                self.wrong.append(f"traceback\n{text}")
        if code not in {0, 1, *(-number for number in numbers), *(128 + n for n in numbers)}:
            self.wrong.append(f"exit code {code}\n{text}")
        shown = re.findall(r"^epoch (\d+), step (\d+)/(\d+)", text, re.MULTILINE)
        resumed = re.search(r"at epoch (\d+), step (\d+)$", text, re.MULTILINE)
        stopped = re.search(r"stopped in epoch (\d+) after step (\d+)", text)
        if shown:
            self.per_epoch = int(shown[0][2])
        if shown or resumed:
            self.lost.append(
                self.steps(self.reached) - self.steps(resumed.groups() if resumed else (0, 0))
            )
        for place in (*shown[-1:], *([stopped.groups()] if stopped else [])):
            self.reached = place
        self.saved += bool(stopped)

    def steps(self, place):
        """Steps of the run up to (epoch, step)."""
        return int(place[0]) * self.per_epoch + int(place[1])

    def end(self, fault, most=None):
        """The last run comes to its end. A line says what there was; `most` steps may be lost."""
        while not self.round or (self.place / "out" / f"tried{self.round}").exists():
            self.strike(lambda process: False)
        lost = max(self.lost, default=0)
        columns = self.folder, fault, self.struck, self.round, self.saved, lost, len(self.wrong)
        print("\n|", *(f"{column} |" for column in columns), end="", flush=True)
        if most is not None and lost > most:
            self.wrong.append(f"{lost} steps lost")
        assert not self.wrong, "\n\n".join(self.wrong)
        assert not [path.name for path in (self.place / "out").iterdir() if "-" in path.name]

    def compare(self, name):
        """To the bit: log, curves, weights, optimizer, random state, events and frames."""
        one, other = (self.place / "out" / name for name in ("whole", name))
        if log_of(one) != log_of(other) or points(one) != points(other):
            self.wrong.append(f"log or curves of {other} differ")
        for name in ("last.pth", "best.pth"):
            contents = [torch.load(path / name, weights_only=True) for path in (one, other)]
            if not equal(*({**content, "config": 0, "given": 0} for content in contents)):
                self.wrong.append(f"{other / name} differs")
        if "dvs" in self.folder:
            whole, made = (self.place / f"data-{path.name}" for path in (one, other))
            if contents_of(whole) != contents_of(made):
                self.wrong.append(f"what was converted for {other} differs")
            shutil.rmtree(made)


def contents_of(folder):
    """{path: its content} of all files in a folder but what conversion leaves for the next one."""
    files = (path for path in folder.glob("[!.]*/**/*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def points(folder):
    """{curve: [(x, value)]} of a run's losses and accuracies in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for path in (folder, folder / "steps"):
        board = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for name in board.Tags()["scalars"]:
            if not name.endswith(("seconds", "_per_second", "_mb")):
                found[name] = [(point.step, point.value) for point in board.Scalars(name)]
    assert found
    return found


def size(path):
    return path.exists() and path.stat().st_size


def done(output):
    """Whether a run has trained and saved all that it had to."""
    return size(output) and "\nbest top-1" in output.read_text()


def children(pid):
    with contextlib.suppress(OSError):
        return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    return []


def descendants(pid):
    return [below for child in children(pid) for below in (child, *descendants(child))]


def end(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill(process):
    """SIGKILL to a run and whatever it started."""
    end(pid for first in process.pids for pid in (first, *descendants(first)))


FOLDER = pytest.mark.parametrize("folder", FOLDERS)


@FOLDER
def test_killed(folder, tmp_path, narrow):
    """With all that it started, as by a power cut, or alone."""
    trial = Trial(folder, tmp_path, narrow)
    while trial.struck < KILLS:
        alone = trial.random.random() < 0.5
        trial.strike((lambda process: end([process.pid])) if alone else kill, signal.SIGKILL)
    trial.end("SIGKILL")


@FOLDER
@pytest.mark.parametrize("target", ["process", "group"])
def test_signals(folder, target, tmp_path, narrow):
    send = os.kill if target == "process" else os.killpg
    trial = Trial(folder, tmp_path, narrow)
    while trial.struck < FEW * len(SIGNALS):
        number = SIGNALS[trial.struck % len(SIGNALS)]
        trial.strike(lambda process, number=number: send(process.pid, number), number)
    trial.end(f"signals to the {target}", most=0)


@FOLDER
def test_signals_to_the_launcher(folder, tmp_path, narrow):
    trial = Trial(folder, tmp_path, narrow, Launched)
    while trial.struck < FEW * len(SIGNALS):
        number = SIGNALS[trial.struck % len(SIGNALS)]
        trial.strike(lambda process, number=number: os.kill(process.pid, number), number)
    trial.end("signals to torchrun, 2 ranks", most=0)


@FOLDER
def test_one_of_two_ranks_killed(folder, tmp_path, narrow):
    trial = Trial(folder, tmp_path, narrow, functools.partial(Fork, ranks=2))
    while trial.struck < FEW:
        rank = trial.random.randrange(2)
        trial.strike(lambda process, rank=rank: end([process.pids[rank]]), signal.SIGKILL)
    trial.end("SIGKILL to one of 2 ranks")


@FOLDER
def test_worker_killed(folder, tmp_path, narrow):
    trial = Trial(folder, tmp_path, narrow)

    def kill_worker(process):
        workers = children(process.pid)
        if not workers:
            return False
        end(workers[:1])

    while trial.struck < FEW:
        trial.strike(kill_worker)
    trial.end("SIGKILL to a loader worker", most=0)
