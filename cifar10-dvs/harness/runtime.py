"""What a run needs around the model: log, signals, random states, a main that fails in a line."""

import atexit
import contextlib
import errno
import logging
import os
import random
import re
import resource
import signal
import sys
import threading
import time

import numpy as np
import torch
import torch.distributed

from .config import UserError

logger = logging.getLogger("qkformer")

# What ends a run: Ctrl-C, a scheduler, a closed terminal, SLURM's warning before the time is up.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
SAME_SIGNAL = 3  # seconds in which another signal is the first one, which a launcher passes on
SCARCE = "can't allocate memory|can't start new thread|failed to map segment"
MACHINE = (  # errors of the machine, which are no fault of the program
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN),
)


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
    leave(code)


def leave(code):
    """Exit. One of several ranks skips Python's own end: a thread of Gloo may still hold a tensor,
    and to free it then aborts the process.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):  # nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def explain(error):
    """The line for a fault of the user or the machine; None for one of the program."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, UserError):
        return str(error)
    no_memory = re.search("CUDA out of memory|ALLOC_FAILED", text)
    if no_memory or isinstance(error, torch.OutOfMemoryError):
        return f"not enough GPU memory; make batch_size smaller ({text.split('. ')[0]})"
    if isinstance(error, MemoryError) or re.search(SCARCE, text):
        return f"not enough memory; make batch_size or workers smaller ({text.split('] ')[-1]})"
    if "Too many open files" in str(error):
        return "too many open files; raise the limit (ulimit -n 4096) or set workers: 0"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename:
        return f"{error.strerror}: perhaps in /dev/shm (docker run --shm-size=8g, or workers: 0)"
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
    sys.unraisablehook = lambda _: None  # what was half made may complain as it is deleted
    sys.stderr.write(f"error: {reason}\n")  # in one piece, since other ranks write too
    sys.stderr.flush()
    return 1
