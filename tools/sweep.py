"""Accuracy, energy and time of one checkpoint against the number of time steps and the size.

Usage, from anywhere:
    python tools/sweep.py cifar10                           # T = 1 2 4 8 16, the newest best.pth
    python tools/sweep.py cifar10 --size 12 16 24 --rounds 3
    python tools/sweep.py imagenet --checkpoint best.pth --T 1 2 4 6 -- --data_path /data/imagenet
    python tools/sweep.py dvs128-gesture --T 4 8 16 -- --data_path /data/gesture

Each T and size is tested by the folder's test.py: --rounds times for accuracy and time, of which
the fastest counts, and once with --energy, which counts layer by layer and takes longer. What comes
behind `--` goes to test.py. The table goes to sweep-NAME.json and sweep-NAME.png beside the
checkpoint NAME.pth. Weights and statistics of BatchNorm stay those that were trained.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import models

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {  # {folder: the flags of T and, where there are several, of the size}
    "cifar10": ("--time_step", "--img_size"),
    "cifar100": ("--time_step", "--img_size"),
    "dvs128-gesture": ("--T", None),
    "cifar10-dvs": ("--T", None),
    "imagenet": ("--time_step", "--input_size"),
}


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", choices=FOLDERS)
    parser.add_argument("--checkpoint", type=Path, help="default: the folder's newest best.pth")
    parser.add_argument("--T", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--size", type=int, nargs="+", help="default: that of the checkpoint")
    parser.add_argument("--rounds", type=int, default=1, help="timed runs, default 1")
    parser.epilog = "Flags of test.py come behind --."
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    args.rest = argv[end + 1 :]
    if args.checkpoint is None:
        found = (ROOT / args.folder / "output").glob("*/best.pth")
        args.checkpoint = max(found, key=lambda path: path.stat().st_mtime, default=None)
        if args.checkpoint is None:
            parser.error(f"no best.pth under {args.folder}/output; train, or name a --checkpoint")
    if not args.checkpoint.is_file():
        parser.error(f"no such checkpoint: {args.checkpoint}")
    if min(args.T) < 1 or args.rounds < 1:
        parser.error("T and rounds are at least 1")
    if args.size and FOLDERS[args.folder][1] is None:
        parser.error(f"size: the recordings of {args.folder} have one size")
    args.checkpoint = args.checkpoint.resolve()
    return args


def run_test(main, args, place, T, size, *flags):
    """What the folder's test.py writes beside the checkpoint, which is in `place` by a link."""
    link = place / args.checkpoint.name
    steps, pixels = FOLDERS[args.folder]
    flags = ["--checkpoint", link, steps, T, *([pixels, size] if size else []), *flags]
    with contextlib.redirect_stdout(io.StringIO()):
        main([*args.rest, *map(str, flags)])
    kind = "energy" if "--energy" in flags else "test"
    return json.loads(link.with_name(f"{kind}-{link.stem}.json").read_text())


def sweep(main, args):
    """[{T, size, top1, loss, energy, ann, sops, images_per_second}], each printed as it comes."""
    print("  T  size  top-1 %        mJ   ANN, mJ   SOPs, M  images/s", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        (place / args.checkpoint.name).symlink_to(args.checkpoint)
        for size in args.size or [None]:
            run_test(main, args, place, args.T[0], size)  # this one compiles, and is not timed
            for T in args.T:
                results = [run_test(main, args, place, T, size) for _ in range(args.rounds)]
                counted = run_test(main, args, place, T, size, "--energy")
                row = {"T": T, "size": size, **{n: results[0][n] for n in ("top1", "loss")}}
                row["images_per_second"] = max(result["images_per_second"] for result in results)
                row.update({name: counted[name] for name in ("energy", "ann", "sops")})
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
    os.chdir(ROOT / args.folder)  # as test.py runs, so that relative paths mean the same
    modules = models.load(args.folder)
    script, config = modules.test, modules.config
    try:
        rows = sweep(script.main, args)
    except config.UserError as error:
        raise SystemExit(f"error: {error}") from None
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
