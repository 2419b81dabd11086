"""Bytes that a training step moves and saves, counted operator by operator; `bench.py --bytes`
prints them.

Moved: every tensor that an operator of PyTorch reads or writes, forward and backward, once per
operator, but what BatchNorm normalises twice, since its sums come first; views move nothing. Saved:
what autograd keeps from the forward for the backward pass, parameters left out. Both are counted
under bfloat16 autocast on a CPU, where tensors have the sizes of float16 autocast on a GPU. A
neuron is one operator here as it is one kernel there: the release's reads its input and writes
spikes, membranes before and after the reset; ours writes spikes and recomputes the membranes.
"""

import functools

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models

MB = 2**20
NORMALISING = [
    f"aten::{kind}_batch_norm{way}" for kind in ("native", "cudnn") for way in ("", "_backward")
]


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Within it, `total` grows by the bytes that autograd saves, each memory once, the model's
    parameters left out.
    """

    def __init__(self, model):
        self.known = {parameter.data_ptr() for parameter in model.parameters()}
        self.total = 0
        self.kept = []  # so that no memory is used again, and then taken for known

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.known:
                self.known.add(storage.data_ptr())
                self.kept.append(storage)
                self.total += storage.nbytes()
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    def __enter__(self):
        super().__enter__()
        return self

    def __exit__(self, *args):
        super().__exit__(*args)
        self.kept.clear()


class Moved(TorchDispatchMode):
    """Within it, `total` grows by the bytes that operators read and write."""

    counts_kernels = True  # layers may go on running fused

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.total += moved(operator, args, kwargs, result)
        return result


def moved(operator, args, kwargs, result):
    """Bytes that a call of an operator reads and writes; 0 where it only makes a view or claims
    memory.
    """
    name, schema = operator.name(), operator._schema
    if any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
        return 0
    if name.startswith(("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view")):
        return 0
    twice = args if name in NORMALISING else ()
    tensors = tree_leaves((args, kwargs, result, twice))
    if not schema.returns:  # it writes to arguments
        tensors += [
            arg
            for place, arg in zip(schema.arguments, args, strict=False)
            if place.alias_info is not None and place.alias_info.is_write
        ]
    return sum(size(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor))


def size(tensor):
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@torch.library.custom_op("qkformer_bench::neuron", mutates_args=())
def neuron(
    x: torch.Tensor, tau: float, v_threshold: float, membranes: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Spikes, and the membranes before and after the reset, or nothing in their place."""
    h, v = torch.empty_like(x), torch.zeros_like(x)
    for t in range(len(x)):
        before = v[t - 1] if t else torch.zeros_like(x[0])
        h[t] = before + (x[t] - before) / tau
        v[t] = h[t].masked_fill(h[t] >= v_threshold, 0.0)
    spikes = (h >= v_threshold).to(x.dtype)
    return (spikes, h, v) if membranes else (spikes, x.new_empty(0), x.new_empty(0))


@torch.library.custom_op("qkformer_bench::neuron_backward", mutates_args=())
def neuron_backward(grad: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return grad + 0 * kept  # a gradient's size; its value is not looked at


@neuron.register_fake
def _(x, tau, v_threshold, membranes):
    return tuple(torch.empty_like(x) if i == 0 or membranes else x.new_empty(0) for i in range(3))


@neuron_backward.register_fake
def _(grad, kept):
    return torch.empty_like(grad)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[1] if inputs[3] else inputs[0])


def _backward(ctx, grad_spikes, grad_h, grad_v):
    return neuron_backward(grad_spikes.contiguous(), *ctx.saved_tensors), None, None, None


neuron.register_autograd(_backward, setup_context=_setup_context)


def parts(model):
    """(kind, module) for the parts of a model."""
    for name, module in model.named_children():
        if name.startswith("patch_embed"):
            yield name.replace("patch_embed", "SPEDS-"), module
        if name.startswith("stage"):
            for block in module:
                attention = next(
                    module
                    for key, module in block.named_children()
                    if key in ("tssa", "ssa", "attn")
                )
                yield f"{name} attention", attention
                yield f"{name} MLP", block.mlp


def inputs_of(model, x, spikes):
    """{part: (what it gets when the model runs on x, the largest value that is marked)}."""
    inputs, hooks = {}, []

    def record(module, args):
        inputs[module] = args[0].detach(), spikes.largest(args[0])

    for _, module in parts(model):
        hooks.append(module.register_forward_pre_hook(record))
    model(x)
    for hook in hooks:
        hook.remove()
    return inputs


def stand_in(model, neurons, spikes, function, names=""):
    """Neurons, those whose names end so, are function(x, tau, v_threshold)."""
    for name, node in model.named_modules():
        if isinstance(node, neurons) and name.endswith(names):
            node.multi_step_forward = lambda x, node=node: spikes.mark(
                function(x, node.tau, node.v_threshold)[0], 1 if node.fused else None
            )


def count(model, x, spikes):
    """{kind: [MB moved, MB saved]} of a training step, summed over the parts of that kind; `spikes`
    is the module.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inputs = inputs_of(model.train(), x, spikes)
    totals = {}
    for kind, module in parts(model):
        value, known = inputs[module]
        if value.stride(0) != 0 and kind != "SPEDS-1":  # the image needs no gradient
            value = spikes.mark(value.requires_grad_(), known)
        with Moved() as moved:
            with Saved(model) as saved, torch.autocast("cpu", dtype=torch.bfloat16):
                out = module(value)
            out.backward(torch.ones_like(out))
        entry = totals.setdefault(kind, [0.0, 0.0])
        entry[0] += moved.total / MB
        entry[1] += saved.total / MB
    return totals


def table(name, modules, x, T):
    """Rows {model, kind, path, moved_mb, saved_mb}, per image, of the release's way of computing
    and the fast one.
    """
    entry, spikes, rows = models.entry(name, modules), modules.spikes, []
    for path in ("release-like", "fast"):
        torch.manual_seed(0)
        model = entry(T=T, fused=path == "fast")
        membranes = path == "release-like"
        # A layer that is to run fused must keep its neuron as it is.
        names = "" if membranes else "attn_lif"
        function = functools.partial(neuron, membranes=membranes)
        stand_in(model, modules.neuron.MultiStepLIF, spikes, function, names)
        for kind, (moved, saved) in count(model, x, spikes).items():
            row = {
                "model": name,
                "kind": kind,
                "path": path,
                "moved_mb": moved / len(x),
                "saved_mb": saved / len(x),
            }
            rows.append(row)
    return rows


def print_table(rows):
    """MB per image, before (release-like) and after (fast)."""
    paths = {
        path: [row for row in rows if row["path"] == path] for path in ("release-like", "fast")
    }
    print(
        f"{rows[0]['model']:18}{'moved MB':>10}{'fast':>10}{'':8}{'saved MB':>10}{'fast':>10}   "
        f"per image"
    )
    pairs = list(zip(*paths.values(), strict=True))
    total = {
        path: {key: sum(row[key] for row in found) for key in ("moved_mb", "saved_mb")}
        for path, found in paths.items()
    }
    pairs.append(tuple({"kind": "all", **values} for values in total.values()))
    for before, after in pairs:
        text = f"{before['kind']:18}"
        for key in ("moved_mb", "saved_mb"):
            text += f"{before[key]:10.1f}{after[key]:10.1f}{100 * after[key] / before[key]:6.0f} %"
        print(text)
