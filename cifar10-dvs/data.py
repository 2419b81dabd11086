"""CIFAR10-DVS through spikingjelly's reader, as frames of event counts."""

import copy
import math
from functools import partial

import numpy as np
import torch
from spikingjelly.datasets.cifar10_dvs import CIFAR10DVS
from timm.data.mixup import Mixup, mixup_target
from torchvision.datasets import DatasetFolder

import shapes
from augment import augment
from convert import prepare, read_array
from harness.batches import BatchLoader, part, test_batches, train_batches
from harness.log import UserError, logger

# folder in it: archive
ARCHIVES = {name.removesuffix(".zip"): name for name, *_ in CIFAR10DVS.resource_url_md5()}
SUFFIXES = (".aedat",)
CLASSES = tuple(ARCHIVES)
PAGE = "https://figshare.com/articles/dataset/CIFAR10-DVS_New/4724671"
HEIGHT, WIDTH = CIFAR10DVS.get_H_W()
SAMPLES = {True: 9000, False: 1000}  # in training, in testing
TRAIN_SHARE = 0.9


def build_dataset(cfg, train, ranks):
    """The training or test set: ([T, 2, H, W] event counts, label), with names in `classes`.

    Makes the frames where they are missing.
    """
    root = cfg.data_path
    if cfg.dataset == "shapes":
        root = ranks.from_main(lambda: shapes.prepare(root))
    frames = ranks.from_main(
        lambda: prepare(root, cfg.time_step, CIFAR10DVS, ARCHIVES, SUFFIXES, PAGE),
        slow=True,
    )
    dataset = open_frames(cfg, frames, train)
    dataset = part(dataset, split(dataset.targets, train, cfg.split_seed))
    report(len(dataset), train, frames, cfg.dataset != "shapes")
    return dataset


def split(labels, train, seed=None):
    """Indices of the training or test samples, class by class.

    Of the n samples of a class, the first ceil(0.9 n) train. First means by file name (_0, _1, _10,
    _100, ...), as in the release, or in an order drawn with `seed`.

    Args:
        labels: of all samples.
    """
    labels = torch.tensor(labels)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    indices = []
    for label in labels.unique():
        of_class = (labels == label).nonzero()[:, 0]
        if generator:
            of_class = of_class[torch.randperm(len(of_class), generator=generator)]
        first = math.ceil(TRAIN_SHARE * len(of_class))
        indices += (of_class[:first] if train else of_class[first:]).tolist()
    return indices


# Copied from dvs128-gesture/data.py
class Frames(DatasetFolder):
    """All samples of a folder. Labels number CLASSES by name, also those without a sample."""

    def find_classes(self, directory):
        return sorted(CLASSES), {name: label for label, name in enumerate(sorted(CLASSES))}


# Copied from dvs128-gesture/data.py
def open_frames(cfg, folder, train):
    """All samples of a folder, augmented for training."""
    unknown = sorted({path.name for path in folder.glob("[!.]*") if path.is_dir()} - set(CLASSES))
    if unknown or not folder.is_dir():
        wrong = f"has {', '.join(unknown[:3])}, no classes of this one" if unknown else "is missing"
        raise UserError(f"{folder} {wrong}: another data set's frames? give each its own data_path")
    transform = augment if train and not cfg.no_aug else None
    load = partial(load_frames, T=cfg.time_step)
    return Frames(folder, load, (".npz",), transform=transform, allow_empty=True)


# Copied from dvs128-gesture/data.py
def as_tested(cfg, dataset):
    """A training set whose samples come as in testing."""
    dataset = copy.copy(dataset)
    dataset.transform = None
    return dataset


# Copied from dvs128-gesture/data.py
def load_frames(path, T, remedy="remove it to have it made again"):
    """Frames of a sample, float32 [T, 2, H, W]. UserError if the file has none of that shape."""
    try:
        frames = read_array(path, "frames", 4096 + T * 2 * HEIGHT * WIDTH * 8)
        if frames.shape != (T, 2, HEIGHT, WIDTH) or frames.dtype.kind not in "uif":
            raise ValueError(f"it has shape {list(frames.shape)} and type {frames.dtype}")
        if not (frames.min() >= 0 and frames.max() < np.inf):
            raise ValueError("it has values that are not counts")
    except Exception as error:  # whatever NumPy, zipfile and zlib make of a bad file
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path}: not the frames of a sample ({reason}); {remedy}") from None
    return torch.from_numpy(frames.astype(np.float32))


