"""Does a sample's output depend on the other samples of its batch? For any torch model.

Usage, from anywhere; this file runs on torch alone, so a copy of it will do:
    python leak.py FILE.py:FACTORY                                # images, 4 3 224 224
    python leak.py FILE.py:FACTORY --input 8 3 32 32
    python leak.py FILE.py:FACTORY --input 4 8 2 64 64 --time-first   # T = 4 steps, 8 samples
    python leak.py "FILE.py:Net(depth=2).load('best.pth')"        # any expression of FILE's names

In evaluation, outputs are compared while one sample after another is exchanged (companions), the
batch is turned round (order), its last sample is left out and its first is alone (size), and the
batch is seen twice (state). In training, with BatchNorm evaluating and random numbers repeated,
samples are exchanged again: what mixes there is not BatchNorm.

Every pass runs on a copy of the model. What differs is looked at again in float64, where the model
can compute in that, so that it is not rounding. An untrained model is woken first, so that spikes
reach all of it: a BatchNorm that never saw a batch gets a random scale and shift, and its
statistics from the inputs. No leak is found in a module that no change reaches; they are named.

Where samples mix: hooks see every module's inputs and outputs. An index of a dimension that changes
with two samples is mixed. The first module whose inputs are not and whose output is, is named.

Exit code: 0 no leak, 1 a leak, 2 it can't be told; one line says which.
"""

import argparse
import copy
import importlib.util
import random
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm

SEED = 0


class Unclear(Exception):
    """Why it can't be told whether a model leaks."""


class Leak(NamedTuple):
    """What `leaks` found; str() of it is a sentence."""

    mode: str  # "evaluation" or "training"
    checks: tuple  # of companions, order, size, state: with what a sample's output changes
    change: float  # largest, of a sample's output
    relative: float  # to the largest output
    module: str  # that mixes first; "" where none can be named, "the model" for its own forward
    kind: str  # its class
    shape: tuple  # of its input
    dimension: int | None  # of its input, in which it mixes
    share: float  # of its output for other samples that one sample changes

    def __str__(self):
        *most, last = self.checks
        names = {
            "companions": "its companions",
            "order": "their order",
            "size": "the batch's size",
            "state": "the batch seen before",
        }
        with_what = " and ".join(filter(None, [", ".join(names[c] for c in most), names[last]]))
        amount = f"by up to {self.change:.3g} ({100 * self.relative:.3g} % of the largest output)"
        line = f"in {self.mode}, a sample's output changes {amount} with {with_what}"
        if self.module:
            what = "keeps its state" if self.checks == ("state",) else "mixes samples"
            line += f"; the first module that {what} is {self.module} ({self.kind})"
        if self.dimension is not None:
            line += f", in dimension {self.dimension} of its input {list(self.shape)}"
            line += f": one sample changes {100 * self.share:.0f} % of what the others get"
        return line


def leaks(model: torch.nn.Module, inputs: torch.Tensor, time_first: bool = False) -> list[Leak]:
    """What makes a sample's output depend on more than the sample; empty: nothing was found.

    Args:
        model: called with `inputs`; it is not changed. In training mode as a whole, it is put in
            evaluation; otherwise its modules stay as they are, also one left in training.
        inputs: a batch of two or more samples, different ones: [B, ...].
        time_first: the inputs are [T, B, ...].

    Raises Unclear where the output does not change with its own sample, or has no samples.
    """
    with torch.random.fork_rng(), torch.no_grad():
        if not Search(model, inputs, time_first).run(name=False):
            return []
        return Search(*in_float64(model, inputs), time_first).run()


def unreached(model: torch.nn.Module, inputs: torch.Tensor, time_first: bool = False) -> list[str]:
    """Names of modules, in evaluation, whose inputs do not change with any of the samples."""
    with torch.random.fork_rng(), torch.no_grad():
        search = Search(model, inputs, time_first)
        calls, other = traced(search.model, inputs), traced(search.model, search.other)
        pairs = [(a, b) for a, b in zip(calls, other, strict=False) if a.inputs]
        alive = {a.name for a, b in pairs if not same(a.inputs, b.inputs)}
        return [*dict.fromkeys(a.name for a, _ in pairs if a.name not in alive)]


