"""Runs that are short of something real: memory for workers, files, disk, address space.

    python -m pytest -n 0 -s -m long tests/test_short_of.py

Each ends by itself, in one line or as a run that had all it needs.
"""

import os
import shlex
import subprocess
import sys

import pytest
import torch

from conftest import on_cpu
from on_digits import cifar10

pytestmark = pytest.mark.long
TINY = "--dim 16 --num_heads 2 --time_step 1 --epochs 1 --warmup_epochs 0 --log_interval 1"
QUICK = f"-c quickstart.yml {TINY} --img_size 8 --batch_size 128 --workers 2"
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system, which takes root")


def run(limit, flags, output):
    """(exit code, output, last.pth or None) of train.py in a shell that has the limit; one line of
    error where the code is not 0.
    """
    words = [sys.executable, "train.py", *flags.split(), "--output", output]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{limit} && {shlex.join(on_cpu(words))}; code=$?; "
         f"cp {output}/*/last.pth {output}-last.pth; exit $code"]
        if "mount" in limit
        else ["sh", "-c", f"{limit} && exec {shlex.join(on_cpu(words))}"],
        cwd=cifar10.log.HERE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )  # fmt: skip
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    for block in done.stdout.split("Traceback")[1:]:  # none but multiprocessing's, as it cleans up
        assert "in _remove_temp_dir" in block, done.stdout
    assert done.returncode in (0, 1), done.stdout
    assert len(errors) == done.returncode, done.stdout
    print(f"\n| {limit.split(' && ')[0]} | {done.returncode} | {' '.join(errors)} |", end="")
    return done.returncode, done.stdout, next(output.parent.glob("**/*last.pth"), None)


@AS_ROOT
@pytest.mark.parametrize(
    ("taken", "fits"),
    [(0, True), (2**26 - 300_000, False)],  # a batch has 200 KB
)
def test_shared_memory(tmp_path, taken, fits):
    """Docker's 64 MB, with the published yml, of which others take a part."""
    mount = "mount -t tmpfs -o size=64m tmpfs /dev/shm"
    fill = f"head -c {taken} /dev/zero > /dev/shm/others"
    flags = f"-c cifar10.yml --dataset digits {TINY} --cooldown_epochs 0"
    code, said, last = run(f"{mount} && {fill}", flags, tmp_path / "out")
    assert (code == 0) == fits and ("--shm-size" in said) != fits
    assert torch.load(last, weights_only=True)["step"] >= (not fits)


@pytest.mark.parametrize("files", [14, 17, 20, 21, 22, 23, 24, 26, 64])
def test_open_files(tmp_path, files):
    code, said, _ = run(f"ulimit -n {files}", QUICK, tmp_path / "out")
    assert code == (files < 64) and ("ulimit -n" in said) == (files < 64)


@AS_ROOT
@pytest.mark.parametrize("size", ["16k", "64k", "200k", "400k", "4m"])
def test_disk(tmp_path, size):
    mount = f"mkdir -p {tmp_path}/out && mount -t tmpfs -o size={size} tmpfs {tmp_path}/out"
    code, said, last = run(mount, QUICK, tmp_path / "out")
    assert code == (size != "4m") and ("No space left" in said) == (size != "4m")
    assert code or torch.load(last, weights_only=True)["epoch"] == 0
