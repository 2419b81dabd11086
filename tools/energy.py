"""Operations and theoretical energy of a checkpoint's network, counted over its test set.

Usage, from anywhere:
    python tools/energy.py cifar10/output/quickstart/best.pth
    python tools/energy.py best.pth --folder imagenet -- --data_path /data/imagenet --time_step 2

A table is printed, and written to energy-NAME.csv and energy-NAME.json beside NAME.pth.

The energy is the paper's (45 nm CMOS): 4.6 pJ for each multiply-accumulate (MAC) of the first
convolution + 0.9 pJ for each synaptic operation (SOP) of all other convolutions, of Q-K attention
and of SSA. SOPs of a layer are the firing rate of its input x T x its MACs in one step. In detail:

- Firing rate: the mean of the input. Where spikes have added up, a value of 2 is two accumulates;
  `nonzero` is the share of values that are not 0. A convolution's MACs count its zero padding.
- First convolution: MACs. An image, the same at all steps, is convolved once; frames T times.
- Q-K attention: the sum over q accumulates the spikes of q, and each spike of k meets its mask.
  Both have N x C MACs; the inputs whose rate counts are q and k.
- SSA: each spike of k adds a row of v to k^T v, each spike of q a row of that to q (k^T v). Both
  have N x C x C / heads MACs; the inputs whose rate counts are k and q. The neuron's threshold
  takes in the factor 0.125.
- BatchNorm is folded into its convolution and costs nothing. Neurons, pooling and shortcuts are
  not counted.
- The linear head is no part of the formula: its row counts MACs (SOPs where it reads spikes), but
  the sums leave it out.
- ANN equivalent: 4.6 pJ for each MAC of the same layers, once for an image, T times for frames. In
  8 bits a MAC costs 0.23 pJ.

Beside it, "counters": the rule of NeuroBench and of spikingjelly's counters. A layer's operations
are those whose input is not 0, padding left out; they are accumulates at 0.9 pJ where all of the
layer's inputs are 0 or 1, and MACs at 4.6 pJ where a 2 is among them. Effective ACs, effective
MACs, activation sparsity and footprint are NeuroBench's names.

"memory" is the term of spikingjelly's estimate_simple_energy, 24.96 pJ a byte: 4 bytes of a weight
for each of these operations (each MAC, where a 2 is among the inputs) and of a bias for each
output. A membrane is read and written at each step.
"""

import csv
import json
import math
import re
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from spikingjelly.activation_based.neuron import BaseNode
from torch import nn

import models

stage_of = models.load("cifar10").meters.stage_of
MAC, AC = 4.6e-9, 0.9e-9  # mJ
MAC8 = 0.23e-9  # in 8 bits, an addition 0.03 and a multiplication 0.2
BYTE = 24.96e-9
# The paper's firing rates, of the outputs of neurons: HST-10-768 at 224 x 224 with T = 4, stages 1
# and 2. It has none for v_lif, which is here for its place in the table.
PAPER = {
    "q_lif": (0.0432, 0.0231),
    "k_lif": (0.1784, 0.0847),
    "v_lif": (None, None),
    "attn_lif": (0.3477, 0.2655),
    "masked k": (0.0832, 0.0350),
    "proj_lif": (0.1478, 0.0577),
    "fc1_lif": (0.0518, 0.0246),
    "fc2_lif": (0.2733, 0.1869),
}


class Row(NamedTuple):
    """A layer, or a product in an attention."""

    layer: str
    stage: str
    rate: float | None  # of the input; None for real values
    nonzero: float | None
    steps: float  # in which it is computed
    macs: float  # in one step
    sops: float | None  # of an image; None where MACs are counted
    energy: float  # mJ an image
    ann: float  # likewise
    effective: float  # operations of an image whose input is not 0
    binary: bool  # whether all inputs are 0 or 1
    counters: float  # mJ, by the rule of the counters
    memory: float  # mJ


class Sums(NamedTuple):
    macs: float
    sops: float
    energy: float
    ann: float
    counters: float
    memory: float
    effective_acs: float
    effective_macs: float


