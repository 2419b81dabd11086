"""What a run needs around the model: ranks, log, signals, random states, and a main that fails in
one line.
"""

import contextlib
import errno
import logging
import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed

from config import UserError

logger = logging.getLogger("qkformer")

# What ends a run: Ctrl-C, a scheduler, a closed terminal, SLURM's warning before the time is up.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
SAME_SIGNAL = 3  # seconds in which another signal is the first one, which a launcher passes on
FIRST_WORD = 60  # seconds until a rank that waits for rank 0 says so
MACHINE = (  # errors of the machine, which are no fault of the program
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN),
)


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


def set_up_log(ranks):
    """Lines of rank 0 to standard output; warnings of every rank."""
    with contextlib.suppress(AttributeError):  # where it is no file
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be of any bytes
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.WARNING, force=True)
    logger.setLevel(logging.INFO if ranks.main else logging.WARNING)
    if ranks.note:
        logger.info(ranks.note)


class StopSignal:
    """Within `with StopSignal() as stop`, signals that end a run make `stop` true and its `number`
    theirs.

    A second one ends the process at once. A thread reads them, because Python's own handlers do not
    run while the main thread is within a call of C, such as one that waits for a lost rank.
    """

    number = 0

    def __enter__(self):
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        handlers = [signal.signal(number, lambda *_: None) for number in STOP_SIGNALS]
        self.before = handlers, signal.set_wakeup_fd(writer, warn_on_full_buffer=False), writer
        threading.Thread(target=self._read, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *_):
        handlers, wakeup, writer = self.before
        signal.set_wakeup_fd(wakeup)
        for number, handler in zip(STOP_SIGNALS, handlers, strict=True):
            signal.signal(number, handler)
        os.close(writer)

    def _read(self, reader):
        first = None
        while number := os.read(reader, 1):
            if number[0] not in STOP_SIGNALS:
                continue
            if first is None:
                first, self.number = time.monotonic(), number[0]
            elif time.monotonic() - first > SAME_SIGNAL:
                os._exit(128 + number[0])
        os.close(reader)

    def __bool__(self):
        return self.number != 0


@contextlib.contextmanager
def deaf():
    """Processes that are started within never get the signals that end a run."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def get_rng_state(device):
    """The state of Python's, NumPy's and PyTorch's generators, of types that
    torch.load(weights_only=True) takes.
    """
    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(states, ranks, path):
    """Set the random state of this rank, of a checkpoint's; of another number of ranks,
    none fits.
    """
    try:
        if len(states) != ranks.world_size:
            return
        state = states[ranks.rank]
        random.setstate(state["python"])
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if ranks.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], ranks.device)
    except Exception as error:  # whatever the file has there
        raise UserError(f"{path}: can't be resumed: its rng is no random state ({error})") from None


@contextlib.contextmanager
def seeded(seed):
    """Python's, NumPy's and PyTorch's CPU generators start from `seed` within, and go on as before
    after.
    """
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
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def set_deterministic():
    """Let PyTorch choose kernels that give the same bits each time; it warns of operations that
    have none.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False


def run(main):
    """Call main() and exit with what it returns; a fault of user or machine is a line
    and code 1.
    """
    try:
        code = main()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        reason = explain(error)
        if reason is None:
            raise
        code = fail(reason)
    sys.exit(code)


def explain(error):
    """The line for a fault of the user or the machine; None for one of the program."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, UserError):
        return str(error)
    no_memory = re.search("CUDA out of memory|ALLOC_FAILED", text)
    if no_memory or isinstance(error, torch.OutOfMemoryError):
        return f"not enough GPU memory; make batch_size smaller ({text.split('. ')[0]})"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return f"not enough memory; make batch_size or workers smaller ({text.split('] ')[-1]})"
    if "Too many open files" in str(error):
        return "too many open files; raise the limit (ulimit -n 4096) or set workers: 0"
    if isinstance(error, OSError) and error.errno in MACHINE:
        return f"{error.filename or type(error).__name__}: {error.strerror}"
    if type(error).__module__ == "torch._inductor.exc":
        return f"torch.compile can't build this model ({text}); compile: false runs without it"
    if isinstance(error, RuntimeError) and torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
        if re.search("[Tt]imed out|[Tt]imeout", str(error)):
            why = "which is stopped, blocked or slow"
            return f"rank {rank} waited timeout_minutes for another rank, {why}"
        if re.search("closed by peer|reset by peer|Broken pipe|refused|NCCL", str(error)):
            why = "it was killed, or says why in a line of its own, or the network failed"
            return f"rank {rank} lost another rank: {why}; resume: auto goes on from last.pth"
    if isinstance(error, torch.distributed.DistError):
        return f"the ranks do not find each other at MASTER_ADDR and MASTER_PORT ({text})"
    return None


def fail(reason):
    sys.stderr.write(f"error: {reason}\n")  # in one piece, since other ranks write too
    sys.stderr.flush()
    return 1
