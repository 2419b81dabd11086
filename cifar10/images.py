"""Image files: which of them a folder holds, and what is in one; damaged ones are refused.

As in timm and the release, alpha channels are dropped, and EXIF data turn no photo.
"""

import io
import os
import stat
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from harness.log import UserError, first_line, logger

# No others: EPS, for example, PIL hands to Ghostscript, and that runs programs.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")

MOST_SCANS = 100  # over a JPEG; a progressive one has ten


class BadImage(UserError):
    """A file that is not a whole image."""


def to_rgb(image):
    """The image in 8-bit RGB. Of 16 bits the upper 8 count, as in PIL for colour; grey it clips."""
    deep = image.mode == "I" and image.format in ("PNG", "PPM")
    if deep or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = "whole numbers" if image.mode == "I" else "floats"
        raise ValueError(f"32-bit {kind}, whose black and white are not known; save it with 8 bits")
    return image.convert("RGB")


def read_image(path, decode=lambda image, data: to_rgb(image)):
    """The RGB image in a file, by `decode` of PIL's image and the bytes; BadImage if not whole."""
    try:
        info, most = os.stat(path), Image.MAX_IMAGE_PIXELS
        if not stat.S_ISREG(info.st_mode):  # a pipe would never end
            raise ValueError("not a file")
        if info.st_size > 4 * most:
            raise ValueError(f"{info.st_size:,} bytes are too many for an image")
        data = Path(path).read_bytes()
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > most:  # before they are decoded
            raise ValueError(f"{image.width:,} x {image.height:,} pixels, more than {most:,}")
        if image.format == "PNG":  # its checksums, which decoding leaves out
            Image.open(io.BytesIO(data), formats=FORMATS).verify()
        if image.format == "JPEG" and (scans := data.count(b"\xff\xda")) > MOST_SCANS:
            raise ValueError(f"{scans:,} scans, more than {MOST_SCANS}")  # of a few bytes each
        # Decoders take missing data for grey: the end of a JPEG comes after its last scan's start.
        if image.format == "JPEG" and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
            raise ValueError("a JPEG without an end")
        return decode(image, data)
    except Exception as error:  # damaged bytes can make a decoder fail in any way
        fault = first_line(error)
    fault = "unknown format" if fault.startswith("cannot identify") else fault
    raise BadImage(f"{path}: not a whole image ({fault})")


def list_images(folder, others):
    """Paths of the images in a folder and below it, in order. Links count, hidden names do not; a
    folder counts once, however many links lead to it. `others` counts what is left out, by kind.
    """

    def fail(error):
        raise error

    found, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        images = [n for n in names if n.lower().endswith(IMG_EXTENSIONS) and n[0] != "."]
        others.update(map(kind_of, set(names) - set(images)))
        found += [os.path.join(place, name) for name in images]
    if not found:
        raise UserError(f"{folder} holds no images ({', '.join(IMG_EXTENSIONS)})")
    return sorted(found, key=os.path.split)


def kind_of(name):
    return "hidden" if name[0] == "." else Path(name).suffix or "without a suffix"


def say_others(folder, others):
    """How many files of a folder, by suffix, are no images."""
    if kinds := ", ".join(f"{count} {kind}" for kind, count in others.most_common(5)):
        more = ", ..." if len(others) > 5 else ""
        logger.info(f"{folder}: {others.total()} files are left out ({kinds}{more})")


def list_classes(folder):
    """The names of the folders in a folder, in order: the classes."""
    names = [path.name for path in Path(folder).iterdir() if path.is_dir() and path.name[0] != "."]
    if not names:
        raise UserError(f"{folder} holds no folders; it needs one for each class, with its images")
    return sorted(names)


def list_split(root, train):
    """([(path, label)], class names) of root/train or root/val, with a folder for each class."""
    root, names = Path(root), ("train", "val") if train else ("val", "train")
    folder, other = (root / name for name in names)
    if not os.path.isdir(folder):
        raise UserError(f"no folder {folder.absolute()}; it needs a folder for each class")
    classes = list_classes(folder)
    if os.path.isdir(other) and (differ := sorted(set(classes) ^ set(list_classes(other)))):
        raise UserError(f"{root}: only {names[differ[0] not in classes]}/ has class {differ[0]}")
    return list_folder(folder)


def list_folder(folder):
    """([(path, label)], class names) of the images in a folder's folders, one for each class."""
    folder, classes = Path(folder), list_classes(folder)
    samples, others = [], Counter(kind_of(path.name) for path in folder.iterdir() if path.is_file())
    for label, name in enumerate(classes):
        samples += [(path, label) for path in list_images(folder / name, others)]
    say_others(folder, others)
    return samples, classes
