"""The folder of a run: which one is taken, and what is written to it."""

import json
import os
import subprocess
import sys

import pytest

from conftest import ROOT, log_of
from forks import opened
from on_digits import cifar10
from on_runs import FEW, is_same, train


def test_folders(tmp_path):
    """A run's folder is written to only by going on from its last.pth."""

    def found(**settings):
        folder, resume = opened(tmp_path, **settings)
        return folder.name, resume and str(resume.relative_to(tmp_path))

    def make(name, *files, experiment="a"):
        (tmp_path / name).mkdir(exist_ok=True)
        for file in files:
            (tmp_path / name / file).touch()
        (tmp_path / name / "args.yaml").write_text(f"experiment: {experiment}\n")

    assert found() == found(resume="auto") == ("a", None)
    make("a", "last.pth", "best.pth")
    assert found() == ("a-2", None) and found(resume="auto") == ("a", "a/last.pth")
    make("a-b", "last.pth", experiment="a-b")
    make("a-384", "last.pth", experiment="a-384")  # another experiment, whose name ends in a number
    make("b", "last.pth", experiment="b")
    os.utime(tmp_path / "a" / "last.pth", (1, 1))
    assert found(resume="auto") == ("a", "a/last.pth")
    make("a-2", "last.pth")
    assert found() == ("a-3", None)
    assert found(resume="auto") == ("a-2", "a-2/last.pth")
    assert found(resume=tmp_path / "a" / "last.pth") == ("a", "a/last.pth")
    assert found(resume=tmp_path / "a" / "best.pth") == ("a-3", "a/best.pth")
    assert found(resume=tmp_path / "b" / "last.pth") == ("b", "b/last.pth")


def test_links_are_replaced(few, tmp_path, stop_when):
    """What a link in a run's folder leads to is read, but never written."""
    args = [*FEW, "--output", tmp_path / "run", "--resume", "auto"]
    stop_when(lambda run: run.epoch == 1)
    assert train(*args)[0] == 143
    run, other = tmp_path / "run" / "quickstart", tmp_path / "other"
    (run / "test-best.json").write_text("theirs")
    other.mkdir()
    names = ("last.pth", "best.pth", "args.yaml", "log.txt", "classes.txt", "test-best.json")
    for name in names:
        (run / name).rename(other / name)
        (run / name).symlink_to(other / name)
    before = {name: (other / name).read_bytes() for name in names}
    stop_when(lambda run: False)
    log = log_of(other)
    code, text = train(*args)
    assert code == 0 and "at epoch 1" in text
    train("--checkpoint", run / "best.pth", main=cifar10.test.main)
    assert before == {name: (other / name).read_bytes() for name in names} and len(log) == 1
    assert not [name for name in names if (run / name).is_symlink() and name != "best.pth"]
    assert json.loads((run / "test-best.json").read_text())["top1"] >= 0
    is_same(run, few)


@pytest.mark.parametrize("torn", ['{"epoch": 4, "lr', '{"epoch": "1"}', '{"epoch": [0]}', "[]"])
def test_log_with_a_torn_line(torn, tmp_path):
    lines = [json.dumps({"epoch": epoch}) for epoch in range(4)]
    (tmp_path / "log.txt").write_text("\n".join([*lines, torn]))
    log = cifar10.folder.RunLog(tmp_path, 3, 0)
    assert log.path.read_text().splitlines() == lines[:3]


def test_failed_resume_changes_nothing(few):
    before = {path: path.read_bytes() for path in few.rglob("*.*")}
    args = [*FEW, "--output", few.parent, "--resume", "auto"]
    for flags, words in (
        (["--dim", 32], ["dim is 32", "is of dim 16"]),
        (["--opt", "sgd"], ["last.pth", "adamw", "sgd"]),
        (["--experiment", "a/b"], ["experiment is 'a/b'"]),
    ):
        code, text = train(*args, *flags)
        assert code == 1 and all(word in text.splitlines()[-1] for word in words), text
    assert {path: path.read_bytes() for path in few.rglob("*.*")} == before


FULL = """
import sys
from pathlib import Path
from tensorboard.summary.writer.record_writer import RecordWriter
from harness.folder import RunLog
from harness.process import run

def main():
    log = RunLog(Path(sys.argv[1]), 0, 0)
    log.step("step/loss", 1.0, 0)
    log.flush()
    RecordWriter.write = lambda *_: open("/dev/full", "w").write("x" * 2**20)
    for step in range(1, 100):
        log.step("step/loss", 1.0, step)
    log.flush()

run(main)
"""


def test_full_disk_under_the_curves(tmp_path):
    """They are written by a thread of TensorBoard's: one line, and no traceback."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        cwd=ROOT / "cifar10",
        capture_output=True,
        text=True,
    )
    said = f"error: {tmp_path}: can't be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)
