"""Files of random damage: each is read, or ends in an error of one line, soon, with nothing written.

    FUZZ=10000 python -m pytest -n 0 -s -m long tests/test_fuzz.py

FUZZ is the number of files of each kind (default 1000), SEED where they start (default 0); a line for
each kind says how many were read and refused. Without -m long each kind gets 4 seconds.
"""

import io
import os
import random
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch

from conftest import load, resolve_in
from on_events import write

FUZZ, SEED = int(os.environ.get("FUZZ", 1000)), int(os.environ.get("SEED", 0))
FOLDERS = ("cifar10", "cifar100", "dvs128-gesture", "cifar10-dvs", "imagenet")
EVENTS = ("dvs128-gesture", "cifar10-dvs")
LONGEST = 20  # seconds for one file
TOKENS = [
    *(
        b"[",
        b"{",
        b"- ",
        b": ",
        b"#",
        b"'",
        b'"',
        b"|",
        b">",
        b"&a ",
        b"*a",
        b"!!python/name:os.x ",
    ),
    *(b"\0", b"\x1b[2J", b"\xff", b"\n", b"\t", b"\xe2\x80\xa8", b"nan", b"1e999", b"-1", b"0x10"),
    *(b"~root/", b"$HOME", b"../", b"null", b"9" * 400, b"[" * 3000, b"base: x.yml\n"),
]


def damaged(draw, content):
    """A few bytes changed, cut out, put in, or put in again."""
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        place, size = draw.randrange(len(content) + 1), draw.choice((1, 1, 4, 40))
        how = draw.randrange(5)
        if how == 0 and place < len(content):
            content[place] ^= 1 << draw.randrange(8)
        elif how == 1:
            del content[place : place + size]
        elif how == 2:
            content[place:place] = draw.choice(TOKENS)
        elif how == 3:
            content[place:place] = content[draw.randrange(len(content) + 1) :][:size]
        else:
            content[place : place + size] = draw.randbytes(size)
        content = content or bytearray(b"x")
    return bytes(content)


class Yml:
    def __init__(self, place):
        self.path, self.folders = place / "x.yml", [load(name) for name in FOLDERS]
        self.path.touch()

    def read(self, draw):
        modules = draw.choice(self.folders)
        file = draw.choice(sorted(modules.log.HERE.glob("*.yml")))
        self.path.write_bytes(damaged(draw, file.read_bytes()))
        resolve_in(modules, "-c", self.path)


class Checkpoint:
    """Bytes of the file, or values in it."""

    SMALL = "--time_step 1 --dim 16 --num_heads 2 --workers 0".split()

    def __init__(self, place):
        self.path, self.states = place / "x.pth", []
        self.path.touch()
        ranks = load("cifar10").process.Ranks("cpu")
        for name in FOLDERS:
            modules = load(name)
            size = ["--layer", 4, *([] if "dvs" in name else ["--img_size", 32])]
            cfg = resolve_in(modules, *self.SMALL, *size, "--fused", "false")
            args = cfg, modules.options, modules.data, ranks, 3
            model, optimizer = modules.build.load_model(*args)[0], None
            optimizer = torch.optim.AdamW(model.parameters())
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": {}}
            state |= {"epoch": 1, "step": 2, "loss_total": 1.5, "global_batch": 8, "samples": 80}
            state |= {"seed": 1, "best": 50.0, "rng": [modules.batches.get_rng_state(ranks.device)]}
            state |= {"config": vars(cfg), "given": {"file": "x.yml", "yml": {"dim": 16}}}
            state |= {"cross_sample_lif": False, "classes": ["a", "b", "c"]}
            self.states.append((modules, ranks, optimizer, state))

    def odd(self, draw):
        loop = []
        loop.append(loop)
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        texts = ["", "\x1b[2J\n", "x" * 9999, "../..", "~nobody", "$NONE", "auto", b"x"]
        numbers = [None, True, -1, 0, 10**400, 10**9, float("nan"), float("-inf")]
        several = [loop, [], {}, [[1], [2]], {"a": loop}, (1,), {1: 2}]
        tensors = [torch.ones(3), torch.ones(1).expand(10**6, 10**6), torch.ones(2).to_sparse()]
        tensors += [
            nested,
            torch.zeros(0),
            torch.tensor(float("nan")),
            torch.ones(2).to(torch.int8),
        ]
        return draw.choice([*texts, *numbers, *several, *tensors])

    def changed(self, draw, value, depth=0):
        """A copy of the state with another value, or name, somewhere in it."""
        if isinstance(value, (dict, list)) and value and (depth == 0 or draw.random() < 0.75):
            keys = [*value] if isinstance(value, dict) else [*range(len(value))]
            key, copy = draw.choice(keys), value.copy()
            copy[key] = self.changed(draw, value[key], depth + 1)
            if isinstance(copy, dict) and draw.random() < 0.1:
                copy[draw.choice(("\x1b[2J\n", "", 7, "T", "module.x"))] = copy.pop(key)
            return copy
        return self.odd(draw)

    def read(self, draw):
        modules, ranks, optimizer, state = draw.choice(self.states)
        if draw.random() < 0.3:
            torch.save(state, self.path)
            self.path.write_bytes(damaged(draw, self.path.read_bytes()))
        else:
            torch.save(self.changed(draw, state), self.path)
        checkpoint = modules.checkpoint.load_checkpoint(self.path)
        settings = modules.config.read_settings(modules.options, ["--fused", "false"])
        back = modules.build.recorded_values(modules.options, checkpoint, self.path)
        cfg = settings.resolve("resume", back, self.path, checkpoint.get("given"))
        if cfg.dim > 64 or cfg.layer > 9 or cfg.time_step > 9:
            return  # what the key takes, and takes its time
        args = settings, modules.options, modules.data, ranks, self.path
        tested = modules.build.load_tested(*args)
        modules.build.check_classes(checkpoint, self.path, tested.classes or ["a", "b", "c"])
        for name, default in (("epoch", -1), ("step", 0), ("best", -1.0), ("loss_total", 0.0)):
            modules.checkpoint.number(checkpoint, name, default, self.path)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        modules.checkpoint.load_optimizer(optimizer, scaler, checkpoint, self.path, "adamw")
        modules.batches.set_rng_state(checkpoint.get("rng", []), ranks, self.path)


