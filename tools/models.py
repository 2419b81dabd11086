"""The models that the tools measure: those of the data set folders, several in one process."""

import functools
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
IMAGENET = tuple(
    f"{name}_10_{dim}" for name in ("QKFormer", "MSQKFormer") for dim in (384, 512, 768)
)
FOLDERS = ("cifar10", "cifar100", "dvs128-gesture", "cifar10-dvs")  # MSQKFormer is that of cifar10/
EVENT = ("dvs128-gesture", "cifar10-dvs")


def import_file(path):
    """The module in a file, under no name that others see."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def load(folder):
    """All modules of a data set folder, those of its packages too, as attributes."""
    here = ROOT / folder
    names = [path.stem for path in sorted(here.glob("*.py")) if path.stem != "hubconf"]
    for package in ("spiking", "harness"):
        files = sorted((here / package).glob("*.py"))
        names += [f"{package}.{path.stem}" for path in files if path.stem != "__init__"]
    modules = import_file(here / "harness" / "hub.py").import_folder(here, *names)
    names = [name.rpartition(".")[2] for name in names]
    return SimpleNamespace(**dict(zip(names, modules, strict=True)))


def folder_of(name):
    """The folder of a model: a name of IMAGENET or of FOLDERS, or MSQKFormer."""
    return "imagenet" if name in IMAGENET else "cifar10" if name == "MSQKFormer" else name


def entry(name, modules):
    """The function that makes a model, in its folder's modules."""
    file = modules.ms if name.startswith("MS") else modules.model
    return getattr(file, name if "QKFormer" in name else "QKFormer")


def make_input(name, batch, T, size, device):
    shape = (batch, T, 2, size, size) if name in EVENT else (batch, 3, size, size)
    x = torch.poisson(torch.full(shape, 0.3)) if name in EVENT else torch.randn(shape)
    return x.to(device)
