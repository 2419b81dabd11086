"""A checkpoint as a folder in the layout of timm's hub: weights, configuration, a model card.

Usage, from anywhere:
    python tools/export.py cifar10/output/quickstart/best.pth --to mymodel
    python tools/export.py best.pth --folder imagenet --to mymodel --onnx -- --img_size 224

`test.py --checkpoint mymodel` tests it, `load("mymodel")` of a folder's hubconf.py reads it, and,
once the folder's model.py is imported, timm.create_model("local-dir:mymodel", pretrained=True).
--onnx writes model.onnx by the plain path too, for one sample, or any number of samples; it needs
requirements-export.txt.
"""

import hashlib
import json
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from timm.models import save_for_hf

import models

ARGUMENTS = "T embed_dims num_heads mlp_ratios depths attention neuron tau v_threshold".split()


def export(modules, tested, folder, command, onnx=False):
    """Write a Tested of a folder's harness/build.py to a new folder; returns its files."""
    cfg, model = tested.cfg, tested.model.eval()
    keywords = {k: getattr(cfg, key, None) for key, k in modules.build.KEYWORDS.items()}
    args = {k: keywords[k] for k in ARGUMENTS if keywords.get(k) is not None}
    args |= {"cross_sample_lif": tested.settings["cross_sample_lif"]}
    back = {n: v for n, v in vars(cfg).items() if modules.options.KEYS[n].back != ""}
    back = {n: v for n, v in back.items() if modules.options.KEYS[n].kind is not Path}
    ours = {"config": back, "cross_sample_lif": args["cross_sample_lif"], "classes": tested.classes}
    shape = modules.data.input_shape(cfg)
    seen = {"input_size": shape[-3:], "num_classes": model.num_classes}
    seen |= {name: getattr(cfg, name) for name in ("mean", "std", "crop_pct") if hasattr(cfg, name)}
    config = {"pretrained_cfg": seen, "qkformer": json.loads(json.dumps(ours, default=str))}
    model._model_args = {}
    save_for_hf(model, folder, model_config=config, model_args=args, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    config["qkformer"]["sha256"] = sha256(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if onnx:
        write_onnx(model, shape, folder / "model.onnx")
    (folder / "README.md").write_text(card(tested, model, shape, folder, command))
    return sorted(folder.iterdir())


def write_onnx(model, shape, path):
    """The model for any number of samples; it runs layer by layer while it is traced."""
    batch = torch.export.Dim("batch", min=2)
    x = torch.zeros(2, *shape)
    named = {"input_names": ["input"], "output_names": ["logits"], "external_data": False}
    args = {"dynamo": True, "dynamic_shapes": ({0: batch},), "verbose": False, **named}
    with torch.no_grad():
        torch.onnx.export(model, (x,), str(path), **args)


def card(tested, model, shape, folder, command):
    """The text of the model card."""
    settings, rows = tested.settings, []
    for file in sorted(tested.path.parent.glob(f"test-{tested.path.stem}*.json")):
        result = json.loads(file.read_text())
        if result.get("sha256") == settings["sha256"]:
            data = result.get("dataset", "")
            rows.append(
                f"| top-1, {data}, {result['samples']:,} samples | {result['top1']:.2f} % |"
            )
    counted = tested.path.with_name(f"energy-{tested.path.stem}.json")
    if counted.is_file():
        energy = json.loads(counted.read_text())["energy"]
        rows.append(f"| energy by the paper's formula | {energy:.4g} mJ a sample |")
    leak = (
        "the release's: samples of a batch mix" if settings["cross_sample_lif"] else "the paper's"
    )
    parameters = sum(p.numel() for p in model.parameters())
    sums = [f"| `{file.name}` | {sha256(file)} |" for file in sorted(folder.glob("model.*"))]
    facts = [
        f"| network | {model.pretrained_cfg['architecture']}, {parameters:,} parameters |",
        f"| time steps | {tested.cfg.time_step} |",
        f"| input | {' x '.join(map(str, shape))}, data set {settings.get('dataset', '')} |",
        f"| `cross_sample_lif` | {settings['cross_sample_lif']}, {leak} |",
        f"| weights | {'averaged' if settings['use_ema'] else 'plain'}, of a file of SHA-256 "
        f"{settings['sha256']} |",
        *(rows or ["| accuracy | not tested |"]),
    ]
    lines = ["---", "library_name: timm", "tags: [image-classification, spiking]", "---"]
    lines += ["# QKFormer", "", "| | |", "|---|---|", *facts]
    lines += ["", "| file | SHA-256 |", "|---|---|", *sums, "", "Written by", "", f"    {command}"]
    return "\n".join(lines) + "\n"


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv=None):
    words, flags = models.split(argv)
    parser = models.checkpoint_parser(__doc__)
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--onnx", action="store_true", help="write model.onnx too")
    args = parser.parse_args(words)
    folder, path = args.to.absolute(), args.checkpoint
    path = path / "best.pth" if (path / "best.pth").is_file() else path
    if folder.exists():
        raise SystemExit(f"error: {folder} is there already; name another folder with --to")
    if args.onnx and not (find_spec("onnx") and find_spec("onnxscript")):
        raise SystemExit("error: --onnx needs more: pip install -r requirements-export.txt")
    flags = [*flags, "--fused", "false"] if args.onnx else flags
    modules, tested = models.open_checkpoint(path, args.folder, flags)
    command = shlex.join(["python", "tools/export.py", *(argv or sys.argv[1:])])
    try:
        files = export(modules, tested, folder, command, args.onnx)
    except OSError as error:
        raise SystemExit(f"error: {folder} can't be written: {error.strerror}") from None
    print("\n".join(f"written: {file}" for file in files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
