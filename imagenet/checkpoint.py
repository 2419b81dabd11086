"""A run's folder and its checkpoints: written so that a crash can't damage them, read so that they can't run code.

Ours hold model, optimizer, scheduler, scaler, epoch (the last one finished), step (done of the next epoch) with the
sum of their losses, global_batch, best (top-1 in %), rng (of every rank), config and cross_sample_lif. The release's
are read too: weights under `model` or, saved by timm, `state_dict`; so is a bare state dict.
"""

import argparse
import json
import os
import pathlib
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from config import HERE, UserError

# Plain data of a checkpoint that torch.load does not take by itself: arguments, paths, NumPy's numbers.
HARMLESS = [
    argparse.Namespace,
    *(getattr(pathlib, name) for name in ("PosixPath", "PurePosixPath")),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "float32", "float64")),
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # as NumPy 1 wrote it
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),
]
SEMANTICS = {
    False: "cross_sample_lif: false (the paper's semantics: an image's logits do not depend on its batch)",
    True: "cross_sample_lif: true (the release's semantics: logits depend on the other images of the batch)",
}


def save_checkpoint(state, path):
    """Write to a temporary file, flush it to the disk and rename it: `path` is the old file or the whole new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: can't be written ({error}); the file of before is untouched") from None


def load_checkpoint(path):
    """Read a checkpoint on the CPU: a dict with the weights under `model`. UserError if that can't be done safely."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such checkpoint: {path}")
    try:
        with torch.serialization.safe_globals(HARMLESS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path):
            what = str(error).split("WeightsUnpickler error:")[-1].split(". ")[0].strip().splitlines()[0]
            raise UserError(f"{path}: not loaded, since doing so could run code in it: {what}") from None
        raise UserError(f"{path}: not a checkpoint, or not whole; get or make it again") from None
    except Exception:  # damaged bytes can make the reader fail in any way
        raise UserError(f"{path}: not a checkpoint, or not whole; get or make it again") from None
    weights = checkpoint
    for key in ("model", "state_dict"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            weights = checkpoint[key]
            break
    if not isinstance(weights, dict) or not weights or not all(map(is_weight, weights.items())):
        raise UserError(f"{path}: holds no weights: neither `model` nor `state_dict`, nor a bare state dict")
    extra = checkpoint if weights is not checkpoint else {}
    return {**extra, "model": {name.removeprefix("module."): value for name, value in weights.items()}}


def is_weight(item):
    return isinstance(item[0], str) and torch.is_tensor(item[1])


def load_weights(model, checkpoint, path):
    """Load checkpoint["model"]; UserError that names keys and shapes where it is of another architecture."""
    have, want = checkpoint["model"], model.state_dict()
    problems = []
    for title, names in (
        ("missing", [name for name in want if name not in have]),
        ("unexpected", [name for name in have if name not in want]),
        (
            "of another shape",
            [
                f"{name} {list(have[name].shape)} instead of {list(want[name].shape)}"
                for name in want
                if name in have and have[name].shape != want[name].shape
            ],
        ),
    ):
        if names:
            problems.append(f"{len(names)} {title} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})")
    if problems:
        made_with = Path(path).parent / "args.yaml"
        hint = f"; it was made with -c {made_with}" if made_with.is_file() else ""
        raise UserError(f"{path}: of another architecture than the configuration's: {'; '.join(problems)}{hint}")
    model.load_state_dict(have)


def resolve_semantics(setting, checkpoint, path):
    """(cross_sample_lif, line that says why) for the key's setting and the checkpoint, None for a run without one."""
    recorded = checkpoint.get("cross_sample_lif") if checkpoint else None
    if setting != "auto":
        value = setting == "true"
        if recorded is not None and recorded != value:
            return value, f"warning: {SEMANTICS[value]}, as set, but {path} was trained with {recorded}"
        return value, SEMANTICS[value]
    if checkpoint is None:
        return False, SEMANTICS[False]
    if recorded is not None:
        return recorded, f"{SEMANTICS[recorded]}, as {path} records"
    return True, (
        f"warning: {path} does not record its semantics, so it is taken for one of the release's: {SEMANTICS[True]}; "
        "set cross_sample_lif: false if it was trained with the paper's"
    )


def newest(paths):
    """The path that was written last, or None."""
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


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
        resume = newest(path / "last.pth" for path in runs if (path / "last.pth").is_file())
        if resume is None and runs == [root / cfg.experiment]:
            return runs[0], None  # it ended before its first checkpoint
    elif cfg.resume:
        resume = Path(cfg.resume)
    if resume and resume.name == "last.pth" and (resume.parent / "args.yaml").is_file():
        return resume.parent, resume
    names = [cfg.experiment, *(f"{cfg.experiment}-{number}" for number in range(2, len(runs) + 3))]
    return next(root / name for name in names if root / name not in runs), resume


def make_folder(folder, cfg):
    """Make a run's folder, with the whole configuration in args.yaml."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "args.yaml").write_text(yaml.safe_dump(vars(cfg), sort_keys=False))
    except OSError as error:
        raise UserError(f"output folder {folder}: {error.strerror}") from None


def open_log(folder, epoch):
    """log.txt and TensorBoard's writer, without what an earlier run of this epoch and the later ones left there."""
    log, temporary = folder / "log.txt", folder / "log.txt.tmp"
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    temporary.write_text("".join(line + "\n" for line in lines if epoch_of(line) < epoch))
    os.replace(temporary, log)
    return log, SummaryWriter(str(folder), purge_step=epoch)


def epoch_of(line):
    """Epoch of a line of log.txt; of one that a crash has cut short, none that comes before another."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
