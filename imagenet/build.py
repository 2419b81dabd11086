"""From configuration and checkpoint to a model on this rank's device, and to its measured accuracy."""

import hashlib
from collections import namedtuple

import timm
import torch

import data
import model as models
import ms
import options
from checkpoint import load_checkpoint, load_weights, resolve_semantics
from config import UserError
from engine import evaluate, make_autocast
from fused import available
from lif import resolve_backend
from runtime import logger

Released = namedtuple("Released", "model input_size top1")  # top-1 in %, of the paper

RELEASED = {  # MD5 of the release's files
    "60df416983ae326bb14bdb4566444320": Released("QKFormer_10_384", 224, 78.80),
    "85dd1f94c87ba5ec908fed5d0a3f7f69": Released("QKFormer_10_512", 224, 82.04),
    "dc1595408ed1bd40346be2bdaf5015d5": Released("QKFormer_10_768", 224, 84.22),
    "ba20af8eb450d4ec9c71009fde8e7125": Released("QKFormer_10_768", 288, 85.25),
    "99a671118f67a680aa38b6ac5aae449a": Released("QKFormer_10_768", 384, 85.65),
}


def check_model(cfg):
    """UserError where there is no cfg.model, or not at this input size."""
    names = [name for file in (models, ms) for name in timm.list_models(module=file.__name__)]
    if cfg.model not in names:
        raise UserError(f"model is {cfg.model!r}; there are {', '.join(names)}")
    if cfg.input_size % 16:
        raise UserError(f"input_size is {cfg.input_size}; it must be a multiple of 16")


def build_model(cfg, cross_sample_lif, ranks):
    """The configuration's model, on this rank's device."""
    if cfg.compile and cfg.checkpoint_stages:
        raise UserError("compile and checkpoint_stages do not go together; leave one of them out")
    try:
        resolve_backend(cfg.backend, ranks.device.type, torch.float32)  # says which it is
        if cfg.fused:
            available(ranks.device.type, torch.float32, cfg.backend)  # likewise
        model = timm.create_model(
            cfg.model,
            T=cfg.time_step,
            img_size_h=cfg.input_size,
            img_size_w=cfg.input_size,
            num_classes=cfg.nb_classes,
            embed_dims=cfg.dim,  # timm leaves out what is None: then the model's own counts
            num_heads=cfg.num_heads,
            mlp_ratios=cfg.mlp_ratio,
            depths=cfg.layer,
            attention=tuple(cfg.attention),
            drop_path=cfg.drop_path or 0.0,
            cross_sample_lif=cross_sample_lif,
            backend=cfg.backend,
            fused=cfg.fused,
            checkpoint_stages=cfg.checkpoint_stages,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from None
    layout = torch.channels_last if cfg.channels_last else torch.contiguous_format
    model = model.to(ranks.device, memory_format=layout)
    if cfg.compile:
        model.compile(dynamic=False)  # T*B is a number of steps where the release's neuron runs over both
    return model


def load_model(cfg, ranks, checkpoint=None, path=None, new_head=False):
    """(model with the checkpoint's weights, its cross_sample_lif), with a line on its semantics.

    With `new_head`, a head of another number of classes, or none, is left as it was initialised; a line says so.
    """
    check_model(cfg)
    cross_sample_lif, semantics = resolve_semantics(cfg.cross_sample_lif, checkpoint, path)
    logger.info(semantics)
    model = build_model(cfg, cross_sample_lif, ranks)
    if checkpoint and new_head:
        weights = checkpoint["model"]
        classes = weights["head.weight"].shape[:1] if "head.weight" in weights else None
        if classes == (cfg.nb_classes,):
            head = "its head fits and is kept"
        else:
            had = "no head" if classes is None else f"a head of {'x'.join(map(str, classes))} classes"
            head = f"has {had}, but nb_classes is {cfg.nb_classes}; a new one is initialised"
            checkpoint = {**checkpoint, "model": {**weights, **model.head.state_dict(prefix="head.")}}
        load_weights(model, checkpoint, path)
        logger.info(f"{path}: {head}")
    elif checkpoint:
        load_weights(model, checkpoint, path)
    return model, cross_sample_lif


def number(checkpoint, name, default, path):
    """A number of the default's type in a checkpoint; the default where it is not recorded."""
    value = checkpoint.get(name, default)
    if type(value) is not type(default):
        raise UserError(f"{path}: can't be resumed: its {name} is {value!r}; finetune only takes its weights")
    return value


def md5(path):
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def load_tested(cfg, ranks, path):
    """(model, cross_sample_lif, the paper's top-1 or None) of a checkpoint that is to be tested.

    One of the release's is known by its MD5, which sets model and semantics in cfg, and input_size where that is
    the default. The top-1 is None for any other file, and at another input size.
    """
    checkpoint = load_checkpoint(path)
    released = RELEASED.get(ranks.from_main(lambda: md5(path)))
    if released is None:
        return *load_model(cfg, ranks, checkpoint, path), None
    line = f"{path}: the release's {released.model} at {released.input_size}, {released.top1:.2f} % in the paper"
    cfg.model = released.model
    if cfg.input_size == options.KEYS["input_size"].default:
        cfg.input_size = released.input_size
    elif cfg.input_size != released.input_size:
        line += f"; tested at {cfg.input_size}, since input_size says so"
    logger.info(line)
    checkpoint["cross_sample_lif"] = True  # it does not record it
    published = released.top1 if cfg.input_size == released.input_size else None
    return *load_model(cfg, ranks, checkpoint, path), published


def measure(cfg, ranks, model, path, published):
    """Metrics of a model on data_path/val, with a line that names the checkpoint; the published top-1 beside it."""
    dataset, _ = data.build_dataset(cfg, False, ranks)
    metrics = evaluate(model, data.test_loader(cfg, dataset, ranks), ranks, make_autocast(cfg, ranks, cfg.eval_amp))
    logger.info(
        f"{path}: top-1 {metrics.top1:.2f} %, top-5 {metrics.top5:.2f} %, loss {metrics.loss:.4f}, "
        f"{metrics.images_per_second:.0f} images/s"
    )
    if published is not None:
        logger.info(f"top-1: measured {metrics.top1:.2f} %, published {published:.2f} %")
    return metrics
