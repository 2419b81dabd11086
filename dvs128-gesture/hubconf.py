"""Loads a model from any working directory; several folders work in one process:

    import torch
    loaded = torch.hub.load("QKFormer/dvs128-gesture", "load", "best.pth", source="local")
    model, transform, classes = loaded
    logits = model(transform(frames).unsqueeze(0))

`load(path, device="cpu")` returns what a checkpoint holds: the model in evaluation mode, the
transform of a sample's frames [T, 2, H, W] to its input, the names of the classes. QKFormer is the
model that is registered with timm. A pickled one needs its folder to be loaded first.
"""

import functools
import runpy
from pathlib import Path

HERE = Path(__file__).resolve().parent
dependencies = ["torch", "timm", "spikingjelly"]

hub = runpy.run_path(str(HERE / "harness" / "hub.py"))
build, options, data = hub["import_folder"](HERE, "harness.build", "options", "data")
load = functools.partial(build.load, options, data)
globals().update(options.MODELS)
