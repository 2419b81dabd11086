"""From configuration and checkpoint to a model on this rank's device, and to its measured accuracy."""

import timm
import torch

import data
import model as models
from checkpoint import load_weights, resolve_semantics
from config import UserError
from engine import evaluate, make_autocast
from lif import resolve_backend
from runtime import logger


def check_model(cfg):
    """UserError where model.py does not have cfg.model, or not at this input size."""
    names = timm.list_models(module=models.__name__)
    if cfg.model not in names:
        raise UserError(f"model is {cfg.model!r}; model.py has {', '.join(names)}")
    if cfg.input_size % 16:
        raise UserError(f"input_size is {cfg.input_size}; it must be a multiple of 16")


def build_model(cfg, cross_sample_lif, ranks):
    """The configuration's model, on this rank's device."""
    try:
        resolve_backend(cfg.backend, ranks.device.type, torch.float32)  # says which it is
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
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from None
    layout = torch.channels_last if cfg.channels_last else torch.contiguous_format
    return model.to(ranks.device, memory_format=layout)


def load_model(cfg, ranks, checkpoint=None, path=None, new_head=False):
    """(model with the checkpoint's weights, its cross_sample_lif), with a line on its semantics.

    With `new_head`, a head of another number of classes is left as it was initialised; a line says so.
    """
    check_model(cfg)
    cross_sample_lif, semantics = resolve_semantics(cfg.cross_sample_lif, checkpoint, path)
    logger.info(semantics)
    model = build_model(cfg, cross_sample_lif, ranks)
    if checkpoint and new_head:
        own, weights = model.head.state_dict(prefix="head."), checkpoint["model"]
        shapes = [None if weights.get(name) is None else list(weights[name].shape) for name in own]
        if shapes == [list(value.shape) for value in own.values()]:
            logger.info(f"{path}: its head fits and is kept")
        else:
            had = "no head" if None in shapes else f"a head of {shapes[1][0]} classes"
            logger.info(f"{path}: has {had}, which does not fit {cfg.nb_classes} classes; a new one is initialised")
            checkpoint = {**checkpoint, "model": {**weights, **own}}
    if checkpoint:
        load_weights(model, checkpoint, path)
    return model, cross_sample_lif


def measure(cfg, ranks, model, path):
    """Metrics of a model on data_path/val, with a line that names the checkpoint it is from."""
    dataset, _ = data.build_dataset(cfg, train=False)
    metrics = evaluate(model, data.test_loader(cfg, dataset, ranks), ranks, make_autocast(cfg, ranks, cfg.eval_amp))
    logger.info(
        f"{path}: top-1 {metrics.top1:.2f} %, top-5 {metrics.top5:.2f} %, loss {metrics.loss:.4f}, "
        f"{metrics.images_per_second:.0f} images/s"
    )
    return metrics
