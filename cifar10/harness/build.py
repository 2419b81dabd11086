"""From configuration and checkpoint to a model on this rank's device, and to its accuracy."""

import math
import os
import re
import reprlib
from collections import namedtuple
from pathlib import Path

import torch

from spiking.native import available
from spiking.neuron import resolve_backend

from .checkpoint import digest, load_checkpoint, load_weights
from .config import read_settings
from .folder import fetch, find_checkpoint, read_args, write_result
from .graph import graphed
from .log import UserError, logger, telling, typed
from .meters import Metrics, evaluate, make_autocast
from .process import Ranks

# {key: the models' keyword}
KEYWORDS = {"time_step": "T", "dim": "embed_dims", "mlp_ratio": "mlp_ratios", "layer": "depths"}
SAME = "patch_size num_heads attention drop_path neuron tau v_threshold surrogate surrogate_alpha"
KEYWORDS |= {name: name for name in f"{SAME} backend fused memory events".split()}
FAMILIES = (  # data sets, model, a weight that no family above has; the first that fits counts
    ("event data", "QKFormer", "patch_embed1.proj3_conv.weight"),
    ("ImageNet", "QKFormer", "patch_embed1.proj2_conv.weight"),
    ("ImageNet", "MSQKFormer", "patch_embed1.rpe_conv.weight"),
    ("CIFAR", "MSQKFormer", "patch_embed1.embed1.embed_conv.weight"),
    ("CIFAR", "QKFormer", "patch_embed1.proj1_conv.weight"),
)
HIDDEN = re.compile(r"stage(\d)\.(\d+)\.mlp\.\w+1_conv\.weight")
LEAK = {
    False: "cross_sample_lif: false, the paper's network (logits do not depend on the batch)",
    True: "cross_sample_lif: true, the release's network (logits depend on the batch)",
}


# A checkpoint that is to be tested; settings: {what is tested: value}.
Tested = namedtuple("Tested", "cfg ranks path model settings classes")


def recorded_values(options, checkpoint, path, data=True) -> dict:
    """{key: value} that a checkpoint brings back: what it records, and what its shapes tell; with
    `data`, where its data count too, a line says which folders are left out. UserError for weights
    of another network, and for values that no key takes.
    """
    recorded = {name: options.KEYS[name].default for name in ("neuron", "tau", "v_threshold")}
    read_shapes(options, checkpoint["model"], path, recorded)  # an error for another folder's file
    config, args = checkpoint.get("config"), read_args(Path(path).parent)
    if not isinstance(config, dict):
        config = steps_of(checkpoint, path)
    for name, key in options.KEYS.items():
        for spelled in {name, *key.aliases} & config.keys() if key.back else ():
            fault = f"{path}: damaged: its {spelled} is {reprlib.repr(config[spelled])}"
            with telling(f"{fault}; it must be ", kinds=ValueError):
                value = key.convert(config[spelled])
            if key.kind is not Path:  # a file from elsewhere has no say in what is read
                recorded[name] = value
            elif isinstance(args.get(name), str) and os.path.isdir(args[name]):
                recorded[name] = args[name]
            elif data and key.back == "data" and value not in (None, key.default):
                left = f"its {name} is {value}, which is not there, or not in its args.yaml"
                logger.info(f"warning: {path}: {left}; what is set here counts")
    return recorded | read_shapes(options, checkpoint["model"], path, recorded)


def read_shapes(options, weights, path, recorded):
    """{key: value} that the shapes of weights tell; a recorded value where it fits these shapes."""
    known, family = next((row[:2] for row in FAMILIES if row[2] in weights), (None, None))
    if known not in (None, options.DATA_SET):
        raise UserError(f"{path}: {family} for {known}, but this folder is for {options.DATA_SET}")
    hidden = {match[1]: weights[match[0]].shape for match in map(HIDDEN.match, weights) if match}
    odd = any(len(shape) != 4 or 0 in shape for shape in hidden.values())
    if family is None or not hidden or odd:
        raise UserError(f"{path}: weights of another network: {', '.join([*weights][:3])}, …")
    wide, dim = hidden[max(hidden)][:2]
    ratios = recorded.get("mlp_ratio", 0), wide / dim, math.nextafter(wide / dim, math.inf)
    ratio = next((ratio for ratio in ratios if int(dim * ratio) == wide), wide / dim)
    ssa = {name.partition(".")[0] for name in weights if ".v_conv." in name}
    # What is recorded counts: a token and a channel attention, or one of your own, look alike.
    kinds = ["ssa" if f"stage{stage}" in ssa else "token" for stage in sorted(hidden)]
    kinds = recorded.get("attention", kinds)
    names = recorded.get("model"), family, f"{family}_10_{dim}"  # the first: a variant of your own
    name = next((n for n in names if n in options.MODELS), f"{family}_10_384")
    learnt, blocks = re.compile(r"lif\d?\.w$"), len([*filter(HIDDEN.match, weights)])
    neuron = "plif" if any(map(learnt.search, weights)) else recorded.get("neuron", "lif")
    found = {"model": name, "layer": blocks, "dim": dim, "mlp_ratio": ratio}
    found |= {"attention": kinds, "neuron": neuron}
    return found | ({"num_classes": classes_of(weights)} if "head.weight" in weights else {})


