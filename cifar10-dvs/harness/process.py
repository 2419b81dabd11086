"""This process: its place among the ranks, the signals that stop it, and how it ends."""

import atexit
import contextlib
import os
import re
import signal
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed

from .log import UserError, escaped, first_line, telling

# What ends a run: Ctrl-C, a scheduler, a closed terminal, SLURM's warning before the time is up.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
SAME_SIGNAL = 3  # seconds in which another signal is the first one, which a launcher passes on


class Ranks:
    """This process's place among those that torchrun, torch.distributed.launch or srun started
    (NCCL on GPUs, Gloo on CPUs): `rank` of `world_size`, and its `device`. `alone`: there is one.
    A rank that waits for another one longer than `timeout_minutes` ends with an error.
    """

    def __init__(self, device: str, timeout_minutes: float = 10, alone: bool = False):
        if "RANK" not in os.environ and not alone:
            os.environ.update(slurm_ranks(os.environ))
        self.rank = 0 if alone else variable("RANK", 0)
        self.world_size = 1 if alone else variable("WORLD_SIZE", 1)
        self.main = self.rank == 0
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
            raise UserError(f"device is {device!r}; it must be auto, cpu, cuda or cuda:N")
        self.device = torch.device(device)
        if self.device.type == "cuda":
            if self.device.index is None:
                self.device = torch.device("cuda", variable("LOCAL_RANK", 0))
            elif self.world_size > 1:
                raise UserError(f"device is {self.device}; with several ranks say cuda")
            if self.device.index >= (count := torch.cuda.device_count()):
                raise UserError(f"device {self.device}: this machine has {count} CUDA devices")
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            device_id = self.device if backend == "nccl" else None
            timeout = timedelta(minutes=timeout_minutes)
            with telling("the ranks do not find each other: ", kinds=(ValueError, RuntimeError)):
                torch.distributed.init_process_group(backend, device_id=device_id, timeout=timeout)
            # For from_main, which needs no GPU, and for what takes rank 0 hours there.
            self.quick = torch.distributed.new_group(timeout=timeout, backend="gloo")
            self.patient = torch.distributed.new_group(timeout=timedelta(days=2), backend="gloo")

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

    def from_main(self, function, slow=False):
        """What function() returns on rank 0, or its UserError, on every rank. slow: for hours."""
        if self.world_size == 1:
            return function()
        try:
            box = [function() if self.main else None]
        except UserError as error:
            box = [error]
        torch.distributed.broadcast_object_list(box, group=self.patient if slow else self.quick)
        if isinstance(box[0], UserError):
            raise box[0]
        return box[0]


def variable(name, default):
    """A number that a launcher has set."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < default:
        raise UserError(f"the variable {name} is {text!r}; a launcher sets it, or none does")
    return int(text)


def slurm_ranks(env):
    """torchrun's variables for a task of SLURM's srun, those of the master where unset; else {}."""
    if "SLURM_PROCID" not in env or "SLURM_STEP_NUM_TASKS" not in env:
        return {}  # plain python in a batch script has SLURM_PROCID and SLURM_NTASKS too
    hosts = env.get("SLURM_STEP_NODELIST") or "localhost"
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", hosts)[0]  # of a1,b2 or n[01-04,07]
    port = 15000 + int(env.get("SLURM_JOB_ID", 0)) % 10000
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        # With --gpus-per-task=1 a task sees one GPU only, number 0.
        "LOCAL_RANK": str(int(env.get("SLURM_LOCALID", 0)) % max(torch.cuda.device_count(), 1)),
        "MASTER_ADDR": env.get("MASTER_ADDR") or re.sub(r"\[(\w+)[^\]]*\]", r"\1", first),
        "MASTER_PORT": env.get("MASTER_PORT") or str(port),
    }


class StopSignal(contextlib.ExitStack):
    """Within `with StopSignal() as stop`, signals that end a run make `stop` true and its `number`
    theirs; one that is ignored, as nohup has it, stays so. A second one ends the process at once.
    """

    number = 0

    def __enter__(self):
        reader, writer = os.pipe()
        self.callback(os.close, writer)
        os.set_blocking(writer, False)
        heard = [n for n in STOP_SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
        for number in heard:
            self.callback(signal.signal, number, signal.signal(number, lambda *_: None))
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self.callback(signal.set_wakeup_fd, before)
        # Python's own handlers would wait while the main thread is in a call of C.
        threading.Thread(target=self._read, args=(reader, heard), daemon=True).start()
        return self

    def _read(self, reader, heard):
        while number := os.read(reader, 1):
            if number[0] not in heard:
                continue
            if not self:
                first, self.number = time.monotonic(), number[0]
            elif time.monotonic() - first > SAME_SIGNAL:
                os._exit(128 + number[0])
        os.close(reader)

    def __bool__(self):
        return self.number != 0


@contextlib.contextmanager
def without_signals():
    """Processes that are started within never get the signals that end a run."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def tell_thread(fault):
    """A traceback of a thread's fault, but for a full disk, of which a curve's next point tells."""
    if not isinstance(fault.exc_value, OSError):
        threading.__excepthook__(fault)


def run(main):
    """Call main(), exit with what it returns; a fault of user or machine is a line and code 1."""
    threading.excepthook = tell_thread
    try:
        try:
            code = main()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        except Exception as error:
            if (reason := explain(error)) is None:
                raise
            sys.unraisablehook = lambda _: None  # what was half made may complain as it is deleted
            sys.stderr.write(f"error: {escaped(reason)}\n")  # in one piece: other ranks write too
            code = 1
    except KeyboardInterrupt:  # while another rank's end is told, too
        code = 130
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    # Not by Python's own end: a thread of Gloo may hold a tensor, and to free it then would abort.
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(code)


def explain(error):
    """The line for a fault of the user or the machine; None for one of the program."""
    text = first_line(error)
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError) or re.search("CUDA out of|ALLOC_FAILED", text):
        return f"not enough GPU memory; make batch_size smaller ({text.split('. ')[0]})"
    scarce = "can't allocate memory|can't start new thread|failed to map segment"
    if isinstance(error, MemoryError) or re.search(scarce, text):
        return f"not enough memory; make batch_size or workers smaller ({text.split('] ')[-1]})"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or type(error).__name__}: {error.strerror}"
    if isinstance(error, RuntimeError) and torch.distributed.is_initialized():
        rank, why = f"rank {torch.distributed.get_rank()}", "was killed, or says why itself"
        if re.search("[Tt]imed out|[Tt]imeout", str(error)):
            return f"{rank} waited timeout_minutes for another one, stopped or slow ({text})"
        if re.search("closed by peer|reset by peer|Broken pipe|refused|NCCL", str(error)):
            return f"{rank} lost another one, which {why} ({text}); resume: auto goes on"
    return None
