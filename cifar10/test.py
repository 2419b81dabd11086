"""Test a checkpoint: top-1, top-5 and loss on the test set, printed and written to test.json beside the checkpoint.

Usage:
    python test.py --checkpoint output/cifar10/best.pth
    python test.py -c quickstart.yml                           # the newest best.pth under output/
"""

import json
from pathlib import Path

import data
import options
from checkpoint import load_checkpoint, load_weights, newest, resolve_semantics
from config import HERE, UserError, load_config
from engine import evaluate, make_autocast
from runtime import Ranks, logger, run, set_up_log
from train import build_model


def main(argv=None):
    cfg, notes, _ = load_config(
        options.KEYS, options.NO_EFFECT, options.DEFAULT_CONFIG, argv, "Test QKFormer on CIFAR."
    )
    ranks = Ranks(cfg.device)
    set_up_log(ranks)
    for note in notes:
        logger.info(note)
    root = Path(cfg.output) if cfg.output else HERE / "output"
    path = Path(cfg.checkpoint) if cfg.checkpoint else newest(root.glob("*/best.pth"))
    if path is None:
        raise UserError(f"no checkpoint: there is no best.pth under {root}; train first, or name one with --checkpoint")
    checkpoint = load_checkpoint(path)
    cross_sample_lif, semantics = resolve_semantics(cfg.cross_sample_lif, checkpoint, path)
    logger.info(semantics)
    model = build_model(cfg, cross_sample_lif, ranks)
    load_weights(model, checkpoint, path)
    loader = data.test_loader(cfg, data.build_dataset(cfg, False, ranks), ranks)
    metrics = evaluate(model, loader, ranks, make_autocast(cfg, ranks, cfg.eval_amp))

    logger.info(
        f"{path}: top-1 {metrics.top1:.2f} %, top-5 {metrics.top5:.2f} %, loss {metrics.loss:.4f}, "
        f"{metrics.images_per_second:.0f} images/s"
    )
    result = {"checkpoint": str(path), **metrics._asdict(), "cross_sample_lif": cross_sample_lif}
    if ranks.main:
        try:
            path.with_name("test.json").write_text(json.dumps(result, indent=1) + "\n")
        except OSError as error:
            logger.warning(f"warning: {path.with_name('test.json')} can't be written: {error.strerror}")
    return 0


if __name__ == "__main__":
    run(main)
