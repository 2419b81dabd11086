"""A run's folder: which one it is, its args.yaml, its log and its curves."""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
from pathlib import Path

import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from .log import HERE, UserError, logger, telling

MAXFORMER = "https://github.com/bic-L/MaxFormer/releases/download/checkpoints"
ASSETS = {name: f"{MAXFORMER}/{name}.pth.tar" for name in ("ms_qk_10-384_T4", "ms_qk_10-768_T1")}


def fetch(name: str | Path) -> Path:
    """The file that a name means: a path, a folder of tools/export.py, or a URL or key of ASSETS,
    downloaded once into torch.hub's cache and verified by a hash in its name; else UserError.
    """
    path, url = Path(name), ASSETS.get(str(name), str(name))
    if path.exists() or not url.startswith(("https://", "http://")):
        return path / "model.safetensors" if path.is_dir() else path
    cache = Path(torch.hub.get_dir(), "checkpoints", hashlib.sha256(url.encode()).hexdigest()[:8])
    path = cache / url.partition("?")[0].rpartition("/")[2]
    known = torch.hub.HASH_REGEX.search(path.name)
    with telling(f"{url}: can't be downloaded: "):
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), known and known[1])
    logger.info(f"{url}: {path}; {'its checksum fits' if known else 'no checksum of it is known'}")
    return path


def newest(settings, file, experiment):
    """The file of that name written last in the runs of an experiment, or of all; None without."""
    paths = []
    for path in Path(settings.output or HERE / "output").glob(f"*/{file}"):
        run = path.parent  # run-2 may be the second run of `run`, or the first of `run-2`
        name = read_args(run).get("experiment", re.sub(r"-\d+$", "", run.name))
        if not is_new(run) and experiment in (None, str(name)):
            paths.append(path)
    return max(paths, key=os.path.getmtime, default=None)


def find_checkpoint(settings) -> Path:
    """The checkpoint to test: the named one, the named run's best.pth, or the one written last."""
    if settings.checkpoint:
        return fetch(settings.checkpoint)
    if settings.named and (path := settings.file.parent / "best.pth").is_file():
        return path  # -c output/a/args.yaml
    if path := newest(settings, "best.pth", settings.experiment):
        return path
    of = f" of {settings.experiment}" if settings.experiment else ""
    none = f"there is no best.pth{of} under {settings.output or HERE / 'output'}"
    raise UserError(f"no checkpoint: {none}; train first, or name one with --checkpoint")


def find_resumed(settings):
    """The checkpoint to resume, or None. auto: of the named experiment, the yml's or the newest."""
    if settings.resume != "auto":
        return settings.resume and Path(settings.resume)
    path, named = newest(settings, "last.pth", settings.name), settings.experiment or settings.named
    if path is None and not named and (path := newest(settings, "last.pth", None)):
        logger.info(f"resume: auto takes the newest run, since there is none of {settings.name}")
    return path


def read_text(path):
    """The text of a file; OSError for a pipe, which would never end, and for too many bytes."""
    if not path.is_file() or path.stat().st_size > 2**24:
        raise OSError(f"{path.name} is no file of a run")
    return path.read_text(errors="replace")


def read_args(folder) -> dict:
    """A run's args.yaml; {} where there is none that can be read."""
    return dict_in(folder / "args.yaml", yaml.safe_load)


def dict_in(text, parse) -> dict:
    """The dict in a text, or in a file; {} where there is none that can be read."""
    try:
        found = parse(read_text(text) if isinstance(text, Path) else text)
    except Exception:  # whatever is there
        found = None
    return found if isinstance(found, dict) else {}


