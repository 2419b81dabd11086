"""Runs of cifar10/'s train.py on the digits that take a second, whole and stopped where a test
wants; most in this process.
"""

import contextlib
import io
import re
import shlex
import signal

import pytest
import torch

from conftest import log_of, on_cpu
from forks import equal
from on_digits import cifar10

UserError = cifar10.config.UserError
NARROW = "-c quickstart.yml --dim 16 --num-heads 2 --time-step 1 --img-size 8 --warmup-epochs 0"
# randomness in every place: mixup and flips in a worker, random erasing and drop path
RANDOM = [*NARROW.split(), *"--mixup 0.5 --hflip 0.5 --reprob 0.5 --drop-path 0.2".split()]
ARGS = [*RANDOM, *"--batch-size 128 --epochs 2 --cooldown-epochs 1".split()]
FEW = [*RANDOM, *"--batch-size 358 --epochs 2".split()]  # of 4 steps
ONE = [*NARROW.split(), *"--batch-size 1024 --epochs 1".split()]  # of one step


def train(*argv, main=cifar10.train.main):
    """(exit code, what it said) of a run in this process, with its error as the script has it."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            code = main(on_cpu(argv))
        except UserError as error:
            code = print(f"error: {error}") or 1
    return code, text.getvalue()


def content(path):
    """A checkpoint but for the configuration, which names the run's folder."""
    return {**torch.load(path, weights_only=True), "config": 0, "given": 0}


def is_same(one, other):
    """To the bit: log, weights, optimizer and random states of two runs, last and best."""
    assert log_of(one) == log_of(other)
    for name in ("last.pth", "best.pth"):
        assert equal(content(one / name), content(other / name)), name


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A run of ARGS that nothing interrupts."""
    output = tmp_path_factory.mktemp("output")
    code, text = train(*ARGS, "--output", output, "--experiment", "whole")
    assert code == 0
    return output / "whole", text


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """A run of FEW that nothing interrupts."""
    output = tmp_path_factory.mktemp("output")
    assert train(*FEW, "--output", output)[0] == 0
    return output / "quickstart"


@pytest.fixture
def stop_when(monkeypatch):
    """Gives runs a signal as soon as function(run) is true."""

    class Stop:
        number = signal.SIGTERM

        def __bool__(self):
            return self.function(self.run)

    def fit(run):
        run.stop = stop
        stop.run = run
        return run._fit(stop)

    def choose(function):
        stop.function = function
        monkeypatch.setattr(cifar10.run.Run, "fit", fit)

    stop = Stop()
    return choose


def printed(text):
    """The command that goes on, as a stopped run prints it."""
    return shlex.split(re.search(r"; to go on: (.*)$", text, re.MULTILINE)[1])