def classes_of(weights):
    """How many classes a head has; 0 without one."""
    return (*weights["head.weight"].shape, 1)[0] if "head.weight" in weights else 0


def steps_of(checkpoint, path):
    """{"time_step": T} of a file without our configuration, from its args or its name; else {}."""
    args = checkpoint.get("args")
    args = args if isinstance(args, dict) else getattr(args, "__dict__", {})
    named = re.search(r"(?:^|[_-])T(\d+)(?=[._-])", Path(path).name)
    found = {f"its args.{name}": args.get(name) for name in ("time_step", "T")}
    for origin, steps in {**found, "its name": named and int(named[1])}.items():
        if type(steps) is int:
            logger.info(f"{path}: T is {steps}, from {origin}")
            return {"time_step": steps}
    logger.info(f"{path}: does not tell T; the T of the configuration is used")
    return {}


def resolve_semantics(setting, checkpoint, path, model="QKFormer"):
    """(cross_sample_lif, a line that says why) of the key's value: "true", "false" or "auto"."""
    if model.startswith("MS"):
        if setting == "true":
            raise UserError(f"cross_sample_lif is true, which has no meaning for {model}")
        return False, f"{model}: an image's logits do not depend on its batch"
    recorded = checkpoint.get("cross_sample_lif") if checkpoint else False
    if not isinstance(recorded, (bool, type(None))):
        raise UserError(f"{path}: its cross_sample_lif is {recorded!r}, neither true nor false")
    if setting == "auto" and recorded is None:
        why = f"{path} does not record its semantics, so it is taken for one of the release's"
        other = "set cross_sample_lif: false if it was trained with the paper's"
        return True, f"warning: {why}: {LEAK[True]}; {other}"
    value = recorded if setting == "auto" else setting == "true"
    if checkpoint and recorded not in (None, value):
        return value, f"warning: {LEAK[value]}, as set, but {path} was trained with {recorded}"
    return value, LEAK[value]


def build_model(cfg, options, data, cross_sample_lif, num_classes, ranks) -> torch.nn.Module:
    """The configuration's model, on this rank's device."""
    *_, channels, height, width = shape = data.input_shape(cfg)
    values = {KEYWORDS[key]: getattr(cfg, key, None) for key in KEYWORDS}
    keywords = {name: value for name, value in values.items() if value is not None}
    keywords |= {"img_size_h": height, "img_size_w": width, "in_channels": channels}
    keywords |= {"num_classes": num_classes, "cross_sample_lif": cross_sample_lif}
    with telling("", kinds=(ValueError, RuntimeError)):
        resolve_backend(cfg.backend, ranks.device.type, torch.float32)  # now, not in the first step
        if cfg.fused:
            available(ranks.device.type, torch.float32, cfg.backend, cfg.time_step)
        model = options.MODELS[cfg.model](**keywords)
        model.frames(torch.empty(1, *shape, device="meta"))  # is its size one that it takes?
    return model.to(ranks.device)


def load_model(cfg, options, data, ranks, num_classes, checkpoint=None, path=None, new_head=False):
    """(model with the checkpoint's weights, its cross_sample_lif, which a line explains). With
    `new_head`, a head of another number of classes, or none, stays as it was initialised.
    """
    cross, why = resolve_semantics(cfg.cross_sample_lif, checkpoint, path, cfg.model)
    logger.info(why)
    model = build_model(cfg, options, data, cross, num_classes, ranks)
    weights = checkpoint["model"] if checkpoint else None
    if weights and new_head:
        had, head = classes_of(weights), "its head fits and is kept"
        if had != num_classes:
            had = f"a head of {had or 'no'} classes"
            head = f"has {had}, here there are {num_classes}; a new one is made"
            weights = {**weights, **model.head.state_dict(prefix="head.")}
        logger.info(f"{path}: {head}")
    if weights:
        load_weights(model, weights, path)
    return model, cross


