"""Classes of images that have no labels: the five most probable ones of each image, in a csv.

Usage, from anywhere:
    python tools/predict.py cifar10/output/quickstart/best.pth photos/     # writes predict.csv
    python tools/predict.py best.pth photos/ --folder imagenet --predictions photos.csv

Images in folders below count too. They are prepared as in testing; a damaged one is an error or,
for imagenet/ with `-- --on_bad_image skip`, left out. Names are those of the label file, else the
checkpoint's, else, of 1,000 classes, ImageNet's.
"""

import csv
import io
import os
import sys
from collections import Counter
from pathlib import Path

import torch

import models


def list_images(modules, folder):
    """[(path, index)] of the images in a folder and below it, in the order of their paths."""
    if not os.path.isdir(folder):
        raise modules.log.UserError(f"images is {folder}, which is not a folder")
    others = Counter()
    paths = sorted(map(Path, modules.images.list_images(folder, others)))
    modules.images.say_others(folder, others)
    return [(str(path), index) for index, path in enumerate(paths)]


def class_names(modules, tested, labels=None):
    """Names of the classes, those of wnids with their words; [] where none are known."""
    total = tested.model.num_classes
    if labels is not None:
        return read_labels(modules, labels, total)
    in_words = getattr(modules.data, "class_names", list)  # imagenet/ alone has it
    names = modules.build.names_in(tested.classes)
    if len(names) == total:
        return in_words(names)
    return in_words() if total == 1000 else []


def read_labels(modules, path, total):
    """The first word of every line of a file, line i for class i."""
    UserError = modules.log.UserError
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"labels: {path} can't be read: {error}") from None
    names = [line.split()[0] for line in lines if line.strip()]
    if len(names) != total:
        lines = f"{len(names)} lines, but the network has {total} classes"
        raise UserError(f"labels: {path} has {lines}")
    return names


def check_predictions(modules, path):
    """UserError, before the work, where predictions can't be written or would replace others."""
    if os.path.lexists(path):
        raise modules.log.UserError(f"predictions: {path} is there already; name another file")
    modules.folder.write_whole(path, b"")
    path.unlink()


@torch.inference_mode()
def predict(modules, tested, samples, names):
    """For each sample a row: its path, a class, its name if known, the probability, the next."""
    dataset = models.image_files(modules, tested.cfg, samples)
    loader, autocast = models.test_batches(modules, tested, dataset)
    model = modules.graph.graphed(tested.model.eval(), tested.cfg, tested.ranks)
    rows = []
    for batch, indices in modules.log.progress(loader, "predict", tested.ranks):
        with autocast():
            logits = model(batch)
        top = logits.double().softmax(1).topk(min(5, logits.shape[1]))
        for index, values, classes in zip(*map(torch.Tensor.tolist, (indices, *top)), strict=True):
            row = [samples[index][0]]
            for number, value in zip(classes, values, strict=True):
                row += [number, *names[number : number + 1], f"{value:.6f}"]
            rows.append(row)
    return rows


def write(modules, path, rows, folder, named):
    """The csv, with paths from `folder` on; named: whether the rows have names of classes."""
    columns = ("class", "name", "probability") if named else ("class", "probability")
    best, text = range(1, len(rows[0]) // len(columns) + 1), io.StringIO(newline="")
    head = ["file", *(f"{column}{k}" for k in best for column in columns)]
    rows = [(os.path.relpath(file, folder), *row) for file, *row in rows]
    csv.writer(text).writerows([head, *rows])
    # Names of files keep their bytes, whatever they encode.
    modules.folder.write_whole(path, text.getvalue().encode(errors="surrogateescape"))
    modules.log.logger.info(f"{len(rows)} images: {path}")


def main(argv=None):
    argv, flags = models.split(argv)
    parser = models.checkpoint_parser(__doc__)
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument(
        "--predictions", type=Path, default="predict.csv", help="new file; default: predict.csv"
    )
    parser.add_argument(
        "--labels", type=Path, help="text file, a line for each class, whose first word is its name"
    )
    args = parser.parse_args(argv)
    folder, path = args.images.absolute(), args.predictions.absolute()
    labels = args.labels and args.labels.absolute()
    modules, tested = models.open_checkpoint(args.checkpoint, args.folder, flags)
    with models.one_line(modules):
        if not hasattr(modules, "images"):
            raise modules.log.UserError(f"{tested.path}: of event data, which are no images")
        check_predictions(modules, path)
        names = class_names(modules, tested, labels)
        rows = predict(modules, tested, list_images(modules, folder), names)
        if not rows:
            raise modules.log.UserError(f"predict: no image in {folder} can be read")
        write(modules, path, rows, folder, bool(names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
