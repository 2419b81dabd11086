"""Accuracy, energy and time of one checkpoint against the number of time steps.

Usage, from anywhere:
    python tools/sweep.py cifar10                           # T = 1 2 4 8 16, the newest best.pth
    python tools/sweep.py imagenet --checkpoint best.pth --T 1 2 4 6 -- --data_path /data/imagenet
    python tools/sweep.py dvs128-gesture --T 4 8 16 -- --data_path /data/gesture

Each T is two runs of the folder's test.py: one for accuracy and images per second, and one with
--energy, which counts layer by layer and takes longer. What comes behind `--` goes to test.py. The
table goes to sweep-NAME.json and sweep-NAME.png beside the checkpoint NAME.pth. Weights and
statistics of BatchNorm stay those of the T that was trained.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("cifar10", "cifar100", "dvs128-gesture", "cifar10-dvs", "imagenet")


def parse(argv):
    parser = argparse.ArgumentParser(description="Accuracy, energy and time against T.")
    parser.add_argument("folder", choices=FOLDERS)
    parser.add_argument("--checkpoint", type=Path, help="default: the folder's newest best.pth")
    parser.add_argument("--T", type=int, nargs="+", default=[1, 2, 4, 8, 16])
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
    if min(args.T) < 1:
        parser.error("T is at least 1")
    args.checkpoint = args.checkpoint.resolve()
    return args


def test(main, args, T, place, *flags):
    """What the folder's test.py writes beside the checkpoint, which is in `place` by a link."""
    link = place / args.checkpoint.name
    steps = "--T" if args.folder in ("dvs128-gesture", "cifar10-dvs") else "--time_step"
    with contextlib.redirect_stdout(io.StringIO()):
        main([*map(str, (*args.rest, "--checkpoint", link, steps, T, *flags))])
    kind = "energy" if "--energy" in flags else "test"
    return json.loads(link.with_name(f"{kind}-{link.stem}.json").read_text())


def sweep(main, args):
    """[{T, top1, energy, ann, sops, images_per_second}], each printed as it comes."""
    print("  T  top-1 %        mJ   ANN, mJ   SOPs, M  images/s", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / args.checkpoint.name).symlink_to(args.checkpoint)
        test(main, args, args.T[0], Path(place))  # the first run compiles, and is not timed
        for T in args.T:
            result = test(main, args, T, Path(place))
            counted = test(main, args, T, Path(place), "--energy")
            row = {name: result[name] for name in ("top1", "loss", "images_per_second")}
            row.update({name: counted[name] for name in ("energy", "ann", "sops")})
            rows.append({"T": T, **row})
            print(
                f"{T:>3} {row['top1']:>8.2f} {row['energy']:>9.4g} {row['ann']:>9.4g} "
                f"{row['sops'] / 1e6:>9.4g} {row['images_per_second']:>9.0f}",
                flush=True,
            )
    return rows


def draw(path, rows):
    from matplotlib.figure import Figure

    steps = [row["T"] for row in rows]
    curves = {
        "top-1, %": [row["top1"] for row in rows],
        "energy, mJ an image": [row["energy"] for row in rows],
        "time, ms an image": [1e3 / row["images_per_second"] for row in rows],
    }
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(1, 3), curves.items(), strict=True):
        axes.plot(steps, values, "o-")
        axes.set_xlabel("time steps T")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        if not title.startswith("top-1"):
            axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


def main(argv=None):
    args = parse(argv)
    os.chdir(ROOT / args.folder)  # as test.py runs, so that relative paths mean the same
    sys.path.insert(0, str(ROOT / args.folder))
    script, config = importlib.import_module("test"), importlib.import_module("config")
    try:
        rows = sweep(script.main, args)
    except config.UserError as error:
        raise SystemExit(f"error: {error}") from None
    path = args.checkpoint.with_name(f"sweep-{args.checkpoint.stem}.json")
    try:
        path.write_text(json.dumps(rows, indent=1) + "\n")
        draw(path.with_suffix(".png"), rows)
        print(f"written: {path} and .png")
    except ImportError:
        print(f"written: {path}; a plot needs matplotlib (pip install matplotlib)")
    except OSError as error:
        raise SystemExit(f"error: {path} can't be written: {error.strerror}") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