class Tally:
    """What one layer or neuron saw: sums in float64, in which spikes are counted exactly."""

    def __init__(self):
        self.values = 0  # how many there were
        self.macs = 0  # multiply-accumulates for them
        self.passes = 0  # samples x time steps
        self.real = False  # whether the values are real numbers, not spikes or sums of spikes
        self.binary = True  # whether they are all 0 or 1
        self.effective = 0  # operations with a value that is not 0
        self.biases = 0  # that were added
        self.steps = 0  # sums of the values of each time step, of neurons
        self.sums = torch.zeros(2, dtype=torch.float64)  # of the values; of those that are not 0

    def add(self, x, macs=0, passes=0):
        self.values += x.numel()
        self.macs += macs
        self.passes += passes
        self.binary = self.binary and bool(((x == 0) | (x == 1)).all())
        sums = torch.stack([x.sum(dtype=torch.float64), x.count_nonzero().double()])
        self.sums = self.sums.to(x.device) + sums

    @property
    def rate(self):
        return self.sums[0].item() / self.values

    @property
    def nonzero(self):
        return self.sums[1].item() / self.values


class Counter:
    """Within it, hooks count what passes through a model; layers then run unfused, see layer.py.

    Args:
        model: any that takes images [B, C, H, W] for `model.T` steps, or frames [B, T, C, H, W],
            with spikingjelly's neurons between convolutions and linear layers.

    Attributes: `layers` (inputs of convolutions and linear layers) and `neurons` (outputs), a Tally
    for each name of a module, in the order of the first call; of what was evaluated, `images`
    (samples), `T` and `static` (images, the same at all steps).
    """

    def __init__(self, model):
        self.model = model
        self.layers, self.neurons, self.hooks = {}, {}, []
        self.images, self.T, self.static = 0, 0, True

    def __enter__(self):
        self.hooks = [self.model.register_forward_pre_hook(self._input)]
        for name, module in self.model.named_modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
                self.hooks.append(module.register_forward_hook(self._layer(name)))
            elif isinstance(module, BaseNode):
                self.hooks.append(module.register_forward_hook(self._neuron(name)))
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    def _input(self, model, args):
        (x,) = args
        self.static = x.dim() == 4
        self.T = model.T if self.static else x.shape[1]
        self.images += len(x)

    def _layer(self, name):
        def hook(module, args, output):
            (x,) = args
            # The layer that is called first reads the images.
            image = self.static and name == next(iter(self.layers), name)
            linear = isinstance(module, nn.Linear)
            tally = self.layers.setdefault(name, Tally())
            tally.real = image or (linear and x.dim() == 2)  # [B, D]: a mean over T
            passes = x.numel() // x.shape[-1] if linear else len(x)
            tally.add(x, output.numel() * module.weight[0].numel(), passes)
            tally.effective += effective(module, x)
            tally.biases += 0 if module.bias is None else output.numel()

        return hook

    def _neuron(self, name):
        def hook(module, args, output):
            tally = self.neurons.setdefault(name, Tally())
            tally.add(output)
            # [T, B, ...], or [T*B, 1, ...] where it runs on from sample to sample
            tally.steps += output.double().reshape(self.T, -1).sum(1).cpu()

        return hook