class Recording:
    """A recording, its labels or its list of trials."""

    def __init__(self, place):
        self.folders = []
        for name in EVENTS:
            write(name, place / name)
            modules, shown = load(name), {}
            source, links = place / name / "download", place / name / "links"
            for folder, archive in modules.data.ARCHIVES.items():
                if (source / archive).is_file():
                    modules.archives.unpack(source / archive, source)
                (links / folder).mkdir(parents=True)
                for path in (source / folder).iterdir():
                    (links / folder / path.name).symlink_to(path)
                    shown[links / folder / path.name] = str(path)
            self.folders.append((modules, links, shown))

    def read(self, draw):
        modules, links, shown = draw.choice(self.folders)
        path = draw.choice(sorted(shown)).resolve()
        whole = path.read_bytes()
        try:
            path.write_bytes(damaged(draw, whole))
            modules.aedat.check_raw(links, shown)
        finally:
            path.write_bytes(whole)


class Archive:
    """Members with odd names, types and sizes, and bytes of the file."""

    NAMES = (
        "a.aedat",
        "../x",
        "/tmp/x",
        "a/../../x",
        "C:x",
        "\x1b[2J",
        "a\nb",
        "",
        ".",
        "é",
        "x" * 300,
    )

    def __init__(self, place):
        self.place, self.folders = place, [load(name) for name in EVENTS]
        for modules in self.folders:
            (place / next(iter(modules.data.ARCHIVES.values()))).touch()

    def read(self, draw):
        modules = draw.choice(self.folders)
        name = next(iter(modules.data.ARCHIVES.values()))
        archive, out = self.place / name, self.place / "out"
        out.mkdir(exist_ok=True)
        content = io.BytesIO()
        members = [(draw.choice(self.NAMES), draw.randbytes(draw.randrange(99))) for _ in range(3)]
        if name.endswith(".zip"):
            with zipfile.ZipFile(content, "w") as file:
                for member, data in members:
                    info = zipfile.ZipInfo(member)
                    info.external_attr = draw.choice((0, 0o100644, 0o120777, 0o40755)) << 16
                    file.writestr(info, data)
        else:
            with tarfile.open(fileobj=content, mode="w:gz") as file:
                for member, data in members:
                    info = tarfile.TarInfo(member)
                    info.type = draw.choice([*b"0012345670"]).to_bytes(1, "big")
                    info.size, info.linkname = len(data), draw.choice(self.NAMES)
                    file.addfile(info, io.BytesIO(data))
        content = content.getvalue()
        archive.write_bytes(damaged(draw, content) if draw.random() < 0.6 else content)
        try:
            modules.archives.unpack(archive, out)
        except modules.log.UserError:
            raise
        except Exception as error:  # convert.stage makes a line of it
            raise modules.log.UserError(type(error).__name__) from None


def everything(place):
    return {path for path in place.rglob("*") if "out" not in path.parts}


def fuzz(kind, place, count, seconds):
    monster = kind(place / "files")
    before = everything(place)
    read = refused = number = 0
    end = time.monotonic() + seconds
    while number < count and (time.monotonic() < end or not (read and refused)):
        draw, start = random.Random(f"{SEED} {kind.__name__} {number}"), time.monotonic()
        try:
            monster.read(draw)
            read += 1
        except Exception as error:
            assert type(error).__name__ == "UserError", (number, error)
            refused += 1
        assert time.monotonic() - start < LONGEST, number
        number += 1
    assert everything(place) == before
    print(f"\n{kind.__name__}: {number} files, {read} read, {refused} refused")
    return read, refused


KINDS = pytest.mark.parametrize("kind", [Yml, Checkpoint, Recording, Archive])


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "files").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@KINDS
def test_a_few(kind, place):
    read, refused = fuzz(kind, place, FUZZ, 4)
    assert read and refused


@pytest.mark.long
@KINDS
def test_many(kind, place):
    read, refused = fuzz(kind, place, FUZZ, 10**6)
    assert read + refused == FUZZ and read and refused


def test_what_the_damage_is():
    """Other content nearly always, and the same each time."""
    content = Path(__file__).read_bytes()
    made = [damaged(random.Random(seed), content) for seed in range(100)]
    assert sum(one != content for one in made) > 90 and len({*made}) > 90
    assert made == [damaged(random.Random(seed), content) for seed in range(100)]
