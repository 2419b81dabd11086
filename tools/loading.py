"""Images a second of imagenet/'s training loader, per core, beside timm's and the release's.

Usage:
    python tools/loading.py                    # two tables
    python tools/loading.py --quality 96 --images 960 --rounds 9

The images are windows of 500 x 375 pixels of scikit-learn's sample photographs. All three loaders
have the recipe of imagenet.yml:

    release    torchvision's ImageFolder, timm's create_transform with all of it in the workers
    timm       its create_dataset and create_loader; normalised and erased on the device
    ours       imagenet/'s train_loader; the device as well

The first table is of single steps, one process, one thread. The second is of whole loaders with one
worker. Counted is processor time, not the clock's, so that other programs on the machine matter
little; the loaders take turns. A worker's time is what limits training on a GPU, since the device
does the rest. Here the device is the CPU, and `main` is what the training process itself spends.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_dataset, create_loader, create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

from models import load

imagenet = load("imagenet")
ranks = imagenet.process.Ranks("cpu")
read_image = imagenet.images.read_image
FILES = 24  # in each of two classes
CPU = torch.device("cpu")


def make_photographs(root, quality):
    """root/train/CLASS/*.JPEG, 500 x 375; returns their mean size in bytes."""
    generator = np.random.RandomState(0)
    for name, photo in zip(("n1", "n2"), load_sample_images().images, strict=True):
        folder = root / "train" / name
        folder.mkdir(parents=True)
        for number in range(FILES):
            top, left = generator.randint(427 - 375 + 1), generator.randint(640 - 500 + 1)
            window = photo[top : top + 375, left : left + 500]
            window = window[:, ::-1] if generator.randint(2) else window
            Image.fromarray(window).save(folder / f"{number}.JPEG", quality=quality)
    return statistics.mean(path.stat().st_size for path in root.rglob("*.JPEG"))


def theirs_transform(cfg, on_device=False):
    """As the release calls timm; with `on_device` as timm's own loader does."""
    return create_transform(
        cfg.img_size,
        is_training=True,
        use_prefetcher=on_device,
        color_jitter=cfg.color_jitter,
        auto_augment=cfg.aa,
        interpolation="bicubic",
        re_prob=cfg.reprob,
        re_mode=cfg.remode,
        re_count=cfg.recount,
    )


def each(function, inputs):
    return lambda: [function(value) for value in inputs]


def steps_of(cfg, paths):
    """{step: (release's, timm's, ours)}: functions, each of which does the step for all images."""
    release, timm, ours = (
        theirs_transform(cfg).transforms,
        theirs_transform(cfg, on_device=True).transforms,
        imagenet.data.build_transform(cfg, train=True).transforms,
    )
    photographs, tensors = (
        [read(path) for path in paths] for read in (default_loader, imagenet.pixels.read_pixels)
    )
    crops = [ours[0](image) for image in tensors]
    floats, integers = ([(last(image), 0) for image in crops] for last in (release[3], ours[3]))

    def on_device(erasing):
        loader = PrefetchLoader([fast_collate(integers)], device=CPU, re_prob=cfg.reprob)
        loader.random_erasing = erasing
        return lambda: list(loader)

    timm_erasing = RandomErasing(cfg.reprob, mode=cfg.remode, max_count=cfg.recount, device=CPU)
    opened = each(lambda path: Image.open(path).size, paths)
    decoded = each(default_loader, paths)
    cropped = each(release[0], photographs)
    flipped, augmented = each(release[1], crops), each(release[2], crops)
    return {
        "read and check": (
            opened,
            opened,
            each(lambda path: read_image(path, lambda image, content: image), paths),
        ),
        "read, check, decode": (decoded, decoded, each(imagenet.pixels.read_pixels, paths)),
        "crop and resize": (cropped, cropped, each(ours[0], tensors)),
        "flip": (flipped,) * 3,
        "RandAugment": (augmented,) * 3,
        "to a tensor": tuple(each(steps[3], crops) for steps in (release, timm, ours)),
        "normalise and erase": (
            each(lambda item: release[5](release[4](item[0].clone())), floats),
            on_device(timm_erasing),
            on_device(imagenet.pixels.Erasing(cfg, [1], CPU)),
        ),
        "collate": (
            lambda: default_collate(floats),
            lambda: fast_collate(integers),
            lambda: default_collate(integers),
        ),
    }


def loaders_of(cfg, root, images):
    """[(name, function that makes the loader of one epoch)]; each file comes again and again."""
    theirs = ImageFolder(root / "train", theirs_transform(cfg))
    timm = create_dataset("", root=str(root), split="train")
    ours = imagenet.data.build_dataset(cfg, True, ranks)
    for samples in (theirs.samples, timm.reader.samples, ours.samples):
        samples *= images // len(samples)
    return [
        (
            "release",
            lambda epoch: DataLoader(theirs, cfg.batch_size, True, num_workers=1, drop_last=True),
        ),
        (
            "timm",
            lambda epoch: create_loader(
                timm,
                cfg.img_size,
                cfg.batch_size,
                is_training=True,
                color_jitter=cfg.color_jitter,
                auto_augment=cfg.aa,
                interpolation="bicubic",
                re_prob=cfg.reprob,
                re_mode=cfg.remode,
                re_count=cfg.recount,
                num_workers=1,
                device=CPU,
                persistent_workers=False,
            ),
        ),
        ("ours", lambda epoch: imagenet.data.train_loader(cfg, ours, epoch, 0, ranks, 0)),
    ]


def seconds():
    """Processor time of this process, and of workers that have ended."""
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time(), workers.ru_utime + workers.ru_stime


def time_epoch(loader):
    """Milliseconds an image of (the worker, this process)."""
    start, images = seconds(), 0
    for batch, _ in loader:
        images += len(batch)
    del loader
    main, worker = (
        1000 * (now - then) / images for now, then in zip(seconds(), start, strict=True)
    )
    return worker, main


def time_step(function, images):
    start = time.process_time()
    function()
    return 1000 * (time.process_time() - start) / images


def main(argv=None):
    parser = argparse.ArgumentParser(description="Images a second of imagenet/'s training loader.")
    parser.add_argument("--images", type=int, default=960, help="of an epoch")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = make_photographs(root, args.quality)
        flags = ["--data_path", folder, "--workers", "1"]
        (root / "val").symlink_to("train")
        cfg = imagenet.config.read_settings(imagenet.options, flags).resolve()
        paths = sorted(map(str, (root / "train").rglob("*.JPEG")))
        print(
            f"{len(paths)} JPEGs of 500 x 375, {size / 1000:.0f} kB each; medians of {args.rounds}"
        )

        steps = steps_of(cfg, paths)
        times = {name: [[], [], []] for name in steps}
        for _ in range(args.rounds):
            for name, functions in steps.items():
                for found, function in zip(times[name], functions, strict=True):
                    found.append(time_step(function, len(paths)))
        print(f"\n{'ms an image':24}{'release':>10}{'timm':>10}{'ours':>10}")
        for name, found in times.items():
            cells = "".join(f"{statistics.median(values):10.3f}" for values in found)
            print(f"{name:24}{cells}")

        loaders = loaders_of(cfg, root, args.images)
        times = {name: [] for name, _ in loaders}
        for epoch in range(args.rounds):
            for name, make in loaders:
                times[name].append(time_epoch(make(epoch)))
    print(f"\n{'one worker':12}{'ms':>8}{'images/s':>12}{'main, ms':>12}{'both: images/s':>18}")
    for name, found in times.items():
        worker, main = (statistics.median(column) for column in zip(*found, strict=True))
        both = 1000 / (worker + main)
        print(f"{name:12}{worker:8.2f}{1000 / worker:12.0f}{main:12.2f}{both:18.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
