"""Loads a model from any working directory; several folders work in one process:

    import torch
    loaded = torch.hub.load("QKFormer/cifar10-dvs", "load", "best.pth", source="local")
    model, transform, classes = loaded
    logits = model(transform(image).unsqueeze(0))

`load` is build.py's, `QKFormer` and the other models are those registered with timm.
"""

import importlib.util
from pathlib import Path

HERE = Path(__file__).resolve().parent
dependencies = ["torch", "timm", "spikingjelly"]

spec = importlib.util.spec_from_file_location("hub", HERE / "harness" / "hub.py")
hub = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hub)
(build,) = hub.import_folder(HERE, "build")
load = build.load
globals().update(build.MODELS)
