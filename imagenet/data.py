"""Photographs in ImageNet's folder layout, through timm's transforms and mixup.

    data_path/train/<class>/*.JPEG
    data_path/val/<class>/*.JPEG

Classes are numbered in the order of their folders' names.
"""

import io
import re
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup, auto_augment, create_transform
from torch.utils.data import Dataset, default_collate
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from config import UserError
from engine import BatchLoader, test_batches, train_batches
from runtime import logger

# JPEG: start of image, of a scan, end of image; a marker, other than what stands within a scan's data; those that
# begin a segment with its length
SOI, SOS, EOI = b"\xff\xd8", 0xDA, 0xD9
MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])", re.DOTALL)
SEGMENTS = {*range(0xC0, 0xD0), *range(SOS, 0xF0), 0xFE} - {0xC8}


# Copied from cifar10/data.py
def posterize(image, bits_to_keep, **_):
    """timm's operation, also for 0 bits (magnitude 10): black, as in the release; today's Pillow raises."""
    if bits_to_keep < 1:
        return image.point(lambda value: 0)
    return auto_augment.posterize(image, bits_to_keep)


for name in ("Posterize", "PosterizeOriginal", "PosterizeIncreasing"):
    auto_augment.NAME_TO_OP[name] = posterize


class BadImage(UserError):
    """A file that is not a whole image."""


def jpeg_fault(data):
    """What is wrong with a JPEG's segments, or None: the decoder takes missing data, as zeros too, for a grey area.

    Segments are skipped by their lengths, so a thumbnail in one of them does not count, nor what follows the end.
    """
    at, scans = len(SOI), 0
    while marker := MARKER.search(data, at):
        code, at = marker[1][0], marker.end()
        if code == EOI:
            return None if scans else "a JPEG without a scan"
        if code not in SEGMENTS:
            return f"a JPEG with an illegal marker, FF {code:02X}"
        scans += code == SOS
        at += int.from_bytes(data[at : at + 2], "big")
    return "a JPEG without an end"


def read_image(path):
    """The RGB image in a file; BadImage if it can't be read or is not whole.

    What can't be seen are changed bytes of a scan that still decodes (a JPEG has no checksums), to other pixels.
    """
    try:
        data = Path(path).read_bytes()
        image = Image.open(io.BytesIO(data))
        if image.format == "PNG":
            Image.open(io.BytesIO(data)).verify()  # the checksums, which decoding leaves out
        image = image.convert("RGB")
        fault = jpeg_fault(data) if data.startswith(SOI) else None
    except UnidentifiedImageError:
        fault = "unknown format"
    except Exception as error:  # damaged bytes can make a decoder fail in any way
        fault = str(error) or type(error).__name__
    if fault:
        raise BadImage(f"{path}: not a whole image ({fault})")
    return image


class Images(Dataset):
    """Images of files, transformed, each with a number: its label, or its index where there are no labels.

    Args:
        samples: [(path, number)].
        transform: PIL image -> tensor.
        skip: whether a bad file is left out, with a line that names it. In training the next good one takes
            its place, in evaluation its place stays empty (the item is None).
        replace: whether this is training.
    """

    def __init__(self, samples, transform, skip, replace=False):
        self.samples, self.transform, self.skip, self.replace = samples, transform, skip, replace

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        for step in range(len(self) if self.replace else 1):
            path, number = self.samples[(index + step) % len(self)]
            try:
                return self.transform(read_image(path)), number
            except BadImage as error:
                if not self.skip:
                    raise UserError(f"{error}; on_bad_image: skip leaves such files out") from None
                logger.warning(f"skipped: {error}")
        if self.replace:
            raise UserError(f"none of the {len(self)} training images can be read")
        return None


