"""Configuration from defaults < yml < flags. The table of keys is in options.py."""

import argparse
import difflib
import importlib.metadata
import re
import sys
from pathlib import Path
from typing import NamedTuple

from . import yml
from .keys import Key
from .yml import show

HERE = Path(__file__).resolve().parent.parent  # the data set's folder
OLDEST = {
    "torch": "2.6",
    "timm": "1.0.30",
    "spikingjelly": "2.0",
}  # versions that were tried and work
PATH = Key(Path, None, "path of a yml")

SYNONYMS = {  # what others call a key: a hint, where such a name is not one of ours
    "lr": "learning_rate learningrate base_lr init_lr",
    "epochs": "epoch num_epochs n_epochs max_epochs num_epoch total_epochs",
    "batch_size": "bs batch batchsize train_batch_size train_batch batch_size_per_gpu",
    "val_batch_size": "test_batch_size eval_batch_size validation_batch_size vbs",
    "weight_decay": "wd decay l2 weightdecay",
    "time_step": "t time_steps timestep timesteps steps num_steps n_steps frames frames_number",
    "workers": "worker n_workers j num_threads threads nworkers",
    "opt": "optimizer optim optimiser",
    "opt_betas": "betas adam_betas beta",
    "opt_eps": "eps epsilon adam_eps",
    "sched": "scheduler lr_scheduler lr_schedule schedule",
    "min_lr": "final_lr eta_min end_lr lr_min",
    "warmup_epochs": "warmup warmup_epoch num_warmup_epochs",
    "cooldown_epochs": "cooldown",
    "clip_grad": "grad_clip gradient_clip clip max_grad_norm grad_norm clip_grad_norm",
    "accum_iter": "accumulation accum_steps grad_accum gradient_accumulation_steps accumulate",
    "layer": "layers num_layers n_layers depth num_blocks blocks",
    "dim": "embed_dim embed_dims embedding_dim hidden_dim width channels",
    "num_heads": "heads n_heads head nhead",
    "num_classes": "classes n_classes nclasses",
    "img_size": "image_size imgsize resolution size imsize",
    "data_dir": "data data_root root dataset_path dataset_dir datapath datadir data_folder",
    "output": "out save_dir out_dir outdir output_folder save_path logdir work_dir",
    "experiment": "exp exp_name experiment_name run name run_name",
    "checkpoint": "ckpt weights checkpoint_path ckpt_path load model_path",
    "log_interval": "log_freq log_every print_interval print_every",
    "smoothing": "label_smoothing labelsmoothing",
    "aa": "auto_augment autoaugment randaugment rand_augment",
    "reprob": "random_erasing re_prob erasing erase",
    "amp": "fp16 mixed_precision half use_amp",
    "amp_dtype": "precision dtype",
    "device": "gpu gpus cuda device_id gpu_id",
    "seed": "random_seed manual_seed",
    "backend": "neuron_backend lif_backend",
    "neuron": "neuron_type spiking_neuron neurons node lif_type",
    "tau": "membrane_tau init_tau time_constant lif_tau",
    "v_threshold": "threshold vth v_th thresh",
    "surrogate_alpha": "alpha slope surrogate_slope",
}

UNREAD = {  # flags of files that a script does not read, and those that it does
    "train": (
        ("checkpoint", "predict"),
        "train.py starts from the weights of --finetune, or goes on with the run of --resume",
    ),
    "test": (("finetune", "resume"), "test.py tests the file of --checkpoint"),
}


class UserError(Exception):
    """A mistake that the user can mend. The scripts print it as one line and exit with 1."""


class Given(NamedTuple):
    """Where values come from: the yml, whether -c named it, what it and its bases set, flags."""

    file: str
    named: bool
    yml: dict
    flags: dict


def check_versions():
    """UserError for a library that is older than the oldest version known to work."""
    for name, oldest in OLDEST.items():
        have = importlib.metadata.version(name)
        if numbers(have) < numbers(oldest):
            raise UserError(
                f"{name} {have} is too old, {oldest} is the oldest that works: pip install -r "
                f"requirements.txt"
            )


