"""Loads a model from any working directory; several folders work in one process:

    import torch
    loaded = torch.hub.load("QKFormer/cifar10", "load", "best.pth", source="local")
    model, transform, classes = loaded
    logits = model(transform(image).unsqueeze(0))

`load` is build.py's, `QKFormer` and the other models are those registered with timm.
"""

import importlib
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
dependencies = ["torch", "timm", "spikingjelly"]


def import_here(name):
    """Import a module of this folder even if another folder's of the same name is loaded.

    Afterwards the names import the first folder's modules again, since pickle looks them up.
    """
    own = [path.stem for path in HERE.glob("*.py")]
    hidden = {
        stem: sys.modules.pop(stem) for stem in own if of_another_folder(sys.modules.get(stem))
    }
    sys.path.insert(0, str(HERE))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of timm, that another folder's model has this name
            return importlib.import_module(name)
    finally:
        sys.path.remove(str(HERE))
        if hidden:
            for stem in own:
                sys.modules.pop(stem, None)
            sys.modules.update(hidden)


def of_another_folder(module):
    return (
        module is not None
        and Path(getattr(module, "__file__", None) or ".").resolve().parent != HERE
    )


build = import_here("build")
load = build.load
globals().update(build.MODELS)
