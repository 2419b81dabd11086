"""CIFAR-10, CIFAR-100, digits or a folder of images, with timm's transforms and mixup."""

import copy
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import FastCollateMixup, auto_augment, create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import Dataset
from torchvision import datasets, transforms

from harness.batches import BatchLoader, test_batches, train_batches
from harness.log import UserError, telling
from images import list_split, read_image, to_rgb

CIFAR = {"torch/cifar10": datasets.CIFAR10, "torch/cifar100": datasets.CIFAR100}
SAME = "no_aug mean std crop_pct scale ratio hflip vflip color_jitter".split()  # keys as in timm


def posterize(image, bits_to_keep, **_):
    """timm's operation; 0 bits (magnitude 10) give black, as in the release; Pillow would raise."""
    if bits_to_keep < 1:
        return image.point(lambda value: 0)
    return auto_augment.posterize(image, bits_to_keep)


for name in ("Posterize", "PosterizeOriginal", "PosterizeIncreasing"):
    auto_augment.NAME_TO_OP[name] = posterize


class Arrays(Dataset):
    """Images uint8 [N, H, W] or [N, H, W, 3], whose classes are called by their numbers."""

    def __init__(self, images, targets, transform):
        self.images, self.targets, self.transform = images, targets, transform
        self.classes = [str(number) for number in range(max(targets) + 1)]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = Image.fromarray(self.images[index]).convert("RGB")
        return self.transform(image), int(self.targets[index])


def digits(train, transform):
    """scikit-learn's 1,797 handwritten digits, 8x8. A fifth of each class is for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    halves = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    return Arrays(*(halves[0::2] if train else halves[1::2]), transform)


class Folder(Dataset):
    """Images of files: [(path, label)], with the names of the classes."""

    def __init__(self, samples, classes, transform):
        self.samples, self.classes, self.transform = samples, classes, transform

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        return self.transform(read_image(path)), label


def check(cfg):
    """UserError for keys that do not go together."""
    if mixes(cfg) and cfg.batch_size % 2:
        raise UserError(f"batch_size is {cfg.batch_size}; mixup and cutmix need an even one")
    _, height, width = input_shape(cfg)
    if cfg.batch_size * cfg.time_step * (height // 4) * (width // 4) == 1:
        raise UserError(f"batch_size 1, {height} x {width}, T = 1 leave BatchNorm a single value")


def input_shape(cfg):
    """(channels, height, width) of the network's input."""
    if cfg.input_size and cfg.input_size[0] != 3:
        raise UserError(f"input_size is {cfg.input_size}; images have 3 channels")
    return tuple(cfg.input_size or (3, cfg.img_size, cfg.img_size))


def build_transform(cfg, train, use_prefetcher=True):
    """timm's transform of a PIL image to uint8 [3, H, W]; without prefetcher normalised float32."""
    return create_transform(
        input_shape(cfg),
        is_training=train,
        use_prefetcher=use_prefetcher,
        auto_augment=cfg.aa,
        interpolation=cfg.train_interpolation if train else cfg.interpolation,
        **{name: getattr(cfg, name) for name in SAME},
    )


def input_transform(cfg):
    """PIL image -> the model's input in evaluation, [3, height, width], normalised."""
    return transforms.Compose([to_rgb, build_transform(cfg, False, use_prefetcher=False)])


def build_dataset(cfg, train, ranks):
    """The training or test set: (uint8 [3, height, width], label), with names in `classes`."""
    transform = build_transform(cfg, train)
    if cfg.dataset == "digits":
        return digits(train, transform)
    if cfg.dataset == "folder":
        return Folder(*list_split(cfg.data_path, train), transform)
    ranks.from_main(lambda: open_cifar(cfg, train, transform, download=True).root, slow=True)
    return open_cifar(cfg, train, transform)


def as_tested(cfg, dataset):
    """A training set whose samples come as in testing."""
    dataset = copy.copy(dataset)
    dataset.transform = build_transform(cfg, False)
    return dataset


def open_cifar(cfg, train, transform, download=False):
    """CIFAR in data_path, downloaded where it is missing. UserError says what is wrong there."""
    cifar = CIFAR[cfg.dataset]
    there = f"is missing or damaged in data_path {Path(cfg.data_path).absolute()}"
    mend = f"put {cifar.filename} from {cifar.url} there; `-c quickstart.yml` needs no data set"
    with telling(f"{cifar.base_folder} {there}, and no download came (", f"): {mend}"):
        return cifar(cfg.data_path, train=train, transform=transform, download=download)


def make_loader(cfg, dataset, collate, batches, ranks):
    pin_memory = cfg.pin_mem and ranks.device.type == "cuda"
    loader = BatchLoader(dataset, collate, batches, cfg.workers, pin_memory)
    return PrefetchLoader(loader, cfg.mean, cfg.std, device=ranks.device)


def train_loader(cfg, dataset, epoch, first_step, ranks, seed):
    """Normalised images and targets (soft with mixup or cutmix) of an epoch from `first_step`."""
    collate = fast_collate
    if mixes(cfg):
        draws = cfg.mixup, cfg.cutmix, cfg.cutmix_minmax, cfg.mixup_prob, cfg.mixup_switch_prob
        soft = {"mode": cfg.mixup_mode, "label_smoothing": cfg.smoothing}
        classes = cfg.num_classes or len(dataset.classes)
        collate = FastCollateMixup(*draws, **soft, num_classes=classes)
        # Of an epoch: its workers are new, since running ones would not learn that mixup is off.
        # From there on targets stay smoothed.
        collate.mixup_enabled = not 0 < cfg.mixup_off_epoch <= epoch
    batches = train_batches(len(dataset), cfg.batch_size, seed, epoch, ranks)
    return make_loader(cfg, dataset, collate, batches[first_step:], ranks)


def test_loader(cfg, dataset, ranks):
    """Normalised images and labels."""
    batches = test_batches(len(dataset), cfg.val_batch_size, ranks)
    return make_loader(cfg, dataset, fast_collate, batches, ranks)


def mixes(cfg):
    return cfg.mixup > 0 or cfg.cutmix > 0 or cfg.cutmix_minmax is not None
