"""Time and memory of a training step and of inference, for our models and what they are compared
with, in one run.

Usage:
    python tools/bench.py                        # HST-10-384, batch 32 on a GPU, 2 on a CPU
    python tools/bench.py --published --json bench.json    # all models; growth with T, size, batch
    python tools/bench.py --model cifar10 --batch 64 --T 1 2 4 6 --paths fast dense
    python tools/bench.py --model cifar10 MSQKFormer --batch 16    # and with membrane shortcuts
    python tools/bench.py --profile trace.json   # PyTorch's profiler, for chrome://tracing

What is compared:
    fast          the folder's model as it comes
    dense         fast, with dense convolutions (events: false); not by default
    plain         fused: false, backend: torch; module by module, the neuron in PyTorch
    release-like  fused: false, backend: spikingjelly; as in the authors' release
    spikingjelly  spikingjelly's own QKFormer (ImageNet models only)
    small         fast, with memory: small; not by default

They take turns, so that a machine that warms up or slows down does so for all; figures are medians
over the rounds, with the spread between the quartiles. On a GPU in float16 mixed precision, timed
by CUDA events, memory is the peak of allocated tensors; on a CPU in float32, memory is what
autograd saves for the backward pass. Inference is with the running statistics of the very input,
so that neurons fire as in training. --dtype bfloat16 on a CPU counts the memory of 16-bit mixed
precision.
"""

import models  # isort: skip  # before torch, since it sets how its threads wait

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from spikingjelly.activation_based import functional
from spikingjelly.activation_based.model import qkformer
from torch.profiler import profile

from models import EVENT, FOLDERS, IMAGENET, folder_of, load, make_input
from saved import Saved

OURS = {"fast": {}, "dense": {"events": False}, "small": {"memory": "small"}}
PATHS = ("fast", "plain", "release-like", "spikingjelly")
# Published batches per GPU, then how HST-10-384 grows: (models, batches, Ts, sizes), None for the
# default.
PUBLISHED = [
    (["QKFormer_10_384"], [32, 64], None, None),
    (["QKFormer_10_512"], [32], None, None),
    (["QKFormer_10_768"], [24], None, None),
    (["cifar10", "cifar100"], [64], None, None),
    (["dvs128-gesture", "cifar10-dvs"], [16], None, None),
    (["QKFormer_10_384"], [32], [1, 2, 6], None),
    (["QKFormer_10_384"], [32], None, [288, 384]),
    (["QKFormer_10_384"], [1, 8, 128], None, None),
]


def build(name, path, T, modules, **sizes):
    """The module to time, or None where there is no such path for a model. sizes: embed_dims and
    num_heads, other than the name says.
    """
    entry = models.entry(name, modules)
    if path == "spikingjelly":
        if not name.startswith("QKFormer"):
            return None
        dim = int(name.rpartition("_")[2])
        sizes = {"embed_dims": dim, "num_heads": dim // 64, **sizes}
        return qkformer.QKFormer(T=T, **{**sizes, "num_heads": (sizes["num_heads"],) * 3})
    if path in OURS:
        return entry(T=T, **OURS[path], **sizes)
    backend = "torch" if path == "plain" else "spikingjelly"
    return entry(T=T, backend=backend, fused=False, **sizes)


def set_up(name):
    """cuDNN as the folder's train.py sets it."""
    torch.backends.cudnn.benchmark = name not in EVENT
    torch.backends.cudnn.deterministic = name in EVENT


class Candidate:
    """One path of one configuration, ready to run a step of either kind."""

    def __init__(self, model, x, dtype):
        self.model, self.x = model.to(x.device), x
        self.target = torch.arange(len(x), device=x.device) % model.head.out_features
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.scaler = torch.amp.GradScaler(x.device.type, enabled=dtype == torch.float16)
        mixed = dtype != torch.float32
        self.autocast = functools.partial(
            torch.autocast, x.device.type, dtype=dtype if mixed else None, enabled=mixed
        )
        self.seconds = {"train": [], "infer": []}
        self.memory = 0.0

    @torch.no_grad()
    def adopt_statistics(self):
        """Makes running statistics those of this input."""
        bns = [
            m for m in self.model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)
        ]
        for momentum in (1.0, 0.1):
            for bn in bns:
                bn.momentum = momentum
            if momentum == 1.0:
                self.model.train()
                self.loss()

    def loss(self):
        functional.reset_net(self.model)
        with self.autocast():
            return torch.nn.functional.cross_entropy(self.model(self.x), self.target)

    def train(self):
        self.model.train()
        loss = self.loss()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss

    @torch.inference_mode()
    def infer(self):
        self.model.eval()
        functional.reset_net(self.model)
        with self.autocast():
            self.model(self.x)

    def timed(self, kind):
        step = getattr(self, kind)
        if not self.x.is_cuda:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def measure_memory(self):
        """MB of a training step: the peak on a GPU, what autograd saves on a CPU."""
        if self.x.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            self.train()
            return torch.cuda.max_memory_allocated() / 2**20
        self.model.train()
        with Saved(self.model) as saved:
            loss = self.loss()
        loss.backward()
        return saved.total / 2**20