def open_run(settings):
    """(folder of this run, which is locked, checkpoint to resume or None). Only a run that goes on
    from its own last.pth writes to a folder that holds a run, and where that is in use it is an
    error; any other gets a number behind its name.
    """
    root, name = Path(settings.output or HERE / "output"), settings.name
    if not re.fullmatch(r"[\w.+=,-]*\w[\w.+=,-]*", name):
        raise UserError(f"experiment is {name!r}; letters, digits and -_.+=, name a folder")
    resume, folder = find_resumed(settings), root / name
    own = resume and resume.name == "last.pth" and not is_new(resume.parent)
    if own or (settings.resume == "auto" and is_new(folder)):
        folder = resume.parent if own else folder
        if not claim(folder):
            raise UserError(f"{folder} is in use by another run; stop it, or set experiment")
        return folder, resume
    for folder in map(root.joinpath, numbered(name)):
        # Its user may have come and gone between the first look and the claim.
        if is_new(folder) and claim(folder) and is_new(folder):
            return folder, resume


def is_new(folder):
    return not (folder / "args.yaml").exists()


def numbered(name):
    """name, name-2, name-3, ..."""
    return itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))


def claim(folder):
    """Lock a run's folder, by a file beside it, for this process; False if another one has it."""
    place = Path(os.path.realpath(folder))
    with writing(folder):
        place.parent.mkdir(parents=True, exist_ok=True)
        # Never closed: it is locked until this process ends.
        file = os.open(place.with_name(f".{place.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # but for these, the file system has no locks: go on
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def write_args(folder, values, classes):
    """args.yaml and classes.txt, which has a class's name a line."""
    write_whole(folder / "args.yaml", yaml.safe_dump(values, sort_keys=False).encode())
    write_whole(folder / "classes.txt", os.fsencode("".join(f"{name}\n" for name in classes)))


def write_result(path, result):
    """test-NAME.json beside NAME.pth (of another test set shifted-NAME.json), or a line; -2 where
    another test's is there, and so on.
    """
    text = json.dumps(result, indent=1)
    figures = ("loss", "top1", "top5", "images_per_second", "sha256")
    figures = {name: result[name] for name in figures if name in result}
    kind = "shifted" if "test_path" in result else "test"
    for name in numbered(f"{kind}-{path.stem}"):
        file = path.with_name(f"{name}.json")
        there = dict_in(file, json.loads)
        if not there or there | figures == json.loads(text):
            break
    try:
        write_whole(file, f"{text}\n".encode())
    except UserError as error:
        logger.warning(f"warning: {error}")


def write_whole(path, content):
    """Write a file that is whole or not at all; UserError where it can't be."""
    with writing(path), replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path):
    """A file that is whole or not at all; once on the disk it replaces `path`, a link too."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a killed run
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def writing(path):
    """What goes wrong within with a file or folder, as on a full disk, becomes one line."""
    return telling(f"{path}: can't be written: ", kinds=(OSError, RuntimeError))


class RunLog:
    """log.txt, one JSON line an epoch, and TensorBoard's curves over epochs and, in steps/, over
    all steps. What was written from `epoch` and `step` on is dropped, since it is done again.
    """

    def __init__(self, folder, epoch, step):
        self.folder, self.path = folder, folder / "log.txt"
        with writing(folder):
            lines = read_text(self.path).splitlines() if self.path.exists() else []
            # A line that a crash has cut short has no epoch, and is dropped.
            kept = [n for n in lines if dict_in(n, json.loads).get("epoch") in range(epoch)]
            write_whole(self.path, "".join(f"{line}\n" for line in kept).encode())
            self.epochs = SummaryWriter(folder, purge_step=epoch)
            self.steps = SummaryWriter(folder / "steps", purge_step=step)

    def epoch(self, record):
        """An epoch's line and points."""
        points = {f"epoch/{name}": value for name, value in record.items() if name != "epoch"}
        rates = points.pop("epoch/firing_rate", {})
        points |= {f"firing_rate/{stage}": rate for stage, rate in rates.items()}
        with writing(self.folder), open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
            for curve, value in points.items():
                self.epochs.add_scalar(curve, value, record["epoch"])

    def step(self, curve, value, step):
        """A point of a curve over all steps."""
        with writing(self.folder):
            self.steps.add_scalar(curve, value, step)

    def flush(self):
        """Write all points so far, before a checkpoint from which a killed run goes on."""
        with writing(self.folder):
            self.epochs.flush()
            self.steps.flush()
