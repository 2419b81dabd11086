"""The release's five checkpoints, known by their MD5, and what they do not record."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import data
import options
from harness.build import Tested, load_tested, measure
from harness.config import read_settings
from harness.folder import fetch, find_checkpoint
from harness.log import logger
from harness.process import Ranks


class Released(NamedTuple):
    """Model, input size, top-1 in % of the paper, and the batch it was measured with, if known."""

    model: str
    img_size: int
    top1: float
    batch: int | None


RELEASED = {
    "60df416983ae326bb14bdb4566444320": Released("QKFormer_10_384", 224, 78.80, 32),
    "85dd1f94c87ba5ec908fed5d0a3f7f69": Released("QKFormer_10_512", 224, 82.04, 32),
    "dc1595408ed1bd40346be2bdaf5015d5": Released("QKFormer_10_768", 224, 84.22, 24),
    "ba20af8eb450d4ec9c71009fde8e7125": Released("QKFormer_10_768", 288, 85.25, None),
    "99a671118f67a680aa38b6ac5aae449a": Released("QKFormer_10_768", 384, 85.65, None),
}


def load_released(settings, ranks, path: Path | None = None, rename=None) -> tuple[Tested, dict]:
    """(the checkpoint to test, {"published_top1": the paper's} where it is one of the release's and
    tested at its own size).
    """
    path = path or ranks.from_main(lambda: find_checkpoint(settings), slow=True)
    released = RELEASED.get(ranks.from_main(lambda: md5(path)))
    if released is None:
        return load_tested(settings, options, data, ranks, path, rename=rename), {}
    paper = f"the release's {released.model} at {released.img_size}, {released.top1:.2f} %"
    why = "since one neuron mixes the images of a batch (cross_sample_lif)"
    logger.info(f"{path}: {paper} in the paper, which its authors withdrew in May 2026, {why}")
    known = {"img_size": released.img_size, "cross_sample_lif": True}
    if released.batch:  # under the release's semantics the figure depends on it
        known["val_batch_size"] = released.batch
    tested = load_tested(settings, options, data, ranks, path, known)
    same = tested.cfg.img_size == released.img_size
    return tested, {"published_top1": released.top1} if same else {}


def md5(path):
    if not path.is_file():
        return None  # load_checkpoint says so
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def measure_released(settings, ranks, path: Path | None = None):
    """Test a checkpoint; of one of the release's a line has both figures."""
    tested, published = load_released(settings, ranks, path)
    metrics = measure(tested, data, **published)
    for top1 in published.values():
        logger.info(f"top-1: measured {metrics.top1:.2f} %, published {top1:.2f} %")


def load(path, device="cpu", rename=None):
    """(model in eval mode, transform of a PIL image to its input, names of the classes or None) of
    a checkpoint, for use from Python. UserError as test.py has it; rename: see load_tested.
    """
    settings = read_settings(options, ["--device", device])
    tested, _ = load_released(settings, Ranks(device, alone=True), fetch(path), rename)
    names = tested.classes or (data.class_names() if tested.model.num_classes == 1000 else None)
    return tested.model.eval(), data.input_transform(tested.cfg), names