class Search:
    """The checks, one after another. Passes run on copies of the model."""

    def __init__(self, model, inputs, time_first):
        self.dim = 1 if time_first else 0
        self.size = inputs.shape[self.dim]
        if self.size < 2:
            raise Unclear(f"inputs {list(inputs.shape)} hold {self.size} sample; give two or more")
        self.model, self.inputs = copy.deepcopy(model), inputs
        self.precision = 1e-9 if inputs.dtype == torch.float64 else 1e-6
        wake(self.model, inputs)
        if self.model.training:
            self.model.eval()
        if self.inputs.is_floating_point():
            noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(SEED))
            self.other = noise.to(inputs) * inputs.std() + inputs.mean()
        else:
            self.other = inputs.flip(self.dim)
        self.exchanged = []  # the batch with sample b exchanged
        for b in range(self.size):
            batch = self.inputs.clone()
            batch.select(self.dim, b).copy_(self.other.select(self.dim, b))
            self.exchanged.append(batch)

    def run(self, name=True):
        """[Leak]; with name=False without the modules, in less time."""
        self.name = name
        self.here = self.outputs(self.inputs)
        found = [self.state(), self.evaluation()]
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        self.here = self.outputs(self.inputs)
        found = [leak for leak in (*found, self.mixing("training", {})) if leak]
        if len(found) > 1 and found[-1].module == found[-2].module:
            found[-2:] = [found[-2]._replace(mode=f"{found[-2].mode} and training")]
        return found

    def samples(self, output, size=None):
        """[B, ...] of an output: all that belongs to each sample."""
        size = size or self.size
        if not (rows := [rows_of(x, size, self.dim) for x in tensors(output)]):
            raise Unclear("the output holds no tensor")
        if None in rows:
            raise Unclear(f"the output has no dimension with {size} samples")
        return torch.cat(rows, 1)

    def outputs(self, batch, model=None):
        return self.samples(call(model or copy.deepcopy(self.model), batch), batch.shape[self.dim])

    def state(self):
        """A Leak where the same batch gives something else the second time."""
        model = copy.deepcopy(self.model)
        first, second = (self.outputs(self.inputs, model) for _ in range(2))
        change, relative = difference(first, second)
        if relative <= self.precision:
            return None
        model = copy.deepcopy(self.model)
        once, twice = (traced(model, self.inputs) if self.name else [] for _ in range(2))
        for seen, again in zip(once, twice, strict=False):  # in the order of the calls' ends
            if same(seen.inputs, again.inputs) and not same(seen.outputs, again.outputs):
                where = (seen.name, seen.kind, seen.shape, None, 0.0)
                return Leak("evaluation", ("state",), change, relative, *where)
        return Leak("evaluation", ("state",), change, relative, "", "", (), None, 0.0)

    def evaluation(self):
        here, others = self.here, {}
        backwards = self.outputs(self.inputs.flip(self.dim)).flip(0)
        others["order"] = difference(here, backwards)
        for count in {1, self.size - 1}:
            fewer = self.outputs(self.inputs.narrow(self.dim, 0, count))
            others["size"] = max(others.get("size", (0, 0)), difference(here[:count], fewer))
        return self.mixing("evaluation", others)

    def mixing(self, mode, others):
        """A Leak of the model in its present mode; `others`: {check: (change, relative)}."""
        here, changes = self.here, {}
        for b, batch in enumerate(self.exchanged):
            there = self.outputs(batch)
            rest = [i for i in range(self.size) if i != b]
            changes[b] = difference(here[rest], there[rest])
            if torch.equal(here[b], there[b]) and mode == "evaluation":
                why = "so nothing can be told: give trained weights, or larger inputs"
                raise Unclear(f"the output of sample {b} is the same for another input, {why}")
        found = {"companions": max(changes.values()), **others}
        checks = tuple(name for name, (_, rel) in found.items() if rel > self.precision)
        if not checks:
            return None
        amount = max(found[name] for name in checks)
        return Leak(mode, checks, *amount, *self.where())

    def where(self):
        """(module, class, shape of its input, dimension, share) of the first that mixes."""
        if not self.name:
            return "", "", (), None, 0.0
        traces = [traced(copy.deepcopy(self.model), x) for x in (self.inputs, *self.exchanged)]
        for here, *others in zip(*traces, strict=False):  # in the order in which calls end
            inputs = [changed(here.inputs, there.inputs) for there in others]
            outputs = [changed(here.outputs, there.outputs) for there in others]
            if all(map(separate, zip(*inputs, strict=True))) and not all(
                map(separate, zip(*outputs, strict=True))
            ):
                return here.name, here.kind, here.shape, *self.extent(here, inputs, outputs)
        return "", "", (), None, 0.0

    def extent(self, here, inputs, outputs):
        """(dimension of the input in which samples are apart, share of the others' indices there
        that change with one sample).
        """
        tensors = [*zip(*inputs, strict=True)]
        alive = [t for t in tensors if any(any(map(len, dims)) for dims in t)]
        dims = dimensions(alive[0]) if alive else []
        if not dims or len(here.inputs) > 1 or len(outputs[0][0]) <= dims[0]:
            return (dims[0] if dims else None), 0.0
        d, total = dims[0], len(here.outputs[0][dims[0]])
        shares = []
        for before, after in zip(inputs, outputs, strict=True):
            own, reached = before[0][d], after[0][d]
            shares.append(len(reached - own) / max(total - len(own), 1))
        return d, max(shares)