def numbers(version):
    """The numbers of a version, to compare: of 0.0.0.0.14 and of 2.11.0+cu130."""
    return [int(number) for number in re.findall(r"\d+", version.split("+")[0])]


def load_config(keys, no_effect, default_file, argv=None, description=None):
    """Resolve the configuration.

    Args:
        keys: {name: Key}, every key that does something.
        no_effect: {name: reason}, names of the release that are accepted and do nothing here.
        default_file: yml beside this file, read when no -c is given.
        argv: the command line, default sys.argv[1:].
        description: first line of --help.

    Returns (cfg, notes, given): an argparse.Namespace with every key, lines to print about keys
    without effect, and what of cfg was set where, a Given.
    Raises UserError for a file that can't be read, an unknown key, a value of the wrong type or out
    of range, and a flag of a file that the script would not read.
    """
    check_versions()
    parser = _parser(keys, no_effect, default_file, description)
    flags, unknown = parser.parse_known_args(argv)
    flags = vars(flags)
    named = "config" in flags
    file = _find(flags.pop("config", default_file))
    names = {spelled: name for name, key in keys.items() for spelled in (name, *key.aliases)}
    if unknown:
        kind = "unknown flag" if unknown[0].startswith("-") else "no flag stands before"
        hint = _hint(unknown[0], names, no_effect)
        raise UserError(f"command line: {kind} {_name(unknown[0])}{hint}")

    cfg = {name: key.default for name, key in keys.items()}
    notes = []
    given = Given(file.name, named, {}, {})
    sources = [(entries, given.yml) for entries in _read(file)]
    sources.append(([(*flag, "command line") for flag in flags.items()], given.flags))
    for entries, into in sources:
        here = {}
        for spelled, value, where in entries:
            spelled = spelled.replace("-", "_")
            name = names.get(spelled)
            if name is None:
                if spelled not in no_effect:
                    hint = _hint(spelled, names, no_effect)
                    raise UserError(f"{where}: unknown key {_name(spelled)}{hint}")
                notes.append(f"{where}: {spelled} has no effect: {no_effect[spelled]}")
                continue
            try:
                cfg[name] = keys[name].convert(value)
            except ValueError as wanted:
                said = f"{spelled} is {show(value)}"
                raise UserError(f"{where}: {said}; it must be {wanted}") from None
            other, before = here.setdefault(name, (spelled, cfg[name]))
            if before != cfg[name]:
                said = f"{other} and {spelled} are one key, but their values differ"
                raise UserError(f"{where}: {said}; leave one of them out")
            into[name] = cfg[name]
    if cfg["experiment"] is None:
        cfg["experiment"] = file.stem
    others, own = UNREAD.get(Path(sys.argv[0]).stem, ((), ""))
    unread = [name for name in others if given.flags.get(name)]
    if unread and not cfg.get("test_only"):
        raise UserError(f"command line: --{unread[0]} is not read here; {own}")
    return argparse.Namespace(**cfg), notes, given


def _find(name):
    """The yml of this name, where one is or beside the script."""
    known = ", ".join(sorted(path.name for path in HERE.glob("*.yml")))
    try:
        name = PATH.convert(name)
        for path in (Path(name), HERE / name):
            if path.is_file():
                return path.resolve()
        what = "a folder" if Path(name).is_dir() else "no such file"
    except ValueError as wanted:
        what = f"it must be {wanted}"
    except (OSError, RuntimeError) as error:
        what = str(error)
    raise UserError(f"-c {_name(name)}: {what} (beside the script: {known})")


def _read(file):
    """[[(key, value, where), ...], ...] of a yml and of its bases, which come first.

    `base: other.yml` names a yml beside the one that says so.
    """
    files, sources = [], []
    while file is not None:
        files.append(file)
        try:
            entries = yml.read(file)
        except ValueError as error:
            raise UserError(str(error)) from None
        sources.insert(0, [entry for entry in entries if entry[0] != "base"])
        base = [entry for entry in entries if entry[0] == "base" and entry[1] is not None]
        file = _base(*base[0][1:], files) if base else None
    return sources