def bench(name, batch, T, size, paths, rounds, device, dtype):
    """[{path, kind, images/s, ...}, ...] of one configuration, and its candidates."""
    set_up(name)
    modules, x = load(folder_of(name)), make_input(name, batch, T, size, device)
    candidates = {}
    for path in paths:
        torch.manual_seed(0)
        model = build(name, path, T, modules)
        if model is None:
            continue
        # What the others hold on a GPU is in everybody's peak; so each is measured alone, and moved
        # away meanwhile.
        for other in candidates.values():
            other.model.cpu()
        held = torch.cuda.memory_allocated() if x.is_cuda else 0  # by the others' optimizers
        candidate = Candidate(model, x, dtype)
        for _ in range(2):  # compiles kernels, chooses algorithms
            candidate.train()
            candidate.infer()
        candidate.adopt_statistics()
        candidate.memory = candidate.measure_memory() - held / 2**20
        candidates[path] = candidate
    return measure(candidates, name, batch, T, size, rounds), candidates


def measure(candidates, name, batch, T, size, rounds):
    for candidate in candidates.values():
        candidate.model.to(candidate.x.device)
    for kind in ("infer", "train"):  # steps change what fires
        for _ in range(rounds):
            for candidate in candidates.values():
                candidate.seconds[kind].append(candidate.timed(kind))
    rows = []
    for path, candidate in candidates.items():
        for kind, seconds in candidate.seconds.items():
            low, median, high = (
                statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
            )
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "T": T,
                    "size": size,
                    "path": path,
                    "kind": kind,
                    "images_per_second": batch / median,
                    "seconds": median,
                    "spread": (high - low) / median,
                    "train_memory_mb": candidate.memory,
                }
            )
    return rows


def print_table(rows):
    print(f"{'model':17} {'batch':>5} {'T':>3} {'size':>4}  {'':6}", end="")
    print(
        f"{'path':13} {'images/s':>9} {'ms':>9} {'spread':>7} {'fast is':>8} {'memory MB':>10} "
        f"{'fast has':>8}"
    )
    for row in rows:
        same = ("model", "batch", "T", "size", "kind")
        fast = [r for r in rows if r["path"] == "fast" and all(r[key] == row[key] for key in same)]
        faster = f"{row['seconds'] / fast[0]['seconds']:7.2f}x" if fast else ""
        smaller = (
            f"{100 * fast[0]['train_memory_mb'] / row['train_memory_mb']:6.0f} %" if fast else ""
        )
        print(
            f"{row['model']:17} {row['batch']:5} {row['T']:3} {row['size']:4}  "
            f"{row['kind']:6}{row['path']:13} "
            f"{row['images_per_second']:9.1f} {1000 * row['seconds']:9.1f} "
            f"{100 * row['spread']:6.1f}% {faster:>8} "
            f"{row['train_memory_mb']:10.0f} {smaller:>8}"
        )


def configurations(arguments, on_gpu):
    """(model, batch, T, size) one after another."""
    chosen = [(arguments.model, arguments.batch, arguments.T, arguments.size)]
    for names, batches, Ts, sizes in PUBLISHED if arguments.published else chosen:
        for name in names:
            for batch in batches or [32 if on_gpu else 2]:
                for T in Ts or [16 if name in EVENT else 4]:
                    for size in sizes or [
                        128 if name in EVENT else 224 if name in IMAGENET else 32
                    ]:
                        yield name, batch, T, size


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        nargs="+",
        default=["QKFormer_10_384"],
        choices=(*IMAGENET, *FOLDERS, "MSQKFormer"),
    )
    parser.add_argument("--batch", nargs="+", type=int, help="default: 32 on a GPU, 2 on a CPU")
    parser.add_argument("--T", nargs="+", type=int, help="default: 4; event models 16")
    parser.add_argument(
        "--size", nargs="+", type=int, help="default: 224; CIFAR 32; event models 128"
    )
    parser.add_argument(
        "--published", action="store_true", help="the published batches of all models, and growth"
    )
    parser.add_argument(
        "--paths", nargs="+", default=PATHS, choices=tuple({**OURS, **dict.fromkeys(PATHS)})
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on a GPU"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--profile",
        metavar="FILE",
        help="write a trace of one training step of the first path there",
    )
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("float16" if device.type == "cuda" else "float32"))
    machine = {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join(sys.argv),
    }
    print("; ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    rows = []
    for name, batch, T, size in configurations(arguments, device.type == "cuda"):
        try:
            found, candidates = bench(
                name, batch, T, size, arguments.paths, arguments.rounds, device, dtype
            )
        except torch.OutOfMemoryError as error:
            print(
                f"{name}, batch {batch}, T {T}, size {size}: {str(error).splitlines()[0]}",
                flush=True,
            )
            continue
        rows += found
        print_table(found)
        if arguments.profile:
            with profile() as trace:
                next(iter(candidates.values())).train()
            trace.export_chrome_trace(arguments.profile)
            arguments.profile = None
    if arguments.json:
        Path(arguments.json).write_text(
            json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
