"""Photographs in ImageNet's folder layout, through timm's transforms, random erasing and mixup.

    data_path/train/<class>/*.JPEG
    data_path/val/<class>/*.JPEG

Classes are numbered in the order of their folders' names.
"""

import copy

import torch
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ImageNetInfo,
    Mixup,
    auto_augment,
    create_transform,
)
from timm.data.loader import PrefetchLoader
from torch.utils.data import Dataset, default_collate
from torchvision import transforms

import photos
from harness.batches import BatchLoader, seeded, test_batches, train_batches
from harness.log import UserError, logger
from images import BadImage, list_split, read_image, to_rgb
from pixels import Crop, Erasing, read_pixels


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
        read, transform: path -> image; image -> tensor.
        skip: whether a bad file is left out, with a line that names it; else it is a UserError.
        replace: whether the next good image takes the place of one left out, as in training; else
            its item is None.
        classes: their names.
    """

    def __init__(self, samples, read, transform, skip, replace=False, classes=()):
        self.samples, self.read, self.transform = samples, read, transform
        self.classes = classes
        self.skip, self.replace = skip, replace

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        for step in range(len(self) if self.replace else 1):
            path, number = self.samples[(index + step) % len(self)]
            try:
                return self.transform(self.read(path)), number
            except BadImage as error:
                if not self.skip:
                    raise UserError(f"{error}; on_bad_image: skip leaves such files out") from None
                logger.warning(f"skipped: {error}")
        if self.replace:
            raise UserError(f"none of the {len(self)} training images can be read")
        return None


def build_transform(cfg, train):
    """image -> uint8 [3, input_size, input_size]; Loader normalises.

    For training timm's random transform of a uint8 image [3, H, W]; for evaluation the centre of a
    PIL image.
    """
    size = cfg.img_size
    if not train:
        # As in the release: a margin up to 224, none above.
        resized = int(size / 0.875) if size <= 224 else size
        resize = transforms.Resize(resized, transforms.InterpolationMode.BICUBIC)
        return transforms.Compose([resize, transforms.CenterCrop(size), transforms.PILToTensor()])
    transform = create_transform(
        size,
        is_training=True,
        use_prefetcher=True,
        color_jitter=cfg.color_jitter,
        auto_augment=cfg.aa,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
    )
    transform.transforms[0] = Crop(transform.transforms[0])
    return transform


def check(cfg):
    """UserError for keys that do not go together."""
    if mixes(cfg) and cfg.batch_size % 2:
        raise UserError(f"batch_size is {cfg.batch_size}; mixup and cutmix need an even one")
    if cfg.batch_size * cfg.time_step * (cfg.img_size // 16) ** 2 == 1:
        size = cfg.img_size
        raise UserError(f"batch_size 1, img_size {size}, T = 1 leave BatchNorm a single value")


def input_shape(cfg):
    """(channels, height, width) of the network's input."""
    return 3, cfg.img_size, cfg.img_size


def input_transform(cfg):
    """PIL image -> the model's input in evaluation, [3, input_size, input_size], normalised."""
    normalize = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    floats = transforms.ConvertImageDtype(torch.float32)
    return transforms.Compose([to_rgb, build_transform(cfg, False), floats, normalize])


def build_dataset(cfg, train, ranks):
    """Images of data_path/train or data_path/val, with names in `classes`."""
    root = cfg.data_path
    if cfg.dataset == "photos":
        root = ranks.from_main(lambda: photos.prepare(root))
    samples, classes = list_split(root, train)
    read, transform = read_pixels if train else read_image, build_transform(cfg, train)
    return Images(samples, read, transform, cfg.on_bad_image == "skip", train, classes)


def as_tested(cfg, dataset):
    """A training set whose samples come as in testing."""
    dataset = copy.copy(dataset)
    dataset.read, dataset.replace = read_image, False
    dataset.transform = build_transform(cfg, False)
    return dataset


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


class Loader:
    """Normalised images [B, 3, H, W] and targets of the given batches, on this rank's device; with
    the number of `classes` for training, erased and mixed.

    The next batch is sent there, normalised and erased while the model works on this one; on a GPU
    by a stream of its own.
    """

    def __init__(self, cfg, dataset, collate, batches, ranks, classes=None):
        pin_memory = cfg.pin_mem and ranks.device.type == "cuda"
        self.loader = BatchLoader(dataset, collate, batches, cfg.workers, pin_memory)
        self.prefetched = PrefetchLoader(self.loader, device=ranks.device)
        # What is drawn here comes from other numbers than what the workers draw, below 2 ** 31.
        self.seeds = [2**31 + seed for _, seed in batches]
        if classes and cfg.reprob > 0:
            self.prefetched.random_erasing = Erasing(cfg, self.seeds, ranks.device)
        self.mix = make_mixup(cfg, classes) if classes and mixes(cfg) else None

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for seed, (images, targets) in zip(self.seeds, self.prefetched, strict=True):
            if self.mix:
                with seeded(seed):
                    images, targets = self.mix(images, targets)
            if len(images):
                yield images, targets


def collate_whole(items):
    """Images and numbers of the items that are not None; there may be none."""
    items = [item for item in items if item is not None]
    return default_collate(items) if items else (torch.empty(0, 3, 1, 1), torch.empty(0))


def make_mixup(cfg, classes):
    """timm's Mixup; it makes the targets soft."""
    alphas = cfg.mixup, cfg.cutmix, cfg.cutmix_minmax
    draws = cfg.mixup_prob, cfg.mixup_switch_prob, cfg.mixup_mode
    soft = {"label_smoothing": cfg.smoothing, "num_classes": cfg.num_classes or classes}
    return Mixup(*alphas, *draws, **soft)


def train_loader(cfg, dataset, epoch, first_step, ranks, seed):
    """The micro-steps of an epoch's whole steps, from the optimizer's `first_step` on."""
    batches = train_batches(len(dataset), cfg.batch_size, seed, epoch, ranks)
    whole = len(batches) - len(batches) % cfg.accum_iter
    batches = batches[first_step * cfg.accum_iter : whole]
    return Loader(cfg, dataset, default_collate, batches, ranks, len(dataset.classes))


def test_loader(cfg, dataset, ranks):
    """Normalised images and labels, or indices."""
    batches = test_batches(len(dataset), cfg.val_batch_size, ranks)
    return Loader(cfg, dataset, collate_whole, batches, ranks)


# Copied from cifar10/data.py
def mixes(cfg):
    return cfg.mixup > 0 or cfg.cutmix > 0 or cfg.cutmix_minmax is not None
