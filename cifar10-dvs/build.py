# Copied from dvs128-gesture/build.py with SPLIT = []->SPLIT = ["split_seed"]
"""From configuration and checkpoint to a model on this rank's device."""

from pathlib import Path

import torch

import data
import model as models
import options
from energy import counting
from harness.checkpoint import load_checkpoint, load_weights, resolve_semantics
from harness.config import UserError, load_config
from harness.engine import evaluate, make_autocast
from harness.graph import graphed
from harness.ranks import Ranks
from harness.runs import shown, write_result
from harness.runtime import logger
from harness.weights import architecture, steps_of
from harness.yml import show
from spiking.compiler import available
from spiking.neuron import resolve_backend

MODELS = {name: getattr(models, name) for name in models.__all__}  # those registered with timm
# Keys that a checkpoint decides unless they are set: those that shapes tell, the network's others,
# its input's, and those of the split, in which a difference would test on samples of the training.
SHAPES = ("model", "layer", "dim", "mlp_ratio", "num_classes")
NEURON = ("neuron", "tau", "v_threshold", "surrogate_alpha")
NETWORK = ("T", "num_heads", "attention", *NEURON)
INPUT = ("dataset", "val_batch_size")
SPLIT = ["split_seed"]


# Copied from cifar10/build.py with data_dir->data_path
def settle(cfg, given, checkpoint, path, purpose="test"):
    """Set in cfg what a checkpoint tells: its network and, except to "finetune", input and split.

    A flag, or a yml that -c names or that was edited since, overrides it; a line names both values.
    UserError where this must be a mistake: weights would not fit, or training samples would be
    tested. To "resume" or "finetune", a line also names values of the yml that are not used.
    """
    recorded, finetune = read_config(checkpoint, path), purpose == "finetune"
    for name in (*SHAPES, *NETWORK) if finetune else (*SHAPES, *NETWORK, *INPUT, *SPLIT):
        if name not in recorded or (finetune and name == "num_classes"):
            continue
        value, (said, origin) = recorded[name], what_was_said(name, given, checkpoint)
        fixed = (
            name in (*SHAPES, *SPLIT)
            or (name == "attention" and said and not same_shapes(said, value))
            or (name == "neuron" and "plif" in (said, value))  # it has weights of its own
        )
        if origin is None or said == value:
            if purpose != "test" and given.yml.get(name, value) not in (value, None):
                logger.info(
                    f"{given.file}: {name} is {given.yml[name]}, but {path} has {value}, which is "
                    f"used"
                )
            setattr(cfg, name, value)
        elif fixed:
            raise UserError(
                f"{origin}: {name} is {said}, but {path} is of {name} {value}; leave it out to use "
                f"that"
            )
        else:
            logger.info(
                f"{origin}: {name} is {said}, but {path} was trained with {value}; {said} is used"
            )
    place = recorded.get("data_path")
    if (
        not finetune
        and place
        and what_was_said("data_path", given, checkpoint)[1] is None
        and Path(place).is_dir()
    ):
        cfg.data_path = place
    if purpose == "resume":
        say_changes(cfg, checkpoint, path)


# Copied from cifar10/build.py
def say_changes(cfg, checkpoint, path):
    """A line names the settings of training whose values are not those of the run so far."""
    then, changed = checkpoint.get("config"), []
    for name, key in options.KEYS.items() if isinstance(then, dict) else ():
        if key.scripts == ("train",) and key.group != "run" and key.kind != Path and name in then:
            now, before = getattr(cfg, name), then[name]
            if show(now) != show(before):
                changed.append(f"{name} {show(now)} (was {show(before)})")
    if changed:
        logger.info(f"warning: {path} was trained otherwise; now {', '.join(changed)}")


