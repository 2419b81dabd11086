"""Checkpoints: written so that a crash can't damage them, read so that they can't run code.

What ours hold is in Run.state. Files of others are read too: the release's, timm's, DeepSpeed's,
Lightning's, safetensors and bare state dicts.
"""

import argparse
import hashlib
import json
import math
import os
import pickle
import reprlib
import zipfile
from pathlib import Path, PosixPath

import numpy as np
import safetensors.torch
import torch
from torch.utils._pytree import tree_leaves

from .folder import dict_in, replacing, writing
from .log import UserError, first_line, logger, telling

# Arguments, paths and NumPy's numbers: plain data that torch.load does not take by itself.
HARMLESS = [argparse.Namespace, PosixPath, np.dtype]
HARMLESS += [type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "float32", "float64")]
for core in ("core", "_core"):  # as NumPy 1 wrote it, and NumPy 2
    HARMLESS.append((np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar"))
WEIGHTS = ("model", "state_dict", "model_state_dict", "module", "net")  # where files keep them
EMA = ("model_ema", "state_dict_ema", "ema")
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DDP, torch.compile and Lightning
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COUNTS = (torch.int32, torch.int64)
MOST_VALUES = 10**7  # in dicts and lists; a checkpoint of a thousand ranks has less


def save_checkpoint(state: dict, path: Path):
    """Write a checkpoint: after a crash `path` is the old file or the whole new one."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            torch.save(state, file)


def load_checkpoint(path: Path, use_ema: bool = False) -> dict:
    """A checkpoint on the CPU: its dict with weights under `model`, averaged ones under `model_ema`
    and, with `use_ema`, `model`. UserError if it can't be read safely, or has no finite weights.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such checkpoint: {path}")
    ours = {}
    if path.name == "model.safetensors":  # of tools/export.py, perhaps
        ours = dict_in(path.with_name("config.json"), lambda text: json.loads(text)["qkformer"])
    checkpoint = read_file(path, ours.pop("sha256", None))
    checkpoint = {"model": checkpoint, **ours} if ours else checkpoint
    held = {n: checkpoint[n] for n in (*WEIGHTS, *EMA) if isinstance(checkpoint.get(n), dict)}
    extra = {n: checkpoint[n] for n in checkpoint if n not in held} if held else {}
    plain = next((held[name] for name in WEIGHTS if name in held), None if held else checkpoint)
    averaged = next((held[name] for name in EMA if name in held), None)
    if averaged is not None:
        extra["model_ema"] = own_names(averaged, path)
        if not use_ema:
            which = "averaged weights only" if plain is None else "averaged weights and plain ones"
            logger.info(f"{path}: holds {which}, which are taken")
    elif use_ema:
        raise UserError(f"{path}: holds no averaged weights ({', '.join(EMA)}); leave use_ema out")
    given = extra.get("given", {"yml": {}, "file": ""})
    if not isinstance(given, dict) or not isinstance(given.get("yml"), dict):
        raise UserError(f"{path}: damaged: its given is {reprlib.repr(given)}")
    weights = extra["model_ema"] if use_ema or plain is None else own_names(plain, path)
    return {**extra, "model": weights}


def digest(path):
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_file(path, sha256=None):
    """The dict in a file, whose SHA-256 may be known."""
    zipped = zipfile.is_zipfile(path)
    try:
        if path.stat().st_size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            raise MemoryError
        if sha256 and sha256 != digest(path):
            raise ValueError("its SHA-256 is not that in config.json")
        if not zipped and not sha256:
            logger.info(f"{path}: has no checksums, so damage to its numbers can't be seen")
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:  # torch.load leaves the checksums out
                check_records(archive)
                if damaged := archive.testzip():
                    raise ValueError(f"the checksum of its {damaged} differs")
        with torch.serialization.safe_globals(HARMLESS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        check_values(checkpoint)
    except MemoryError:
        raise UserError(f"{path}: not enough memory to read it") from None
    except Exception as error:  # damaged bytes can make the reader fail in any way
        why, what = "not a checkpoint, or not whole; get or make it again", first_line(error)
        if isinstance(error, pickle.UnpicklingError) and zipped:
            why = "not loaded, since doing so could run code in it"
            what = first_line(str(error).split("WeightsUnpickler error:")[-1])
        raise UserError(f"{path}: {why} ({what.split('. ')[0]})") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds a {type(checkpoint).__name__}, no weights")
    return checkpoint


def check_records(archive):
    """ValueError for what torch.save never writes, before anything is read: compressed records, of
    any size, folders, whose content torch.load leaves out, and names that are twice there.
    """
    names = set()
    for record in archive.infolist():
        odd = record.compress_type or record.compress_size != record.file_size
        folder = record.external_attr & 0x10 or record.is_dir()
        if odd or folder or record.filename in names:
            raise ValueError(f"its {record.filename} is no record of torch.save")
        names.add(record.filename)


def check_values(checkpoint):
    """ValueError for more values than there can be, such as of a list that is in itself."""
    values = [checkpoint]
    for value in values:  # which grows
        value = vars(value) if isinstance(value, argparse.Namespace) else value
        if isinstance(value, (dict, list, tuple, set)):
            values.extend(value.values() if isinstance(value, dict) else value)
        if len(values) > MOST_VALUES:
            raise ValueError(f"it shows more than {MOST_VALUES:,} values")


def own_names(weights, path):
    """Weights by the names that the model has, without what wrappers put around them; checked."""
    counters = ("total_ops", "total_params")  # of operations, left there by a tool
    weights = {n: v for n, v in weights.items() if isinstance(n, str) and not n.endswith(counters)}
    if not any(map(torch.is_tensor, weights.values())):
        raise UserError(f"{path}: no weights by themselves, nor under {', '.join(WEIGHTS + EMA)}")
    while wrappers := [p for p in PREFIXES if all(name.startswith(p) for name in weights)]:
        weights = {name.removeprefix(wrappers[0]): value for name, value in weights.items()}
    if larger_than_memory(weights.values()):
        raise UserError(f"{path}: damaged: its weights are views of less memory than they show")
    for name, value in weights.items():
        if not is_plain(value):
            fault = "is no tensor, or one that is sparse, nested or without data"
        elif value.dtype not in (COUNTS if name.endswith("num_batches_tracked") else FLOATS):
            fault = f"is of type {value.dtype}, which weights are not"
        elif not value.isfinite().all():
            fault = "has values that are not finite numbers"
        else:
            continue
        raise UserError(f"{path}: {name} {fault}")
    return weights


def is_plain(value):
    """Whether it is a tensor whose numbers are all in memory."""
    strided = torch.is_tensor(value) and value.layout == torch.strided
    return strided and not value.is_nested and not value.is_meta


def larger_than_memory(values):
    """Whether tensors among the values show more than is there: a small file would cost hours."""
    plain = [*filter(is_plain, values)]
    memory = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in plain}
    return sum(v.numel() * v.element_size() for v in plain) > sum(memory.values())


def load_weights(model: torch.nn.Module, weights: dict, path: Path):
    """Load weights; UserError that names keys and shapes where they are of another network."""
    want = model.state_dict()
    # Old files lack these; nothing depends on them.
    have = {n: v for n, v in want.items() if n.endswith("num_batches_tracked")} | weights
    both = [name for name in want if name in have and have[name].shape != want[name].shape]
    differ = {
        "missing": [name for name in want if name not in have],
        "unexpected": [name for name in have if name not in want],
        "of another shape": [f"{n} {[*have[n].shape]} instead of {[*want[n].shape]}" for n in both],
    }
    short = {how: ", ".join(n[:3]) + ", …" * (len(n) > 3) for how, n in differ.items()}
    if text := "; ".join(f"{len(n)} {how} ({short[how]})" for how, n in differ.items() if n):
        raise UserError(f"{path}: of another architecture than the configuration's: {text}")
    model.load_state_dict(have)


def number(checkpoint, name, default, path, low=-1):
    """A number of the default's type, from `low` on, in a checkpoint; the default if it lacks."""
    value = checkpoint.get(name, default)
    if type(value) is not type(default) or not low <= value < 1e15:
        raise UserError(f"{path}: its {name} is {reprlib.repr(value)}; --finetune needs none")
    return value


def load_optimizer(optimizer, scaler, checkpoint, path, opt):
    """Load the states of optimizer and scaler; UserError for damaged ones, and of another `opt`."""
    # Settings of the groups that stay as they are here; the last ones are chosen for this device.
    ours = "initial_lr weight_decay betas eps momentum lr_scale maximize amsgrad nesterov "
    ours += "differentiable decoupled_weight_decay capturable foreach fused"
    with telling(f"{path}: no fitting optimizer state (", "); --finetune needs none"):
        if (had := (checkpoint.get("config") or {}).get("opt", opt)) != opt:
            raise ValueError(f"it is of {had}, opt is {opt}")
        state = checkpoint["optimizer"]
        if larger_than_memory(tree_leaves(state["state"])):
            raise ValueError("its tensors are views of less memory than they show")
        pairs = zip(state["param_groups"], optimizer.param_groups, strict=True)
        groups = [had | {k: own[k] for k in ours.split() if k in own} for had, own in pairs]
        optimizer.load_state_dict({**state, "param_groups": groups})
        check_optimizer(optimizer)
        if saved := checkpoint.get("scaler"):  # empty where the run was not in float16
            scaler.load_state_dict(saved)
            if not math.isfinite(saved["scale"]):
                raise ValueError(f"the scaler's scale is {saved['scale']}")


def check_optimizer(optimizer):
    """ValueError where a state that was loaded can't be gone on with."""
    adam = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
    for parameter, state in optimizer.state.items():
        if state and adam and (lacking := {"step", "exp_avg", "exp_avg_sq"} - state.keys()):
            raise ValueError(f"no {min(lacking)}")
        for name, value in state.items():
            if torch.is_tensor(value) and not value.isfinite().all():
                raise ValueError(f"{name} is not finite")
            if adam and name.startswith("exp_avg") and value.shape != parameter.shape:
                raise ValueError(f"{name} is of another shape than its parameter")
