"""Reads a yml of `key: value` lines as it is written; what a text stands for its key says."""

import re

import yaml

from .log import UserError, first_line

NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


def read_yml(path):
    """[(key, value, "FILE, line N"), ...] of a yml of `key: value` lines; UserError if it is none.

    A value is text as it is written (so 010 and 1:30 never turn into 8 and 90), None for null, or a
    list of these.
    """
    file = shown(path.name)
    try:
        if (size := path.stat().st_size) > 2**18:
            raise ValueError(f"it has {size:,} bytes")
        root = yaml.compose(path.read_bytes().decode("utf-8-sig"), yaml.BaseLoader)
    except OSError as error:
        raise UserError(f"{file}: can't be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{file}{place}: not a yml: {problem}") from None
    if root is None or root.value == "":
        return []  # nothing but comments
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{file}, line {root.start_mark.line + 1}: not a yml of `key: value` lines")
    entries, lines = [], {}
    for key_node, node in root.value:
        where = f"{file}, line {key_node.start_mark.line + 1}"
        key = _scalar(key_node, where, "a key")
        same = str(key).replace("-", "_")
        if same in lines:
            raise UserError(f"{where}: {shown(key)} is in line {lines[same]} already")
        lines[same] = key_node.start_mark.line + 1
        many = isinstance(node, yaml.SequenceNode)
        items = [_scalar(item, where, shown(key)) for item in (node.value if many else [node])]
        entries.append((str(key), items if many else items[0], where))
    return entries


def _scalar(node, where, name):
    """A node's text, or None for null."""
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{where}: {name} must be a word, a number or a list of these")
    plain_null = node.style is None and node.value in ("", "~", "null", "Null", "NULL")
    return None if plain_null else node.value


def shown(value):
    """A value, or a name, as an error names it: on one line, and short."""
    if isinstance(value, list):
        text = f"[{', '.join(map(shown, value))}]"
    elif isinstance(value, str):
        plain = NUMBER.fullmatch(value) or re.fullmatch(r"-{0,2}[\w.=-]+", value, re.ASCII)
        text = value if plain else repr(value) if value.isprintable() else ascii(value)
    else:
        text = "null" if value is None else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
