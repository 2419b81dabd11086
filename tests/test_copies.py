"""tools/copies.py: it passes here, finds every kind of drift, and --fix mends it."""

import importlib.util

import pytest

from conftest import ROOT

spec = importlib.util.spec_from_file_location("copies", ROOT / "tools" / "copies.py")
copies = importlib.util.module_from_spec(spec)
spec.loader.exec_module(copies)

MODEL = '''"""Model."""

WIDTH = 3


class MLP:
    """Hidden."""

    def forward(self, x):
        self.mlp1 = x
        y = x
        return y


class Block:
    def forward(self, x):
        a = x
        a = a
        b = a
        return b + 1
'''
COPY = '''"""Another model."""

# Copied from cifar10/model.py
WIDTH = 3


# Copied from cifar10/model.py with mlp1->fc1
class MLP:
    """Hidden."""

    def forward(self, x):
        self.fc1 = x
        y = x
        return y


class Block:
    def own(self):
        return 1

    # Copied from cifar10/model.py
    def forward(self, x):
        a = x
        a = a
        b = a
        return b + 1
'''


@pytest.fixture
def tree(tmp_path):
    for folder, model in (("cifar10", MODEL), ("imagenet", COPY)):
        (tmp_path / folder).mkdir()
        for name in copies.SAME:
            (tmp_path / folder / name / "__pycache__").mkdir(parents=True)
            (tmp_path / folder / name / "neuron.py").write_text(f"# {name}\n")
            (tmp_path / folder / name / "__pycache__" / "lif.pyc").write_text(folder)
        (tmp_path / folder / "model.py").write_text(model)
    (tmp_path / "cifar10" / "data.py").write_text("SIZE = 32\n")
    (tmp_path / "imagenet" / "data.py").write_text("# Copied from cifar10/data.py\nSIZE = 32\n")
    return tmp_path


def test_this_repository():
    assert copies.check(ROOT) == []


def test_clean(tree):
    assert copies.check(tree) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("imagenet/spiking/neuron.py", "spik", "Spik", "imagenet/spiking: differs from cifar10"),
        ("cifar10/harness/neuron.py", "harn", "Harn", "imagenet/harness: differs from cifar10"),
        ("imagenet/data.py", "32", "33", "imagenet/data.py: differs from cifar10/data.py"),
        (
            "imagenet/model.py",
            "WIDTH = 3",
            "WIDTH = 4",
            "imagenet/model.py: WIDTH differs from cifar10/model.py",
        ),
        ("imagenet/model.py", "self.fc1 = x", "self.fc1 = y", "imagenet/model.py: MLP differs"),
        (
            "imagenet/model.py",
            "return b + 1",
            "return b + 2",
            "imagenet/model.py: Block.forward differs",
        ),
        ("cifar10/model.py", "mlp1 = x", "mlp1 = 2 * x", "imagenet/model.py: MLP differs"),
    ],
)
def test_drift(tree, file, old, new, problem):
    path = tree / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    found = copies.check(tree)
    assert len(found) == 1 and found[0].startswith(problem), found
    copies.check(tree, fix=True)
    assert copies.check(tree) == []
    changed = file.startswith("cifar10")
    assert (path.read_text().count(new) > 0) == changed  # the source wins


def test_missing_file(tree):
    (tree / "imagenet" / "spiking" / "neuron.py").unlink()
    assert copies.check(tree) == ["imagenet/spiking: differs from cifar10/spiking"]
    (tree / "cifar10" / "spiking" / "neuron.py").unlink()
    (tree / "imagenet" / "spiking" / "more.py").write_text("")
    assert copies.check(tree) == ["imagenet/spiking: differs from cifar10/spiking"]


def test_what_can_not_be_renewed(tree):
    path = tree / "imagenet" / "model.py"
    path.write_text(COPY.replace("class MLP:", "class Mlp:"))
    (problem,) = copies.check(tree)
    assert "line 7" in problem and "same name" in problem
    path.write_text(COPY.replace("    # Copied from cifar10/model.py\n    def", "    def"))
    (problem,) = copies.check(tree)
    assert "Block.forward is a copy of cifar10/model.py; mark it as one" in problem
