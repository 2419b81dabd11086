"""Which network weights are of, read off their names and shapes."""

import argparse
import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from .config import UserError
from .runtime import logger

FAMILIES = (  # data sets, model, a weight that no family above has; the first that fits counts
    ("event data", "QKFormer", "patch_embed1.proj3_conv.weight"),
    ("ImageNet", "QKFormer", "patch_embed1.proj2_conv.weight"),
    ("ImageNet", "MSQKFormer", "patch_embed1.rpe_conv.weight"),
    ("CIFAR", "MSQKFormer", "patch_embed1.embed1.embed_conv.weight"),
    ("CIFAR", "QKFormer", "patch_embed1.proj1_conv.weight"),
)
LEARNT = re.compile(r"lif\d?\.w$")  # of neurons
HIDDEN = re.compile(r"stage(\d)\.(\d+)\.mlp\.\w+1_conv\.weight")


class Architecture(NamedTuple):
    """What shapes tell of a network. `attention` has "ssa" or "token" for each stage: "channel" has
    the same shapes. With `learns_tau`, neurons are "plif".
    """

    family: str
    layer: int
    dim: int
    mlp_ratio: float
    classes: int | None
    attention: list
    learns_tau: bool


def architecture(weights, path, data_set, nearest):
    """The Architecture of weights for this data set.

    Args:
        weights: a state dict.
        path: where it is from.
        data_set: this folder's, as in FAMILIES.
        nearest: makes a model of this folder, with whose names those of unknown weights are
            compared.

    UserError where they are of no network of this folder, with the reason.
    """
    known, family = next((row[:2] for row in FAMILIES if row[2] in weights), (None, None))
    if known not in (None, data_set):
        raise UserError(
            f"{path}: {family} for {known}, another architecture than this folder's, which is for "
            f"{data_set}"
        )
    hidden = {match[1]: weights[match[0]].shape for match in map(HIDDEN.match, weights) if match}
    if (
        family is None
        or not hidden
        or any(len(shape) != 4 or 0 in shape for shape in hidden.values())
    ):
        raise UserError(f"{path}: {difference(weights, nearest())}")
    last = max(hidden)
    wide, dim = hidden[last][:2]
    ratio = wide / dim
    stages = sorted(hidden)
    return Architecture(
        family,
        layer=sum(1 for name in weights if HIDDEN.match(name)),
        dim=dim,
        mlp_ratio=ratio if int(dim * ratio) == wide else math.nextafter(ratio, math.inf),
        classes=len(weights["head.weight"]) if "head.weight" in weights else None,
        attention=[
            "ssa" if any(of_ssa(name, stage) for name in weights) else "token" for stage in stages
        ],
        learns_tau=any(LEARNT.search(name) for name in weights),
    )


def of_ssa(name, stage):
    return name.startswith(f"stage{stage}.") and ".v_conv." in name


def difference(weights, model):
    """Why weights are not those of any model here: how their names differ from the
    nearest model's.
    """
    first, count = Counter(name.split(".")[0] for name in weights).most_common(1)[0]
    want = model.state_dict()
    if any(
        name.removeprefix(f"{first}.") in want for name in weights if name.startswith(f"{first}.")
    ):
        known = "which no model here has; without it they would fit"
        return f"{count} keys begin with `{first}.`, {known}"
    unknown = [name for name in weights if name not in want]
    lacking = [name for name in want if name not in weights]
    return (
        f"weights of another network: {count} keys begin with `{first}.`; compared with "
        f"{type(model).__name__}, the nearest here, {len(unknown)} are unknown "
        f"({', '.join(unknown[:3])}) and {len(lacking)} are missing ({', '.join(lacking[:3])})"
    )


def steps_of(checkpoint, path):
    """T of a file without our configuration, from its args or its name; None if neither has it."""
    args = checkpoint.get("args")
    args = (
        vars(args)
        if isinstance(args, argparse.Namespace)
        else args
        if isinstance(args, dict)
        else {}
    )
    named = re.search(r"(?:^|[_-])T(\d+)(?=[._-])", Path(path).name)
    found = [
        (args[name], f"its args.{name}")
        for name in ("time_step", "T")
        if isinstance(args.get(name), int)
    ]
    found += [(int(named[1]), "its name")] if named else []
    for steps, origin in found:
        logger.info(f"{path}: T is {steps}, from {origin}")
        return steps
    logger.info(f"{path}: does not tell T; the T of the configuration is used")
    return None
