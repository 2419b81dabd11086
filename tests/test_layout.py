"""The layout's rules: what stands where, and who imports whom."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

from conftest import ROOT

FOLDERS = ("imagenet", "cifar10", "cifar100", "dvs128-gesture", "cifar10-dvs")
PACKAGES = ("spiking", "harness")


def modules(folder):
    """{dotted name: path} of a folder's or of the tools' modules."""
    paths = [*folder.glob("*.py"), *(p for name in PACKAGES for p in (folder / name).glob("*.py"))]
    names = {path: ".".join(path.relative_to(folder).with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def arrows(folder):
    """{module: the folder's modules that it imports}."""
    known, found = modules(folder), {}
    for name, path in known.items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = ".".join(filter(None, (package if node.level else "", node.module)))
                inner = [f"{base}.{alias.name}" for alias in node.names]
                names = [one if one in known else base for one in inner]
            else:
                continue
            found[name] |= {one for one in names if one in known and one != name}
    return found


@pytest.mark.parametrize("name", FOLDERS)
def test_arrows_of_a_folder(name):
    found = arrows(ROOT / name)
    for module, others in found.items():
        tops = {other.partition(".")[0] for other in others}
        if module.startswith("spiking"):
            assert tops <= {"spiking"}, module
        if module.startswith("harness"):
            assert tops <= {"spiking", "harness"}, module
    [*TopologicalSorter(found).static_order()]  # CycleError names a circle


def test_arrows_of_the_tools():
    [*TopologicalSorter(arrows(ROOT / "tools")).static_order()]


@pytest.mark.parametrize("name", FOLDERS)
def test_first_level(name):
    """At most 12 code files, none of them alike in all five folders."""
    own = [path for path in (ROOT / name).iterdir() if path.suffix in (".py", ".cu", ".cuh")]
    assert len(own) <= 12
    for path in own:
        others = [ROOT / folder / path.name for folder in FOLDERS]
        assert len({p.read_bytes() if p.is_file() else b"" for p in others}) > 1, path.name


def test_top_level():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    tops = {line.partition("/")[0] for line in listed.stdout.splitlines()}
    assert tops - {"README.md", "LICENSE", "pyproject.toml", "CITATION.cff", ".gitignore"} == {
        *FOLDERS,
        *("tests", "tools", "docs", ".ci"),
        *(path.name for path in ROOT.glob("requirements*.txt")),
    }


def test_folders_in_one_process(tmp_path):
    """torch.hub: each folder has its own packages, names stay the user's, and models pickle."""
    code = f"""
import copy, pickle, sys, types, torch
mine = sys.modules["layer"] = sys.modules["data"] = types.ModuleType("data")
load = lambda folder, name, **k: torch.hub.load(r"{ROOT}/" + folder, name, source="local", **k)
small = dict(embed_dims=32, num_heads=2)
shapes = {{"cifar10": (2, 3, 16, 16), "cifar100": (2, 3, 16, 16), "imagenet": (2, 3, 32, 32)}}
files = set()
for folder in {FOLDERS}:
    name = "QKFormer_10_384" if folder == "imagenet" else "QKFormer"
    model = load(folder, name, **small).eval()
    files.add(sys.modules[type(model).__module__].conv_bn_lif.__code__.co_filename)
    x = torch.rand(shapes.get(folder, (2, 2, 2, 32, 32)))
    with torch.no_grad():
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), model(x)), folder
    torch.save(model, "model.pth")
    torch.load("model.pth", weights_only=False)
assert len(files) == 5, files
assert sys.modules.pop("layer") is sys.modules.pop("data") is mine
generic = ("data", "model", "ms", "config", "options", "harness", "spiking", "images", "hub")
assert not [n for n in sys.modules if n.partition(".")[0] in generic], sys.modules.keys()
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "CXX": "no-such-compiler"},  # layers run plain, without waiting for one
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
