"""A run's folder: its name, its args.yaml, its log and its curves."""

import atexit
import contextlib
import errno
import fcntl
import itertools
import json
import logging
import os
import re
import time
from pathlib import Path

import yaml
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from .checkpoint import progress_of
from .config import HERE, UserError

logger = logging.getLogger("qkformer")
CURVES = {  # {key of a line in log.txt: its curve in TensorBoard}
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
    """The path as one would type it here: relative to the working directory where it lies below
    that.
    """
    with contextlib.suppress(ValueError):
        return Path(path).resolve().relative_to(Path.cwd())
    return path


def newest(paths):
    """The checkpoint of the most epochs and steps, of equal ones that written last;
    None of none.
    """
    paths = list(paths)
    if len(paths) < 2:
        return paths[0] if paths else None
    return max(paths, key=lambda path: (progress_of(path), path.stat().st_mtime))


def find_checkpoint(cfg, output):
    """The checkpoint to test: cfg.checkpoint, or the best.pth under `output` written last."""
    if cfg.checkpoint:
        return Path(cfg.checkpoint)
    root = Path(output) if output else HERE / "output"
    path = max(root.glob("*/best.pth"), key=lambda path: path.stat().st_mtime, default=None)
    if path is None:
        raise UserError(
            f"no checkpoint: there is no best.pth under {root}; train first, or name one with "
            f"--checkpoint"
        )
    return path


def write_result(path, result):
    """test-NAME.json beside the checkpoint NAME.pth; a line where it can't be written."""
    file = path.with_name(f"test-{path.stem}.json")
    try:
        file.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        logger.warning(f"warning: {file} can't be written: {error.strerror}")


def find_run(cfg, output):
    """(folder to go on in or None, checkpoint to resume or None, folder of all runs, those of this
    name).
    """
    if not re.fullmatch(r"[\w.+=,-]*\w[\w.+=,-]*", cfg.experiment):
        raise UserError(
            f"experiment is {cfg.experiment!r}; it names a folder, so letters, digits and -_.+=, "
            f"only"
        )
    root = Path(output) if output else HERE / "output"
    numbered = re.compile(re.escape(cfg.experiment) + r"(-\d+)?")
    runs = [
        path.parent for path in root.glob("*/args.yaml") if numbered.fullmatch(path.parent.name)
    ]
    resume = None
    if cfg.resume == "auto":
        runs_of_it = [folder for folder in runs if experiment_of(folder) == cfg.experiment]
        resume = newest(
            folder / "last.pth" for folder in runs_of_it if (folder / "last.pth").is_file()
        )
        if resume is None and runs_of_it == [root / cfg.experiment]:
            return runs_of_it[0], None, root, runs  # it ended before its first checkpoint
    elif cfg.resume:
        resume = Path(cfg.resume)
    if resume and resume.name == "last.pth" and (resume.parent / "args.yaml").is_file():
        return resume.parent, resume, root, runs
    return None, resume, root, runs


def open_run(cfg, output):
    """(folder of this run under `output`, default output/ beside the script; checkpoint to resume
    or None).

    Only a run that resumes its last.pth writes to a folder that holds a run or, with resume: auto,
    one that finds no checkpoint there. Any other run gets a folder with a number behind its name.
    The folder is this process's until it ends: a run that would go on there meanwhile ends with an
    error.
    """
    folder, resume, root, runs = find_run(cfg, output)
    if folder is None and cfg.resume == "auto" and root / cfg.experiment not in runs:
        folder = root / cfg.experiment
    if folder is not None:
        if not claim(folder):
            raise UserError(
                f"{folder} is in use by another run: wait for its end, or stop it, or set another "
                f"experiment"
            )
        cfg.experiment = experiment_of(folder)  # also where another yml resumes it
        return folder, resume
    for number in itertools.count(1):
        folder = root / (cfg.experiment if number == 1 else f"{cfg.experiment}-{number}")
        # Its args.yaml may have come, and its user gone, since the runs were listed.
        if folder not in runs and claim(folder) and not (folder / "args.yaml").exists():
            return folder, resume


CLAIMED = []  # files that are open, and so locked, until this process ends


def claim(folder):
    """Make a folder and lock it for this process; False if another one has it.

    The lock is the system's, so it ends with the process, whatever ends it. Loader workers have no
    part in it.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # but for these, the file system has no locks: go on
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    CLAIMED.append(file)
    there = folder / ".lock"
    if there.exists() and os.path.samestat(there.stat(), os.fstat(file.fileno())):
        return True
    return claim(folder)  # its last user removed the file meanwhile


@atexit.register
def leave():
    """Remove folders that were claimed for a run that did not come to be."""
    for file in CLAIMED:
        folder = Path(file.name).parent
        with contextlib.suppress(OSError):
            if [path.name for path in folder.iterdir()] == [".lock"]:
                os.remove(file.name)
                folder.rmdir()


def experiment_of(folder):
    """The experiment of a run's folder, as its args.yaml has it.

    The name does not tell: run-2 is the second run of `run`, or the first of `run-2`.
    """
    try:
        return str(yaml.safe_load((folder / "args.yaml").read_text())["experiment"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return folder.name


def make_folder(folder, cfg, classes=()):
    """Put the configuration in a run's args.yaml and the classes' names, a line each, in its
    classes.txt.
    """
    with writing(folder):
        (folder / "args.yaml").write_text(yaml.safe_dump(vars(cfg), sort_keys=False))
        if classes:
            lines = "".join(f"{name}\n" for name in classes)
            (folder / "classes.txt").write_bytes(os.fsencode(lines))


@contextlib.contextmanager
def writing(folder):
    """What goes wrong within with a file of the folder, such as on a full disk, becomes
    one line.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: can't be written: {error.strerror or error}") from None


class RunLog:
    """log.txt, one JSON line an epoch, and TensorBoard's curves over epochs and, in steps/, over
    steps.

    A resumed run drops what was written from its first epoch and step on, since it does them again.
    TensorBoard drops all points of a folder from one x on. So curves over steps have a folder of
    their own.

    Args:
        folder: the run's.
        epoch, step: the first ones that this run does; `step` counts over all epochs.
    """

    def __init__(self, folder, epoch, step):
        self.folder, self.path = folder, folder / "log.txt"
        with writing(folder):
            lines = (
                self.path.read_text(errors="replace").splitlines() if self.path.is_file() else []
            )
            temporary = folder / "log.txt.tmp"
            temporary.write_text("".join(line + "\n" for line in lines if epoch_of(line) < epoch))
            os.replace(temporary, self.path)
            self.epochs = Curves(folder, epoch)
            self.steps = Curves(folder / "steps", step)

    def point(self, name, value, step):
        """A point of a curve over the steps of all epochs, counted from 0."""
        with writing(self.folder):
            self.steps.point(f"step/{name}", value, step)

    def epoch(self, record):
        """An epoch's line and points."""
        with writing(self.folder):
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
            for name, curve in CURVES.items():
                if name in record:
                    self.epochs.point(curve, record[name], record["epoch"])
            for stage, rate in record.get("firing_rate", {}).items():
                self.epochs.point(f"firing_rate/{stage}", rate, record["epoch"])


class Curves:
    """A file of TensorBoard's in a folder. Points of older files from x = `first` on do not count
    any more.

    PyTorch's SummaryWriter writes in a thread, whose errors are a traceback, and names files by the
    clock, which TensorBoard then reads in a wrong order where that was set back. Here each point is
    written at once.
    """

    def __init__(self, folder, first):
        folder.mkdir(parents=True, exist_ok=True)
        names = (re.match(r"events\.out\.tfevents\.(\d+)", path.name) for path in folder.iterdir())
        number = 1 + max((int(name[1]) for name in names if name), default=0)
        file = open(folder / f"events.out.tfevents.{number:010}", "wb", buffering=0)
        self.records = RecordWriter(file)
        self.write(file_version="brain.Event:2", step=first)
        self.write(session_log=SessionLog(status=SessionLog.START), step=first)

    def write(self, **what):
        self.records.write(Event(wall_time=time.time(), **what).SerializeToString())

    def point(self, name, value, x):
        self.write(summary=Summary(value=[Summary.Value(tag=name, simple_value=value)]), step=x)


def epoch_of(line):
    """Epoch of a line of log.txt; infinity for a line that a crash has cut short, to drop it."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
