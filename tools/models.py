"""What the tools work on: the folders' modules, several in one process, models and checkpoints."""

import argparse
import contextlib
import functools
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the folders' scripts; before torch
import torch

ROOT = Path(__file__).resolve().parent.parent
IMAGENET = tuple(
    f"{name}_10_{dim}" for name in ("QKFormer", "MSQKFormer") for dim in (384, 512, 768)
)
FOLDERS = ("cifar10", "cifar100", "dvs128-gesture", "cifar10-dvs")  # MSQKFormer is that of cifar10/
EVENT = ("dvs128-gesture", "cifar10-dvs")
DATA_SETS = (*FOLDERS, "imagenet")


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


def split(argv):
    """(a tool's own words, those for the folder's settings, which come behind --)."""
    argv = [*map(str, sys.argv[1:] if argv is None else argv)]
    end = argv.index("--") if "--" in argv else len(argv)
    return argv[:end], argv[end + 1 :]


def checkpoint_parser(text):
    """Parser of a tool that takes a checkpoint; `text` is its docstring."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--folder", choices=DATA_SETS, help="of the checkpoint; default: the one above output/"
    )
    parser.epilog = "Flags of the folder's test.py come behind --."
    return parser


def open_checkpoint(path, folder, flags, say=True):
    """(modules of the checkpoint's folder, its Tested); from here on the working directory is that
    folder, so that paths mean what they mean there. SystemExit for what a user can mend.

    say: whether the lines of the log are printed.
    """
    path = Path(path).absolute()
    path = path / "model.safetensors" if (path / "model.safetensors").is_file() else path
    if not path.exists():
        raise SystemExit(f"error: no such checkpoint: {path}")
    above = [one.parent.name for one in path.parents if one.name == "output"]
    folder = folder or next((name for name in above if name in DATA_SETS), None)
    if folder is None:
        known = f"no data set's folder is above it; name one: --folder {' | '.join(DATA_SETS)}"
        raise SystemExit(f"error: {path}: {known}")
    os.chdir(ROOT / folder)
    modules = load(folder)
    with one_line(modules):
        settings = modules.config.read_settings(modules.options, flags, "test")
        ranks = modules.process.Ranks(settings.device, alone=True)
        if say:
            modules.log.set_up_log(ranks)
        if folder == "imagenet":
            return modules, modules.released.load_released(settings, ranks, path)[0]
        args = settings, modules.options, modules.data, ranks, path
        return modules, modules.build.load_tested(*args)


@contextlib.contextmanager
def one_line(modules):
    """A fault of the user or the machine within ends the tool with one line, as in test.py."""
    try:
        yield
    except Exception as error:
        if (reason := modules.process.explain(error)) is None:
            raise
        raise SystemExit(f"error: {modules.log.escaped(reason)}") from None


def test_batches(modules, tested, dataset=None):
    """(loader of the test set, or of another data set, autocast), as testing has them."""
    cfg, ranks = tested.cfg, tested.ranks
    dataset = dataset or modules.data.build_dataset(cfg, False, ranks)
    loader = modules.data.test_loader(cfg, dataset, ranks)
    return loader, modules.meters.make_autocast(cfg, ranks, cfg.eval_amp)


def image_files(modules, cfg, samples, classes=()):
    """A data set of image files [(path, number)], prepared as in testing."""
    data, transform = modules.data, modules.data.build_transform(cfg, False)
    if hasattr(data, "Folder"):
        return data.Folder(samples, classes, transform)
    skip = cfg.on_bad_image == "skip"
    return data.Images(samples, modules.images.read_image, transform, skip, classes=classes)
