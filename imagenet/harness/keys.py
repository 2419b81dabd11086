"""A key of the configuration: its type, range and help, and what a value for it is converted to."""

import os
import re
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from pathlib import Path

from .yml import TAGS, show

TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NUMBER = re.compile(rf"{TAGS['int']}|{TAGS['float']}")
# control characters, line separators, and what Python makes of bytes that are not UTF-8
NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
LONGEST = 255  # bytes of a word or of a file's name


@dataclass(frozen=True)
class Key:
    """A key of the yml, and the flag of the same name.

    kind: int, float, bool, str, Path, or a list of one of these, as in [float]. A value of kind
        Path is a string in which ~ and $VARIABLES are expanded.
    default, help: the help says what the key is, and what null means where that is the default.
    null: whether the value may be null (`none` as a flag).
    flags: short forms, as in the release.
    aliases: other names for it, which the other folders have.
    choices, low, high, pattern: what the value, or each of a list, is checked against.
    length, rising: (fewest, most) values of a list, and whether they must not fall.
    words: what the value must be, as an error says it, where the above can't tell.
    scripts: those whose --help has the key, because they use it; the others accept it.
    group: of the keys in --help.
    """

    kind: object
    default: object
    help: str
    null: bool = False
    flags: tuple = ()
    aliases: tuple = ()
    choices: tuple = ()
    low: float = -float("inf")
    high: float = float("inf")
    length: tuple = (0, 100)
    rising: bool = False
    pattern: str = ""
    words: str = ""
    scripts: tuple = ("train", "test")
    group: str = ""

    def convert(self, value):
        """`value`, or what its text says, as this key's type. ValueError says what it must be."""
        if self.null and (value is None or value in ("none", "null", "None", "", ["none"])):
            return None
        if not isinstance(self.kind, list):
            return self._convert(value, self.kind)
        if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], str):
            value = value[0]  # a flag such as --mean 0.5,0.5,0.5
        items = value.replace(",", " ").split() if isinstance(value, str) else value
        items = items if isinstance(items, (list, tuple)) else [items]
        if not self.length[0] <= len(items) <= self.length[1]:
            raise ValueError(self.wanted())
        values = [self._convert(item, self.kind[0]) for item in items]
        if self.rising and values != sorted(values):
            raise ValueError(f"{self.wanted()}, the smaller one first")
        return values

    def _convert(self, value, kind):
        if isinstance(value, (bool, int, float)):
            value = str(value).lower()
        if not isinstance(value, str):
            raise ValueError(self.wanted())
        if "true" in self.choices and value.lower() in TRUTH:  # cross_sample_lif: yes, or True
            value = str(TRUTH[value.lower()]).lower()
        if self.choices:
            value = value if value in self.choices else None
        elif kind is bool:
            value = TRUTH.get(value.lower())
        elif kind in (int, float):
            value = self._number(value, kind)
        else:
            value = self._text(value, kind)
        if value is None:
            raise ValueError(self.wanted())
        return value

    def _number(self, text, kind):
        """The number that the text stands for, to the last digit if it is whole, or None."""
        if not NUMBER.fullmatch(text):
            return None
        try:
            exact = Decimal(int(text, 0) if text[:2] in ("0x", "0o") else text)
        except ArithmeticError:  # an exponent of 19 digits
            return None
        if kind is int:
            return int(exact) if self.low <= exact <= self.high and exact == int(exact) else None
        number = float(exact)
        return number if self.low <= number <= self.high and (number != 0 or exact == 0) else None

    def _text(self, text, kind):
        if text and kind is Path and not NO_TEXT.search(text):
            text = self._expand(text)
        if not text or NO_TEXT.search(text) or len(text.encode()) > 4000:
            return None
        names = text.split("/") if kind is Path else [text]
        if max(len(name.encode()) for name in names) > LONGEST:
            return None
        return text if not self.pattern or re.fullmatch(self.pattern, text) else None

    def _expand(self, path):
        """The path with ~ and $VARIABLES replaced; ValueError names one that is not set."""

        def variable(match):
            name = match[1].strip("{}")
            if name not in os.environ:
                raise ValueError(f"{self.wanted()}; the variable {name} is not set")
            return os.environ[name]

        home = os.path.expanduser(path)
        if home.startswith("~"):
            raise ValueError(f"{self.wanted()}; there is no home folder {show(path.split('/')[0])}")
        return re.sub(r"\$(\w+|\{[^}]*\})", variable, home)

    def wanted(self):
        """What the value must be, in words."""
        if self.words:
            text = self.words
        elif self.choices:
            text = "one of " + ", ".join(choice or "''" for choice in self.choices)
        else:
            kind = self.kind[0] if isinstance(self.kind, list) else self.kind
            text = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind)
            text = text or ("a path" if kind is Path else "a word")
            if kind in (int, float):
                text += f" from {self.low} to {self.high}"
        return f"{text}, or none" if self.null else text


TrainKey = partial(Key, scripts=("train",))
TestKey = partial(Key, scripts=("test",))


def grouped(**groups):
    """{name: Key} of all groups, each key with its group's name."""
    pairs = ((group, *pair) for group, keys in groups.items() for pair in keys.items())
    return {name: replace(key, group=group) for group, name, key in pairs}
