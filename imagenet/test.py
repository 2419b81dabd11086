"""Test a checkpoint: top-1, top-5 and loss on data_path/val, printed and written to a JSON beside the checkpoint.

Network and input are those that the checkpoint was trained with; a flag goes over them.

Usage:
    python test.py --data_path /data/imagenet --checkpoint output/imagenet/best.pth      # writes test-best.json there
    python test.py --checkpoint hst_10_384.pth       # one of the release's: its model and input size are known
    python test.py --checkpoint hst_10_384.pth --predict photos --labels wnids.txt --predictions photos.csv
    torchrun --nproc_per_node=8 test.py --checkpoint hst_10_384.pth                   # the same figures, sooner
"""

import csv
import os
from pathlib import Path

import torch

import data
import options
from build import load_tested, measure
from config import UserError, load_config
from engine import make_autocast, progress
from runs import find_checkpoint
from runtime import Ranks, logger, run, set_up_log


@torch.inference_mode()
def predict(cfg, ranks, model, wnids):
    """[[file, top-5 classes, their probabilities, their wnids where given], ...] of the images of cfg.predict."""
    images = data.find_images(cfg)
    autocast = make_autocast(cfg, ranks, cfg.eval_amp)
    model.eval()
    rows = []
    for batch, indices in progress(data.test_loader(cfg, images, ranks), "predict", ranks):
        with autocast():
            logits = model(batch)
        top = logits.double().softmax(1).topk(min(5, logits.shape[1]))
        for index, values, classes in zip(*map(torch.Tensor.tolist, (indices, *top)), strict=True):
            path = Path(images.samples[index][0]).relative_to(cfg.predict)
            named = [wnids[number] for number in classes] if wnids else []
            rows.append((index, [str(path), *classes, *(f"{value:.6f}" for value in values), *named]))
    return [row for _, row in sorted(row for share in ranks.gather(rows) for row in share)]


def read_wnids(cfg):
    """The first word of every line of the label file, line i for class i; None without such a file."""
    if cfg.labels is None:
        return None
    try:
        wnids = [line.split()[0] for line in Path(cfg.labels).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"labels: {cfg.labels} can't be read: {error}") from None
    if len(wnids) != cfg.nb_classes:
        raise UserError(f"labels: {cfg.labels} has {len(wnids)} lines, but nb_classes is {cfg.nb_classes}")
    return wnids


def check_predictions(path):
    """UserError, before anything is computed, where predictions can't be written or would replace others."""
    if path.exists():
        raise UserError(f"predictions: {path} is there already; name another file")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"predictions: {path} can't be written: {path.parent} is no folder that allows it")


def write_predictions(path, rows, with_wnids):
    top = (len(rows[0]) - 1) // (3 if with_wnids else 2) if rows else 5
    columns = ("class", "probability", "wnid")[: 3 if with_wnids else 2]
    try:
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", *(f"{column}{k}" for column in columns for k in range(1, top + 1))])
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from None
    logger.info(f"{len(rows)} images: {path}")


def main(argv=None):
    description = "Test QKFormer on ImageNet."
    cfg, notes, given = load_config(options.KEYS, options.NO_EFFECT, options.DEFAULT_CONFIG, argv, description)
    ranks = Ranks(cfg.device)
    set_up_log(ranks)
    for note in notes:
        logger.info(note)
    path = find_checkpoint(cfg, cfg.output_dir)
    if not cfg.predict:
        measure(cfg, given, ranks, path)
        return 0
    predictions = Path(cfg.predictions)
    ranks.from_main(lambda: check_predictions(predictions))
    model, *_ = load_tested(cfg, given, ranks, path)
    wnids = read_wnids(cfg)
    rows = predict(cfg, ranks, model, wnids)
    ranks.from_main(lambda: write_predictions(predictions, rows, wnids is not None))
    return 0


if __name__ == "__main__":
    run(main)
