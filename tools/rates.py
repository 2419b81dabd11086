"""Time of an inference on this processor against how many inputs of layers are not 0.

Usage:
    python tools/rates.py                                   # HST-10-384: a table, events-time.png
    python tools/rates.py --model cifar10 --batch 16 --rounds 5 --figure rates.png

All thresholds of a network with random weights are scaled, so that its neurons fire more or less.
Three ways take turns: ours, ours with dense convolutions (events: false) and spikingjelly's own
network. Counted beside them: synaptic operations, which tools/energy.py defines. This is of CPUs:
on a GPU convolutions are dense.
"""

import models  # isort: skip  # before torch, since it sets how its threads wait

import argparse
import json
import platform
import statistics
from pathlib import Path

import torch

import bench
import energy

NAMES = {"fast": "sums of events", "dense": "dense convolutions", "spikingjelly": "spikingjelly"}


def prepare(name, path, T, x, scale):
    """A Candidate of bench.py whose thresholds are scaled, or None where there is no such path."""
    torch.manual_seed(0)
    model = bench.build(name, path, T, models.load(models.folder_of(name)))
    if model is None:
        return None
    for module in model.modules():
        if hasattr(module, "v_threshold"):
            module.v_threshold *= scale
    candidate = bench.Candidate(model, x, torch.float32)
    candidate.adopt_statistics()
    return candidate


def measure(name, T, x, scale, rounds):
    """{scale, nonzero: mean over layers' inputs, sops of an image, path: seconds an image}."""
    ways = {path: prepare(name, path, T, x, scale) for path in NAMES}
    ways = {path: way for path, way in ways.items() if way}
    for way in ways.values():
        way.infer()
    seconds = {path: [] for path in ways}
    for _ in range(rounds):
        for path, way in ways.items():
            seconds[path].append(way.timed("infer"))
    model = ways["fast"].model.eval()
    with energy.Counter(model) as counter, torch.no_grad():
        model(x)
    rows = [row for row in energy.count(counter) if row.sops is not None]
    weights = sum(row.macs * row.steps for row in rows)
    nonzero = sum(row.nonzero * row.macs * row.steps for row in rows) / weights
    found = {path: statistics.median(times) / len(x) for path, times in seconds.items()}
    return {"scale": scale, "nonzero": nonzero, "sops": sum(row.sops for row in rows), **found}


def draw(path, rows, title):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    time = figure.subplots()
    operations = time.twinx()
    rows = sorted(rows, key=lambda row: row["nonzero"])
    share = [100 * row["nonzero"] for row in rows]
    for number, (way, label) in enumerate(NAMES.items()):
        if way in rows[0]:
            times = [1e3 * row[way] for row in rows]
            time.plot(share, times, "o-", color=f"C{number}", markersize=4, label=label)
    sops = [row["sops"] / 1e9 for row in rows]
    operations.plot(share, sops, ":", color="0.4", label="synaptic operations, right")
    time.set_title(title, fontsize=9)
    time.set_xlabel("inputs of layers that are not 0, % (mean by operations)")
    time.set_ylabel("time of an inference, ms an image")
    operations.set_ylabel("synaptic operations of an image, billions")
    for axes in (time, operations):
        axes.set_ylim(bottom=0)
    time.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="QKFormer_10_384", help="as of tools/bench.py")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--T", type=int)
    parser.add_argument("--size", type=int)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.3, 0.5, 0.75, 1, 1.5, 2, 3])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--figure", type=Path, default="events-time.png")
    args = parser.parse_args(argv)
    event, large = args.model in models.EVENT, args.model in models.IMAGENET
    T = args.T or (16 if event else 4)
    size = args.size or (128 if event else 224 if large else 32)
    torch.manual_seed(0)
    x = models.make_input(args.model, args.batch, T, size, "cpu")
    machine = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    title = f"{args.model}, T = {T}, {args.batch} of {size} x {size}, float32\n{machine}"
    print(title)
    print("thresholds   not 0, %   SOPs, G  " + "  ".join(f"{way:>13}" for way in NAMES.values()))
    rows = []
    for scale in args.scales:
        row = measure(args.model, T, x, scale, args.rounds)
        rows.append(row)
        times = "  ".join(f"{1e3 * row[way]:10.1f} ms" for way in NAMES if way in row)
        print(
            f"{scale:10g} {100 * row['nonzero']:10.1f} {row['sops'] / 1e9:9.3f}  {times}",
            flush=True,
        )
    args.figure.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(args.figure, rows, title)
    print(f"written: {args.figure} and .json")
    return 0


def processor():
    """The processor's name, as Linux has it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.machine()


if __name__ == "__main__":
    raise SystemExit(main())