def build_transform(cfg, train):
    """PIL image -> normalised tensor [3, input_size, input_size]: timm's of training, or the centre for evaluation."""
    size = cfg.input_size
    if not train:
        return transforms.Compose(
            [
                transforms.Resize(int(size / 0.875) if size <= 224 else size, transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
            ]
        )
    try:
        return create_transform(
            size,
            is_training=True,
            color_jitter=cfg.color_jitter,
            auto_augment=cfg.aa,
            interpolation="bicubic",
            re_prob=cfg.reprob,
            re_mode=cfg.remode,
            re_count=cfg.recount,
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"aa is {cfg.aa!r}, which timm does not take: {error}") from None


def build_dataset(cfg, train):
    """(Images of data_path/train or data_path/val, names of the classes); UserError if that is not nb_classes."""
    folder = Path(cfg.data_path) / ("train" if train else "val")
    if not folder.is_dir():
        raise UserError(f"no folder {folder.resolve()}: data_path needs train/ and val/, with a folder a class")
    try:
        found = ImageFolder(folder)
    except OSError as error:  # torchvision names the classes that have no image, or says that there is no class
        raise UserError(f"{folder}: {' '.join(str(error).split())}") from None
    if len(found.classes) != cfg.nb_classes:
        raise UserError(f"{folder} has {len(found.classes)} classes, but nb_classes is {cfg.nb_classes}")
    images = Images(found.samples, build_transform(cfg, train), cfg.on_bad_image == "skip", replace=train)
    return images, found.classes


def find_images(cfg):
    """Images of the folder cfg.predict and those below it, in order of their names, each with its index."""
    folder = Path(cfg.predict)
    if not folder.is_dir():
        raise UserError(f"predict is {folder}, which is not a folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    if not paths:
        raise UserError(f"{folder} holds no images ({', '.join(IMG_EXTENSIONS)})")
    samples = [(str(path), index) for index, path in enumerate(paths)]
    return Images(samples, build_transform(cfg, False), cfg.on_bad_image == "skip")


class Loader:
    """Images [B, 3, H, W] and targets of the given batches, made by worker processes, on the rank's device."""

    def __init__(self, cfg, dataset, collate, batches, ranks):
        self.device = ranks.device
        self.layout = torch.channels_last if cfg.channels_last else torch.contiguous_format
        pin_memory = cfg.pin_mem and ranks.device.type == "cuda"
        self.loader = BatchLoader(dataset, collate, batches, cfg.num_workers, pin_memory)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            if batch is not None:
                images, targets = batch
                images = images.to(self.device, non_blocking=True, memory_format=self.layout)
                yield images, targets.to(self.device, non_blocking=True)


def collate_whole(items):
    """Images and numbers of the items that are not None; None if there is no such item."""
    items = [item for item in items if item is not None]
    return default_collate(items) if items else None


class MixedCollate:
    """Images and soft targets of a training batch, mixed."""

    def __init__(self, cfg):
        self.mixup = Mixup(
            mixup_alpha=cfg.mixup,
            cutmix_alpha=cfg.cutmix,
            cutmix_minmax=cfg.cutmix_minmax,
            prob=cfg.mixup_prob,
            switch_prob=cfg.mixup_switch_prob,
            mode=cfg.mixup_mode,
            label_smoothing=cfg.smoothing,
            num_classes=cfg.nb_classes,
        )

    def __call__(self, items):
        return self.mixup(*default_collate(items))


def train_loader(cfg, dataset, epoch, first_step, ranks):
    """The micro-steps of an epoch from the optimizer's `first_step` on, without those that make no whole step."""
    batches = train_batches(len(dataset), cfg.batch_size, cfg.seed, epoch, ranks)
    whole = len(batches) - len(batches) % cfg.accum_iter
    collate = MixedCollate(cfg) if mixes(cfg) else default_collate
    return Loader(cfg, dataset, collate, batches[first_step * cfg.accum_iter : whole], ranks)


def test_loader(cfg, dataset, ranks):
    """Normalised images and labels, or indices."""
    return Loader(cfg, dataset, collate_whole, test_batches(len(dataset), cfg.val_batch_size, ranks), ranks)


# Copied from cifar10/data.py
def mixes(cfg):
    return cfg.mixup > 0 or cfg.cutmix > 0 or cfg.cutmix_minmax is not None
