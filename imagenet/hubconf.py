"""Loads a model from any working directory; several folders work in one process:

    import torch
    loaded = torch.hub.load("QKFormer/imagenet", "load", "best.pth", source="local")
    model, transform, classes = loaded
    logits = model(transform(image).unsqueeze(0))

`load(path, device="cpu")` returns what a checkpoint holds: the model in evaluation mode, the
transform of a PIL image to its input, the names of the classes. The others are the models that are
timm's: QKFormer_10_384, _512, _768 and MSQKFormer's. A pickled one needs its folder loaded first.
"""

import runpy
from pathlib import Path

HERE = Path(__file__).resolve().parent
dependencies = ["torch", "timm", "spikingjelly"]

hub = runpy.run_path(str(HERE / "harness" / "hub.py"))
released, options = hub["import_folder"](HERE, "released", "options")
load = released.load
globals().update(options.MODELS)
