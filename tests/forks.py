"""Forks of the process that tests, for what is to end, or be ended, by itself."""

import atexit
import multiprocessing
import os
import signal
import sys
import time

import torch

from on_digits import cifar10


def forked(function, output=None):
    """Start function() in a fork of this process, in a group of its own; returns its pid."""
    if pid := os.fork():
        return pid
    code = 99
    try:
        os.setpgid(0, 0)
        atexit._clear()  # what the process that tests has to end is not this one's
        multiprocessing.process._children.clear()
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


def opened(output, **settings):
    """(folder, checkpoint to resume) of a run called a, or as settings say."""
    settings = {"output": output, "experiment": "a", **settings}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return cifar10.folder.open_run(cifar10.config.read_settings(cifar10.options, flags))


def equal(one, other):
    """Whether nested contents of checkpoints are the same to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other