def check_classes(checkpoint, path, classes, strict=True):
    """UserError (not strict: a line) where a checkpoint's classes are not those of the data."""
    names = names_in(checkpoint.get("classes"))
    had = len(names) or classes_of(checkpoint["model"])
    if strict and had and had != len(classes):
        raise UserError(f"{path} has {had} classes, but the data has {len(classes)}")
    for number, (name, here) in enumerate(zip(names, map(str, classes), strict=False)):
        if name != here and had == len(classes):
            other = f"{path}: class {number} is {name!r}, but in the data it is {here!r}"
            if strict:
                raise UserError(other)
            logger.info(f"warning: {other}; its head is kept all the same")
            break


def names_in(classes):
    """A checkpoint's names of its classes; [] if it has none."""
    fits = isinstance(classes, (list, tuple)) and all(isinstance(n, str) for n in classes)
    return [*classes] if fits else []


def load_tested(settings, options, data, ranks, path=None, known=None, rename=None) -> Tested:
    """The checkpoint to test, its network, input and data as it was trained; what is set now goes
    over them, with a line each. path: None: settings say which. known: {key: value} of what it does
    not record. rename: {part of a weight's name in the file: what it is here}.
    """
    path = path or ranks.from_main(lambda: find_checkpoint(settings), slow=True)
    checkpoint = load_checkpoint(path, settings.use_ema)
    for theirs, ours in (rename or {}).items():
        weights = checkpoint["model"].items()
        checkpoint["model"] = {name.replace(theirs, ours): value for name, value in weights}
    recorded, sha256 = recorded_values(options, checkpoint, path), digest(path)
    if checkpoint.get("cross_sample_lif") is not True:  # else the figure depends on the batch
        recorded.pop("val_batch_size", None)
    recorded |= known or {}
    checkpoint.setdefault("cross_sample_lif", recorded.pop("cross_sample_lif", None))
    cfg = settings.resolve("test", recorded, path, checkpoint.get("given"))
    classes = cfg.num_classes or 0  # weights without a head
    model, cross = load_model(cfg, options, data, ranks, classes, checkpoint, path)
    back = {n: v for n, v in vars(cfg).items() if options.KEYS[n].back in ("network", "data")}
    settings = {**back, "use_ema": settings.use_ema, "cross_sample_lif": cross, "sha256": sha256}
    return Tested(cfg, ranks, path, model, settings, checkpoint.get("classes"))


def measure(tested: Tested, data, dataset=None, **more) -> Metrics:
    """Metrics on the test set, or on `dataset`, in a line and, with `more`, in a JSON beside it."""
    cfg, ranks, path = tested.cfg, tested.ranks, tested.path
    shape = data.input_shape(cfg)
    if not tested.model.num_classes:
        raise UserError(f"{path}: weights without a head, which can't be tested")
    if dataset is None:
        dataset, weights = data.build_dataset(cfg, False, ranks), tested.model.state_dict()
        check_classes({"classes": tested.classes, "model": weights}, path, dataset.classes)
    events = len(shape) == 4  # deterministic, as in training
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = events, not events
    model, autocast = graphed(tested.model, cfg, ranks), make_autocast(cfg, ranks, cfg.eval_amp)
    metrics = evaluate(model, data.test_loader(cfg, dataset, ranks), ranks, autocast)
    figures = f"top-1 {metrics.top1:.2f} %, top-5 {metrics.top5:.2f} %, loss {metrics.loss:.4f}"
    of = f"{more.get('test_path', cfg.dataset)}, {len(dataset):,} samples"
    logger.info(f"{typed(path)}: {figures} ({of}, {metrics.images_per_second:.0f} a second)")
    result = {"checkpoint": str(path), **metrics._asdict(), "samples": len(dataset)}
    result |= {"input": shape, **tested.settings, **more}
    ranks.from_main(lambda: write_result(path, result))
    return metrics


def load(options, data, path, device="cpu", rename=None):
    """(model in eval mode, transform of a sample, such as a PIL image, to its input, names of the
    classes or None) of a checkpoint, for use from Python; rename: see load_tested.
    """
    settings, ranks = read_settings(options, ["--device", device]), Ranks(device, alone=True)
    tested = load_tested(settings, options, data, ranks, fetch(path), rename=rename)
    return tested.model.eval(), data.input_transform(tested.cfg), tested.classes
