"""Everything that a first GPU is asked, in one go: is it right, is it fast, where does the time go?

Usage:
    python tools/gpu.py --out gpu                  # all stages, at most 2.5 hours on a quiet GPU
    python tools/gpu.py --out gpu --stages step kernels
    python tools/gpu.py --out gpu --device cpu --small      # tiny, to try this script itself

Each stage is a process with a time limit, and one that fails does not stop the others. Stages, in
their order:
    environment  GPU, driver, versions, compilers
    tests        those marked for a GPU; golden numbers, all backends, in float64 and float32
    step         a training step of HST-10-384: time of the host, of the GPU, by kernel; where the
                 host waits
    kernels      each kernel at each of its shapes in that step, beside a copy of as many bytes
    products     weight gradients of 1x1 layers, in float16 and summed in float32, against float64
    bench        tools/bench.py at batch 32 and 64
    graphs       inference and training steps as CUDA graphs, equal to the bit
    compiled     inference through torch.compile
    sanitizer    compute-sanitizer's memcheck and racecheck over the kernels' tests
    photos       imagenet/quickstart.yml in float16 with the scaler, stopped and resumed once, and
                 in float32

In the folder --out: STAGE.json and STAGE.log of each, profiles as text, summary.json; a table of
all at the end.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import checks
import stages
from timing import Run

LIMITS = {  # seconds
    "environment": 120,
    "tests": 1200,
    "step": 900,
    "kernels": 600,
    "products": 300,
    "bench": 900,
    "graphs": 300,
    "compiled": 900,
    "sanitizer": 1800,
    "photos": 1800,
}
NEEDS_GPU = ("graphs", "sanitizer")


def one_stage(name, arguments):
    """In a process of its own: STAGE.json in --out."""
    run = Run(arguments)
    stage = getattr(stages, name, None) or getattr(checks, name)
    line, rows = stage(run)
    (run.out / f"{name}.json").write_text(
        json.dumps({"line": line, "rows": rows}, indent=1, default=str) + "\n"
    )


def start_stage(name, arguments, out):
    """{stage, status, seconds, line}: ok, failed, timed out or skipped, with the last line of the
    log for a reason.
    """
    if name in NEEDS_GPU and torch.device(arguments.device).type != "cuda":
        return {"stage": name, "status": "skipped", "seconds": 0.0, "line": "needs a GPU"}
    result, log = out / f"{name}.json", out / f"{name}.log"
    result.unlink(missing_ok=True)
    words = [sys.executable, __file__, "--one", name, "--out", out, "--device", arguments.device]
    words += ["--small"] if arguments.small else []
    start, status = time.perf_counter(), "ok"
    with open(log, "w") as file:
        # a session of its own, so that what it started ends with it
        process = subprocess.Popen(
            [*map(str, words)], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(LIMITS[name])
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if status == "ok" and process.returncode:
        status = "failed"
    line = (
        json.loads(result.read_text())["line"]
        if status == "ok"
        else (log.read_text().splitlines() or [""])[-1]
    )
    return {
        "stage": name,
        "status": status,
        "seconds": round(time.perf_counter() - start, 1),
        "line": line[:200],
    }


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument("--stages", nargs="+", choices=LIMITS, default=[*LIMITS])
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--small", action="store_true", help="tiny models and few rounds: figures mean nothing"
    )
    parser.add_argument("--one", choices=LIMITS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        one_stage(arguments.one, arguments)
        return 0
    if arguments.device != "cpu" and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU; --device cpu --small tries the script")
    out = Path(arguments.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in arguments.stages:
        print(f"{name} (at most {LIMITS[name]} s) ...", flush=True)
        rows.append(start_stage(name, arguments, out))
        (out / "summary.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"\n{'stage':12} {'status':9} {'s':>7}  ")
    for row in rows:
        print(f"{row['stage']:12} {row['status']:9} {row['seconds']:7.1f}  {row['line']}")
    return int(any(row["status"] in ("failed", "timed out") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
