"""Checkpoints: written so that a crash can't damage them, read so that they can't run code.

Ours hold model, optimizer, scheduler, scaler, epoch (the last one finished), step (done of the next
epoch) with the sum of their losses, global_batch, best (top-1 in %), rng (of every rank), config,
given (the yml behind it), cross_sample_lif, classes (their names), with model_ema the averaged
weights under that name and, within an epoch of dist_bn: reduce, the running statistics of every
rank. Files of others are read too: the release's, timm's, DeepSpeed's, Lightning's, safetensors and
bare state dicts.
"""

import argparse
import logging
import math
import os
import pathlib
import pickle
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from .config import UserError

# Plain data of a checkpoint that torch.load does not take by itself: arguments, paths, NumPy's
# numbers.
HARMLESS = [
    argparse.Namespace,
    *(getattr(pathlib, name) for name in ("PosixPath", "PurePosixPath")),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "float32", "float64")),
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # as NumPy 1 wrote it
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),
]
WEIGHTS = ("model", "state_dict", "model_state_dict", "module", "net")  # where files keep them
EMA = ("model_ema", "state_dict_ema", "ema")
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DDP, torch.compile and Lightning
SEMANTICS = {
    False: "cross_sample_lif: false (the paper's semantics: an image's logits do not depend on "
    "its batch)",
    True: "cross_sample_lif: true (the release's semantics: logits depend on the other images of "
    "the batch)",
}
logger = logging.getLogger("qkformer")


def save_checkpoint(state, path):
    """Write to a temporary file, flush it to the disk, rename it to `path`.

    So after a crash `path` is either the old file or the whole new one.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error.__context__, OSError):  # a full disk, for which torch.save has no words
            error = error.__context__
        said = f"can't be written ({error}); an older file there is untouched"
        raise UserError(f"{path}: {said}") from None


def load_checkpoint(path, use_ema=False):
    """Read a checkpoint on the CPU: a dict with the weights under `model`, averaged ones under
    `model_ema`.

    With `use_ema`, the averaged weights are under `model`. UserError if the file can't be read
    safely, is damaged, or does not hold weights that are finite numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such checkpoint: {path}")
    checkpoint = read_file(path)
    held = {
        name: checkpoint[name]
        for name in (*WEIGHTS, *EMA)
        if isinstance(checkpoint.get(name), dict)
    }
    plain = next((held[name] for name in WEIGHTS if name in held), None)
    averaged = next((held[name] for name in EMA if name in held), None)
    if plain is None and averaged is None:
        plain, checkpoint = checkpoint, {}
    if use_ema and averaged is None:
        raise UserError(f"{path}: holds no averaged weights ({', '.join(EMA)}); leave use_ema out")
    if plain is not None and averaged is not None and not use_ema:
        logger.info(
            f"{path}: holds plain and averaged weights; these are the plain ones (use_ema takes "
            f"the others)"
        )
    elif plain is None and not use_ema:
        logger.info(f"{path}: holds averaged weights only, which are taken")
    chosen = averaged if use_ema or plain is None else plain
    extra = {name: value for name, value in checkpoint.items() if name not in held}
    if averaged is not None:
        extra["model_ema"] = own_names(averaged, path)
    given = extra.get("given", {"yml": {}})
    if not (isinstance(given, dict) and isinstance(given.get("yml"), dict)):
        raise UserError(f"{path}: damaged: its given is {str(given)[:50]!r}")
    return {**extra, "model": own_names(chosen, path)}


