"""What the tests share: the folders' modules, loaded side by side, the golden numbers, and runs of
the scripts.
"""

import atexit
import functools
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch

pytest_plugins = ["on_digits", "on_photos", "on_events", "on_host", "on_graphs"]  # their fixtures
ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).resolve().parent / "data"


@functools.cache
def load(folder):
    """The modules of a data set folder, as attributes. Those of several folders can be used in one
    process.
    """
    names = [path.stem for path in (ROOT / folder).glob("*.py")]
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(ROOT / folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of timm, that a model of this name is there already
            return SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(ROOT / folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)
        if folder != "cifar10":
            register(load("cifar10"))


def register(modules):
    """timm knows one model of each name: make QKFormer that of this folder. Between tests it is
    cifar10's.
    """
    for file, name in (("model", "QKFormer"), ("ms", "MSQKFormer")):
        module = getattr(modules, file, None)
        if hasattr(module, name):
            sys.modules[file] = module  # where timm looks for the function's module
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                timm.models.register_model(getattr(module, name))
            del sys.modules[file]


def build_model(modules, cfg, cross_sample_lif=False):
    """The model that this folder's train.py builds."""
    register(modules)
    try:
        return modules.build.build_model(cfg, cross_sample_lif, modules.ranks.Ranks("cpu"))
    finally:
        register(load("cifar10"))


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


def check_golden(golden, build, lif_class, semantics, plain_losses=True):
    """Every array of one semantics ("per_sample" or "release") to a relative 1e-9; `build()` makes
    the model.

    Both paths; without `plain_losses` the plain one takes no steps of an optimizer.
    """
    for fused in (True, False):
        path = lambda fused=fused: build(fused=fused)  # noqa: E731
        check_golden_path(golden, path, lif_class, semantics, fused or plain_losses)


def check_golden_path(golden, build, lif_class, semantics, with_losses=True):
    def equal(name, value):
        want = golden.arrays[f"{semantics}/{name}"]
        assert np.shape(value) == want.shape, name
        assert np.abs(np.asarray(value) - want).max() <= 1e-9 * np.abs(want).max(), name

    model = golden.fill(build())
    x, criterion = golden.input(), torch.nn.functional.cross_entropy
    rates = {}

    def record(name):
        def hook(module, inputs, output):
            rates[name] = output.mean().item()

        return hook

    hooks = [
        m.register_forward_hook(record(name))
        for name, m in model.named_modules()
        if isinstance(m, lif_class)
    ]
    model.eval()
    with torch.no_grad():
        equal("eval_logits", model(x))  # with hooks, which the fused path leaves to the plain one
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        logits = model(x)
    equal("eval_logits", logits)
    assert list(rates) == golden.meta["lif_modules"]
    equal("firing_rates", list(rates.values()))

    target = golden.target(logits.shape[1])
    model.train()
    logits = model(x)
    equal("train_logits", logits.detach())
    criterion(logits, target).backward()
    parameters = dict(model.named_parameters())
    equal("grad_norms", [parameters[name].grad.norm().item() for name in golden.meta["parameters"]])
    buffers = dict(model.named_buffers())
    equal("buffer_norms", [buffers[name].double().norm().item() for name in golden.meta["buffers"]])

    if not with_losses:
        return
    model = golden.fill(build()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.06)
    losses = []
    for _ in range(3):
        loss = criterion(model(x), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    equal("losses", losses)


def on_cpu(argv):
    """Flags as words, for the CPU unless they name a device: a GPU is too few for two ranks, and
    rounds otherwise.
    """
    words = [*map(str, argv)]
    return words if "--device" in words else [*words, "--device", "cpu"]


def importable(monkeypatch, modules, *names):
    """For this test the folder's modules have the names by which torch.compile looks them up."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, getattr(modules, name))


COMPILER = """#!/bin/sh
# g++ that keeps what it made of its input for the next of many runs
case " $* " in *" - "*) ;; *) exec g++ "$@" ;; esac
source=$(mktemp) && cat > $source
for word; do [ "$last" = -o ] && made=$word; last=$word; done
kept=$0-$( (echo "$@" | sed "s: $made : :"; cat $source) | sha1sum | cut -c1-40)
[ -f $kept ] || { g++ "$@" < $source && cp $made $kept.$$ && mv $kept.$$ $kept; } || exit
rm $source && cp $kept $made
"""


@functools.cache
def compiler():
    """For CXX, so that each of the runs here need not compile the same kernels."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    path = Path(folder, "compiler")
    path.write_text(COMPILER)
    path.chmod(0o700)
    return str(path)


def script(
    folder, name, *args, ranks=1, launcher="torchrun", timeout=900, check=True, env=None, **kwargs
):
    """Run a script of a folder as a user would, on the CPU; returns the CompletedProcess, its
    output in .stdout.
    """
    command = [sys.executable, f"{name}.py"]
    if ranks > 1:
        module = {"torchrun": "torch.distributed.run", "launch": "torch.distributed.launch"}[
            launcher
        ]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            module,
            f"--nproc_per_node={ranks}",
            f"--master_port={port}",
            f"{name}.py",
        ]
    done = subprocess.run(
        [
            *command,
            *(on_cpu(args) if name in ("train", "test", "../tests/eval_101") else map(str, args)),
        ],
        cwd=kwargs.pop("cwd", ROOT / folder),
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "CXX": compiler(),
            **(env or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        **kwargs,
    )
    assert not check or done.returncode == 0, done.stdout
    return done


def start(folder, *args, ranks=1, env=None):
    """Start a folder's train.py on the CPU and go on; returns the process, its output line by line
    in .stdout.
    """
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks > 1
        else []
    )
    return subprocess.Popen(
        [sys.executable, *launcher, "train.py", *on_cpu(args)],
        cwd=ROOT / folder,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "ignore",
            "CXX": compiler(),
            **(env or {}),
        },
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