class Call(NamedTuple):
    """One call of a module: prints of the tensors that went in and came out."""

    name: str
    kind: str
    shape: tuple
    inputs: list
    outputs: list


def traced(model, batch):
    """[Call] of the modules of a model, in the order in which the calls end."""
    calls, open_calls, hooks = [], [], []

    def before(module, args, kwargs):
        seen = [*tensors((args, kwargs))]
        shape = tuple(seen[0].shape) if seen else ()
        open_calls.append((shape, [*map(prints, seen)]))

    def after(name):
        def hook(module, args, kwargs, output):
            out = [*map(prints, tensors(output))]
            calls.append(Call(name, type(module).__name__, *open_calls.pop(), out))

        return hook

    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hook = after(name or "the model's own forward")
        hooks.append(module.register_forward_hook(hook, with_kwargs=True))
    call(model, batch)
    for hook in hooks:
        hook.remove()
    return calls


def call(model, batch):
    torch.manual_seed(SEED)
    random.seed(SEED)
    return model(batch.clone())


def tensors(value):
    """The tensors in a tensor, or in lists, tuples and dicts of such."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors([*value.values()])


def prints(x):
    """For every dimension of x a number for each index: a sum over all else, with random weights,
    which stays the same only if all of the slice does.
    """
    y = x.detach().nan_to_num() if x.is_floating_point() else x.detach().double()
    weights, sums = [], []
    for size in x.shape:
        generator = torch.Generator().manual_seed(size)
        weights.append(torch.rand(size, generator=generator, dtype=torch.float64).to(y))
    for d in reversed(range(x.dim())):
        before = y.new_ones(1)  # the weights of all dimensions before d; those behind are summed
        for weight in weights[:d]:
            before = torch.outer(before, weight).flatten()
        y = y.reshape(len(before), x.shape[d])
        sums.insert(0, (before @ y).cpu())
        y = y @ weights[d]
    return sums


def changed(ours, theirs):
    """For every tensor and dimension the set of indices at which two prints differ."""
    result = []
    for x, y in zip(ours, theirs, strict=True):
        pairs = [(a - b).abs() > 1e-9 * a.abs().max() for a, b in zip(x, y, strict=True)]
        result.append([set(pair.nonzero().flatten().tolist()) for pair in pairs])
    return result


def same(ours, theirs):
    return not any(any(dims) for dims in changed(ours, theirs))


def dimensions(sets):
    """The dimensions in which samples are apart; `sets`: for each, changed indices by dimension."""
    apart = []
    for d, of_samples in enumerate(zip(*sets, strict=True)):
        if sum(map(len, of_samples)) == len(set().union(*of_samples)):
            apart.append(d)
    return apart


def separate(sets):
    """Whether samples are apart in a tensor: it may have no dimension where it does not change."""
    return bool(dimensions(sets)) or not any(map(any, sets))


def rows_of(x, size, dim):
    """An output as [B, ...]; None where no dimension holds the samples."""
    for d in (dim, 0, *range(x.dim())):
        if d < x.dim() and x.shape[d] == size:
            return x.movedim(d, 0).reshape(size, -1).double()
    if x.dim() and x.shape[0] % size == 0:  # T*B, or B*T
        x = x.unflatten(0, (-1, size)).transpose(0, 1) if dim else x.unflatten(0, (size, -1))
        return x.reshape(size, -1).double()
    return None


def difference(x, y):
    """(largest difference, its share of the largest value)."""
    change = (x - y).abs().max().item()
    return change, change / max(x.abs().max().item(), 1e-30)


def in_float64(model, inputs):
    """A copy of a model, and inputs, in float64; as they are where it can't compute in that."""
    try:
        double = copy.deepcopy(model).double()
        x = inputs.double() if inputs.is_floating_point() else inputs
        call(copy.deepcopy(double), x)
        return double, x
    except Exception:  # whatever a model says of a type that it does not know
        return model, inputs


