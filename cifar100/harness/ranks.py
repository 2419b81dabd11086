"""This process's place among several: its rank, its device, and what it says to the others."""

import contextlib
import logging
import os
import re
import shutil
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed

from .config import UserError

logger = logging.getLogger("qkformer")

FIRST_WORD = 60  # seconds until a rank that waits for rank 0 says so


class Ranks:
    """This process's place among all: `rank` of `world_size`, and its `device`.

    One process, or one of those that torchrun, torch.distributed.launch or SLURM's srun started
    (NCCL on GPUs, Gloo on CPUs). A rank that waits for another one longer than `timeout_minutes`
    ends with an error.
    """

    def __init__(self, device, timeout_minutes=10):
        if "RANK" not in os.environ and started_by_srun(os.environ):
            os.environ.update(slurm_ranks(os.environ))
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.note = None  # for the log
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self.note = unused_gpu() if device == "cpu" else None
        try:
            self.device = torch.device(device)
        except RuntimeError:
            raise UserError(f"device is {device!r}; it must be auto, cpu, cuda or cuda:N") from None
        if self.device.type not in ("cpu", "cuda"):
            raise UserError(f"device is {device!r}; it must be auto, cpu, cuda or cuda:N")
        if self.device.type == "cuda":
            if self.device.index is not None and self.world_size > 1:
                raise UserError(
                    f"device is {device!r}; with several ranks say cuda, and each takes its own"
                )
            if self.device.index is None:
                self.device = torch.device("cuda", local_rank)
            if self.device.index >= torch.cuda.device_count():
                raise UserError(
                    f"device {self.device}: this machine has {torch.cuda.device_count()} CUDA "
                    f"devices"
                )
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            device_id = self.device if backend == "nccl" else None
            timeout = timedelta(minutes=timeout_minutes)
            torch.distributed.init_process_group(backend, device_id=device_id, timeout=timeout)
            # For from_main, which needs no GPU, and for what takes rank 0 hours there.
            self.quick = torch.distributed.new_group(timeout=timeout, backend="gloo")
            self.patient = torch.distributed.new_group(timeout=timedelta(days=2), backend="gloo")

    @property
    def main(self):
        return self.rank == 0

    def sum(self, tensor):
        """The sum over ranks, in place."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, value):
        """[value of every rank], on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def from_main(self, function, task=None):
        """What function() returns on rank 0, on every rank; its UserError too.

        `task` says what it does, if that can take long: then ranks wait for days, and one says
        for what.
        """
        if self.world_size == 1:
            return function()
        box = [None, None]
        if self.main:
            try:
                box[0] = function()
            except UserError as error:
                box[1] = str(error)
        line = f"rank 1 waits for rank 0, which {task}" if task and self.rank == 1 else None
        group = self.patient if task else self.quick
        with waiting(line):
            torch.distributed.broadcast_object_list(box, group=group)
        if box[1] is not None:
            raise UserError(box[1])
        return box[0]


def unused_gpu():
    """A line on an NVIDIA card that PyTorch can't use, or None."""
    there = Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi")
    if not there or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):  # hidden on purpose
        return None
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return (
        f"device: auto takes the CPU. There is an NVIDIA card, but PyTorch {torch.__version__}, "
        f"built {built}, can't use it: pip install -r requirements.txt (CUDA 13) or "
        "requirements-cu12.txt (older drivers and cards)"
    )


@contextlib.contextmanager
def waiting(line):
    """Log the line, if there is one, after FIRST_WORD seconds within, and then ever more seldom."""
    done = threading.Event()

    def say():
        start, pause = time.monotonic(), FIRST_WORD
        while not done.wait(pause):
            minutes, pause = (time.monotonic() - start) / 60, 2 * pause
            logger.warning(f"{line} ({minutes:.0f} min)")

    if line:
        threading.Thread(target=say, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def started_by_srun(env):
    """Whether srun started this process.

    SLURM_PROCID and SLURM_NTASKS do not tell: plain python in a batch script has them too.
    """
    named = "SLURM_STEP_NUM_TASKS" in env or (
        "SLURM_NTASKS" in env and ("SLURM_STEP_ID" in env or "MASTER_ADDR" in env)
    )
    return named and "SLURM_PROCID" in env


def slurm_ranks(env):
    """The variables of torchrun for a task that srun started; MASTER_ADDR and MASTER_PORT stay
    where they are set.

    With one GPU bound to each task (--gpus-per-task=1), that is the only one it sees, so its local
    rank is 0.
    """
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST") or "localhost"
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"],
        "LOCAL_RANK": str(int(env.get("SLURM_LOCALID", 0)) % max(torch.cuda.device_count(), 1)),
        "MASTER_ADDR": env.get("MASTER_ADDR") or first_host(hosts),
        "MASTER_PORT": env.get("MASTER_PORT")
        or str(15000 + int(env.get("SLURM_JOB_ID", 0)) % 10000),
    }


def first_host(hosts):
    """The first of SLURM's list of hosts, such as a1,b2 or n[01-04,07] or
    r[1-2]i0n[0-3].cluster.
    """
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", hosts)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)
