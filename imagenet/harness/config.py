"""Configuration: defaults and the yml beside the script < checkpoint < a yml of -c < flags."""

import argparse
import difflib
import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from .log import HERE, UserError, first_line, logger, telling

NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NULLS = (None, "none", "null", "None", "", ["none"])
# Flags of train.py that mean another key where test.py gets them, as the release's does.
IN_TEST = {"batch_size": "val_batch_size", "model_ema": "use_ema"}
IN_TEST |= dict.fromkeys(("finetune", "resume"), "checkpoint")
# What a checkpoint brings back, by what is done with it; see Key.
BACK = {"train": "", "finetune": "network", "test": "network data", "resume": "network data run"}


@dataclass(frozen=True)
class Key:
    """A key of the yml, and the flag of the same name."""

    kind: type  # of each value: int, float, bool, str, or Path (with ~ and $VARIABLES)
    default: object
    help: str
    low: float = -float("inf")  # of each value, as choices and pattern are
    high: float = float("inf")
    null: bool = False  # whether it may be null (`none` as a flag), as where that is the default
    flags: tuple = ()  # the release's short forms
    aliases: tuple = ()  # other names
    choices: tuple = ()
    length: tuple = ()  # fewest and most values of a list; (): it is a value by itself
    rising: bool = False  # whether they must not fall
    pattern: str = ".*"
    words: str = ""  # what the value must be, as an error says it, where the above can't tell
    back: str = "data"  # when a checkpoint brings it back: a word of BACK, or "": never
    fixed: Callable | None = None  # its result must be as for the checkpoint's; None: as there
    scripts: tuple = ("train", "test")  # that use it

    @property
    def is_optional(self):
        return self.null or self.default is None

    def convert(self, value):
        """`value`, or what its text says, as this key's type. ValueError says what it must be."""
        if self.is_optional and value in NULLS:
            return None
        items = value if self.length and isinstance(value, (list, tuple)) else [value]
        if self.length and len(items) == 1 and isinstance(items[0], str):
            items = items[0].replace(",", " ").split()  # a flag such as --mean 0.5,0.5,0.5
        (least, most), values = self.length or (1, 1), [self._one(item) for item in items]
        if not least <= len(values) <= most or None in values:
            raise ValueError(self.wanted())
        if self.rising and values != sorted(values):
            raise ValueError(f"{self.wanted()}, the smaller one first")
        return values if self.length else values[0]

    def _one(self, value):
        """The value of one item, or None where it does not fit."""
        if not isinstance(value, (bool, int, float, str)):
            return None
        text, kind = str(value), self.kind
        if self.choices:
            if "true" in self.choices:  # cross_sample_lif: yes, or True
                text = str(TRUTH.get(text.lower(), text)).lower()
            return text if text in self.choices else None
        if kind is bool:
            return TRUTH.get(text.lower())
        if kind in (int, float):
            number = float(text) if NUMBER.fullmatch(text) else math.nan
            fits = self.low <= number <= self.high and (kind is float or number.is_integer())
            return kind(number) if fits else None
        if not text.isprintable() or not 0 < len(text) <= 4000:
            return None
        if kind is Path:
            text = os.path.expanduser(os.path.expandvars(text))
            if unknown := re.match(r"~[^/]*", text) or re.search(r"\$\{?\w+", text):
                raise ValueError(f"{self.wanted()}; {unknown[0]} stands for nothing here")
        return text if re.fullmatch(self.pattern, text) else None

    def wanted(self):
        """What the value must be, in words."""
        kind, many = self.kind, self.length
        names = {int: "whole number", float: "number", str: "word", Path: "path"}
        text = "true or false" if kind is bool else f"a {names[kind]}"
        if many:
            text = f"{' to '.join(map(str, sorted({*self.length})))} {names[kind]}s"
        if kind in (int, float):
            text += f" from {self.low} to {self.high}"
        if self.choices:
            of = ", ".join(choice or "''" for choice in self.choices)
            text = f"{text} of {of}" if many else f"one of {of}"
        return (self.words or text) + ", or none" * self.is_optional


def same(value):
    """For Key.fixed: another value than the checkpoint's is an error."""
    return value