def wake(model, inputs):
    """Give BatchNorms that never saw a batch scale, shift and, from the inputs, statistics."""
    bns = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    fresh = [bn for bn in bns if bn.num_batches_tracked == 0 and bn.running_mean.abs().max() == 0]
    if not fresh:
        return
    for bn in fresh:
        if bn.affine:
            bn.weight.copy_(1 + 2 * torch.rand(bn.num_features))
            bn.bias.copy_(1.5 * torch.rand(bn.num_features))
    known = copy.deepcopy(model)
    known.train()
    for module in known.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = None  # the mean of all batches, of which there is one
    call(known, inputs)
    statistics = dict(known.named_buffers())
    for name, module in model.named_modules():
        if any(module is bn for bn in fresh):
            for buffer in ("running_mean", "running_var", "num_batches_tracked"):
                getattr(module, buffer).copy_(statistics[f"{name}.{buffer}".lstrip(".")])


def build(text):
    """The model of FILE.py:EXPRESSION; a function or class is called."""
    path, _, expression = text.partition(".py:")
    path = Path(f"{path}.py").resolve()
    if not expression or not path.is_file():
        raise Unclear(f"{text}: not FILE.py:FACTORY, or there is no such file")
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = eval(expression, vars(module))
    model = model if isinstance(model, torch.nn.Module) else model()
    if not isinstance(model, torch.nn.Module):
        raise Unclear(f"{expression} makes a {type(model).__name__}, not a torch.nn.Module")
    return model


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="FILE.py:FACTORY")
    parser.add_argument(
        "--input",
        type=int,
        nargs="+",
        default=[4, 3, 224, 224],
        metavar="N",
        help="shape of the inputs, the batch first (default: 4 3 224 224)",
    )
    parser.add_argument("--time-first", action="store_true", help="the input is [T, B, ...]")
    args = parser.parse_args(argv)
    torch.manual_seed(SEED)
    try:
        model, inputs = build(args.model), torch.randn(args.input)
        found = leaks(model, inputs, args.time_first)
    except Exception as error:  # of the model, its file or its input
        reason = str(error).strip().splitlines() or [type(error).__name__]
        print(f"can't tell: {reason[0]}", file=sys.stderr)
        return 2
    if found:
        print("\n".join(f"leak: {leak}" for leak in found))
        return 1
    names = unreached(model, inputs, args.time_first)
    rest = f"; nothing reaches, so nothing is known of: {', '.join(names)}" if names else ""
    print(f"no leak: a sample's output is its own, in evaluation and in training{rest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
