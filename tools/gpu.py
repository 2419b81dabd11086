"""What a first GPU is asked, in nine minutes, compiling included: what tells most comes first.

Usage:
    python tools/gpu.py --out gpu                        # all of it
    python tools/gpu.py --out gpu --only step tests      # some of it again
    python tools/gpu.py --dry                            # each measurement's share, in minutes
    python tools/gpu.py --report gpu                     # tables of what is there
    python tools/gpu.py --out try --device cpu --small   # tiny, to try this script itself

Measurements, in their order:
    environment  GPU, driver, versions, compilers
    golden       two models against golden numbers: torch in float64 and float32, cupy, fused
    step         a training step and an inference of 32 images in float16, ours, as the release's
                 and spikingjelly's own: time, memory, time of the host, time by kernel
    graphs       the same as CUDA graphs, and on two GPUs: equal to the bit, and how fast
    kernels      each of our kernels at each of its shapes, beside a copy of as many bytes
    tests        those marked for a GPU

Each is a process that ends when its share of --minutes is over; what one leaves goes to the next.
Figures are written to results.jsonl in the folder --out as soon as they are there, so nothing is
lost when this script is stopped, by SIGTERM or by force. What processes say is in log.txt there.
"""

import argparse
import contextlib
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import gpu_report

START = time.monotonic()
MINUTES = 9
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
PATHS = ("fast", "release-like", "spikingjelly")
STEPS = (("QKFormer_10_384", 4), ("QKFormer_10_768", 1), ("QKFormer_10_768", 4))  # model, T
STAGES = ("environment", "golden", "step", "graphs", "kernels", "tests")


class Item(NamedTuple):
    """A measurement: a function of stages.py with its arguments, and its share in minutes."""

    minutes: float
    stage: str
    args: tuple = ()

    @property
    def name(self):
        return " ".join(map(str, (self.stage, *self.args)))


PLAN = (
    Item(0.3, "environment"),
    Item(0.6, "golden", ("imagenet-384",)),
    Item(0.5, "golden", ("dvs128-gesture",)),
    *(Item(0.4, "step", (*what, path)) for what in STEPS for path in PATHS),
    Item(0.6, "graphs", (1,)),
    Item(0.6, "graphs", (2,)),
    Item(0.6, "kernels"),
    Item(2.2, "tests"),
)


class Results:
    """The file of figures, a line of JSON each."""

    def __init__(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self.file = os.open(folder / "results.jsonl", flags, 0o644)
        self.log = os.open(folder / "log.txt", flags, 0o644)
        os.write(self.file, b"\n")  # behind a line that was cut off

    def add(self, item, **figures):
        line = json.dumps({"item": item, **figures}, default=str)
        os.write(self.file, f"{line}\n".encode())
        os.fsync(self.file)


def measure(item, arguments, results, seconds):
    """Make a measurement in a process of its own."""
    results.add(item.name, status="started", seconds=round(seconds, 1))
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        measured(item, arguments, results, seconds)
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)  # as it does itself: whoever is first
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.killpg(pid, signal.SIGKILL)  # what it has started, too
            os.waitpid(pid, 0)
    if code < 0:
        late = code == -signal.SIGALRM
        why = "its time was over" if late else signal.Signals(-code).name
        results.add(item.name, status="out of time" if late else "failed", why=why)


def measured(item, arguments, results, seconds):
    """In the new process, which the system ends after so many seconds."""
    import stages

    status, why, start = "failed", "", time.monotonic()
    try:
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it ends with this script
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        os.dup2(results.log, 1), os.dup2(results.log, 2)
        sys.stdout, sys.stderr = (open(i, "w", buffering=1, closefd=False) for i in (1, 2))
        print(f"\n{item.name}, at most {seconds:.0f} s", flush=True)
        run = stages.Run(arguments, lambda **figures: results.add(item.name, **figures))
        getattr(stages, item.stage)(run, *item.args)
        status = "done"
    except stages.LeftOut as error:
        status, why = "left out", str(error)
    except BaseException as error:
        traceback.print_exc()
        why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    finally:
        spent = round(time.monotonic() - start, 1)
        results.add(item.name, status=status, why=why, seconds=spent)
        os._exit(0)


def run(arguments):
    """Measure in turn; the exit code."""
    results = Results(arguments.out)
    items = [item for item in PLAN if item.stage in arguments.only]
    if arguments.device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # more would wait for each other
    try:
        import stages  # noqa: F401  # before processes are forked, so that they find it there
    except ImportError as error:
        name = error.name.partition(".")[0]
        for item in items:
            results.add(item.name, status="left out", why=f"needs {name}")
        needs = "our neurons are its nodes: " if name == "spikingjelly" else ""
        print(f"{error} ({needs}pip install -r requirements.txt); nothing was measured")
        return 1

    def stop(number, frame):
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    scale = 60 * arguments.minutes / sum(item.minutes for item in items)
    end, code = START, 0
    for item in items:
        end += scale * item.minutes
        left = end - time.monotonic()
        if left <= 0:
            results.add(item.name, status="out of time", why="those before it took its time")
        else:
            measure(item, arguments, results, left)
        found = gpu_report.read(arguments.out)[item.name]
        print(gpu_report.line(item.name, found), flush=True)
        if found["status"] not in ("done", "left out"):
            code = 1
            if item.stage == "environment":
                break
    return code


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for the results; they are added to it")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all (default: 9)")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--small", action="store_true", help="tiny models and few rounds: figures mean nothing"
    )
    parser.add_argument("--dry", action="store_true", help="only print the shares")
    parser.add_argument("--report", type=Path, metavar="OUT", help="only print tables of results")
    arguments = parser.parse_args(argv)
    if arguments.report:
        print(gpu_report.tables(gpu_report.read(arguments.report), PLAN))
    elif arguments.dry:
        items = [item for item in PLAN if item.stage in arguments.only]
        scale, end = arguments.minutes / sum(item.minutes for item in items), 0.0
        print(f"{'measurement':40} {'minutes':>7} {'ends at':>7}")
        for item in items:
            end += scale * item.minutes
            print(f"{item.name:40} {scale * item.minutes:7.1f} {end:7.1f}")
    elif arguments.out:
        return run(arguments)
    else:
        parser.error("--out names the folder for the results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
