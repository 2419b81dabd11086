"""Configuration: defaults < checkpoint < a yml that -c names < flags, resolved once.

A folder's options.py is the table of keys. The yml beside the script counts among the defaults.
"""

import argparse
import difflib
import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from .log import HERE, UserError, logger
from .yml import NUMBER, read_yml, shown

TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NULLS = (None, "none", "null", "None", "", ["none"])
# Flags of train.py that mean another key where test.py gets them, as the release's does.
IN_TEST = {"batch_size": "val_batch_size", "model_ema": "use_ema"}
IN_TEST |= dict.fromkeys(("finetune", "resume"), "checkpoint")
# What a checkpoint brings back, by what is done with it; see Key.
BACK = {"train": "", "finetune": "network", "test": "network data", "resume": "network data run"}


@dataclass(frozen=True)
class Key:
    """A key of the yml, and the flag of the same name.

    kind: int, float, bool, str, Path (a string in which ~ and $VARIABLES are expanded), or a list
        of one of these, as in [float].
    low, high, choices, pattern: what the value, or each of a list, is checked against.
    null: whether the value may be null (`none` as a flag), as it may where that is the default.
    flags, aliases: the release's short forms, and other names for it.
    length, rising: (fewest, most) values of a list, and whether they must not fall.
    words: what the value must be, as an error says it, where the above can't tell.
    back: when a checkpoint brings its value back: "network" in testing, resuming and fine-tuning,
        "data" in testing and resuming, "run" in resuming alone, "" never.
    fixed: function of a value, whose result must stay the checkpoint's, or be None: as there.
    scripts, group: those that use the key, and where it stands in their --help.
    """

    kind: object
    default: object
    help: str
    low: float = -float("inf")
    high: float = float("inf")
    null: bool = False
    flags: tuple = ()
    aliases: tuple = ()
    choices: tuple = ()
    length: tuple = (0, 100)
    rising: bool = False
    pattern: str = ""
    words: str = ""
    back: str = "data"
    fixed: Callable | None = None
    scripts: tuple = ("train", "test")
    group: str = ""

    @property
    def is_optional(self):
        return self.null or self.default is None

    def convert(self, value):
        """`value`, or what its text says, as this key's type. ValueError says what it must be."""
        if self.is_optional and value in NULLS:
            return None
        if not isinstance(self.kind, list):
            return self._one(value, self.kind)
        if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], str):
            value = value[0]  # a flag such as --mean 0.5,0.5,0.5
        items = value.replace(",", " ").split() if isinstance(value, str) else value
        items = items if isinstance(items, (list, tuple)) else [items]
        if not self.length[0] <= len(items) <= self.length[1]:
            raise ValueError(self.wanted())
        values = [self._one(item, self.kind[0]) for item in items]
        if self.rising and values != sorted(values):
            raise ValueError(f"{self.wanted()}, the smaller one first")
        return values

    def _one(self, value, kind):
        text = str(value) if isinstance(value, (bool, int, float)) else value
        if not isinstance(text, str):
            raise ValueError(self.wanted())
        found = None
        if self.choices:
            if "true" in self.choices:  # cross_sample_lif: yes, or True
                text = str(TRUTH.get(text.lower(), text)).lower()
            found = text if text in self.choices else None
        elif kind is bool:
            found = TRUTH.get(text.lower())
        elif kind in (int, float):
            number = float(text) if NUMBER.fullmatch(text) else math.nan
            if self.low <= number <= self.high and (kind is float or number.is_integer()):
                found = kind(number)
        elif text.isprintable() and 0 < len(text) <= 4000:
            if kind is Path:
                text = os.path.expanduser(os.path.expandvars(text))
                if unknown := re.match(r"~[^/]*", text) or re.search(r"\$\{?\w+", text):
                    raise ValueError(f"{self.wanted()}; {unknown[0]} stands for nothing here")
            found = text if re.fullmatch(self.pattern or ".*", text) else None
        if found is None:
            raise ValueError(self.wanted())
        return found

    def wanted(self):
        """What the value must be, in words."""
        many = isinstance(self.kind, list)
        kind = self.kind[0] if many else self.kind
        names = {int: "whole number", float: "number", str: "word", Path: "path"}
        text = "true or false" if kind is bool else f"a {names[kind]}"
        if many:
            counts = " to ".join(map(str, sorted({*self.length})))
            text = f"{counts} {names[kind]}s"
        if kind in (int, float):
            text += f" from {self.low} to {self.high}"
        if self.choices:
            of = ", ".join(choice or "''" for choice in self.choices)
            text = f"{text} of {of}" if many else f"one of {of}"
        text = self.words or text
        return f"{text}, or none" if self.is_optional else text


