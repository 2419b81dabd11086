"""Photographs in ImageNet's folder layout, through timm's transforms and mixup.

    data_path/train/<class>/*.JPEG
    data_path/val/<class>/*.JPEG

Classes are numbered in the order of their folders' names.
"""

import os
from pathlib import Path

import torch
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ImageNetInfo,
    Mixup,
    auto_augment,
    create_transform,
)
from torch.utils.data import Dataset, default_collate
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS

import photos
from batches import BatchLoader, test_batches, train_batches
from config import UserError
from images import BadImage, list_images, list_split, read_image
from runtime import logger


# Copied from cifar10/data.py
def posterize(image, bits_to_keep, **_):
    """timm's operation; 0 bits (magnitude 10) give black, as in the release; Pillow would raise."""
    if bits_to_keep < 1:
        return image.point(lambda value: 0)
    return auto_augment.posterize(image, bits_to_keep)


for name in ("Posterize", "PosterizeOriginal", "PosterizeIncreasing"):
    auto_augment.NAME_TO_OP[name] = posterize


class Images(Dataset):
    """Images of files, transformed, each with a number: its label, or its index if there is none.

    Args:
        samples: [(path, number)].
        transform: PIL image -> tensor.
        skip: whether a bad file is left out, with a line that names it; else it is a UserError.
        replace: whether the next good image takes the place of one left out, as in training; else
            its item is None.
        classes: their names.
    """

    def __init__(self, samples, transform, skip, replace=False, classes=()):
        self.samples, self.transform, self.classes = samples, transform, classes
        self.skip, self.replace = skip, replace

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
    """PIL image -> normalised tensor [3, input_size, input_size].

    For training timm's random transform; for evaluation the centre.
    """
    size = cfg.input_size
    if not train:
        # As in the release: a margin up to 224, none above.
        resized = int(size / 0.875) if size <= 224 else size
        return transforms.Compose(
            [
                transforms.Resize(resized, transforms.InterpolationMode.BICUBIC),
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


def build_dataset(cfg, train, ranks):
    """Images of data_path/train or data_path/val; their `classes` must be nb_classes."""
    root = cfg.data_path
    if cfg.dataset == "photos":
        root = ranks.from_main(lambda: photos.prepare(root))
    samples, classes = list_split(root, train)
    if len(classes) != cfg.nb_classes:
        raise UserError(
            f"nb_classes is {cfg.nb_classes}, but {root} has {len(classes)} classes: "
            f"--nb_classes {len(classes)} takes them"
        )
    return Images(samples, build_transform(cfg, train), cfg.on_bad_image == "skip", train, classes)


def find_images(cfg):
    """Images of the folder cfg.predict and below it, in order of their names, with their index."""
    if not os.path.isdir(cfg.predict):
        raise UserError(f"predict is {cfg.predict}, which is not a folder")
    paths = sorted(map(Path, list_images(cfg.predict)))
    if not paths:
        raise UserError(f"{cfg.predict} holds no images ({', '.join(IMG_EXTENSIONS)})")
    samples = [(str(path), index) for index, path in enumerate(paths)]
    return Images(samples, build_transform(cfg, False), cfg.on_bad_image == "skip")


def class_names(classes=None):
    """A line for each class: its name and, of a wnid, its words ("n01440764 tench, Tinca tinca").

    Without `classes`, ImageNet's 1,000 in the order of their labels. timm has the words.
    """
    info = ImageNetInfo()
    lines = []
    for name in info.label_names() if classes is None else classes:
        try:
            lines.append(f"{name} {info.label_name_to_description(name)}")
        except KeyError:
            lines.append(name)
    return lines


# Copied from cifar10/data.py
def file_reader(cfg):
    """(path of an image file -> a sample without its label, the suffixes of such files)."""
    return transforms.Compose([read_image, build_transform(cfg, False)]), IMG_EXTENSIONS


class Loader:
    """Images [B, 3, H, W] and targets of the given batches, on this rank's device."""

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
    """The micro-steps of an epoch from the optimizer's `first_step` on.

    Those at the end that make no whole step are left out.
    """
    batches = train_batches(len(dataset), cfg.batch_size, cfg.seed, epoch, ranks)
    whole = len(batches) - len(batches) % cfg.accum_iter
    collate = MixedCollate(cfg) if mixes(cfg) else default_collate
    return Loader(cfg, dataset, collate, batches[first_step * cfg.accum_iter : whole], ranks)


def test_loader(cfg, dataset, ranks):
    """Normalised images and labels, or indices."""
    batches = test_batches(len(dataset), cfg.val_batch_size, ranks)
    return Loader(cfg, dataset, collate_whole, batches, ranks)


# Copied from cifar10/data.py
def mixes(cfg):
    return cfg.mixup > 0 or cfg.cutmix > 0 or cfg.cutmix_minmax is not None