def _base(name, where, files):
    try:
        path = (files[-1].parent / PATH.convert(name)).resolve()
        if path.is_file() and path not in files:
            return path
        why = "another yml; this one leads back to it" if path in files else "a yml that is there"
    except ValueError as wanted:
        why = str(wanted)
    except (OSError, RuntimeError) as error:
        why = f"a yml that can be read ({error})"
    raise UserError(f"{where}: base is {show(name)}; it must be {why}")


def _name(text):
    """A name in an error: as it is, if that is short and plain."""
    return text if text.isprintable() and len(text) <= 100 else show(text)


def _hint(name, names, no_effect):
    """What may be meant by an unknown name, or nothing."""
    name = name.lstrip("-").split("=")[0].replace("-", "_").lower()
    close = difflib.get_close_matches(name, [*names, *no_effect], 1, cutoff=0.75)
    meant = next((key for key, others in SYNONYMS.items() if name in others.split()), None)
    meant = meant if meant in names else close[0] if close else None
    return f"; is {names.get(meant, meant)} meant?" if meant else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"command line: {message}")


class _Help(argparse.HelpFormatter):
    """One spelling of a flag, beside a short form, and its value's kind once."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=32, width=100)

    def _format_action_invocation(self, action):
        long = next(spelled for spelled in action.option_strings if spelled.startswith("--"))
        short = [spelled for spelled in action.option_strings if re.fullmatch(r"-\w\w?", spelled)]
        return f"{', '.join([*short, long])} {action.metavar or ''}".strip()


def _parser(keys, no_effect, default_file, description):
    """The flags of all keys; --help has those that train.py or test.py, whichever runs, uses."""
    script = Path(sys.argv[0]).stem
    parser = _Parser(
        usage="%(prog)s [-c FILE] [--KEY VALUE ...]",
        description=description,
        epilog="Each of these is a key of the yml too, with underscores for dashes. A flag goes "
        "over the yml, and the yml over the default [in brackets].",
        allow_abbrev=False,
        formatter_class=_Help,
        argument_default=argparse.SUPPRESS,
    )
    text = f"yml to read, in the working directory or beside the script [{default_file}]"
    parser.add_argument("-c", "--config", metavar="FILE", help=text)
    groups = {}
    for name, key in keys.items():
        if key.group not in groups:
            groups[key.group] = parser.add_argument_group(key.group or None)
        shown = script in key.scripts or (key.scripts and script not in ("train", "test"))
        for spelled in (name, *key.aliases):
            groups[key.group].add_argument(
                *(key.flags if spelled == name else ()),
                *dict.fromkeys((f"--{spelled.replace('_', '-')}", f"--{spelled}")),
                dest=spelled,
                nargs="+" if isinstance(key.kind, list) else "?" if key.kind is bool else None,
                const="true" if key.kind is bool else None,
                metavar=_metavar(key),
                help=_help(key) if shown and spelled == name else argparse.SUPPRESS,
            )
    for name in no_effect:
        spellings = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))
        parser.add_argument(*spellings, dest=name, nargs="*", help=argparse.SUPPRESS)
    return parser


def _metavar(key):
    """The kind of a key's value, as --help shows it."""
    kinds = {int: "N", float: "X", str: "WORD", Path: "PATH"}
    if isinstance(key.kind, list):
        one, (fewest, most) = kinds[key.kind[0]], key.length
        return " ".join([one] * most) if fewest == most else f"{one} ..."
    if key.choices or key.kind is bool:
        return "{" + ",".join(filter(None, key.choices or ("true", "false"))) + "}"
    return kinds[key.kind]


def _help(key):
    values = key.default if isinstance(key.default, list) else [key.default]
    words = {None: "none", False: "false", True: "true"}
    default = " ".join(words[v] if v is None or isinstance(v, bool) else str(v) for v in values)
    return (f"{key.help} [{default}]" if default else key.help).replace("%", "%%")
