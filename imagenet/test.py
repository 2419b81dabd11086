"""Test a checkpoint: top-1, top-5 and loss on data_path/val, printed and written to a JSON beside
the checkpoint.

Network and input are those that the checkpoint was trained with; a flag goes over them.

Usage:
    python test.py --data_path /data/imagenet --checkpoint output/imagenet/best.pth
    python test.py --checkpoint hst_10_384.pth     # one of the release's: model and size are known
    python test.py --checkpoint hst_10_384.pth --predict photos --predictions photos.csv
    torchrun --nproc_per_node=8 test.py --checkpoint hst_10_384.pth  # the same figures, sooner
"""

import harness  # noqa: F401  # isort: skip  # sets what torch reads from the environment

import csv
import io
import itertools
import os
from pathlib import Path

import torch

import data
import options
from harness.build import names_in
from harness.config import read_settings
from harness.folder import write_whole
from harness.graph import graphed
from harness.log import UserError, logger, progress
from harness.meters import make_autocast
from harness.process import run
from harness.run import enter
from released import load_released, measure_released


# Copied from cifar10/test.py
@torch.inference_mode()
def predict(tested, names, path):
    """Write a csv: of each image file, class, its name where known, probability, the next best."""
    cfg, ranks = tested.cfg, tested.ranks
    images, autocast = data.find_images(cfg), make_autocast(cfg, ranks, cfg.eval_amp)
    model = graphed(tested.model.eval(), cfg, ranks)
    rows = []
    for batch, indices in progress(data.test_loader(cfg, images, ranks), "predict", ranks):
        with autocast():
            logits = model(batch)
        top = logits.double().softmax(1).topk(min(5, logits.shape[1]))
        for index, values, classes in zip(*map(torch.Tensor.tolist, (indices, *top)), strict=True):
            row = [index, Path(images.samples[index][0]).relative_to(cfg.predict)]
            for number, value in zip(classes, values, strict=True):
                row += [number, *([names[number]] if names else []), f"{value:.6f}"]
            rows.append(row)
    rows = [row for _, *row in sorted(itertools.chain(*ranks.gather(rows)))]
    if not rows:
        raise UserError(f"predict: no image in {cfg.predict} can be read")
    columns = ("class", "name", "probability") if names else ("class", "probability")
    best, text = range(1, len(rows[0]) // len(columns) + 1), io.StringIO(newline="")
    head = ["file", *(f"{column}{k}" for k in best for column in columns)]
    csv.writer(text).writerows([head, *rows])
    # Names of files keep their bytes, whatever they encode.
    content = text.getvalue().encode(errors="surrogateescape")
    ranks.from_main(lambda: write_whole(path, content))
    logger.info(f"{len(rows)} images: {path}")


def class_names(cfg, recorded, classes):
    """Names of the classes: those of the label file, else of the checkpoint, else of ImageNet's
    1,000 classes; None where none are known.
    """
    if cfg.labels is not None:
        return read_wnids(cfg, classes)
    if len(names_in(recorded)) == classes:
        return data.class_names(recorded)
    return data.class_names() if classes == 1000 else None


def read_wnids(cfg, classes):
    """The first word of every line of the label file, line i for class i."""
    try:
        lines = Path(cfg.labels).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"labels: {cfg.labels} can't be read: {error}") from None
    wnids = [line.split()[0] for line in lines if line.strip()]
    if len(wnids) != classes:
        lines = f"{len(wnids)} lines, but the network has {classes} classes"
        raise UserError(f"labels: {cfg.labels} has {lines}")
    return wnids


# Copied from cifar10/test.py
def check_predictions(path):
    """UserError, before the work, where predictions can't be written or would replace others."""
    if os.path.lexists(path):
        raise UserError(f"predictions: {path} is there already; name another file")
    write_whole(path, b"")
    path.unlink()


def main(argv=None):
    settings = read_settings(options, argv, "test", "Test QKFormer on ImageNet.")
    ranks, predictions = enter(settings), Path(settings.predictions)
    if not settings.predict:
        measure_released(settings, ranks)
        return 0
    ranks.from_main(lambda: check_predictions(predictions))
    tested, _ = load_released(settings, ranks)
    names = class_names(tested.cfg, tested.classes, tested.model.num_classes)
    predict(tested, names, predictions)
    return 0


if __name__ == "__main__":
    run(main)
