"""What the tests share: the folders' modules, loaded side by side, the golden numbers, and runs of
the scripts.
"""

import atexit
import functools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

# Two processes test side by side, and what they start: threads of OpenMP would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import timm
import torch

import models

pytest_plugins = [
    "on_digits",
    "on_images",
    "on_photos",
    "on_events",
    "on_graphs",
    "on_runs",
]  # their fixtures
ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).resolve().parent / "data"
CLASSES = {  # of the published data sets
    "imagenet": 1000,
    "cifar10": 10,
    "cifar100": 100,
    "dvs128-gesture": 11,
    "cifar10-dvs": 10,
}


@functools.cache
def load(folder):
    """All modules of a data set folder, packages' too, as attributes. Those of several folders can
    be used in one process.
    """
    modules = models.load(folder)
    if folder != "cifar10":
        register(load("cifar10"))
    return modules


def register(modules):
    """timm knows one model of each name: make QKFormer that of this folder. Between tests it is
    cifar10's.
    """
    for file, name in (("model", "QKFormer"), ("ms", "MSQKFormer")):
        module = getattr(modules, file, None)
        if hasattr(module, name):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                timm.models.register_model(getattr(module, name))


def resolve_in(modules, *argv, **values):
    """A folder's configuration of a command line, without a checkpoint; `values` go over it."""
    settings = modules.config.read_settings(modules.options, [*map(str, argv)])
    return settings.resolve(**values)


def build_model(modules, cfg, cross_sample_lif=False):
    """The model that this folder's train.py builds."""
    register(modules)
    ranks, classes = modules.process.Ranks("cpu"), cfg.num_classes or CLASSES[modules.log.HERE.name]
    try:
        return modules.build.build_model(
            cfg, modules.options, modules.data, cross_sample_lif, classes, ranks
        )
    finally:
        register(load("cifar10"))


# A file is one process's: those that take longest go first, so that both processes end together.
FIRST = "test_train test_neurons test_events test_event_frames test_leak test_ranks test_faults test_model"


def pytest_collection_modifyitems(items):
    first = FIRST.split()
    order = {name: place for place, name in enumerate(first)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


class Golden:
    """Golden numbers of one model, float64, and the weights and input behind them
    (data/README.md).
    """

    def __init__(self, name):
        self.meta = json.loads((DATA / "golden" / f"{name}.json").read_text())
        self.arrays = np.load(DATA / "golden" / f"{name}.npz")

    @staticmethod
    def fill(model):
        """The weights behind the golden numbers: each entry drawn from a generator seeded by its
        name.
        """
        for name, tensor in model.double().state_dict().items():
            generator, shape = np.random.RandomState(zlib.crc32(name.encode())), tuple(tensor.shape)
            if name.endswith("num_batches_tracked"):
                value = np.zeros(shape)
            elif name.endswith("running_mean"):
                value = generator.normal(0.0, 0.2, shape)
            elif name.endswith("running_var"):
                value = generator.uniform(0.1, 0.6, shape)
            elif "_bn." in name and name.endswith("weight"):
                value = generator.uniform(0.8, 1.6, shape)
            elif name.endswith("q_bn.bias"):
                value = generator.uniform(-3.2, -1.6, shape)
            elif "_bn." in name and name.endswith("bias"):
                value = generator.uniform(0.0, 1.2, shape)
            elif name.endswith("bias"):
                value = generator.uniform(-0.1, 0.1, shape)
            else:
                value = generator.standard_normal(shape) * np.sqrt(2.0 / np.prod(shape[1:]))
            tensor.copy_(torch.as_tensor(value))
        return model

    def input(self):
        generator = np.random.RandomState(self.meta["input"]["seed"])
        shape = self.meta["input"]["shape"]
        image = self.meta["input"]["kind"] == "image"
        return torch.as_tensor(
            generator.standard_normal(shape) if image else generator.poisson(0.3, shape) * 1.0
        )

    def target(self, num_classes):
        generator = np.random.RandomState(self.meta["input"]["seed"] + 1)
        return torch.as_tensor(generator.randint(0, num_classes, self.meta["input"]["shape"][0]))


def on_cpu(argv):
    """Flags as words, for the CPU unless they name a device: a GPU is too few for two ranks, and
    rounds otherwise.
    """
    words = [*map(str, argv)]
    return words if "--device" in words else [*words, "--device", "cpu"]


COMPILER = """#!/bin/sh
# g++ that keeps what it made of its input for the next of many runs
case " $* " in *" - "*) ;; *) exec g++ "$@" ;; esac
source=$(mktemp) && cat > $source
for word; do [ "$last" = -o ] && made=$word; last=$word; done
kept=$0-$( (echo "$@" | sed "s: $made : :"; cat $source) | sha1sum | cut -c1-40)
[ -f $kept ] || { g++ "$@" < $source && cp $made $kept.$$ && mv $kept.$$ $kept; } || exit
rm $source && cp $kept $made
"""


def compiler():
    """For CXX, so that no other of the processes here compiles the same kernels."""
    folder, process = tempfile.mkdtemp(), os.getpid()
    atexit.register(lambda: shutil.rmtree(folder) if os.getpid() == process else None)
    path = Path(folder, "compiler")
    path.write_text(COMPILER)
    path.chmod(0o700)
    return str(path)


if "CXX" not in os.environ and shutil.which(
    "g++"
):  # which the workers of xdist, and what they start, inherit
    os.environ["CXX"] = compiler()


def environment():
    """Of a script's run: threads, since with others sums round otherwise."""
    env = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **env}


