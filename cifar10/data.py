"""CIFAR-10, CIFAR-100, digits or a folder of images, with timm's transforms and mixup."""

import os
from pathlib import Path

import numpy as np
import torchvision
from PIL import Image
from timm.data import FastCollateMixup, auto_augment, create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import calculate_md5

from harness.batches import BatchLoader, test_batches, train_batches
from harness.config import UserError
from harness.runtime import logger
from images import list_split, read_image
from options import NUM_CLASSES

CIFAR = {
    "torch/cifar10": torchvision.datasets.CIFAR10,
    "torch/cifar100": torchvision.datasets.CIFAR100,
}


def posterize(image, bits_to_keep, **_):
    """timm's operation; 0 bits (magnitude 10) give black, as in the release; Pillow would raise."""
    if bits_to_keep < 1:
        return image.point(lambda value: 0)
    return auto_augment.posterize(image, bits_to_keep)


for name in ("Posterize", "PosterizeOriginal", "PosterizeIncreasing"):
    auto_augment.NAME_TO_OP[name] = posterize


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits, 8x8 RGB. A fifth of each class is for testing."""

    classes = [str(digit) for digit in range(10)]

    def __init__(self, train, transform):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        images = (images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        halves = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
        self.images, _, self.labels, _ = halves if train else (halves[1], None, halves[3], None)
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = Image.fromarray(self.images[index]).convert("RGB")
        return self.transform(image), int(self.labels[index])


class Folder(Dataset):
    """Images of root/train or root/val, a folder for each class, in order of their names."""

    def __init__(self, root, train, transform):
        self.samples, self.classes = list_split(root, train)
        self.transform = transform

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        return self.transform(read_image(path)), label


def image_size(cfg):
    """(channels, height, width) of the network's input."""
    if cfg.input_size and cfg.input_size[0] != 3:
        raise UserError(f"input_size is {cfg.input_size}; images have 3 channels")
    return tuple(cfg.input_size or (3, cfg.img_size, cfg.img_size))


def build_transform(cfg, train):
    """PIL image -> uint8 [3, height, width]; PrefetchLoader normalises."""
    try:
        return create_transform(
            image_size(cfg),
            is_training=train,
            no_aug=cfg.no_aug,
            use_prefetcher=True,
            scale=cfg.scale,
            ratio=cfg.ratio,
            hflip=cfg.hflip,
            vflip=cfg.vflip,
            color_jitter=cfg.color_jitter,
            auto_augment=cfg.aa,
            interpolation=cfg.train_interpolation if train else cfg.interpolation,
            mean=cfg.mean,
            std=cfg.std,
            crop_pct=cfg.crop_pct,
        )
    except Exception as error:  # timm fails in many ways on a policy that it can't read
        raise UserError(f"timm can't make these transforms (aa is {cfg.aa!r}): {error!r}") from None


def build_dataset(cfg, train, ranks, fixed=False):
    """The training or test set: (uint8 [3, height, width], label), with names in `classes`.

    Downloads CIFAR where it is missing. For training on a folder of images, cfg.num_classes becomes
    the number of its classes, unless a flag (`fixed`) or the yml has chosen another one.
    """
    transform = build_transform(cfg, train)
    if cfg.dataset == "digits":
        dataset = Digits(train, transform)
    elif cfg.dataset == "folder":
        dataset = Folder(cfg.data_dir, train, transform)
        found = len(dataset.classes)
        if train and not fixed and cfg.num_classes == NUM_CLASSES != found:
            logger.info(f"num_classes is {found}: {cfg.data_dir} has that many classes")
            cfg.num_classes = found
        if cfg.num_classes != found:
            said = f"num_classes is {cfg.num_classes}"
            has = f"{cfg.data_dir} has {found} classes"
            raise UserError(f"{said}, but {has}: --num_classes {found} takes them")
    else:
        task = f"checks or downloads {cfg.dataset}"
        ranks.from_main(lambda: open_cifar(cfg, train, transform, download=True).root, task)
        dataset = open_cifar(cfg, train, transform)
    if len(dataset.classes) > cfg.num_classes:
        found = len(dataset.classes)
        raise UserError(f"num_classes is {cfg.num_classes}, but {cfg.dataset} has {found} classes")
    return dataset


