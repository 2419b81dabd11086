"""Accuracy, energy and time of one checkpoint against the number of time steps and the size.

Usage, from anywhere:
    python tools/sweep.py cifar10                           # T = 1 2 4 8 16, the newest best.pth
    python tools/sweep.py cifar10 --size 12 16 24 --rounds 3
    python tools/sweep.py imagenet --checkpoint best.pth --T 1 2 4 6 -- --data_path /data/imagenet
    python tools/sweep.py dvs128-gesture --T 4 8 16 -- --data_path /data/gesture

Each T and size is tested as test.py does: --rounds times for accuracy and time, of which the
fastest counts, and once more to count the energy, see energy.py. What comes behind `--` are flags
of test.py. The table goes to sweep-NAME.json and sweep-NAME.png beside the checkpoint NAME.pth.
Weights and statistics of BatchNorm stay those that were trained.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

import energy
import models
from models import EVENT, ROOT


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", choices=models.DATA_SETS)
    parser.add_argument("--checkpoint", type=Path, help="default: the folder's newest best.pth")
    parser.add_argument("--T", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--size", type=int, nargs="+", help="default: that of the checkpoint")
    parser.add_argument("--rounds", type=int, default=1, help="timed runs, default 1")
    parser.epilog = "Flags of test.py come behind --."
    argv, rest = models.split(argv)
    args = parser.parse_args(argv)
    args.rest = rest
    if args.checkpoint is None:
        found = (ROOT / args.folder / "output").glob("*/best.pth")
        args.checkpoint = max(found, key=lambda path: path.stat().st_mtime, default=None)
        if args.checkpoint is None:
            parser.error(f"no best.pth under {args.folder}/output; train, or name a --checkpoint")
    if not args.checkpoint.is_file():
        parser.error(f"no such checkpoint: {args.checkpoint}")
    if min(args.T) < 1 or args.rounds < 1:
        parser.error("T and rounds are at least 1")
    if args.size and args.folder in EVENT:
        parser.error(f"size: the recordings of {args.folder} have one size")
    args.checkpoint = args.checkpoint.absolute()
    return args


def measure(args, T, size):
    """{T, size, top1, loss, images_per_second, energy, ann, sops}."""
    flags = [*args.rest, "--time_step", str(T), *(["--img_size", str(size)] if size else [])]
    modules, tested = models.open_checkpoint(args.checkpoint, args.folder, flags, say=False)
    with models.one_line(modules):
        model = modules.graph.graphed(tested.model, tested.cfg, tested.ranks).eval()
        loader, autocast = models.test_batches(modules, tested)
        with autocast(), torch.inference_mode():
            model(next(iter(loader))[0])  # compiles, chooses algorithms
        evaluate = modules.meters.evaluate
        found = [evaluate(model, loader, tested.ranks, autocast) for _ in range(args.rounds)]
        sums = energy.add_up(energy.count(energy.measure(modules, tested)))["all"]
    row = {"T": T, "size": size, "top1": found[0].top1, "loss": found[0].loss}
    row["images_per_second"] = max(metrics.images_per_second for metrics in found)
    return row | {name: getattr(sums, name) for name in ("energy", "ann", "sops")}


def sweep(args):
    """The rows of `measure`, each printed as it comes."""
    print("  T  size  top-1 %        mJ   ANN, mJ   SOPs, M  images/s", flush=True)
    rows = []
    for size in args.size or [None]:
        for T in args.T:
            row = measure(args, T, size)
            rows.append(row)
            print(
                f"{T:>3} {size or '':>5} {row['top1']:>8.2f} {row['energy']:>9.4g} "
                f"{row['ann']:>9.4g} {row['sops'] / 1e6:>9.4g} "
                f"{row['images_per_second']:>9.0f}",
                flush=True,
            )
    return rows


def draw(path, rows, title):
    """The PNG: top-1, energy and time against T, a line for each size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    places = accuracy, energy, time = figure.subplots(1, 3)
    for number, size in enumerate(dict.fromkeys(row["size"] for row in rows)):
        of_size = sorted((row for row in rows if row["size"] == size), key=lambda row: row["T"])
        steps, color = [row["T"] for row in of_size], f"C{number}"
        times = [1e3 / row["images_per_second"] for row in of_size]
        top1, spent, ann = ([row[n] for row in of_size] for n in ("top1", "energy", "ann"))
        name = f"{size} x {size}" if size else "the network"
        accuracy.plot(steps, top1, "o-", color=color, markersize=4, label=name)
        energy.plot(steps, spent, "o-", color=color, markersize=4)
        energy.plot(steps, ann, ":", color=color, label=f"energy of the ANN equivalent of {name}")
        time.plot(steps, times, "o-", color=color, markersize=4)
    names = ("top-1, %", "energy of a sample, mJ", "time of a sample, ms")
    for axes, name in zip(places, names, strict=True):
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("time steps T")
        axes.set_xticks(sorted({row["T"] for row in rows}))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    accuracy.set_ylim(0, 104)
    figure.legend(loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=100)


def main(argv=None):
    args = parse(argv)
    rows = sweep(args)
    path = args.checkpoint.with_name(f"sweep-{args.checkpoint.stem}.json")
    try:
        path.write_text(json.dumps(rows, indent=1) + "\n")
        draw(path.with_suffix(".png"), rows, f"{path.parent.name}/{args.checkpoint.name}")
        print(f"written: {path} and .png")
    except ImportError:
        print(f"written: {path}; a plot needs matplotlib (pip install matplotlib)")
    except OSError as error:
        raise SystemExit(f"error: {path} can't be written: {error.strerror}") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
