"""Test a checkpoint: top-1, top-5 and loss on data_path/val, printed and written to test.json beside the checkpoint.

Usage:
    python test.py --data_path /data/imagenet --checkpoint output/imagenet/best.pth
    python test.py --checkpoint hst_10_384.pth       # one of the release's: its model and input size are known
    python test.py --checkpoint hst_10_384.pth --predict photos --labels wnids.txt    # a folder without labels
    torchrun --nproc_per_node=8 test.py --checkpoint hst_10_384.pth                   # the same figures, sooner
"""

import csv
import hashlib
import json
import sys
from collections import namedtuple
from pathlib import Path

import torch

import data
import options
from build import load_model, measure
from checkpoint import load_checkpoint, newest
from config import HERE, UserError, load_config
from engine import make_autocast, progress
from runtime import Ranks, logger, run, set_up_log

Released = namedtuple("Released", "model input_size top1")  # top-1 in %, of the paper

RELEASED = {  # MD5 of the release's files
    "60df416983ae326bb14bdb4566444320": Released("QKFormer_10_384", 224, 78.80),
    "85dd1f94c87ba5ec908fed5d0a3f7f69": Released("QKFormer_10_512", 224, 82.04),
    "dc1595408ed1bd40346be2bdaf5015d5": Released("QKFormer_10_768", 224, 84.22),
    "ba20af8eb450d4ec9c71009fde8e7125": Released("QKFormer_10_768", 288, 85.25),
    "99a671118f67a680aa38b6ac5aae449a": Released("QKFormer_10_768", 384, 85.65),
}


def md5(path):
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def recognise(cfg, checkpoint, path, argv):
    """The entry of RELEASED for a checkpoint or None; what it tells goes into cfg, except for what a flag says."""
    released = RELEASED.get(md5(path))
    if released is None:
        return None
    given = {arg.split("=")[0].lstrip("-").replace("-", "_") for arg in argv if arg.startswith("--")}
    cfg.model = released.model
    if "input_size" not in given:
        cfg.input_size = released.input_size
    checkpoint["cross_sample_lif"] = True  # it does not record it
    logger.info(f"{path}: the release's {released.model} at {released.input_size}, {released.top1:.2f} % in the paper")
    return released


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
    argv = sys.argv[1:] if argv is None else argv
    description = "Test QKFormer on ImageNet."
    cfg, notes = load_config(options.KEYS, options.NO_EFFECT, options.DEFAULT_CONFIG, argv, description)
    ranks = Ranks(cfg.device)
    set_up_log(ranks)
    for note in notes:
        logger.info(note)
    root = Path(cfg.output_dir) if cfg.output_dir else HERE / "output"
    path = Path(cfg.checkpoint) if cfg.checkpoint else newest(root.glob("*/best.pth"))
    if path is None:
        raise UserError(f"no checkpoint: there is no best.pth under {root}; train first, or name one with --checkpoint")
    wnids = read_wnids(cfg)
    checkpoint = load_checkpoint(path)
    released = recognise(cfg, checkpoint, path, argv)
    model, cross_sample_lif = load_model(cfg, ranks, checkpoint, path)
    if cfg.predict:
        rows = predict(cfg, ranks, model, wnids)
        if ranks.main:
            write_predictions(path.with_name("predict.csv"), rows, wnids is not None)
        return 0
    metrics = measure(cfg, ranks, model, path)
    result = {
        "checkpoint": str(path),
        **metrics._asdict(),
        "input_size": cfg.input_size,
        "cross_sample_lif": cross_sample_lif,
    }
    if released and released.input_size == cfg.input_size:
        logger.info(f"top-1: measured {metrics.top1:.2f} %, published {released.top1:.2f} %")
        result["published_top1"] = released.top1
    if ranks.main:
        try:
            path.with_name("test.json").write_text(json.dumps(result, indent=1) + "\n")
        except OSError as error:
            logger.warning(f"warning: {path.with_name('test.json')} can't be written: {error.strerror}")
    return 0


if __name__ == "__main__":
    run(main)
