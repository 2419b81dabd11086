"""Reads a yml of `key: value` lines the YAML 1.2 way: values as they are written, with their lines.

A value is a text, None for null, or a list of these. What a text stands for is for the key to say
(keys.py), so that 010, 1:30, 1.10 and 2026-01-01 never turn into 8, 90, 1.1 and a date.
"""

import re

import yaml

TAGS = {  # how values of the core schema's tags are written (YAML 1.2.2, section 10.3.2)
    "str": r"(?s:.*)",
    "null": r"null|Null|NULL|~|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?",
}
PREFIX = "tag:yaml.org,2002:"


class Loader(yaml.BaseLoader):
    """A plain null is null, and everything else a text."""

    yaml_implicit_resolvers = {None: [(PREFIX + "null", re.compile(rf"({TAGS['null']})\Z"))]}


def show(value):
    """A value, or a name, as an error names it: on one line, and short."""
    if isinstance(value, list):
        text = f"[{', '.join(map(show, value))}]"
    elif isinstance(value, str):
        text = value if re.fullmatch(TAGS["float"], value) else repr(value)
    else:
        text = "null" if value is None else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def read(path):
    """[(key, value, "FILE, line N"), ...] of a yml. ValueError, one line, where it is not one."""
    file = path.name if path.name.isprintable() else ascii(path.name)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        root = yaml.compose(text, Loader)
    except OSError as error:
        raise ValueError(f"{file}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line}: not a yml: bytes that are not UTF-8") from None
    except yaml.MarkedYAMLError as error:
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise ValueError(f"{where(file, error.problem_mark)}: not a yml: {problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"{file}, line {line}: not a yml: a control character") from None
    except RecursionError:
        raise ValueError(f"{file}: not a yml: nested too deep") from None
    except (ValueError, OverflowError):  # of an escape sequence or a directive
        raise ValueError(f"{file}: not a yml: a number in it is out of bounds") from None
    if root is None or (root.value, getattr(root, "style", None)) == ("", None):
        return []  # nothing but comments
    if not isinstance(root, yaml.MappingNode) or root.tag != PREFIX + "map":
        raise ValueError(f"{where(file, root.start_mark)}: not a yml of `key: value` lines")
    entries, lines = [], {}
    for key_node, node in root.value:
        line = where(file, key_node.start_mark)
        key = scalar(key_node, line)
        if key is None:
            raise ValueError(f"{line}: a key is missing; the line must be `key: value`")
        same = key.replace("-", "_")
        if same in lines:
            there = f"{show(key)} is in line {lines[same]} already"
            raise ValueError(f"{line}: {there}; leave one of them out")
        lines[same] = key_node.start_mark.line + 1
        if isinstance(node, yaml.SequenceNode) and node.tag == PREFIX + "seq":
            value = [scalar(item, line, key) for item in node.value]
        else:
            value = scalar(node, line, key)
        entries.append((key, value, line))
    return entries


def scalar(node, line, key=None):
    """A node's text, or None for null. ValueError if it is something else."""
    what = "a key" if key is None else key if key.isidentifier() else show(key)
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"{line}: {what} must be a word, a number or a list of these")
    tag = node.tag.removeprefix(PREFIX)
    if tag not in TAGS or not re.fullmatch(TAGS[tag], node.value):
        said = f"{what} is {show(node.value)} with the tag {show(node.tag)}"
        raise ValueError(f"{line}: {said}; leave the tag out")
    return None if tag == "null" else node.value


def where(file, mark):
    return f"{file}, line {mark.line + 1}"