TrainKey = partial(Key, scripts=("train",), back="run")
TestKey = partial(Key, scripts=("test",), back="")
NetworkKey = partial(Key, back="network")
MachineKey = partial(Key, back="run")  # what computes it, not what is computed


def by_name(reasons):
    """{name: reason} of {reason: names}."""
    return {name: why for why, names in reasons.items() for name in names.split()}


class Config(argparse.Namespace):
    """A run's values of all keys, as attributes."""


class Settings(argparse.Namespace):
    """What the yml and the flags say, before it is known what a checkpoint says: a key's value so
    far is an attribute. `name` is the run's: the experiment, or the yml's.
    """

    def __init__(self, keys, file, named):
        super().__init__(**{name: key.default for name, key in keys.items()})
        self.keys, self.file, self.named = keys, file, named  # {name: Key}, the yml, by -c or not
        self.yml = {}  # {name: value} of it and its bases
        self.said = {}  # {name: (value, where)} of what goes over a checkpoint
        self.notes = []  # lines on names without effect

    def resolve(self, purpose="train", recorded=None, path=None, then=None, **chosen) -> Config:
        """The configuration; a line or UserError for each value that goes over a checkpoint's.

        purpose: a key of BACK. recorded: {name: value} of the checkpoint at `path`. then: its run's
        {"file": name, "yml": {...}}, which is nothing new. chosen: values known otherwise.
        """
        values = {name: vars(self)[name] for name in self.keys}
        then = then["yml"] if then and then.get("file") == self.file.name else {}
        for name, had in (recorded or {}).items():
            value, (_, where) = values[name], self.said.get(name, (None, None))
            if self.keys[name].back not in BACK[purpose].split() or value == had:
                continue
            values[name], fixed = had, self.keys[name].fixed
            if where is None:  # perhaps of the yml beside the script, which was edited since
                if purpose == "resume" and then.get(name, value) != value:
                    used = f"{path} has {had}, which is used (-c would take the yml's)"
                    logger.info(f"{self.file.name}: {name} is {value}, but {used}")
            elif where == "command line" or (name, value) not in then.items():
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

    options: the folder's KEYS {name: Key}, NO_EFFECT {name: reason} of names that are accepted,
    and DEFAULT_CONFIG, the yml without -c. argv: default sys.argv[1:]. script: "train" or "test",
    whose flags alone are taken; None: all. description: first line of --help.
    """
    keys, no_effect = options.KEYS, options.NO_EFFECT
    names = {spelled: name for name, key in keys.items() for spelled in (name, *key.aliases)}
    words = sys.argv[1:] if argv is None else argv
    # --data-dir=x as --data_dir=x
    words = [re.sub("(?<=^--)[^=]+", lambda flag: flag[0].replace("-", "_"), w) for w in words]
    flags, unknown = _parser(options, script, description).parse_known_args(words)
    flags = vars(flags)
    named = "config" in flags
    file = find_yml(flags.pop("config")) if named else HERE / options.DEFAULT_CONFIG
    if unknown:
        kind = "unknown flag" if unknown[0].startswith("-") else "no flag stands before"
        raise UserError(f"command line: {kind} {_with_hint(unknown[0], names, no_effect)}")

    settings, seen = Settings(keys, file, named), {}
    entries = [*read_yml(file), *((*flag, "command line", None) for flag in flags.items())]
    for spelled, text, where, source in entries:  # source: the yml, or None for a flag
        spelled = spelled.replace("-", "_")
        name = names.get(spelled)
        if script == "test" and not source:
            name = IN_TEST.get(name, name)
        if name is None:
            if spelled not in no_effect:
                raise UserError(f"{where}: unknown key {_with_hint(spelled, names, no_effect)}")
            why = f"has no effect: {no_effect[spelled].replace('NAME', spelled)}"
            asked = text not in (*NULLS, "false") and (script == "test" or not source)
            if asked and "tools/" in why:  # a plain test, or a run, would pass for it
                raise UserError(f"{where}: {spelled} {why}")
            settings.notes.append(f"{where}: {spelled} {why}")
            continue
        scripts = keys[name].scripts
        if scripts and script not in (None, *scripts) and not source:
            raise UserError(f"{where}: --{spelled} is not read by {script}.py")
        with telling(f"{where}: {spelled} is {shown(text)}; it must be ", kinds=ValueError):
            value = keys[name].convert(text)
        other, before = seen.setdefault((source, name), (spelled, value))
        if before != value:
            if other == spelled:
                raise UserError(f"{where}: {spelled} is there already, with another value")
            raise UserError(f"{where}: {other} and {spelled} are one key, but their values differ")
        setattr(settings, name, value)
        if source:
            settings.yml[name] = value
        if named or not source:
            settings.said[name] = value, file.name if source else where
    settings.name = settings.experiment or file.stem
    return settings


def find_yml(name):
    """The yml that -c names: a path, or one beside the script."""
    for path in (Path(name), HERE / name):
        if os.path.isfile(path):
            return path.resolve()
    known = ", ".join(sorted(path.name for path in HERE.glob("*.yml")))
    raise UserError(f"-c {shown(name)}: no such file (beside the script: {known})")


def read_yml(path, above=()):
    """[(key, value, "FILE, line N", path), ...] of a yml of `key: value` lines and, in front, its
    bases; UserError if it is none. A value is text as written (010 and 1:30 are not 8 and 90), None
    for null, or a list of these. above: the ymls that lead here.
    """
    file = shown(path.name)
    try:
        if (size := path.stat().st_size) > 2**18:
            raise ValueError(f"it has {size:,} bytes")
        root = yaml.compose(path.read_bytes().decode("utf-8-sig"), yaml.SafeLoader)
    except (OSError, yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{file}{place}: not a yml: {problem}") from None
    if root is None or root.value == "":
        return []  # nothing but comments
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{file}, line {root.start_mark.line + 1}: not a yml of `key: value` lines")
    entries, of_bases = [], []
    for key_node, node in root.value:
        where = f"{file}, line {key_node.start_mark.line + 1}"
        many = isinstance(node, yaml.SequenceNode)
        nodes = [key_node, *(node.value if many else [node])]
        if not all(isinstance(node, yaml.ScalarNode) for node in nodes):
            wanted = "a key is a word, its value a word, a number or a list of them"
            raise UserError(f"{where}: {wanted}")
        key, *items = [None if n.tag.endswith(":null") else n.value for n in nodes]
        value = items if many else items[0]
        if key != "base":
            entries.append((str(key), value, where, path))
        elif of_bases:
            raise UserError(f"{where}: base is there already")
        elif value is not None:
            base = path.parent / str(value)
            known = os.path.isfile(base)
            if not known or base.resolve() in (path, *above):
                fault = "it leads back" if known else "no such file"
                raise UserError(f"{where}: base is {shown(value)}: {fault} in {path.parent}")
            of_bases = read_yml(base.resolve(), (path, *above))
    return of_bases + entries


def shown(value):
    """A value, or a name, as an error names it: short."""
    if isinstance(value, list):
        value = f"[{', '.join(map(shown, value))}]"
    text = "null" if value is None else str(value) or "''"
    return text if len(text) <= 100 else text[:97] + "..."


def _with_hint(name, names, no_effect):
    """An unknown name, and what may be meant by it."""
    plain = name.lstrip("-").split("=")[0].replace("-", "_").lower()
    close = difflib.get_close_matches(plain, [*names, *no_effect], 1, cutoff=0.7)
    return shown(name) + (f"; is {names.get(close[0], close[0])} meant?" if close else "")


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
    for title, keys in options.GROUPS.items():
        group = parser.add_argument_group(title)
        for name, key in keys.items():
            values = ("true", "false") if key.kind is bool else filter(None, key.choices)
            shape = ",".join(values)
            how = {"metavar": f"{{{shape}}}" if shape else key.kind.__name__}
            if key.length or key.kind is bool:
                how |= {"nargs": "+"} if key.length else {"nargs": "?", "const": "true"}
            default = json.dumps(key.default).strip('"').replace("null", "none")
            text = f"{key.help} [{default}]".replace("%", "%%")
            helped = text if key.scripts and script in (None, *key.scripts) else argparse.SUPPRESS
            group.add_argument(*key.flags, f"--{name}", help=helped, **how)
            for alias in key.aliases:
                group.add_argument(f"--{alias}", help=argparse.SUPPRESS, **how)
    for name in options.NO_EFFECT:
        parser.add_argument(f"--{name}", nargs="*", help=argparse.SUPPRESS)
    return parser
