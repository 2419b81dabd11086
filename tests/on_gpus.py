"""A CPU in the place of a GPU: layer.cpp launches its kernels as on one."""

import ctypes
import re
from typing import NamedTuple

import pytest
import torch

from conftest import load

compiler, native = load("cifar10").compiler, load("cifar10").native


class Launch(NamedTuple):
    """A kernel that ran: its name, its Build, and its arguments as numbers."""

    name: str
    build: compiler.Build
    args: tuple


CTYPES = {"int": "c_int", "long long": "c_longlong", "float": "c_float", "double": "c_double"}


def kinds_of(build, name):
    """The type in C of each parameter of a kernel on a CPU, as the source has them."""
    defines = dict(word[2:].split("=", 1) for word in build.defines(compiler.HOST_CTYPES))
    known = {"index_t": "long long", **defines}
    (parameters,) = re.findall(rf"ENTRY\s+{name}\(([^)]*)\)\s*\{{", compiler.KERNELS)
    for parameter in parameters.split(","):
        kind = re.sub("const |__restrict__ ", "", parameter).strip().rpartition(" ")[0]
        pointer = "*" in parameter
        yield ctypes.c_void_p if pointer else getattr(ctypes, CTYPES[known.get(kind, kind)])


def forget():
    for function in (native.plan_of, native.plan_of_neuron):
        function.cache_clear()


@pytest.fixture
def stand_in(monkeypatch):
    """A CPU in the place of a GPU: layer.cpp launches its kernels by a cuLaunchKernel of the test's.
    Returns the Launches.
    """
    known, launches = [], []

    def kernel_at(name, dtype, T, neuron, rows, channels, large, device):
        build = compiler.Build(dtype, T, neuron)
        function = getattr(compiler.host_library(build), name)
        known.append((name, build, function, [*kinds_of(build, name)]))
        return len(known), (1, compiler.HOST_PARTS), (1, 1)

    pointer, number = ctypes.c_void_p, ctypes.c_uint

    @ctypes.CFUNCTYPE(ctypes.c_int, pointer, *[number] * 7, pointer, pointer, pointer)
    def driver(address, *how):
        name, build, function, kinds = known[address - 1]
        places = ctypes.cast(how[8], ctypes.POINTER(pointer))
        args = [kind.from_address(places[i]) for i, kind in enumerate(kinds)]
        launches.append(Launch(name, build, tuple(arg.value for arg in args)))
        function(*args)
        return 0

    modules = load("cifar10")
    monkeypatch.setattr(compiler, "on_gpu", lambda device: True)
    monkeypatch.setattr(native, "kernel_at", kernel_at)
    monkeypatch.setattr(compiler, "driver", lambda: ctypes.cast(driver, pointer).value)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)
    for module in (modules.layer, modules.spikes):
        monkeypatch.setattr(module, "takes_events", lambda *args: False)
    forget()
    yield launches
    forget()