def read_file(path):
    """The dict in a file."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.load leaves the checksums out
                if damaged := archive.testzip():
                    raise UserError(
                        f"{path}: damaged: the checksum of its {damaged} differs; get or make it "
                        f"again"
                    )
        with torch.serialization.safe_globals(HARMLESS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path}: not enough memory to read it") from None
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path):
            what = (
                str(error)
                .split("WeightsUnpickler error:")[-1]
                .split(". ")[0]
                .strip()
                .splitlines()[0]
            )
            raise UserError(
                f"{path}: not loaded, since doing so could run code in it: {what}"
            ) from None
        raise UserError(f"{path}: not a checkpoint, or not whole; get or make it again") from None
    except Exception:  # damaged bytes can make the reader fail in any way
        raise UserError(f"{path}: not a checkpoint, or not whole; get or make it again") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds a {type(checkpoint).__name__}, no weights")
    return checkpoint


def own_names(weights, path):
    """Weights by the names that the model has, without what wrappers put around them; checked."""
    weights = {name: value for name, value in weights.items() if isinstance(name, str)}
    for name in [name for name in weights if name.endswith(("total_ops", "total_params"))]:
        del weights[name]  # left by a counter of operations
    while prefix := next(
        (p for p in PREFIXES if weights and all(name.startswith(p) for name in weights)), None
    ):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    if not weights or not any(map(torch.is_tensor, weights.values())):
        raise UserError(
            f"{path}: holds no weights, neither by themselves nor under {', '.join(WEIGHTS + EMA)}"
        )
    for name, value in weights.items():
        if fault := fault_of(name, value):
            raise UserError(f"{path}: {name} {fault}; get or make the file again")
    return weights


def fault_of(name, value):
    """What is wrong with an entry of a state dict, or None."""
    if not torch.is_tensor(value):
        return f"is no tensor but a {type(value).__name__}"
    if value.is_meta or value.is_nested or value.is_quantized or value.layout != torch.strided:
        return "is no plain tensor (sparse, quantised, nested or without data)"
    if name.endswith("num_batches_tracked"):
        return (
            None
            if not (value.is_floating_point() or value.is_complex())
            else f"is of type {value.dtype}"
        )
    if not value.is_floating_point():
        return f"is of type {value.dtype}, which weights are not"
    if not value.isfinite().all():
        return "has values that are not finite numbers"
    return None


def progress_of(path):
    """(epochs, steps of the next) that a checkpoint of ours has behind it, read without its
    tensors.

    Of a file that can't be read, more than any: to be taken, so that an error names it.
    """
    try:
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return int(content["epoch"]) + 1, int(content["step"])
    except Exception:  # damaged bytes can make the reader fail in any way
        return math.inf, 0


def load_weights(model, checkpoint, path):
    """Load checkpoint["model"]; UserError that names keys and shapes where it is of another
    architecture.
    """
    have, want = dict(checkpoint["model"]), model.state_dict()
    for name in want:
        if name.endswith(
            "num_batches_tracked"
        ):  # counts that old files lack; nothing here depends on them
            have.setdefault(name, want[name])
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
            problems.append(
                f"{len(names)} {title} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            )
    if problems:
        raise UserError(
            f"{path}: of another architecture than the configuration's: {'; '.join(problems)}"
        )
    model.load_state_dict(have)


def number(checkpoint, name, default, path, low=-1):
    """A number of the default's type, from `low` on, in a checkpoint; the default where
    it lacks.
    """
    value = checkpoint.get(name, default)
    if type(value) is not type(default) or not low <= value < math.inf:
        said = f"{path}: can't be resumed: its {name} is {value!r}"
        raise UserError(f"{said}; --finetune takes its weights alone")
    return value


def check_optimizer(optimizer, scaler):
    """ValueError where what was loaded into an optimizer, or a scaler's state, can't be gone on
    with.
    """
    adam = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
    needed = {"step", "exp_avg", "exp_avg_sq"} if adam else set()
    for parameter, state in optimizer.state.items():
        if state and (lacking := needed - set(state)):
            raise ValueError(f"no {min(lacking)}")
        for name, value in state.items():
            if torch.is_tensor(value):
                if not value.isfinite().all():
                    raise ValueError(f"{name} is not finite")
                # others keep sums of their own, such as NovoGrad's one number for each parameter
                whole = ("exp_avg", "exp_avg_sq") if adam else ("momentum_buffer",)
                if name in whole and value.shape != parameter.shape:
                    raise ValueError(f"{name} is of another shape than its parameter")
            elif name == "step" and not 0 <= value < math.inf:
                raise ValueError(f"step is {value}")
    for name, value in (scaler or {}).items():
        if not math.isfinite(value):
            raise ValueError(f"the scaler's {name} is {value}")


def resolve_semantics(setting, checkpoint, path, model="QKFormer"):
    """(cross_sample_lif, a line that says why).

    Args:
        setting: the key's value, "true", "false" or "auto".
        checkpoint, path: whose record counts for auto; None for a run that starts from scratch.
        model: the key's value; an MS model has no such neuron.
    """
    if model.startswith("MS"):
        if setting == "true":
            raise UserError(
                f"cross_sample_lif is true, which has no meaning for {model}: leave it out"
            )
        return (
            False,
            f"{model}: an image's logits do not depend on its batch; cross_sample_lif has no "
            f"meaning here",
        )
    recorded = checkpoint.get("cross_sample_lif") if checkpoint else None
    if not isinstance(recorded, (bool, type(None))):
        raise UserError(f"{path}: its cross_sample_lif is {recorded!r}, neither true nor false")
    if setting != "auto":
        value = setting == "true"
        if recorded is not None and recorded != value:
            return (
                value,
                f"warning: {SEMANTICS[value]}, as set, but {path} was trained with {recorded}",
            )
        return value, SEMANTICS[value]
    if checkpoint is None:
        return False, SEMANTICS[False]
    if recorded is not None:
        return recorded, f"{SEMANTICS[recorded]}, as {path} records"
    return True, (
        f"warning: {path} does not record its semantics, so it is taken for one of the release's: "
        f"{SEMANTICS[True]}; set cross_sample_lif: false if it was trained with the paper's"
    )
