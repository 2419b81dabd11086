"""DVS128 Gesture through spikingjelly's reader, as frames of event counts."""

import copy
from functools import partial

import numpy as np
import torch
from spikingjelly.datasets.dvs128_gesture import DVS128Gesture
from timm.data.mixup import Mixup, mixup_target
from torchvision.datasets import DatasetFolder

import shapes
from augment import augment
from convert import prepare, read_array
from harness.batches import BatchLoader, test_batches, train_batches
from harness.log import UserError, logger

ARCHIVES = {"DvsGesture": "DvsGesture.tar.gz"}  # folder in it: archive
SUFFIXES = (".aedat", ".csv", ".txt")  # recordings, their labels and the split
CLASSES = tuple(map(str, range(11)))  # folders of the samples
GESTURES = (  # what they are, in the order of these numbers
    "hand clapping",
    "right hand wave",
    "left hand wave",
    "right arm clockwise",
    "right arm counter clockwise",
    "left arm clockwise",
    "left arm counter clockwise",
    "arm roll",
    "air drums",
    "air guitar",
    "other gestures",
)
PAGE = "https://ibm.ent.box.com/s/3hiq58ww1pbbjrinh367ykfdf60xsfm8/folder/50167556794"
HEIGHT, WIDTH = DVS128Gesture.get_H_W()
SAMPLES = {True: 1176, False: 288}  # in training, in testing


def build_dataset(cfg, train, ranks):
    """The training or test set: ([T, 2, H, W] event counts, label), with names in `classes`.

    Makes the frames where they are missing.
    """
    root = cfg.data_path
    if cfg.dataset == "shapes":
        root = ranks.from_main(lambda: shapes.prepare(root))
    frames = ranks.from_main(
        lambda: prepare(root, cfg.time_step, DVS128Gesture, ARCHIVES, SUFFIXES, PAGE),
        slow=True,
    )
    dataset = named(cfg, open_frames(cfg, frames / ("train" if train else "test"), train))
    report(len(dataset), train, frames, cfg.dataset != "shapes")
    return dataset


class Frames(DatasetFolder):
    """All samples of a folder. Labels number CLASSES by name, also those without a sample."""

    def find_classes(self, directory):
        return sorted(CLASSES), {name: label for label, name in enumerate(sorted(CLASSES))}


def open_frames(cfg, folder, train):
    """All samples of a folder, augmented for training."""
    unknown = sorted({path.name for path in folder.glob("[!.]*") if path.is_dir()} - set(CLASSES))
    if unknown or not folder.is_dir():
        wrong = f"has {', '.join(unknown[:3])}, no classes of this one" if unknown else "is missing"
        raise UserError(f"{folder} {wrong}: another data set's frames? give each its own data_path")
    transform = augment if train and not cfg.no_aug else None
    load = partial(load_frames, T=cfg.time_step)
    return Frames(folder, load, (".npz",), transform=transform, allow_empty=True)


def named(cfg, dataset):
    if cfg.dataset != "shapes":
        dataset.classes = [GESTURES[int(name)] for name in dataset.classes]
    return dataset


def as_tested(cfg, dataset):
    """A training set whose samples come as in testing."""
    dataset = copy.copy(dataset)
    dataset.transform = None
    return dataset


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


def report(samples, train, frames, published=True):
    kind = "training" if train else "test"
    if samples == 0:
        missing = f"{frames} has no {kind} samples; the published data set has {SAMPLES[train]:,}"
        again = f"put all into {frames.parent}/download; remove events_np and frames_* there"
        raise UserError(f"{missing}: {again}")
    other = published and samples != SAMPLES[train]
    note = f" (warning: the published data set has {SAMPLES[train]:,})" if other else ""
    logger.info(f"{samples:,} {kind} samples{note}")


def check(cfg):
    """UserError for keys that do not go together."""
    if mixes(cfg) and cfg.batch_size % 2:
        raise UserError(f"batch_size is {cfg.batch_size}; mixup and cutmix need an even one")
    if cfg.T_train is not None and cfg.T_train > cfg.time_step:
        has = f"a sample has only T = {cfg.time_step} frames to draw from"
        raise UserError(f"T_train is {cfg.T_train}; {has}")


def input_shape(cfg):
    """(T, polarities, height, width) of a sample."""
    return cfg.time_step, 2, HEIGHT, WIDTH


def input_transform(cfg):
    """Frames [T, 2, H, W] -> the model's input."""
    return to_input


def to_input(frames):
    return torch.as_tensor(frames).float()


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


def train_loader(cfg, dataset, epoch, first_step, ranks, seed):
    """The batches of an epoch from step `first_step` on."""
    # Workers are new in each epoch: running ones would not learn that mixup is off.
    batches = train_batches(len(dataset), cfg.batch_size, seed, epoch, ranks)
    collate = Collate(cfg, True, len(dataset.classes), epoch)
    return Loader(cfg, dataset, collate, batches[first_step:], ranks)


def test_loader(cfg, dataset, ranks):
    batches = test_batches(len(dataset), cfg.val_batch_size or cfg.batch_size, ranks)
    return Loader(cfg, dataset, Collate(cfg, False, 0), batches, ranks)


# Copied from cifar10/data.py
def mixes(cfg):
    return cfg.mixup > 0 or cfg.cutmix > 0 or cfg.cutmix_minmax is not None
