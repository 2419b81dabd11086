"""Imports a folder's modules under names of their own: several folders work in one process, and no
name such as `data` or `model` is taken from it.
"""

import importlib
import re
import sys
import types
import warnings
from pathlib import Path


def import_folder(here: Path, *names: str) -> list[types.ModuleType]:
    """The modules `names` of the folder `here`, `harness.build` as qkformer_cifar10.harness.build;
    so too what they import, which they can't do later, and classes and functions, for pickle.
    """
    package = "qkformer_" + re.sub(r"\W", "_", here.name)
    while getattr(sys.modules.get(package), "here", here) != here:
        package += "_"  # another folder of the same name
    prefix = f"{package}."
    own = {path.stem for path in here.iterdir() if path.suffix == ".py" or path.is_dir()}

    def take():
        """What sys.modules has under the folder's plain names, removed there."""
        return {n: sys.modules.pop(n) for n in [*sys.modules] if n.partition(".")[0] in own}

    foreign = take()
    loaded = {n.removeprefix(prefix): m for n, m in sys.modules.items() if n.startswith(prefix)}
    sys.modules.update(loaded)
    sys.path.insert(0, str(here))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of timm, that another folder's model has this name
            for name in names:
                importlib.import_module(name)
    finally:
        sys.path.remove(str(here))
        found = take()
        sys.modules.update(foreign)
    sys.modules.setdefault(package, types.ModuleType(package)).here = here
    for name in found.keys() - loaded.keys():
        sys.modules[prefix + name] = module = found[name]
        module.__name__ = prefix + name
        for value in vars(module).values():
            if isinstance(value, (type, types.FunctionType)) and value.__module__ == name:
                value.__module__ = module.__name__
    return [found[name] for name in names]
