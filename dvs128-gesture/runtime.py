"""What a run needs around the model: ranks, log, signals, random states, and a main that fails in one line."""

import contextlib
import logging
import os
import random
import re
import resource
import shutil
import signal
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed

from config import UserError

logger = logging.getLogger("qkformer")


class Ranks:
    """This process's place among all: `rank` of `world_size`, and its `device`.

    One process, or one of those that torchrun, torch.distributed.launch or SLURM's srun started (NCCL on GPUs,
    Gloo on CPUs).
    """

    def __init__(self, device):
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
                raise UserError(f"device is {device!r}; with several ranks say cuda, and each takes its own")
            if self.device.index is None:
                self.device = torch.device("cuda", local_rank)
            if self.device.index >= torch.cuda.device_count():
                raise UserError(f"device {self.device}: this machine has {torch.cuda.device_count()} CUDA devices")
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            device_id = self.device if backend == "nccl" else None
            torch.distributed.init_process_group(backend, device_id=device_id)
            # For from_main: what rank 0 does there, such as converting a data set, can take hours.
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

    def from_main(self, function):
        """What function() returns on rank 0, on every rank; its UserError too."""
        if self.world_size == 1:
            return function()
        box = [None, None]
        if self.main:
            try:
                box[0] = function()
            except UserError as error:
                box[1] = str(error)
        torch.distributed.broadcast_object_list(box, group=self.patient)
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
        f"device: auto takes the CPU. There is an NVIDIA card, but PyTorch {torch.__version__}, built {built}, "
        "can't use it: pip install -r requirements.txt (CUDA 13) or requirements-cu12.txt (older drivers and cards)"
    )


def started_by_srun(env):
    """Whether this is a task of srun; a plain python in a batch script has SLURM_PROCID and SLURM_NTASKS too."""
    named = "SLURM_STEP_NUM_TASKS" in env or (
        "SLURM_NTASKS" in env and ("SLURM_STEP_ID" in env or "MASTER_ADDR" in env)
    )
    return named and "SLURM_PROCID" in env


def slurm_ranks(env):
    """The variables of torchrun for a task that srun started; MASTER_ADDR and MASTER_PORT stay where they are set.

    With one GPU bound to each task (--gpus-per-task=1), that is the only one it sees, so its local rank is 0.
    """
    # as in node1,node2 or node[01-04,07]
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST") or "localhost"
    first = re.match(r"[^,\[]+(?:\[\d+)?", hosts)[0].replace("[", "")
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"],
        "LOCAL_RANK": str(int(env.get("SLURM_LOCALID", 0)) % max(torch.cuda.device_count(), 1)),
        "MASTER_ADDR": env.get("MASTER_ADDR", first),
        "MASTER_PORT": env.get("MASTER_PORT", str(15000 + int(env.get("SLURM_JOB_ID", 0)) % 10000)),
    }


def set_up_log(ranks):
    """Lines of rank 0 to standard output; warnings of every rank."""
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.WARNING, force=True)
    logger.setLevel(logging.INFO if ranks.main else logging.WARNING)
    if ranks.note:
        logger.info(ranks.note)


class StopSignal:
    """Remembers a SIGINT or SIGTERM instead of dying of it; a second one of the same kind is obeyed at once."""

    def __init__(self):
        self.number = 0
        self.pid = os.getpid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number, frame):
        if os.getpid() == self.pid:  # loader workers inherit this handler, and end when the main process does
            self.number = number
            signal.signal(number, signal.SIG_DFL)

    def __bool__(self):
        return self.number != 0


def get_rng_state(device):
    """The state of Python's, NumPy's and PyTorch's generators, of types that torch.load(weights_only=True) takes."""
    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state, device):
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextlib.contextmanager
def seeded(seed):
    """Python's, NumPy's and PyTorch's CPU generators start from `seed` within, and go on as before after."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def peak_memory_mb(device):
    """Peak memory in MB: of tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def run(main):
    """Call main() and exit with what it returns; a mistake of the user's becomes one line and exit code 1."""
    try:
        code = main()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except UserError as error:
        code = fail(str(error))
    except torch.OutOfMemoryError as error:
        code = fail(f"not enough GPU memory; make batch_size smaller ({str(error).split('. ')[0]})")
    except RuntimeError as error:
        if type(error).__module__ == "torch._inductor.exc":
            reason = str(error).strip().splitlines()[0]
            code = fail(f"torch.compile can't build this model ({reason}); compile: false runs without it")
        elif torch.distributed.is_initialized() and re.search("closed by peer|reset by peer|NCCL", str(error)):
            code = fail(f"rank {torch.distributed.get_rank()} lost another rank, which says why in a line of its own")
        else:
            raise
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def fail(reason):
    sys.stderr.write(f"error: {reason}\n")  # in one piece, since other ranks write too
    sys.stderr.flush()
    return 1