def file_reader(cfg):
    """(path of an image file -> a sample without its label, the suffixes of such files)."""
    return transforms.Compose([read_image, build_transform(cfg, False)]), IMG_EXTENSIONS


def open_cifar(cfg, train, transform, download=False):
    """CIFAR in data_dir, downloaded where it is missing. UserError says what is wrong there."""
    cifar, where = CIFAR[cfg.dataset], Path(os.path.realpath(cfg.data_dir))
    if where.name == cifar.base_folder:
        raise UserError(f"data_dir {where} is one folder too deep; data_dir must be {where.parent}")
    try:
        return cifar(cfg.data_dir, train=train, transform=transform, download=download)
    except Exception as error:  # whatever the network, the disk and torchvision make of it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fault = cifar_fault(cifar, where) or f"{cfg.dataset} is not in data_dir {where}"
        raise UserError(
            f"{fault}, and could not be downloaded ({reason}): "
            f"put {cifar.filename} from {cifar.url} there; `-c quickstart.yml` needs no data set"
        ) from None


def cifar_fault(cifar, where):
    """What is wrong with CIFAR's files in a folder, in words; None if there are none."""
    batches = [*cifar.train_list, *cifar.test_list, (cifar.meta["filename"], cifar.meta["md5"])]
    files = {where / cifar.base_folder / name: md5 for name, md5 in batches}
    try:
        if where.is_file():
            return f"data_dir {where} is a file, not the folder that holds it"
        for path, wanted in {where / cifar.filename: cifar.tgz_md5, **files}.items():
            if path.is_file() and (found := calculate_md5(path)) != wanted:
                return f"{path} is damaged or another file (its MD5 is {found}, not {wanted})"
        if (where / cifar.base_folder).is_dir():
            missing = next((path for path in files if not path.exists()), None)
            return f"{missing} is missing" if missing else None
        for kind in ("binary", "matlab"):
            path = where / cifar.filename.replace("python", kind)
            if path.exists():
                return f"{path} is CIFAR in another format; the Python version is not there"
        for path in (*where.glob(f"*/{cifar.base_folder}"), *where.glob(f"*/{cifar.filename}")):
            below = f"data_dir {path.parent} has {path.name}"
            return f"data_dir {where} is one folder too high ({below})"
    except OSError as error:
        return f"{error.filename} can't be read ({error.strerror})"
    return None


def make_loader(cfg, dataset, collate, batches, ranks):
    pin_memory = cfg.pin_mem and ranks.device.type == "cuda"
    loader = BatchLoader(dataset, collate, batches, cfg.workers, pin_memory)
    channels = image_size(cfg)[0]
    return PrefetchLoader(loader, cfg.mean, cfg.std, channels=channels, device=ranks.device)


def train_loader(cfg, dataset, epoch, first_step, ranks):
    """Normalised images and targets of an epoch from step `first_step` on.

    With mixup or cutmix in the recipe, targets are soft, and stay smoothed from mixup_off_epoch on.
    Workers are started again each epoch, since a running one would not learn that mixup is off.
    """
    collate = fast_collate
    if mixes(cfg):
        collate = FastCollateMixup(
            mixup_alpha=cfg.mixup,
            cutmix_alpha=cfg.cutmix,
            cutmix_minmax=cfg.cutmix_minmax,
            prob=cfg.mixup_prob,
            switch_prob=cfg.mixup_switch_prob,
            mode=cfg.mixup_mode,
            label_smoothing=cfg.smoothing,
            num_classes=cfg.num_classes,
        )
        collate.mixup_enabled = not 0 < cfg.mixup_off_epoch <= epoch
    batches = train_batches(len(dataset), cfg.batch_size, cfg.seed, epoch, ranks)
    return make_loader(cfg, dataset, collate, batches[first_step:], ranks)


def test_loader(cfg, dataset, ranks):
    """Normalised images and labels."""
    batches = test_batches(len(dataset), cfg.val_batch_size, ranks)
    return make_loader(cfg, dataset, fast_collate, batches, ranks)


def mixes(cfg):
    return cfg.mixup > 0 or cfg.cutmix > 0 or cfg.cutmix_minmax is not None
