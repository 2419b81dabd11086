"""Accuracy of a checkpoint on another test set than its own, such as CIFAR-10-C or ImageNet-R.

Usage, from anywhere:
    python tools/shifted.py cifar10/output/cifar10/best.pth CIFAR-10-C/fog.npy --severity 3
    python tools/shifted.py best.pth imagenet-r/ --folder imagenet

The test set is a folder of class folders (no train/ or val/), with images or, for event data,
frames as in frames_number_16_split_by_number/test; or, for cifar10/ and cifar100/, an array of
CIFAR-10-C, beside its labels.npy. Classes are found by name or, where all are numbers, by these; of
a model with more, only the logits of these are compared. What was found goes to shifted-best.json
beside best.pth, like that of test.py.
"""

import sys
from pathlib import Path

import numpy as np
import torch

import models


def open_test_set(modules, cfg, path, severity=None):
    """The data set at a path."""
    data = modules.data
    if path.suffix == ".npy" and hasattr(data, "Arrays"):
        arrays = read_corrupted(modules, path, severity)
        return data.Arrays(*arrays, data.build_transform(cfg, False))
    if severity:
        raise modules.log.UserError(f"severity is {severity}, but test_path is {path}, no .npy")
    if hasattr(modules, "images"):
        return models.image_files(modules, cfg, *modules.images.list_folder(path))
    frames = data.open_frames(cfg, path, False)
    return data.named(cfg, frames) if hasattr(data, "named") else frames


def read_corrupted(modules, path, severity):
    """(images uint8 [N, H, W, 3], labels [N]) of a severity, 1 to 5, or all, as in CIFAR-10-C."""
    UserError = modules.log.UserError
    images, labels = (open_array(modules, file) for file in (path, path.with_name("labels.npy")))
    fits = images.ndim == 4 and images.shape[3] == 3 and images.dtype == np.uint8
    fits = fits and labels.shape == images.shape[:1] and labels.dtype.kind in "iu"
    if not fits or not 0 <= labels.min() <= labels.max() < 2**16:
        has = f"{images.dtype} {[*images.shape]} and {labels.dtype} {[*labels.shape]}"
        raise UserError(f"{path} and labels.npy are {has}, not uint8 [N, H, W, 3] and labels [N]")
    size = len(images) // 5
    if severity and (len(labels) % 5 or (labels.reshape(5, size) != labels[:size]).any()):
        parts = "is not five parts with the same labels"
        raise UserError(f"severity is {severity}, but {path} {parts}")
    part = slice((severity - 1) * size, severity * size) if severity else slice(None)
    return np.array(images[part]), labels[part].tolist()


def open_array(modules, path):
    """The array in a .npy file, which is not read yet."""
    try:
        if not path.is_file():  # a pipe would never end
            raise ValueError("no such file")
        return np.load(path, mmap_mode="r")
    except Exception as error:  # whatever NumPy makes of a bad file
        fault = modules.log.first_line(error)
        raise modules.log.UserError(f"{path}: not a whole array ({fault})") from None


def columns_of(modules, tested, path, classes):
    """The model's number of each class of a test set; UserError for one that it has not."""
    total = tested.model.num_classes
    names, numbers = modules.build.names_in(tested.classes)[:total], [*map(str, range(total))]
    if any(map(str.isdigit, names)):  # a 1 is then the class of that name
        numbers = []
    for known in (names, numbers, [] if names or len(classes) != total else classes):
        if set(classes) <= set(known):
            if len(classes) < total:
                has = f"{len(classes):,} of the model's {total:,} classes"
                modules.log.logger.info(f"{path}: {has}, whose logits alone are compared")
            return [known.index(name) for name in classes]
    alien = next(name for name in classes if name not in (names or numbers))
    known = f"the model's are {', '.join((names or numbers)[:3])}, …"
    alien = f"its class {alien} is none of the model's; {known}"
    raise modules.log.UserError(f"test_path is {path}: {alien}")


def measure(modules, tested, path, severity=None):
    """The folder's Metrics on the test set at a path."""
    total, what = tested.model.num_classes, {"test_path": str(path)}
    if not total:
        raise modules.log.UserError(f"{tested.path}: weights without a head, which can't be tested")
    if not tested.classes and total == 1000 and hasattr(modules.data, "ImageNetInfo"):
        tested = tested._replace(classes=[*modules.data.ImageNetInfo().label_names()])
    dataset = open_test_set(modules, tested.cfg, path, severity)
    columns = columns_of(modules, tested, path, dataset.classes)
    columns = torch.tensor(columns, device=tested.ranks.device)  # there, as a CUDA graph needs it
    what |= {"severity": severity} if severity else {}
    said = ", ".join(f"{name} {value}" for name, value in what.items())
    modules.log.logger.info(f"{said}: {len(dataset):,} samples")
    tested.model.register_forward_hook(lambda model, args, logits: logits[:, columns])
    return modules.build.measure(tested, modules.data, dataset, **what)


def main(argv=None):
    argv, flags = models.split(argv)
    parser = models.checkpoint_parser(__doc__)
    parser.add_argument("test_path", type=Path, help="folder of class folders, or a .npy")
    parser.add_argument("--severity", type=int, choices=range(1, 6), help="of the .npy; none: all")
    args = parser.parse_args(argv)
    path = args.test_path.absolute()
    modules, tested = models.open_checkpoint(args.checkpoint, args.folder, flags)
    with models.one_line(modules):
        measure(modules, tested, path, args.severity)
    return 0


if __name__ == "__main__":
    sys.exit(main())
