"""Configuration from defaults < yml < flags. The table of keys is in options.py."""

import argparse
import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """A mistake that the user can mend. The scripts print it as one line and exit with 1."""


@dataclass(frozen=True)
class Key:
    """A key of the yml, and the flag of the same name.

    kind: int, float, bool, str, or a list of one of these, as in [float].
    null: whether the value may be null (`none` as a flag).
    flags: short forms, as in the release.
    choices, low, high, length: what the value is checked against.
    """

    kind: object
    default: object
    help: str
    null: bool = False
    flags: tuple = ()
    choices: tuple = ()
    low: float = -float("inf")
    high: float = float("inf")
    length: int = 0

    def convert(self, value):
        """`value` as this key's type; a string that converts counts as it. ValueError says what is wanted."""
        if self.null and (value is None or value in ("none", "null", "None", "")):
            return None
        if self.null and value == ["none"]:
            return None
        if isinstance(self.kind, list):
            if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
                value = value[0]  # a flag such as --mean 0.5,0.5,0.5
            items = value if isinstance(value, (list, tuple)) else str(value).replace(",", " ").split()
            if self.length and len(items) != self.length:
                raise ValueError(f"{self.length} values")
            return [self._convert_item(item, self.kind[0]) for item in items]
        return self._convert_item(value, self.kind)

    def _convert_item(self, value, kind):
        if isinstance(value, bool) and kind is not bool:
            value = str(value).lower()  # `true` is a word for a key that has it among its choices
            if value not in self.choices:
                raise ValueError(self._wanted(kind))
        if kind is bool and isinstance(value, str):
            value = {"true": True, "yes": True, "false": False, "no": False}.get(value.lower(), value)
        elif kind is str and isinstance(value, (int, float)):
            value = str(value)
        elif kind in (int, float) and isinstance(value, (str, int, float)):
            try:
                number = float(value)
                value = int(number) if kind is int and number.is_integer() else number
            except ValueError:
                pass
        fits = isinstance(value, kind) and (not self.choices or value in self.choices)
        if not fits or (kind in (int, float) and not (math.isfinite(value) and self.low <= value <= self.high)):
            raise ValueError(self._wanted(kind))
        return value

    def _wanted(self, kind):
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}[kind]
        if self.low > -float("inf"):
            words += f" of at least {self.low:g}"
        if self.high < float("inf"):
            words += f" and at most {self.high:g}"
        return words


class Given(NamedTuple):
    """What the user said: the yml's name, whether -c named it, the keys set in it and its bases, and by flags."""

    file: str
    named: bool
    yml: dict
    flags: dict


def load_config(keys, no_effect, default_file, argv=None, description=None):
    """Resolve the configuration.

    Args:
        keys: {name: Key}, every key that does something.
        no_effect: {name: reason}, names of the release that are accepted and do nothing here.
        default_file: yml beside this file, read when no -c is given.
        argv: the command line, default sys.argv[1:].

    Returns (cfg, notes, given): an argparse.Namespace with every key, lines to print about keys without effect, and
    what of cfg was set where, a Given.
    Raises UserError for a file that can't be read, an unknown key or a value of the wrong type.
    """
    parser = _parser(keys, no_effect, default_file, description)
    flags, unknown = parser.parse_known_args(argv)
    flags = vars(flags)
    named = "config" in flags
    file = _find(flags.pop("config", default_file))
    if unknown:
        raise UserError(f"command line: unknown flag {unknown[0]}{_nearest(unknown[0], keys, no_effect)}")

    cfg = {name: key.default for name, key in keys.items()}
    notes = []
    given = Given(file.name, named, {}, {})
    said = [(name, value, origin) for origin, values in _read(file) for name, value in values.items()]
    said += [(name, value, "command line") for name, value in flags.items() if value is not None]
    for name, value, origin in said:
        name = str(name).replace("-", "_")
        if name in keys:
            try:
                cfg[name] = keys[name].convert(value)
                (given.flags if origin == "command line" else given.yml)[name] = cfg[name]
            except ValueError as wanted:
                raise UserError(f"{origin}: {name} is {value!r}; it must be {wanted}") from None
        elif name in no_effect:
            notes.append(f"{origin}: {name} has no effect: {no_effect[name]}")
        else:
            raise UserError(f"{origin}: unknown key {name}{_nearest(name, keys, no_effect)}")
    if cfg["experiment"] is None:
        cfg["experiment"] = file.stem
    return argparse.Namespace(**cfg), notes, given


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"command line: {message}")


def _parser(keys, no_effect, default_file, description):
    parser = _Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    where = "yml, relative to this folder or to the script's"
    parser.add_argument("-c", "--config", metavar="FILE", help=f"{where} [{default_file}]")
    for name, key in keys.items():
        nargs = "+" if isinstance(key.kind, list) else "?" if key.kind is bool else None
        const = "true" if key.kind is bool else None
        text = key.help.replace("%", "%%") + f" [{key.default}]"
        spellings = dict.fromkeys((*key.flags, f"--{name.replace('_', '-')}", f"--{name}"))
        parser.add_argument(*spellings, dest=name, nargs=nargs, const=const, metavar="VALUE", help=text)
    for name in no_effect:
        spellings = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))
        parser.add_argument(*spellings, dest=name, nargs="*", help=argparse.SUPPRESS)
    return parser


def _find(name):
    for path in (Path(name), HERE / name):
        if path.is_file():
            return path.resolve()
    known = ", ".join(sorted(path.name for path in HERE.glob("*.yml")))
    raise UserError(f"no such configuration file: {name} (beside the script: {known})")


def _read(file, below=()):
    """[(origin, {key: value})], the base (`base: other.yml`, beside the file that names it) first."""
    try:
        values = yaml.safe_load(file.read_text()) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file.name}: can't be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file.name}: not a yml: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file.name}: not a list of `key: value` lines")
    base = values.pop("base", None)
    if base is None:
        return [(file.name, values)]
    path = (file.parent / str(base)).resolve()
    if path in (file, *below) or not path.is_file():
        raise UserError(f"{file.name}: base is {base!r}; it must name another yml beside this one")
    return [*_read(path, (file, *below)), (file.name, values)]


def _nearest(name, *tables):
    name = name.lstrip("-").split("=")[0].replace("-", "_")
    match = difflib.get_close_matches(name, [key for table in tables for key in table], 1, cutoff=0.0)
    return f" (nearest known: {match[0]})" if match else ""