# Copied from dvs128-gesture/data.py
def report(samples, train, frames, published=True):
    kind = "training" if train else "test"
    if samples == 0:
        missing = f"{frames} has no {kind} samples; the published data set has {SAMPLES[train]:,}"
        again = f"put all into {frames.parent}/download; remove events_np and frames_* there"
        raise UserError(f"{missing}: {again}")
    other = published and samples != SAMPLES[train]
    note = f" (warning: the published data set has {SAMPLES[train]:,})" if other else ""
    logger.info(f"{samples:,} {kind} samples{note}")


# Copied from dvs128-gesture/data.py
def check(cfg):
    """UserError for keys that do not go together."""
    if mixes(cfg) and cfg.batch_size % 2:
        raise UserError(f"batch_size is {cfg.batch_size}; mixup and cutmix need an even one")
    if cfg.T_train is not None and cfg.T_train > cfg.time_step:
        has = f"a sample has only T = {cfg.time_step} frames to draw from"
        raise UserError(f"T_train is {cfg.T_train}; {has}")


# Copied from dvs128-gesture/data.py
def input_shape(cfg):
    """(T, polarities, height, width) of a sample."""
    return cfg.time_step, 2, HEIGHT, WIDTH


# Copied from dvs128-gesture/data.py
def input_transform(cfg):
    """Frames [T, 2, H, W] -> the model's input."""
    return to_input


# Copied from dvs128-gesture/data.py
def to_input(frames):
    return torch.as_tensor(frames).float()


# Copied from dvs128-gesture/data.py
class Collate:
    """Makes a batch of samples: ([B, T, 2, H, W], targets).

    In training, mixup comes first, then T_train of the T frames are drawn, the same for the batch.
    Targets are soft and smoothed in training, mixed or not, and labels in testing.
    """

    def __init__(self, cfg, train, classes, epoch=0):
        self.cfg, self.train, self.mixup = cfg, train, None
        self.num_classes = cfg.num_classes or classes
        if train and mixes(cfg) and not 0 < cfg.mixup_off_epoch <= epoch:
            alphas = cfg.mixup, cfg.cutmix, cfg.cutmix_minmax
            draws = cfg.mixup_prob, cfg.mixup_switch_prob, cfg.mixup_mode
            soft = {"label_smoothing": cfg.smoothing, "num_classes": self.num_classes}
            self.mixup = Mixup(*alphas, *draws, **soft)

    def __call__(self, samples):
        frames = torch.stack([frames for frames, _ in samples])
        targets = torch.tensor([label for _, label in samples])
        if not self.train:
            return frames, targets
        if self.mixup:
            # As [B, T*2, H, W]: cutmix takes the third and fourth dimension for the image.
            mixed, targets = self.mixup(frames.flatten(1, 2), targets)
            frames = mixed.view_as(frames)
        else:
            targets = mixup_target(targets, self.num_classes, smoothing=self.cfg.smoothing)
        if self.cfg.T_train is not None:
            drawn = torch.randperm(frames.shape[1])[: self.cfg.T_train].sort().values
            frames = frames[:, drawn]
        return frames, targets


# Copied from dvs128-gesture/data.py
class Loader:
    """Batches of (frames, targets) on this rank's device."""

    def __init__(self, cfg, dataset, collate, batches, ranks):
        self.device = ranks.device
        pin_memory = ranks.device.type == "cuda"
        self.loader = BatchLoader(dataset, collate, batches, cfg.workers, pin_memory)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for frames, targets in self.loader:
            yield tuple(x.to(self.device, non_blocking=True) for x in (frames, targets))


# Copied from dvs128-gesture/data.py
def train_loader(cfg, dataset, epoch, first_step, ranks, seed):
    """The batches of an epoch from step `first_step` on."""
    # Workers are new in each epoch: running ones would not learn that mixup is off.
    batches = train_batches(len(dataset), cfg.batch_size, seed, epoch, ranks)
    collate = Collate(cfg, True, len(dataset.classes), epoch)
    return Loader(cfg, dataset, collate, batches[first_step:], ranks)


# Copied from dvs128-gesture/data.py
def test_loader(cfg, dataset, ranks):
    batches = test_batches(len(dataset), cfg.val_batch_size or cfg.batch_size, ranks)
    return Loader(cfg, dataset, Collate(cfg, False, 0), batches, ranks)


# Copied from cifar10/data.py
def mixes(cfg):
    return cfg.mixup > 0 or cfg.cutmix > 0 or cfg.cutmix_minmax is not None