def effective(module, x):
    """How many multiplications of a layer have an input that is not 0."""
    if isinstance(module, nn.Linear):
        return x.count_nonzero().item() * module.out_features
    conv = F.conv1d if x.dim() == 3 else F.conv2d
    taps = torch.ones_like(module.weight[:: module.out_channels // module.groups]).float()
    how = module.stride, module.padding, module.dilation, module.groups
    seen = conv((x != 0).float(), taps, None, *how).sum(dtype=torch.float64)
    return int(seen.item()) * module.out_channels // module.groups


def count(counter):
    """[Row] of a Counter, in the order of computation."""
    modules = dict(counter.model.named_modules())
    rows = []
    for name, tally in counter.layers.items():
        path, _, layer = name.rpartition(".")
        if layer == "proj_conv" and hasattr(modules[path], "k_lif"):
            rows += products(counter, path, modules[path])
        macs, steps = tally.macs / tally.passes, tally.passes / counter.images
        first = not rows
        if first and counter.static:
            steps = 1
        rows.append(make_row(counter, name, tally, macs, steps, spikes=not (first or tally.real)))
    return rows


def products(counter, name, attention):
    """Rows of what an attention computes between the neurons of q, k (and v) and its projection."""
    if f"{name}.attn_lif" not in counter.neurons:
        print(f"{name}: a {type(attention).__name__}, whose own products are not counted")
        return []
    q, k = (counter.neurons[f"{name}.{neuron}"] for neuron in ("q_lif", "k_lif"))
    work = [("sum of q", q, 1), ("mask * k", k, 1)]
    if hasattr(attention, "v_lif"):
        width = attention.q_conv.out_channels // attention.num_heads
        work = [("k^T v", k, width), ("q (k^T v)", q, width)]
    rows = []
    for what, tally, each in work:
        macs = tally.values * each / (counter.images * counter.T)
        row = make_row(counter, f"{name}: {what}", tally, macs, counter.T, spikes=True)
        rows.append(row._replace(memory=0.0))  # it has no weights
    return rows


def make_row(counter, name, tally, macs, steps, spikes):
    stage = stage_of(name)
    rates = (None, None) if tally.real else (tally.rate, tally.nonzero)
    sops = tally.rate * steps * macs if spikes else None
    energy = AC * sops if spikes else MAC * macs * steps
    once = counter.static or stage == "head"
    ann = MAC * macs * (1 if once else steps)
    share = steps * counter.images / tally.passes if tally.passes else 1  # 1 / T of an image
    done = tally.effective * share / counter.images
    if ": " in name:  # a product
        done = tally.nonzero * steps * macs
    binary = tally.binary and spikes
    weights = done if binary else macs * steps
    bytes_read = 4 * (weights + tally.biases * share / counter.images)
    rule = (AC if binary else MAC) * done
    row = (name, stage, *rates, steps, macs, sops, energy, ann, done, binary, rule)
    return Row(*row, BYTE * bytes_read)


def add_up(rows):
    """{stage: Sums}, and of "all"; the head is in none."""
    stages = {}
    for row in rows:
        for stage in (row.stage, "all"):
            if row.stage != "head":
                work = (row.effective, 0) if row.binary else (0, row.effective)
                values = row.macs, row.sops or 0, row.energy, row.ann, row.counters, row.memory
                stages.setdefault(stage, []).append((*values, *work))
    return {
        stage: Sums(*map(math.fsum, zip(*stages[stage], strict=True)))
        for stage in sorted(stages, key=lambda stage: (stage == "all", stage))
    }


def block_rates(counter):
    """{neuron: {stage: mean output over its blocks}}, with "masked k" of Q-K attention."""
    tallies = dict(counter.neurons)
    for name, module in counter.model.named_modules():
        if hasattr(module, "k_lif") and not hasattr(module, "v_lif"):
            tallies[f"{name}.masked k"] = counter.layers[f"{name}.proj_conv"]
    rates = {}
    for name, tally in tallies.items():
        if match := re.match(r"(stage\d+)\.\d+\.\w+\.(.+)", name):
            rates.setdefault(match[2], {}).setdefault(match[1], []).append(tally.rate)
    means = {
        name: {stage: math.fsum(values) / len(values) for stage, values in stages.items()}
        for name, stages in rates.items()
    }
    return {name: means[name] for name in dict.fromkeys((*PAPER, *means)) if name in means}


def is_published(model):
    """Whether this is HST-10-768 with token attention, whose firing rates the paper reports."""
    stages = [getattr(model, f"stage{index}", ()) for index in (1, 2, 3)]
    attention = [getattr(block, "tssa", None) for block in (*stages[0], *stages[1])]
    token = all(type(module).__name__ == "TokenQKAttention" for module in attention)
    return [*map(len, stages)] == [1, 2, 7] and token and model.head.in_features == 768


def describe(counter, rows, sums):
    """The report's lines."""
    heads = f"{'MACs':>10}{'steps':>6}{'SOPs':>10}{'mJ':>10}{'counters':>10}{'memory':>10}"
    lines = [f"{'layer':34}{'rate':>8}{'nonzero':>9}{heads}"]
    for row in rows:
        rates = "    real         "
        if row.rate is not None:
            rates = f"{row.rate:8.4f}{row.nonzero:9.4f}"
        sops = "" if row.sops is None else number(row.sops)
        work = f"{number(row.macs):>10}{row.steps:6g}{sops:>10}"
        energies = f"{row.energy:10.4g}{row.counters:10.4g}{row.memory:10.4g}"
        lines.append(f"{row.layer:34}{rates}{work}{energies}")

    stages, published = [stage for stage in sums if stage != "all"], is_published(counter.model)
    titles = "".join(f"{stage:>10}" for stage in stages)
    paper = "    paper: stage1    stage2" if published else ""
    lines += ["", f"{'firing rates in the blocks, outputs':36}{titles}{paper}"]
    for name, rates in block_rates(counter).items():
        cells = [f"{rates[stage]:10.4f}" if stage in rates else " " * 10 for stage in stages]
        if published and PAPER[name][0]:
            cells += [f"{PAPER[name][0]:17.4f}{PAPER[name][1]:10.4f}"]
        lines.append(f"{name:36}{''.join(cells)}".rstrip())

    lines += ["", "outputs by time step"]
    for stage in stages:
        steps = [rates for name, rates in step_rates(counter).items() if stage_of(name) == stage]
        if steps:
            means = [math.fsum(values) / len(steps) for values in zip(*steps, strict=True)]
            lines.append(f"{stage:10}" + "".join(f"{mean:8.4f}" for mean in means))
    silent = [name for name, tally in counter.neurons.items() if tally.rate == 0]
    more = f" and {len(silent) - 5} more" if len(silent) > 5 else ""
    named = f"silent layers: {len(silent)} of {len(counter.neurons)}: {', '.join(silent[:5])}"
    usual = "; before training it is usual that attn_lif and what reads it are among them"
    lines += [named + more + usual, ""] if silent else [""]
    total = sums["all"]
    for stage in stages:
        share = sums[stage].energy / total.energy if total.energy else 0
        bar = "█" * round(40 * share)
        lines.append(f"{stage} {bar:40} {sums[stage].energy:.4g} mJ, {100 * share:.0f} %")
    head = math.fsum(row.energy for row in rows if row.stage == "head")
    times = f"{total.ann / total.energy:.2f} x as much" if total.energy else "against nothing"
    return [
        *lines,
        f"energy: {total.energy:.4g} mJ an image, the mean of {counter.images:,}; T = {counter.T}, "
        f"{number(total.macs)} MACs a step, {number(total.sops)} SOPs",
        f"ANN equivalent: {total.ann:.4g} mJ, {times}; in 8 bits {total.ann * MAC8 / MAC:.4g} mJ; "
        f"not in these: the head, {head:.2g} mJ",
        f"by NeuroBench's and spikingjelly's rule: {total.counters:.4g} mJ, "
        f"{number(total.effective_acs)} effective "
        f"ACs, {number(total.effective_macs)} effective MACs",
        f"not in these: memory, {total.memory:.4g} mJ for weights, "
        f"{membranes(counter):.4g} mJ for membranes",
        f"activation sparsity {sparsity(counter):.4f}, footprint {footprint(counter.model):,} B",
    ]


def step_rates(counter):
    """{neuron: [mean output at each time step]}."""
    return {
        name: (tally.steps * counter.T / tally.values).tolist()
        for name, tally in counter.neurons.items()
    }


def membranes(counter):
    """mJ an image for reading and writing 4 bytes of each neuron at each step."""
    return 8 * BYTE * sum(tally.values for tally in counter.neurons.values()) / counter.images


def sparsity(counter):
    """The share of the neurons' outputs that is 0."""
    tallies = counter.neurons.values()
    return 1 - sum(t.sums[1].item() for t in tallies) / sum(t.values for t in tallies)


def footprint(model):
    """Bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def number(value):
    """As in 1.23 G, with three digits."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:#.3g} {unit}".replace(". ", " ")
    return f"{value:.3g}"


def measure(modules, tested) -> Counter:
    """A Counter of the test set; `tested` is of a folder's harness/build.py."""
    loader, autocast = models.test_batches(modules, tested)
    with torch.compiler.set_stance("force_eager"), Counter(tested.model) as counter:
        modules.meters.evaluate(tested.model, loader, tested.ranks, autocast)
    return counter


def report(counter, path):
    """Print what was counted; write it to energy-NAME.csv and .json beside NAME.pth at `path`."""
    rows = count(counter)
    sums = add_up(rows)
    print("\n".join(describe(counter, rows, sums)))
    result = {
        "checkpoint": str(path),
        "images": counter.images,
        "T": counter.T,
        "unit": "mJ an image",
        **sums["all"]._asdict(),
        "stages": {stage: sums[stage]._asdict() for stage in sums if stage != "all"},
        "ann_8_bits": sums["all"].ann * MAC8 / MAC,
        "membranes": membranes(counter),
        "sparsity": sparsity(counter),
        "footprint": footprint(counter.model),
        "neurons": {name: tally.rate for name, tally in counter.neurons.items()},
        "steps": step_rates(counter),
        "blocks": block_rates(counter),
        "layers": [row._asdict() for row in rows],
    }
    table = path.with_name(f"energy-{path.stem}.csv")
    try:
        table.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        with open(table, "w", newline="") as file:
            csv.writer(file).writerows([Row._fields, *rows])
    except OSError as error:
        raise SystemExit(f"error: {table} can't be written: {error.strerror}") from None
    print(f"written: {table} and .json")


def main(argv=None):
    argv, flags = models.split(argv)
    args = models.checkpoint_parser(__doc__).parse_args(argv)
    modules, tested = models.open_checkpoint(args.checkpoint, args.folder, flags)
    with models.one_line(modules):
        report(measure(modules, tested), tested.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
