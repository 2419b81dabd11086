"""The paper's memory experiment: Q-K token attention against self-attention, as the tokens grow.

Usage:
    python tools/memory.py                          # N = 10^2, 20^2 ... 100^2: a table, memory.png
    python tools/memory.py --side 10 50 --channels 512 --heads 8 --figure docs/memory.png

What is compared, from the spikes of q, k (and v) to those of the attention's neuron, float32:

    QKTA             neuron(sum of q over the channels) * k
    SSA q (k^T v)    neuron(q (k^T v)), linear in N, as in model.py
    SSA (q k^T) v    neuron((q k^T) v), with its N x N weights

Counted: what has to be kept for the backward pass. For QKTA that is k, the mask and the membranes
behind it; for SSA q, k, v, the product in the brackets and the membranes. Measured: what autograd
saves, and on a GPU the peak of memory that forward and backward pass allocate on top of q, k and v.
"""

import argparse
import sys
from pathlib import Path

import torch

import models
from saved import Saved

ROOT = Path(__file__).resolve().parent.parent
MB = 2**20


def token_attention(q, k, v, neuron):
    return neuron(q.sum(-1, keepdim=True)) * k


def linear(q, k, v, neuron):
    return neuron(q @ (k.transpose(-2, -1) @ v) * 0.125)


def quadratic(q, k, v, neuron):
    return neuron((q @ k.transpose(-2, -1)) @ v * 0.125)


ATTENTIONS = {"QKTA": token_attention, "SSA q (kᵀ v)": linear, "SSA (q kᵀ) v": quadratic}


def counted(name, tokens, args):
    """Bytes that the backward pass needs."""
    spikes = tokens * args.channels
    if name == "QKTA":
        values = spikes + 2 * tokens * args.heads
    else:
        width = args.channels // args.heads
        product = width * width if name == "SSA q (kᵀ v)" else tokens * tokens
        values = 3 * spikes + product * args.heads + spikes
    return 4 * args.T * args.batch * values


def measured(name, tokens, args, neuron):
    """(bytes that autograd saves, peak of allocated bytes on a GPU or None)."""
    shape = (args.T, args.batch, args.heads, tokens, args.channels // args.heads)
    generator = torch.Generator().manual_seed(0)
    spikes = [(torch.rand(shape, generator=generator) < 0.1).float() for _ in range(3)]
    spikes = [values.to(args.device).requires_grad_() for values in spikes]
    cuda = args.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats(args.device)
        before = torch.cuda.memory_allocated(args.device)
        ATTENTIONS[name](*spikes, neuron).sum().backward()
        peak = torch.cuda.max_memory_allocated(args.device) - before
    with Saved(torch.nn.Module()) as saved:
        ATTENTIONS[name](*spikes, neuron)
        total = saved.total
    return total, peak if cuda else None


def draw(path, rows, args):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    tokens = [row[0] for row in rows]
    for column, (name, color) in enumerate(zip(ATTENTIONS, ("C1", "C0", "C3"), strict=True)):
        cells = [row[1][column] for row in rows]
        axes.plot(tokens, [cell[0] / MB for cell in cells], color=color, label=f"{name}, counted")
        axes.plot(tokens, [cell[1] / MB for cell in cells], "o", color=color, label="measured")
        if cells[0][2] is not None:
            peaks = [cell[2] / MB for cell in cells]
            axes.plot(tokens, peaks, "--", color=color, label=f"peak, {args.device}")
    axes.set_yscale("log")
    axes.set_xlabel("tokens N")
    axes.set_ylabel("memory for the backward pass, MB")
    size = f"C = {args.channels}, heads: {args.heads}, T = {args.T}, batch {args.batch}, float32"
    axes.set_title(f"Attention alone: {size}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def parse(argv):
    parser = argparse.ArgumentParser(description="Memory of Q-K attention and self-attention.")
    sides = list(range(10, 101, 10))
    parser.add_argument("--side", type=int, nargs="+", default=sides, help="N = side x side")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--heads", type=int, default=1, help="must divide the channels")
    parser.add_argument("--T", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--figure", default="memory.png", help="where the plot goes")
    args = parser.parse_args(argv)
    if min(*args.side, args.T, args.batch, args.heads, args.channels) < 1:
        parser.error("sides, channels, heads, T and batch are at least 1")
    if args.channels % args.heads:
        parser.error(f"{args.heads} heads do not divide {args.channels} channels")
    return args


def main(argv=None):
    args = parse(argv)
    neuron = models.load("cifar10").neuron.MultiStepLIF(v_threshold=0.5, backend="torch")
    head = f"{'N':>7}" + "".join(f"{name:>28}" for name in ATTENTIONS)
    print(f"MB for the backward pass: counted, measured ({args.device})\n{head}", flush=True)
    rows = []
    for side in args.side:
        tokens = side * side
        cells = []
        for name in ATTENTIONS:
            cells.append((counted(name, tokens, args), *measured(name, tokens, args, neuron)))
        rows.append((tokens, cells))
        text = "".join(f"{cell[0] / MB:>16.2f}{cell[1] / MB:>12.2f}" for cell in cells)
        print(f"{tokens:>7}{text}", flush=True)
    token, line, square = (cell[1] for cell in rows[-1][1])
    print(
        f"at N = {rows[-1][0]:,}: SSA (q kᵀ) v keeps {square / token:.1f} x, "
        f"SSA q (kᵀ v) {line / token:.1f} x as much as QKTA"
    )
    try:
        draw(args.figure, rows, args)
        print(f"written: {args.figure}")
    except ImportError:
        print("no plot: it needs matplotlib (pip install matplotlib)")
    except OSError as error:
        print(f"error: {args.figure} can't be written: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