# Copied from cifar10/build.py
def what_was_said(name, given, checkpoint):
    """(value, origin) of a key that was set for this call; (None, None) if it was not.

    A yml counts if -c named it, or if the run was trained with it. A value that the yml already had
    in training does not count, because a flag may have overridden it then.
    """
    then = checkpoint.get("given") if isinstance(checkpoint.get("given"), dict) else {}
    if name in given.flags:
        return given.flags[name], "command line"
    if name in given.yml and (given.named or given.file == then.get("file")):
        trained_with_it = given.file == then.get("file")
        if not trained_with_it or then.get("yml", {}).get(name) != given.yml[name]:
            return given.yml[name], given.file
    return None, None


# Copied from cifar10/build.py with time_step->T, data_dir->data_path
def read_config(checkpoint, path):
    """{key: value} of network, input and split: what a checkpoint records and what shapes tell."""
    recorded = {name: options.KEYS[name].default for name in NEURON}  # of files that lack them
    # First, since a file of another folder is not damaged.
    read_shapes(checkpoint["model"], path, recorded)
    if isinstance(checkpoint.get("config"), dict):
        for name, value in checkpoint["config"].items():
            if name in (*SHAPES, *NETWORK, *INPUT, *SPLIT, "data_path"):
                try:
                    recorded[name] = options.KEYS[name].convert(value)
                except ValueError as wanted:
                    raise UserError(
                        f"{path}: damaged: its {name} is {value!r}; it must be {wanted}"
                    ) from None
        if checkpoint.get("cross_sample_lif") is True:  # then the figure depends on the batch
            recorded["val_batch_size"] = recorded.get("val_batch_size") or checkpoint["config"].get(
                "batch_size"
            )
        else:
            recorded.pop("val_batch_size", None)
    elif (steps := steps_of(checkpoint, path)) is not None:
        recorded["T"] = steps
    return {**recorded, **read_shapes(checkpoint["model"], path, recorded)}


# Copied from cifar10/build.py with "CIFAR"->"event data"
def read_shapes(weights, path, recorded):
    """{key: value} that the shapes of weights tell; a recorded value where it fits these shapes."""
    net = architecture(weights, path, "event data", models.QKFormer)
    ratio = recorded.get("mlp_ratio", net.mlp_ratio)
    if int(net.dim * ratio) != int(net.dim * net.mlp_ratio):
        ratio = net.mlp_ratio
    kinds = recorded.get("attention", net.attention)
    if not same_shapes(kinds, net.attention):
        kinds = net.attention
    classes = {} if net.classes is None else {"num_classes": net.classes}
    return {
        "model": net.family,
        "layer": net.layer,
        "dim": net.dim,
        "mlp_ratio": ratio,
        "attention": kinds,
        "neuron": "plif" if net.learns_tau else recorded.get("neuron", "lif"),
        **classes,
    }


# Copied from cifar10/build.py
def same_shapes(one, other):
    """Whether two lists of kinds of attention have the same weights: those of "token" and "channel"
    are alike.
    """
    return [kind == "ssa" for kind in one] == [kind == "ssa" for kind in other]