def same(value):
    """For Key.fixed: another value than the checkpoint's is an error."""
    return value


TrainKey = partial(Key, scripts=("train",), back="run")
TestKey = partial(Key, scripts=("test",), back="")
NetworkKey = partial(Key, back="network")
MachineKey = partial(Key, back="run")  # what computes it, not what is computed


def grouped(**groups):
    """{name: Key} of all groups, each key with its group's name."""
    pairs = ((group, *pair) for group, keys in groups.items() for pair in keys.items())
    return {name: replace(key, group=group) for group, name, key in pairs}


def by_name(reasons):
    """{name: reason} of {reason: names}."""
    return {name: why for why, names in reasons.items() for name in names.split()}


class Config(argparse.Namespace):
    """A run's values of all keys, as attributes."""


class Settings:
    """What the yml and the flags say, before it is known what a checkpoint says.

    Attributes: keys {name: Key}; file, the yml; named, whether -c named it; yml {name: value} of it
    and its bases; said {name: (value, where)} of what goes over a checkpoint; notes, lines to log
    on names without effect.
    """

    def __init__(self, keys, file, named):
        self.keys, self.file, self.named = keys, file, named
        self.yml, self.said, self.notes = {}, {}, []

    def __getattr__(self, name):
        """A key's value as far as it is known: of what the run needs to find its checkpoint."""
        if name.startswith("_") or name not in self.keys:
            raise AttributeError(name)
        default = self.yml.get(name, self.keys[name].default)
        return self.said[name][0] if name in self.said else default

    @property
    def name(self):
        """The experiment that was named, by its key or by -c; None if nothing was."""
        return self.experiment or (self.file.stem if self.named else None)

    def resolve(self, purpose="train", recorded=None, path=None, then=None, **chosen) -> Config:
        """The configuration; a line names each value that goes over a checkpoint's. UserError for
        one that can't.

        purpose: a key of BACK. recorded, path: {name: value} of a checkpoint, and where it is from.
        then: the yml that its run had, {"file": name, "yml": {...}}; what that says again is
        nothing new. chosen: values that are known otherwise.
        """
        values = {name: key.default for name, key in self.keys.items()} | self.yml
        kinds = BACK[purpose].split()
        back = {n: v for n, v in (recorded or {}).items() if self.keys[n].back in kinds}
        then = then["yml"] if then and then["file"] == self.file.name else {}
        for name, value in self.yml.items():
            edited = purpose == "resume" and not self.named and then.get(name, value) != value
            if edited and name in back and back[name] != value:
                used = f"{path} has {back[name]}, which is used (-c would take the yml's)"
                logger.info(f"{self.file.name}: {name} is {value}, but {used}")
        values |= back
        for name, (value, where) in self.said.items():
            if where != "command line" and name in then and then[name] == value:
                continue
            if name in back and value != back[name]:
                fixed, had = self.keys[name].fixed, back[name]
                said = f"{where}: {name} is {value}, but {path}"
                if fixed and fixed(value) is None:  # none: as it is in the checkpoint
                    continue
                if fixed and fixed(value) != fixed(had):
                    raise UserError(f"{said} is of {name} {had}; leave it out to use that")
                logger.info(f"{said} was trained with {had}; {value} is used")
            values[name] = value
        return Config(**(values | chosen))


