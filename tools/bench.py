"""Time and memory of a training step and of inference, for our models and what they are compared with, in one run.

Usage:
    python tools/bench.py                                             # HST-10-384, batch 32 on a GPU, 2 on a CPU
    python tools/bench.py --model cifar10 --batch 64 --T 1 2 4 6
    python tools/bench.py --model QKFormer_10_768 --batch 24 --size 224 288 384 --json bench.json
    python tools/bench.py --profile trace.json                        # PyTorch's profiler, for chrome://tracing

What is compared:
    ours          the folder's model, its default neuron backend
    torch         the same with the plain PyTorch neuron
    release-like  the same with spikingjelly's neuron and the image copied T times, so that the first convolution
                  runs on all copies, as in the authors' release
    spikingjelly  spikingjelly's own QKFormer (ImageNet models only)

They take turns, so that a machine that warms up or slows down does so for all; figures are medians over the rounds,
with the spread between the quartiles. On a GPU in float16 mixed precision, timed by CUDA events, memory is the peak
of allocated tensors; on a CPU in float32, memory is what autograd saves for the backward pass.
"""

import argparse
import functools
import importlib
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

ROOT = Path(__file__).resolve().parent.parent
IMAGENET = ("QKFormer_10_384", "QKFormer_10_512", "QKFormer_10_768")
FOLDERS = ("cifar10", "cifar100", "dvs128-gesture", "cifar10-dvs")
PATHS = ("ours", "torch", "release-like", "spikingjelly")


class Repeated(torch.nn.Module):
    """A model of ours on T copies of the image, without knowing that they are equal."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        x = x.repeat(self.model.T, 1, 1, 1, 1)
        return self.model.head(self.model.forward_features(x).mean(0))


def build(name, path, T, models):
    """The module to time, or None where there is no such path for a model."""
    entry = getattr(models, name if name in IMAGENET else "QKFormer")
    if path == "spikingjelly":
        peer = getattr(qkformer, name.lower(), None)
        return peer(T=T) if peer else None
    if path == "release-like":
        model = entry(T=T, backend="spikingjelly")
        return model if name.startswith(("dvs", "cifar10-dvs")) else Repeated(model)
    return entry(T=T, backend="auto" if path == "ours" else "torch")


class Candidate:
    """One path of one configuration, ready to run a step of either kind."""

    def __init__(self, model, x, classes):
        self.model, self.x = model.to(x.device), x
        self.target = torch.arange(len(x), device=x.device) % classes
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self.scaler = torch.amp.GradScaler(x.device.type, enabled=x.is_cuda)
        self.autocast = functools.partial(torch.autocast, x.device.type, dtype=torch.float16, enabled=x.is_cuda)
        self.seconds = {"train": [], "infer": []}
        self.memory = {}

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
        saved, parameters = {}, {parameter.data_ptr() for parameter in self.model.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        self.model.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss()
        total = sum(saved.values())
        loss.backward()
        return total / 2**20


def bench(name, batch, T, size, paths, rounds, device, models):
    """[{path, kind, images/s, ...}, ...] of one configuration, and its candidates."""
    event = name in ("dvs128-gesture", "cifar10-dvs")
    shape = (batch, T, 2, size, size) if event else (batch, 3, size, size)
    x = (torch.poisson(torch.full(shape, 0.3)) if event else torch.randn(shape)).to(device)
    candidates = {}
    for path in paths:
        torch.manual_seed(0)
        model = build(name, path, T, models)
        if model is not None:
            head = model.model.head if isinstance(model, Repeated) else model.head
            candidates[path] = Candidate(model, x, head.out_features)
    for candidate in candidates.values():  # compiles kernels, chooses algorithms
        candidate.train()
        candidate.infer()
        candidate.memory = candidate.measure_memory()
    for _ in range(rounds):
        for kind in ("train", "infer"):
            for candidate in candidates.values():
                candidate.seconds[kind].append(candidate.timed(kind))
    rows = []
    for path, candidate in candidates.items():
        for kind, seconds in candidate.seconds.items():
            low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
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
    return rows, candidates


def print_table(rows):
    print(f"{'model':16} {'batch':>5} {'T':>3} {'size':>4}  {'':6}", end="")
    print(f"{'path':13} {'images/s':>9} {'ms':>9} {'spread':>7} {'ours is':>8} {'memory MB':>10}")
    for row in rows:
        same = ("model", "batch", "T", "size", "kind")
        ours = [r for r in rows if r["path"] == "ours" and all(r[key] == row[key] for key in same)]
        faster = f"{row['seconds'] / ours[0]['seconds']:7.2f}x" if ours else ""
        print(
            f"{row['model']:16} {row['batch']:5} {row['T']:3} {row['size']:4}  {row['kind']:6}{row['path']:13} "
            f"{row['images_per_second']:9.1f} {1000 * row['seconds']:9.1f} {100 * row['spread']:6.1f}% {faster:>8} "
            f"{row['train_memory_mb']:10.0f}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["QKFormer_10_384"], choices=(*IMAGENET, *FOLDERS))
    parser.add_argument("--batch", nargs="+", type=int, help="default: 32 on a GPU, 2 on a CPU")
    parser.add_argument("--T", nargs="+", type=int, help="default: 4; event models 16")
    parser.add_argument("--size", nargs="+", type=int, help="default: 224; CIFAR 32; event models 128")
    parser.add_argument("--paths", nargs="+", default=PATHS, choices=PATHS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--profile", metavar="FILE", help="write a trace of one training step of the first path there")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join(sys.argv),
    }
    print("; ".join(f"{name} {value}" for name, value in machine.items()))
    rows = []
    for name in arguments.model:
        folder, event = ("imagenet" if name in IMAGENET else name), name in ("dvs128-gesture", "cifar10-dvs")
        sys.path.insert(0, str(ROOT / folder))
        for module in ("model", "lif"):  # another folder's, of the model before
            sys.modules.pop(module, None)
        models = importlib.import_module("model")
        sys.path.pop(0)
        for batch in arguments.batch or [32 if device.type == "cuda" else 2]:
            for T in arguments.T or [16 if event else 4]:
                for size in arguments.size or [128 if event else 224 if folder == "imagenet" else 32]:
                    found, candidates = bench(name, batch, T, size, arguments.paths, arguments.rounds, device, models)
                    rows += found
                    print_table(found)
                    if arguments.profile:
                        with profile() as trace:
                            next(iter(candidates.values())).train()
                        trace.export_chrome_trace(arguments.profile)
                        arguments.profile = None
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