@functools.cache
def fork_server():
    command = [sys.executable, str(ROOT / "tests" / "forkserver.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    return subprocess.Popen(command, env=environment(), **pipes)


class Fork:
    """A run of a script on `ranks` processes, by tests/forkserver.py; no launcher ends one for the
    other. The server takes one at a time.
    """

    def __init__(self, folder, flags, output, ranks=1, name="train"):
        self.server = fork_server()
        line = json.dumps([str(ROOT / folder), name, flags, str(output), ranks])
        self.server.stdin.write(f"{line}\n".encode())
        self.pids = [*map(int, self.server.stdout.readline().split())]
        self.pid = self.pids[0]

    def wait(self, seconds):
        """The exit code, of ranks the largest; None if one goes on."""
        if select.select([self.server.stdout], [], [], seconds)[0]:
            return max(map(int, self.server.stdout.readline().split()), key=abs)
        return None


def script(folder, name, *args, ranks=1, launcher="", timeout=900, check=True, cwd=None, env=None):
    """Run a script of a folder on the CPU; returns the CompletedProcess, its output in .stdout.

    With a launcher, or more variables in `env`, as a user would; else in forks that have PyTorch.
    """
    flags = on_cpu(args) if name in ("train", "test", "../tests/eval_101") else [*map(str, args)]
    cwd = cwd or ROOT / folder
    if name in ("train", "test") and not launcher and not env:
        done = forked_script(cwd, name, flags, ranks, timeout)
    else:
        done = subprocess.run(
            [sys.executable, *launched(ranks, launcher or "torchrun"), f"{name}.py", *flags],
            cwd=cwd,
            env={**environment(), **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
    assert not check or done.returncode == 0, done.stdout
    return done


def launched(ranks, launcher):
    """Python's flags of a launcher."""
    if ranks == 1:
        return []
    module = {"torchrun": "torch.distributed.run", "launch": "torch.distributed.launch"}[launcher]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ["-m", module, f"--nproc_per_node={ranks}", f"--master_port={port}"]


def forked_script(cwd, name, flags, ranks, timeout):
    with tempfile.NamedTemporaryFile() as output:
        run = Fork(cwd, flags, output.name, ranks, name)
        code = run.wait(timeout)
        if code is None:
            for pid in run.pids:
                os.kill(pid, signal.SIGKILL)
            run.wait(60)
        text = Path(output.name).read_text(errors="replace")
    assert code is not None, f"goes on after {timeout} s: {text}"
    return subprocess.CompletedProcess([f"{name}.py", *flags], code, text)


class Started(Fork):
    """A run of a folder's train.py that goes on, its output line by line in .stdout."""

    def __init__(self, folder, flags):
        with tempfile.TemporaryDirectory() as place:
            os.mkfifo(f"{place}/output")
            super().__init__(folder, flags, f"{place}/output")
            self.stdout = open(f"{place}/output", errors="replace")

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self, seconds=900):
        code = super().wait(seconds)
        assert code is not None, "it goes on"
        return code


def start(folder, *args, ranks=1, env=None):
    """Start a folder's train.py on the CPU and go on; ranks by torchrun, and runs with more
    variables, as a user would.
    """
    if ranks == 1 and not env:
        return Started(folder, on_cpu(args))
    return subprocess.Popen(
        [sys.executable, *launched(ranks, "torchrun"), "train.py", *on_cpu(args)],
        cwd=ROOT / folder,
        env={**environment(), **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def log_of(folder):
    """The run's log without what depends on the clock and the machine."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    clock = ("seconds", "images_per_second", "peak_memory_mb")
    return [{name: line[name] for name in line if name not in clock} for line in lines]


def weights_of(path):
    return torch.load(path, weights_only=True)["model"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def one_line(done, *words, code=1):
    """The run ended with `code` and one line of error, which has these words in it."""
    assert done.returncode == code, done.stdout
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stdout, done.stdout
    for word in words:
        assert str(word) in errors[0], (word, errors[0])


def copy_folder(name, place):
    """Copy a data set folder alone to an empty place, as git would give it; returns where it is."""
    ignored = shutil.ignore_patterns("output", "data", "__pycache__")
    return Path(shutil.copytree(ROOT / name, place / name, ignore=ignored))


@pytest.fixture(autouse=True)
def one_thread():
    """Two processes test side by side."""
    torch.set_num_threads(1)