def read_settings(options, argv=None, script=None, description=None) -> Settings:
    """The Settings of a command line; UserError for what is wrong with it or with a yml.

    options: the folder's table: KEYS {name: Key}, NO_EFFECT {name: reason} of names that are
    accepted and do nothing, DEFAULT_CONFIG, the yml without -c. argv: default sys.argv[1:].
    script: "train" or "test", whose flags --help shows and others are refused; None: all.
    description: first line of --help.
    """
    keys, no_effect = options.KEYS, options.NO_EFFECT
    names = {spelled: name for name, key in keys.items() for spelled in (name, *key.aliases)}
    words = [_underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    flags, unknown = _parser(options, script, description).parse_known_args(words)
    flags = vars(flags)
    named = "config" in flags
    file = find_yml(flags.pop("config")) if named else HERE / options.DEFAULT_CONFIG
    if unknown:
        kind = "unknown flag" if unknown[0].startswith("-") else "no flag stands before"
        hint = _hint(unknown[0], names, no_effect)
        raise UserError(f"command line: {kind} {shown(unknown[0])}{hint}")

    settings = Settings(keys, file, named)
    sources = [(entries, False) for entries in read_with_bases(file)]
    sources.append(([(*flag, "command line") for flag in flags.items()], True))
    for entries, from_flags in sources:
        here = {}
        for spelled, text, where in entries:
            spelled = spelled.replace("-", "_")
            name = names.get(spelled)
            if from_flags and script == "test":
                name = IN_TEST.get(name, name)
            if name is None:
                if spelled not in no_effect:
                    hint = _hint(spelled, names, no_effect)
                    raise UserError(f"{where}: unknown key {shown(spelled)}{hint}")
                settings.notes.append(f"{where}: {spelled} has no effect: {no_effect[spelled]}")
                continue
            if from_flags and script not in (None, *keys[name].scripts) and keys[name].scripts:
                meant = "; --finetune or --resume is meant" if name == "checkpoint" else ""
                raise UserError(f"{where}: --{spelled} is not read by {script}.py{meant}")
            try:
                value = keys[name].convert(text)
            except ValueError as wanted:
                said = f"{where}: {spelled} is {shown(text)}"
                raise UserError(f"{said}; it must be {wanted}") from None
            other, before = here.setdefault(name, (spelled, value))
            if before != value:
                both = f"{other} and {spelled} are one key"
                raise UserError(f"{where}: {both}, but their values differ")
            if not from_flags:
                settings.yml[name] = value
            if from_flags or named:
                settings.said[name] = value, where if from_flags else file.name
    return settings


def find_yml(name):
    """The yml that -c names: a path, or one beside the script."""
    for path in (Path(name), HERE / name):
        if os.path.isfile(path):
            return path.resolve()
    known = ", ".join(sorted(path.name for path in HERE.glob("*.yml")))
    raise UserError(f"-c {shown(name)}: no such file (beside the script: {known})")


def read_with_bases(file, above=()):
    """[[(key, text, where), ...], ...] of a yml and of its bases, which come first. `base:
    other.yml` names one beside the yml that says so; `above` are those that lead here.
    """
    entries, sources = read_yml(file), []
    for key, name, where in entries:
        if key == "base" and name is not None:
            base = file.parent / str(name)
            fault = "no such file" if not os.path.isfile(base) else ""
            if fault or base.resolve() in (file, *above):
                fault = f"{fault or 'it leads back'} in {shown(str(file.parent))}"
                raise UserError(f"{where}: base is {shown(name)}: {fault}")
            sources = read_with_bases(base.resolve(), (file, *above))
    return [*sources, [entry for entry in entries if entry[0] != "base"]]


def _hint(name, names, no_effect):
    """What may be meant by an unknown name, or nothing."""
    name = name.lstrip("-").split("=")[0].replace("-", "_").lower()
    close = difflib.get_close_matches(name, [*names, *no_effect], 1, cutoff=0.7)
    return f"; is {names.get(close[0], close[0])} meant?" if close else ""


def _underscored(word):
    """--data-dir=x as --data_dir=x."""
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value if word.startswith("--") else word


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"command line: {message}")


def _parser(options, script, description):
    """The flags of all keys; --help has those that the script uses."""
    parser = _Parser(
        usage="%(prog)s [-c FILE] [--KEY VALUE ...]",
        description=description,
        epilog="Each of these is a key of the yml too. A flag goes over a yml that -c names, that "
        "over the checkpoint, and that over the default [in brackets] and "
        f"{options.DEFAULT_CONFIG}.",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
        argument_default=argparse.SUPPRESS,
    )
    text = f"yml to read, a path or one beside the script [{options.DEFAULT_CONFIG}]"
    parser.add_argument("-c", "--config", metavar="FILE", help=text)
    titles = dict.fromkeys(key.group for key in options.KEYS.values())
    groups = {title: parser.add_argument_group(title) for title in titles}
    for name, key in options.KEYS.items():
        many = isinstance(key.kind, list)
        kind = key.kind[0] if many else key.kind
        choices = ("true", "false") if kind is bool else key.choices
        default = json.dumps(key.default).strip('"').replace("null", "none")
        for spelled in (name, *key.aliases):
            helped = spelled == name and key.scripts and script in (None, *key.scripts)
            text = f"{key.help} [{default}]".replace("%", "%%")
            groups[key.group].add_argument(
                *(key.flags if spelled == name else ()),
                f"--{spelled}",
                dest=spelled,
                nargs="+" if many else "?" if kind is bool else None,
                const="true" if kind is bool else None,
                metavar="{" + ",".join(filter(None, choices)) + "}" if choices else kind.__name__,
                help=text if helped else argparse.SUPPRESS,
            )
    for name in options.NO_EFFECT:
        parser.add_argument(f"--{name}", dest=name, nargs="*", help=argparse.SUPPRESS)
    return parser
