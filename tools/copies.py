"""Check that copied code has not drifted from its source, or renew it.

Usage:
    python tools/copies.py          # exit code 1 and a line for each copy that differs
    python tools/copies.py --fix    # rewrite those copies from their source

Each data set folder is self-contained, so code is copied, not imported. Three kinds of copies are
checked:
- the packages named in SAME, which are alike to the byte in every folder;
- a file whose first line is `# Copied from cifar10/data.py`: the rest of it is that file;
- a class, function, method or assignment behind a line `# Copied from cifar10/model.py`: it is the
  one of the same name there. `# Copied from cifar10/model.py with mlp1->fc1, ssa->attn` replaces
  words on the way.

A class or function that is a copy but is not marked as one is reported too.
"""

import argparse
import ast
import re
import shutil
import sys
from pathlib import Path

FOLDERS = ("cifar10", "cifar100", "dvs128-gesture", "cifar10-dvs", "imagenet")
SAME = ("spiking", "harness")  # packages, alike to the byte
MARKER = re.compile(r"^ *# Copied from (\S+\.py)(?: with (.+))?$")
SHORT = 4  # definitions of fewer lines need no mark


def definitions(text):
    """{dotted name: (first line, last line)} of what can be copied, decorators included; lines
    count from 0.
    """
    found = {}

    def visit(nodes, prefix):
        for node in nodes:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                found[prefix + node.name] = (start - 1, node.end_lineno - 1)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[prefix + node.targets[0].id] = (node.lineno - 1, node.end_lineno - 1)

    visit(ast.parse(text).body, "")
    return found


def replaced(text, words):
    for pair in (words or "").split(","):
        if pair.strip():
            old, new = (word.strip() for word in pair.split("->"))
            text = text.replace(old, new)
    return text


def check_file(root, path):
    """(text of `path` with its copies renewed, [what differed])."""
    text = path.read_text()
    lines = text.splitlines()
    problems = []

    def source(match):
        file = root / match[1]
        if not file.is_file():
            raise SystemExit(
                f"{path.relative_to(root)}: copied from {match[1]}, which does not exist"
            )
        return replaced(file.read_text(), match[2])

    if lines and (match := MARKER.match(lines[0])):
        renewed = lines[0] + "\n" + source(match)
        return renewed, ([f"differs from {match[1]}"] if renewed != text else [])

    have = definitions(text)
    marked = set()
    edits = []
    for number, line in enumerate(lines):
        match = MARKER.match(line)
        if not match:
            continue
        name = next((name for name, (start, _) in have.items() if start == number + 1), None)
        original = source(match)
        there = definitions(original).get(name)
        if name is None or there is None:
            problems.append(
                f"line {number + 1}: nothing here that is in {match[1]} under the same name"
            )
            continue
        marked.add(name)
        start, end = have[name]
        want = original.splitlines()[there[0] : there[1] + 1]
        if lines[start : end + 1] != want:
            problems.append(f"{name} differs from {match[1]}")
            edits.append((start, end + 1, want))
    for start, end, want in reversed(edits):
        lines[start:end] = want

    first = root / FOLDERS[0] / path.name
    if path != first and first.is_file():
        original = first.read_text()
        theirs = {
            name: original.splitlines()[start : end + 1]
            for name, (start, end) in definitions(original).items()
        }
        for name, (start, end) in have.items():
            inside = any(name == outer or name.startswith(f"{outer}.") for outer in marked)
            if (
                not inside
                and end - start + 1 > SHORT
                and theirs.get(name) == text.splitlines()[start : end + 1]
            ):
                marked.add(name)
                problems.append(f"{name} is a copy of {FOLDERS[0]}/{path.name}; mark it as one")
    return ("\n".join(lines) + "\n" if edits else text), problems


def content(package):
    """{path in a package: its bytes}."""
    files = [path for path in package.rglob("*") if path.is_file()]
    files = [path for path in files if "__pycache__" not in path.parts]
    return {path.relative_to(package): path.read_bytes() for path in files}


def check(root, fix=False):
    """[problem], a line each; with `fix`, what can be renewed is, and the rest is returned."""
    problems = []
    folders = [root / name for name in FOLDERS if (root / name).is_dir()]
    for name in SAME:
        original = content(folders[0] / name)
        for folder in folders[1:]:
            if content(folder / name) != original:
                problems.append(f"{folder.name}/{name}: differs from {folders[0].name}/{name}")
                if fix:
                    shutil.rmtree(folder / name, ignore_errors=True)
                    ignored = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(folders[0] / name, folder / name, ignore=ignored)
    for folder in folders:
        for path in sorted(folder.glob("*.py")):
            text, found = check_file(root, path)
            problems += [f"{path.relative_to(root)}: {problem}" for problem in found]
            if fix and text != path.read_text():
                path.write_text(text)
    return problems


def main():
    parser = argparse.ArgumentParser(
        description="Check that copied code has not drifted from its source."
    )
    parser.add_argument(
        "--fix", action="store_true", help="rewrite the copies that differ from their source"
    )
    arguments = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    if arguments.fix:
        for problem in check(root, fix=True):
            print(f"{problem}: renewed" if "differs from" in problem else problem)
    problems = check(root)
    if problems and not arguments.fix:
        print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
