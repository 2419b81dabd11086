"""A run's folder: its name, its args.yaml, its log and its curves."""

import contextlib
import json
import logging
import os
import re
from pathlib import Path

import yaml
from torch.utils.tensorboard import SummaryWriter

from config import HERE, UserError

logger = logging.getLogger("qkformer")
CURVES = {  # in TensorBoard, of what a line of log.txt has
    "train_loss": "loss/train",
    "test_loss": "loss/test",
    "test_acc1": "accuracy/top1",
    "test_acc5": "accuracy/top5",
    "ema_acc1": "accuracy/top1_ema",
    "lr": "lr/epoch",
    "train_lr": "lr/epoch",
    "images_per_second": "speed/images_per_second",
    "seconds": "speed/seconds_per_epoch",
    "peak_memory_mb": "memory/peak_mb",
}


def shown(path):
    """The path as one would type it here: relative to the working directory where it lies below that."""
    with contextlib.suppress(ValueError):
        return Path(path).resolve().relative_to(Path.cwd())
    return path


def newest(paths):
    """The path that was written last, or None."""
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def find_checkpoint(cfg, output):
    """The checkpoint to test: cfg.checkpoint, or the newest best.pth of the runs under `output`."""
    root = Path(output) if output else HERE / "output"
    path = Path(cfg.checkpoint) if cfg.checkpoint else newest(root.glob("*/best.pth"))
    if path is None:
        raise UserError(f"no checkpoint: there is no best.pth under {root}; train first, or name one with --checkpoint")
    return path


def write_result(path, result):
    """test-NAME.json beside the checkpoint NAME.pth; a line where it can't be written."""
    file = path.with_name(f"test-{path.stem}.json")
    try:
        file.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        logger.warning(f"warning: {file} can't be written: {error.strerror}")


def open_run(cfg, output):
    """(folder of this run under `output`, default output/ beside the script; checkpoint to resume or None).

    A folder that holds a run is written to only by going on from its last.pth: any other run's name gets a number.
    """
    if not re.fullmatch(r"[\w.+=,-]*\w[\w.+=,-]*", cfg.experiment):
        raise UserError(f"experiment is {cfg.experiment!r}; it names a folder, so letters, digits and -_.+=, only")
    root = Path(output) if output else HERE / "output"
    numbered = re.compile(re.escape(cfg.experiment) + r"(-\d+)?")
    runs = [path.parent for path in root.glob("*/args.yaml") if numbered.fullmatch(path.parent.name)]
    resume = None
    if cfg.resume == "auto":
        runs_of_it = [folder for folder in runs if experiment_of(folder) == cfg.experiment]
        resume = newest(folder / "last.pth" for folder in runs_of_it if (folder / "last.pth").is_file())
        if resume is None and runs_of_it == [root / cfg.experiment]:
            return runs_of_it[0], None  # it ended before its first checkpoint
    elif cfg.resume:
        resume = Path(cfg.resume)
    if resume and resume.name == "last.pth" and (resume.parent / "args.yaml").is_file():
        return resume.parent, resume
    names = [cfg.experiment, *(f"{cfg.experiment}-{number}" for number in range(2, len(runs) + 3))]
    return next(root / name for name in names if root / name not in runs), resume


def experiment_of(folder):
    """The experiment that a run's folder belongs to: of run-2 it is run, or another experiment of that name."""
    try:
        return str(yaml.safe_load((folder / "args.yaml").read_text())["experiment"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return folder.name


def make_folder(folder, cfg, classes=()):
    """Make a run's folder, with the configuration in args.yaml and the classes' names, a line each, in classes.txt."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "args.yaml").write_text(yaml.safe_dump(vars(cfg), sort_keys=False))
        if classes:
            (folder / "classes.txt").write_text("".join(f"{name}\n" for name in classes))


@contextlib.contextmanager
def writing(folder):
    """What goes wrong within with a file of the folder, such as on a full disk, becomes one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: can't be written: {error.strerror or error}") from None


class RunLog:
    """log.txt, one JSON line an epoch, and TensorBoard's curves over epochs and, in steps/, over steps.

    What an earlier run wrote of this epoch and the later ones is dropped. The curves over steps have a folder of
    their own, because TensorBoard drops all points from one x on, and x is an epoch in one and a step in the other.

    Args:
        folder: the run's.
        epoch, step: what is done first; `step` counts the steps of all epochs.
    """

    def __init__(self, folder, epoch, step):
        self.folder, self.path = folder, folder / "log.txt"
        with writing(folder):
            lines = self.path.read_text(errors="replace").splitlines() if self.path.is_file() else []
            temporary = folder / "log.txt.tmp"
            temporary.write_text("".join(line + "\n" for line in lines if epoch_of(line) < epoch))
            os.replace(temporary, self.path)
            self.epochs = SummaryWriter(str(folder), purge_step=epoch)
            self.steps = SummaryWriter(str(folder / "steps"), purge_step=step)

    def point(self, name, value, step):
        """A point of a curve over the steps of all epochs, counted from 0."""
        with writing(self.folder):
            self.steps.add_scalar(f"step/{name}", value, step)

    def epoch(self, record):
        """An epoch's line and points."""
        with writing(self.folder):
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
            for name, curve in CURVES.items():
                if name in record:
                    self.epochs.add_scalar(curve, record[name], record["epoch"])
            for stage, rate in record.get("firing_rate", {}).items():
                self.epochs.add_scalar(f"firing_rate/{stage}", rate, record["epoch"])
            self.flush()

    def flush(self):
        """Put all points on the disk: before a checkpoint is saved, so that a killed run loses none."""
        with writing(self.folder):
            self.epochs.flush()
            self.steps.flush()


def epoch_of(line):
    """Epoch of a line of log.txt; of one that a crash has cut short, none that comes before another."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