def build_model(cfg, cross_sample_lif, ranks):
    """The configuration's model, on this rank's device."""
    if cfg.compile and cfg.checkpoint_stages:
        raise UserError("compile and checkpoint_stages do not go together; leave one of them out")
    if cfg.model not in MODELS:
        raise UserError(f"model is {cfg.model!r}; there are {', '.join(MODELS)}")
    try:
        resolve_backend(cfg.backend, ranks.device.type, torch.float32)  # now, not in the first step
        if cfg.fused:
            available(ranks.device.type, torch.float32, cfg.backend)  # likewise
        model = MODELS[cfg.model](
            T=cfg.T,
            img_size_h=data.HEIGHT,
            img_size_w=data.WIDTH,
            num_classes=cfg.num_classes,
            embed_dims=cfg.dim,
            num_heads=cfg.num_heads,
            mlp_ratios=cfg.mlp_ratio,
            depths=cfg.layer,
            attention=tuple(cfg.attention),
            drop_path=cfg.drop_path,
            cross_sample_lif=cross_sample_lif,
            checkpoint_stages=cfg.checkpoint_stages,
            neuron=cfg.neuron,
            tau=cfg.tau,
            v_threshold=cfg.v_threshold,
            surrogate_alpha=cfg.surrogate_alpha,
            backend=cfg.backend,
            fused=cfg.fused,
            byte_spikes=cfg.byte_spikes,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from None
    model = model.to(ranks.device)
    if cfg.compile:
        model.compile(
            dynamic=False
        )  # T*B is a number of steps where the release's neuron runs over both
    return model


# Copied from cifar10/build.py
def load_model(cfg, ranks, checkpoint=None, path=None, new_head=False):
    """(model with the checkpoint's weights, its cross_sample_lif), with a line on its semantics.

    With `new_head`, a head of another number of classes, or none, is left as it was initialised; a
    line says so.
    """
    cross_sample_lif, semantics = resolve_semantics(
        cfg.cross_sample_lif, checkpoint, path, cfg.model
    )
    logger.info(semantics)
    model = build_model(cfg, cross_sample_lif, ranks)
    if checkpoint and new_head:
        weights = checkpoint["model"]
        classes = weights["head.weight"].shape[:1] if "head.weight" in weights else None
        if classes == (cfg.num_classes,):
            head = "its head fits and is kept"
        else:
            had = (
                "no head" if classes is None else f"a head of {'x'.join(map(str, classes))} classes"
            )
            head = f"has {had}, but num_classes is {cfg.num_classes}; a new one is initialised"
            checkpoint = {
                **checkpoint,
                "model": {**weights, **model.head.state_dict(prefix="head.")},
            }
        load_weights(model, checkpoint, path)
        logger.info(f"{path}: {head}")
    elif checkpoint:
        load_weights(model, checkpoint, path)
    return model, cross_sample_lif


# Copied from cifar10/build.py
def load_tested(cfg, given, ranks, path):
    """(model, cross_sample_lif) of a checkpoint that is to be tested."""
    checkpoint = load_checkpoint(path, cfg.use_ema)
    settle(cfg, given, checkpoint, path)
    return load_model(cfg, ranks, checkpoint, path)


# Copied from cifar10/build.py with images/s->samples/s
def measure(cfg, given, ranks, path):
    """Metrics of a checkpoint on the test set, in a line and in test-NAME.json beside it."""
    model, cross_sample_lif = load_tested(cfg, given, ranks, path)
    loader = data.test_loader(cfg, data.build_dataset(cfg, False, ranks), ranks)
    with counting(cfg.energy, model, ranks, path):
        model, autocast = graphed(model, cfg, ranks), make_autocast(cfg, ranks, cfg.eval_amp)
        metrics = evaluate(model, loader, ranks, autocast)
    logger.info(
        f"{shown(path)}: top-1 {metrics.top1:.2f} %, top-5 {metrics.top5:.2f} %, loss "
        f"{metrics.loss:.4f}, {metrics.images_per_second:.0f} samples/s"
    )
    result = {"checkpoint": str(path), **metrics._asdict(), "cross_sample_lif": cross_sample_lif}
    ranks.from_main(lambda: write_result(path, result))
    return metrics


def load(path, device="cpu"):
    """What a checkpoint holds, for use from Python.

    Returns (model in eval mode, transform of a sample's frames [T, 2, H, W] to the model's input,
    names of the classes or None). Raises UserError as test.py does.
    """
    cfg, _, given = load_config(
        options.KEYS, options.NO_EFFECT, options.DEFAULT_CONFIG, ["--device", device]
    )
    checkpoint = load_checkpoint(path)
    settle(cfg, given, checkpoint, path)
    model, _ = load_model(cfg, Ranks(cfg.device), checkpoint, path)
    return model.eval(), lambda frames: torch.as_tensor(frames).float(), checkpoint.get("classes")
