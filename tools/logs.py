"""Logs of runs, as tools/curves.py reads them: ours, the release's, timm's, and its own curves."""

import csv
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

# Names of a log's columns: ours and the release's, timm's, and that of the event curve, taken
# within the epoch.
NAMES = {
    "train_loss": ("train_loss", "train_loss_at_iter_512"),
    "test_loss": ("test_loss", "eval_loss", "val_loss"),
    "top1": ("test_acc1", "eval_top1", "val_acc1"),
}


# What scripts print; the mean of an epoch is in brackets. TRAIN: timm's (CIFAR) and torchvision's
# (ImageNet, events) lines of a step; MEANS: ImageNet's of an epoch; TESTED: timm's of the last
# batch; RESULT: ImageNet's and the event scripts' of a test.
MEAN = r"\bloss: +\S+ \( *(\S+)\)"
TRAIN = re.compile(rf"(?:Train: (\d+) |Epoch: \[(\d+)\]).*?{MEAN}", re.I)
MEANS = re.compile(rf"Averaged stats: .*?{MEAN}")
TESTED = re.compile(rf"Test: +\[ *(\d+)/ *\1\].*?{MEAN}.*?Acc@1: +\S+ \( *(\S+)\)", re.I)
RESULT = re.compile(r"\* +Acc@1 (?:= )?([\d.]+),? +Acc@5 (?:= )?[\d.]+,? +loss (?:= )?([\d.]+)")


class CurveError(Exception):
    """A mistake that the user can mend; printed as one line."""


@dataclass
class Run:
    """Epochs of a log, {epoch: {"train_loss", "test_loss", "top1", maybe "seconds"}}, and its
    args.yaml, or None.
    """

    name: str
    epochs: dict = field(default_factory=dict)
    config: dict = None

    def series(self, name):
        """(number of epochs done, value) of each epoch, as two lists."""
        return [epoch + 1 for epoch in self.epochs], [
            values[name] for values in self.epochs.values()
        ]

    @property
    def best(self):
        return max((values["top1"] for values in self.epochs.values()), default=math.nan)


def read_run(path):
    """The Run at a path: a folder with log.txt, summary.csv or args.yaml, or one of these logs."""
    path = Path(path)
    if not path.exists():
        raise CurveError(f"no such run: {path}")
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        path = next(
            (path / name for name in ("log.txt", "summary.csv") if (path / name).is_file()),
            path / "log.txt",
        )
    config = None
    try:
        if (folder / "args.yaml").is_file():
            config = yaml.safe_load((folder / "args.yaml").read_text())
        if not path.is_file():
            if config is None:
                raise CurveError(
                    f"{folder}: not a run: it has no log.txt, summary.csv or args.yaml"
                )
            return Run(folder.name, {}, config)
        text = path.read_text(errors="replace")
    except OSError as error:
        raise CurveError(f"{error.filename}: can't be read: {error.strerror}") from None
    except yaml.YAMLError:
        raise CurveError(f"{folder / 'args.yaml'}: not a yml") from None
    if path.suffix == ".csv":
        rows = read_csv(text)
    else:
        rows = read_console(text) or read_json(text, path)
    name = folder.name if path.name in ("log.txt", "summary.csv") else path.stem
    return Run(
        name,
        dict(sorted(convert(row, path) for row in rows)),
        config if isinstance(config, dict) else None,
    )


def read_csv(text):
    """The rows of a csv; the last one is left out where it is not whole, as of a run
    that goes on.
    """
    lines = text.splitlines()
    rows = list(csv.DictReader(lines))
    return rows[:-1] if rows and (None in rows[-1].values() or not text.endswith("\n")) else rows


def read_console(text):
    """The epochs in what a script printed; one without its test is left out."""
    rows = {}
    for line in text.splitlines():
        if found := TRAIN.search(line):
            epoch = int(found[1] or found[2])
            rows[epoch] = {"epoch": epoch, "train_loss": found[3]}
        elif not rows:
            continue
        elif found := MEANS.search(line):
            rows[epoch]["train_loss"] = found[1]
        elif found := TESTED.search(line):
            rows[epoch] |= {"test_loss": found[2], "test_acc1": found[3]}
        elif found := RESULT.search(line):
            rows[epoch] |= {"test_loss": found[2], "test_acc1": found[1]}
    return [row for row in rows.values() if "test_acc1" in row]


def read_json(text, path):
    """The lines of a log; the last one is left out where it is not whole."""
    lines, rows = text.splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise CurveError(
                    f"{path}, line {number}: not a line of a log (one JSON each)"
                ) from None
    return rows


def convert(row, path):
    """(epoch, values) of a row of a log, under our names."""
    try:
        epoch, values = int(row["epoch"]), {}
        for name, theirs in NAMES.items():
            values[name] = float(next(row[their] for their in theirs if their in row))
        if "seconds" in row:
            values["seconds"] = float(row["seconds"])
    except (KeyError, TypeError, ValueError, StopIteration):
        wanted = "epoch, " + ", ".join(" or ".join(theirs[:2]) for theirs in NAMES.values())
        raise CurveError(f"{path}: not a log of a run; an epoch needs {wanted}") from None
    return epoch, values
