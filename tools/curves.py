"""Is a run on track? Its loss and accuracy over the release's, as a picture and as a table.

Usage:
    python tools/curves.py cifar10/output/cifar10                        # writes curves.png there
    python tools/curves.py imagenet/output/imagenet imagenet/output/imagenet-2 --out both.png
    python tools/curves.py log.txt --curve hst_10_512     # of a log, say what it belongs to

A run is a folder of ours, still running or not, or a log: our log.txt or that of the release's
ImageNet script (one JSON a line), what one of the release's scripts printed, timm's summary.csv, or
one of the curves themselves. What it is compared with follows from its args.yaml; a run on another
data set is compared with nothing.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import yaml
from matplotlib.figure import Figure

from logs import CurveError, Run, read_run

ROOT = Path(__file__).resolve().parent.parent
DIFFER = (
    "dataset model dim layer num_heads time_step img_size epochs batch_size accum_iter lr blr"
).split()
COLOURS = ("#c1272d", "#0060ad", "#2b8a3e", "#8e44ad", "#d9730d")
GREY = "#8a8a8a"


@dataclass
class Published:
    """A published run: its title, folder and yml, top-1 % of the paper, and the time it took on 8
    V100 of 32 GB.
    """

    title: str
    folder: str
    yml: str
    top1: float
    hours: float = None


PUBLISHED = {
    "hst_10_384": Published(
        "HST-10-384, ImageNet 224²", "imagenet", "imagenet.yml", 78.80, 4 * 24 + 12
    ),
    "hst_10_512": Published(
        "HST-10-512, ImageNet 224²", "imagenet", "hst_10_512.yml", 82.04, 5 * 24 + 22
    ),
    "hst_10_768": Published(
        "HST-10-768, ImageNet 224²", "imagenet", "hst_10_768.yml", 84.22, 12 * 24 + 23
    ),
    "finetune_384": Published(
        "HST-10-768 carried on at 384²", "imagenet", "finetune_384.yml", 85.65
    ),
    "cifar10": Published("CIFAR-10", "cifar10", "cifar10.yml", 96.18),
    "cifar100": Published("CIFAR-100", "cifar100", "cifar100.yml", 81.15),
    "cifar10-dvs": Published("CIFAR10-DVS", "cifar10-dvs", "cifar10-dvs.yml", 84.0),
    "dvs128-gesture": Published("DVS128 Gesture", "dvs128-gesture", "dvs128-gesture.yml", 98.6),
}


def named(config):
    """A configuration by the names of today, without what is none."""
    names = {"T": "time_step", "input_size": "img_size"}
    return {names.get(n, n): value for n, value in (config or {}).items() if value is not None}


def recognise(run):
    """The name in PUBLISHED of the run that this one is to be compared with, from its args.yaml;
    None if unknown.
    """
    config = named(run.config)
    model, dataset, classes = (config.get(name) for name in ("model", "dataset", "num_classes"))
    if "QKFormer_10_" in str(model):  # of MS-QKFormer too, of which there is no published run
        if config.get("start_epoch") and config.get("img_size") == 384:
            return "finetune_384"
        return f"hst_10_{model.rpartition('_')[2]}"
    if "img_size" in config:
        return "cifar100" if dataset == "torch/cifar100" or classes == 100 else "cifar10"
    if "time_step" in config:
        return "cifar10-dvs" if "split_seed" in run.config else "dvs128-gesture"
    return None


def differences(run, published):
    """["key value (published value)"] of what the run's configuration has other than the published
    run's yml.
    """
    folder, theirs, yml = ROOT / published.folder, {}, published.yml
    while yml:
        values = yaml.safe_load((folder / yml).read_text())
        theirs, yml = values | theirs, values.get("base")
    theirs = {"dataset": published.folder, "model": "QKFormer"} | named(theirs)
    mine, found = named(run.config), []
    for key in DIFFER:
        ours, want = mine.get(key), theirs.get(key)
        if ours is not None and not same(ours, want):
            found.append(f"{key} {ours}" + (f" ({want})" if want is not None else ""))
    return found


def same(one, other):
    try:
        return math.isclose(float(one), float(other))  # YAML takes 1e-3 for a word
    except (TypeError, ValueError):
        return one == other


def table(run, release):
    """Lines: the run beside the release after 1, 2, 5, 10, 20, 50, … epochs and the last."""
    last = max(run.epochs)
    wanted = {step * 10**power for step in (1, 2, 5) for power in range(4)}
    shown = [epoch for epoch in run.epochs if epoch + 1 in wanted or epoch == last]
    shown = shown if len(run.epochs) > 10 else list(run.epochs)
    other = f"{'release':>9}" if release.epochs else ""
    heads = (f"{head:>12}{other}" for head in ("train loss", "test loss", "top-1 %"))
    lines = [f"{'after':>7}{''.join(heads)}"]
    for epoch in shown:
        theirs = release.epochs.get(epoch)
        line = f"{epoch + 1:7d}"
        for name, digits in (("train_loss", 3), ("test_loss", 3), ("top1", 2)):
            line += f"{run.epochs[epoch][name]:12.{digits}f}"
            if release.epochs:
                line += f"{theirs[name]:9.{digits}f}" if theirs else f"{'-':>9}"
        lines.append(line)
    return lines


def verdict(run, release):
    """A line: where the run stands, and when the release stood there."""
    last = max(run.epochs)
    have = run.epochs[last]["top1"]
    line = f"after {last + 1} epochs you have {have:.2f} %"
    if last in release.epochs:
        line += f", the release had {release.epochs[last]['top1']:.2f} %"
    first = next(
        (epoch for epoch, values in release.epochs.items() if values["top1"] >= have), None
    )
    if release.epochs:
        line += (
            f"; it had yours after {first + 1}" if first is not None else "; it never came that far"
        )
    return line


def cost(run, published):
    """A line on the time of the published run and of this one, or None."""
    seconds = [values["seconds"] for values in run.epochs.values() if "seconds" in values]
    epochs = (run.config or {}).get("epochs")
    parts = []
    if published.hours:
        days, hours = divmod(published.hours, 24)
        parts.append(f"the published run took {days} d {hours} h on 8 V100 of 32 GB")
    if seconds and epochs:
        mean = sum(seconds) / len(seconds)
        parts.append(
            f"yours takes {duration(mean)} an epoch, {duration(mean * epochs)} for {epochs}"
        )
    return "; ".join(parts) or None


def duration(seconds):
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def draw(runs, release, published, path):
    """Write the picture: loss on the left, accuracy on the right, the release in grey under the
    runs, or None.
    """
    matplotlib.rcParams.update(
        {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    )
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run, colour, order in [
        *([(release, GREY, 1)] if release else []),
        *((run, COLOURS[i % 5], 2) for i, run in enumerate(runs)),
    ]:
        style = {"color": colour, "zorder": order, "linewidth": 1.6 if order == 2 else 1.3}
        style |= {"marker": "o", "markersize": 3} if len(run.epochs) <= 30 else {}
        left.plot(*run.series("train_loss"), **style, label=f"{run.name}, training")
        left.plot(
            *run.series("test_loss"), **style, linestyle=(0, (3, 2)), label=f"{run.name}, test"
        )
        label = f"{run.name}, best {run.best:.2f} %" if run.epochs else None
        right.plot(*run.series("top1"), **style, label=label)
    if release:
        paper = f"paper, {published.top1:.2f} %"
        right.axhline(published.top1, color=GREY, linewidth=0.8, linestyle=":", label=paper)
        figure.suptitle(published.title)
    left.set(ylabel="loss")
    right.set(ylabel="top-1 %", ylim=(0, 101))
    ours, theirs = (
        max((max(run.epochs, default=0) for run in group), default=0)
        for group in (runs, [release] if release else [])
    )
    for axes in (left, right):
        axes.set_xlabel("epochs done")
        axes.grid(color="#e6e6e6", linewidth=0.7)
        axes.set_axisbelow(True)
        if 4 * ours < theirs:  # else a young run would be a stroke at the edge
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
        axes.legend(frameon=False, fontsize=9)
    try:
        figure.savefig(path, dpi=150)
    except (
        OSError,
        ValueError,
    ) as error:  # matplotlib names the kinds of picture that it can write
        raise CurveError(f"{path}: can't be written: {error}") from None


def compare(paths, curve=None, out=None):
    """Print the table of every run and draw them; returns the picture's path, None where there is
    no epoch yet.
    """
    runs = [read_run(path) for path in paths]
    names = {curve} if curve else {recognise(run) for run in runs} - {None}
    if not names:
        raise CurveError(
            f"{paths[0]}: no args.yaml says what to compare it with; name it: --curve "
            f"{' | '.join(PUBLISHED)}"
        )
    if len(names) > 1:
        raise CurveError(
            f"these runs belong to {', '.join(sorted(names))}; draw them apart, or name one with "
            f"--curve"
        )
    [name] = names
    if name not in PUBLISHED:
        raise CurveError(f"no curve {name}; there are {', '.join(PUBLISHED)}")
    published, release = PUBLISHED[name], Run("release")
    file = ROOT / published.folder / "curves" / f"{name}.csv"
    if file.is_file():
        release = Run("release", read_run(file).epochs)
        print(
            f"{published.title}: the release's log (cross_sample_lif: true), {len(release.epochs)} "
            f"epochs, best top-1 {release.best:.2f} %"
        )
    else:
        print(
            f"{published.title}: no log of the release's is known; the paper has "
            f"{published.top1:.2f} %"
        )
    alike = False  # whether a run is on the published run's data
    for run in runs:
        print(f"\n{run.name}")
        other, theirs = differences(run, published), release
        if other:
            print(f"not the published run: {', '.join(other)}")
        if other and other[0].startswith("dataset "):
            print("another data set, so there is nothing to compare it with")
            run.name += f" on {run.config['dataset']}"  # the picture has to say so too
            theirs = Run("release")
        if not run.epochs:
            print("no complete epoch yet")
            continue
        alike = alike or theirs is release
        print("\n".join(table(run, theirs)))
        print(verdict(run, theirs))
        if line := cost(run, published):
            print(line)
    if not any(run.epochs for run in runs):
        return None
    first = Path(paths[0])
    out = Path(out) if out else (first if first.is_dir() else first.parent) / "curves.png"
    draw([run for run in runs if run.epochs], release if alike else None, published, out)
    print(f"\ndrawn to {out}")
    return out


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or its log")
    parser.add_argument(
        "--curve", help=f"the published run to compare with: {', '.join(PUBLISHED)}"
    )
    parser.add_argument(
        "--out", metavar="PNG", help="picture to write [curves.png beside the first run]"
    )
    arguments = parser.parse_args(argv)
    try:
        compare(arguments.runs, arguments.curve, arguments.out)
    except CurveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
