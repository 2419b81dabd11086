"""Layers whose modules are edited between two calls, or do not fit: what the fused path remembers of
them is what they are, and PyTorch's errors stay PyTorch's.
"""

import copy
import gc
import weakref

import pytest
import torch
from spikingjelly.activation_based import surrogate
from torch import nn

from test_layer import KINDS, cifar10, compiled, layer, lif, make_layer, models, whole_numbers

# What a user may change of the modules between two calls: (convolution, BatchNorm, neuron).
CHANGES = {
    "threshold": lambda conv, bn, node: setattr(node, "v_threshold", 0.4),
    "threshold in place": lambda conv, bn, node: node.v_threshold.fill_(0.4),
    "tau": lambda conv, bn, node: setattr(node, "tau", 3.0),
    "alpha": lambda conv, bn, node: setattr(node.surrogate_function, "alpha", 1.5),
    "surrogate": lambda conv, bn, node: setattr(node, "surrogate_function", surrogate.ATan()),
    "soft reset": lambda conv, bn, node: setattr(node, "v_reset", None),
    "eps": lambda conv, bn, node: setattr(bn, "eps", 0.5),
    "momentum": lambda conv, bn, node: setattr(bn, "momentum", 0.7),
    "cumulative": lambda conv, bn, node: setattr(bn, "momentum", None),
    "frozen": lambda conv, bn, node: bn.eval(),
    "written": lambda conv, bn, node: conv.weight.data.mul_(-2.0),
    "replaced": lambda conv, bn, node: setattr(bn, "weight", nn.Parameter(2 * bn.weight.detach())),
    "buffer": lambda conv, bn, node: setattr(bn, "running_mean", bn.running_mean + 1.0),
    "bias": lambda conv, bn, node: setattr(conv, "bias", None),
    "padding": lambda conv, bn, node: setattr(conv, "padding", (1, 1)),
    "stride": lambda conv, bn, node: setattr(conv, "stride", [2, 2]),
    "hook": lambda conv, bn, node: bn.register_forward_hook(lambda module, args, y: y + 0.5),
    "forward": lambda conv, bn, node: setattr(bn, "forward", lambda y: 0.5 * y),
}


@compiled
@pytest.mark.parametrize("name", CHANGES)
def test_changes_between_calls(name):
    """Nothing is kept from one call to the next that a change would make wrong."""
    torch.manual_seed(3)
    x, found = torch.randn(4, 3, 12, 8, 6, dtype=torch.float64), []
    for on in (True, False):
        modules, _ = make_layer("1x1", torch.float64, fused=on)
        if name == "threshold in place":
            modules[2].v_threshold = torch.tensor(1.0)
        results = []
        for change in (lambda *_: None, CHANGES[name], None):
            change(*modules) if change else modules.eval()
            leaf = x.clone().requires_grad_()
            with torch.set_grad_enabled(modules.training):
                spikes = layer.conv_bn_lif(leaf, *modules)
            if modules.training:
                spikes.backward(torch.linspace(-1, 1, spikes.numel()).view_as(spikes).double())
            results += [spikes, leaf.grad, *(buffer.clone() for buffer in modules.buffers())]
        found.append(results)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


# More of them, some of which no layer can compute.
EDITS = CHANGES | {
    "weight": lambda conv, bn, node: setattr(
        conv, "weight", nn.Parameter(conv.weight.detach() + 1)
    ),
    "batches": lambda conv, bn, node: setattr(
        bn, "num_batches_tracked", bn.num_batches_tracked.clone()
    ),
    "no running mean": lambda conv, bn, node: setattr(bn, "running_mean", None),
    "stride": lambda conv, bn, node: setattr(conv, "stride", (2, 2)),
    "groups": lambda conv, bn, node: setattr(conv, "groups", 2),
    "padding mode": lambda conv, bn, node: setattr(conv, "padding_mode", "circular"),
    "another class": lambda conv, bn, node: setattr(
        conv, "__class__", type("Own", (nn.Conv2d,), {})
    ),
    "its forward": lambda conv, bn, node: setattr(conv, "forward", conv.forward),
    "hook before": lambda conv, bn, node: node.register_forward_pre_hook(lambda *_: None),
    "hook behind": lambda conv, bn, node: conv.register_full_backward_hook(lambda *_: None),
    "membrane": lambda conv, bn, node: setattr(node, "v", 1.0),
    "membrane, many": lambda conv, bn, node: setattr(node, "v", torch.zeros(3)),
    "not detached": lambda conv, bn, node: setattr(node, "detach_reset", False),
    "decay": lambda conv, bn, node: setattr(node, "decay_input", False),
    "kept": lambda conv, bn, node: setattr(node, "store_v_seq", True),
    "own surrogate": lambda conv, bn, node: setattr(
        node.surrogate_function, "__class__", type("Own", (surrogate.Sigmoid,), {})
    ),
    "no spikes": lambda conv, bn, node: setattr(node.surrogate_function, "spiking", False),
    "memory": lambda conv, bn, node: setattr(node, "memory", "small"),
    "events": lambda conv, bn, node: setattr(node, "events", False),
    "not fused": lambda conv, bn, node: setattr(node, "fused", False),
    "backend": lambda conv, bn, node: setattr(node, "backend", "torch"),
}
LOOKED_AT = [name for name in EDITS if name not in ("written", "threshold in place")]


@pytest.mark.parametrize("edit", LOOKED_AT)
def test_edits_are_seen(edit):
    """What is remembered of modules is what looking at them again finds, after any edit."""
    edited = [[module] for module in make_layer("1x1", torch.float32)[0]]
    before = cifar10.fusible.remember(*edited)
    assert before is not None and cifar10.fusible.remember(*edited) is before
    EDITS[edit](*(module for (module,) in edited))
    got, want = cifar10.fusible.remember(*edited), cifar10.fusible.look(*edited)
    assert (got is None) == (want is None) and got is not before
    if want is not None:
        assert got[0] == want[0]
        for one, other in zip(got[1][0], want[1][0], strict=True):
            assert one is other


@compiled
@pytest.mark.parametrize("edit", ["meta", "double", "int32", "float"])
def test_what_no_kernel_can_read(edit):
    """A weight elsewhere or of another type is PyTorch's matter; counters of other types count."""
    x = torch.randn(4, 3, 12, 8, 6)
    modules, plain = (make_layer("1x1", torch.float32, fused=on)[0] for on in (True, False))
    for conv, bn, _ in (modules, plain):
        conv.bias = None
        if edit in ("meta", "double"):
            conv.weight = nn.Parameter(conv.weight.to(edit if edit == "meta" else torch.double))
        else:
            bn.num_batches_tracked = torch.tensor([-1, 0], dtype=getattr(torch, edit))[0]
    if edit == "meta":
        assert not layer.can_fuse(x, *([module] for module in modules))
    elif edit == "double":
        with pytest.raises(RuntimeError):
            layer.conv_bn_lif(x, *modules)
    else:
        spikes, want = (layer.conv_bn_lif(x, *each) for each in (modules, plain))
        assert torch.equal(spikes, want)
        assert modules[1].num_batches_tracked == plain[1].num_batches_tracked == 0


def test_another_neuron_is_seen():
    one, other = ([[m] for m in make_layer("1x1", torch.float32)[0]] for _ in range(2))
    other[2][0].v_threshold = 0.25
    before = cifar10.fusible.remember(*one)
    got, _ = cifar10.fusible.remember(*one[:2], other[2])
    assert got != before[0] and got.neuron.v_threshold == 0.25


@pytest.mark.parametrize(
    "edit", [{"track_running_stats": False}, {"num_batches_tracked": None}, {"bias": None}], ids=str
)
def test_an_unusual_batch_norm(edit):
    """Its running statistics move, or stay, as they do where modules are called."""
    found, x = [], torch.randn(2, 3, 8, 5, 5)
    for fused in (False, True):
        torch.manual_seed(0)
        conv, bn = nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)
        for name, value in edit.items():
            setattr(bn, name, value)
        spikes = layer.conv_bn_lif(x, conv, bn, lif.MultiStepLIF(fused=fused))
        found.append([spikes, bn.running_mean, bn.running_var])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_patched_class_is_seen(monkeypatch):
    modules = [[module] for module in make_layer("1x1", torch.float32)[0]]
    assert cifar10.fusible.remember(*modules) is not None
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: x)
    assert cifar10.fusible.remember(*modules) is None


def test_what_is_remembered_keeps_no_shared_module():
    conv, bn, node = make_layer("1x1", torch.float32)[0]
    x, others = torch.rand(2, 2, conv.in_channels, 4, 4), (copy.deepcopy(bn), node)
    held = weakref.ref(conv)
    layer.conv_bn_lif_each(x, (conv, bn, node), (conv, *others))
    del conv
    gc.collect()
    assert held() is None


def test_what_is_remembered_keeps_no_model():
    model = models.QKFormer(T=1, embed_dims=32, num_heads=2, depths=3)
    model(torch.rand(2, 3, 8, 8))
    held = weakref.ref(model.stage1[0].mlp.mlp1_conv), weakref.ref(model.stage3[0].ssa.q_conv)
    assert held[0]() in cifar10.fusible.found_of
    del model
    gc.collect()
    assert [found() for found in held] == [None, None]


@pytest.mark.parametrize("channels", [1, 12, 36])
def test_a_batchnorm_of_other_channels(channels):
    """PyTorch's own error, as where the modules are called."""
    conv, bn, node = nn.Conv2d(12, 24, 1), nn.BatchNorm2d(channels), lif.MultiStepLIF()
    for train in (True, False):
        bn.train(train)
        with torch.set_grad_enabled(train), pytest.raises(RuntimeError, match=f"not {channels}"):
            layer.conv_bn_lif(torch.rand(4, 2, 12, 6, 6), conv, bn, node)


def test_a_batchnorm_on_another_device():
    """As one that was put in after the model had been moved."""
    (conv, bn, node), _ = make_layer("1x1", torch.float32)
    for train in (True, False):
        with torch.set_grad_enabled(train), pytest.raises((RuntimeError, NotImplementedError)):
            layer.conv_bn_lif(torch.rand(4, 2, 12, 6, 6), conv, bn.train(train).to("meta"), node)


@pytest.mark.parametrize("channels", [8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_an_input_of_other_channels(kind, channels):
    """PyTorch's own error, where convolutions are sums of events too."""
    modules, pool = make_layer(kind, torch.float32)
    x = (torch.rand(4, 2, channels, 6, 6) > 0.5).float()
    for train in (True, False):
        modules.train(train)
        with (
            torch.set_grad_enabled(train),
            pytest.raises(RuntimeError, match=f"{channels} channels"),
        ):
            layer.conv_bn_lif(x, *modules, pool=pool)


@pytest.mark.parametrize("pool", [False, True])
def test_an_input_smaller_than_the_kernel(pool):
    conv, bn, node = nn.Conv2d(12, 24, 3), nn.BatchNorm2d(24), lif.MultiStepLIF()
    for train in (True, False):
        bn.train(train)
        with (
            torch.set_grad_enabled(train),
            pytest.raises((RuntimeError, ValueError), match="ernel"),
        ):
            layer.conv_bn_lif(torch.ones(4, 2, 12, 2, 8), conv, bn, node, pool=pool)


def test_products_of_other_sizes():
    head = nn.Linear(12, 5).eval()
    a, b = torch.ones(2, 1, 3, 4, 8), torch.ones(2, 1, 3, 6, 5)
    with torch.no_grad():
        for function, *args in (
            (layer.linear, torch.ones(3, 16), head),
            (layer.linear, torch.ones(3, 8), head),
            (cifar10.spikes.matmul, a, b, lif.MultiStepLIF()),
            (cifar10.spikes.matmul, a[..., :4], b, lif.MultiStepLIF()),
        ):
            with pytest.raises(
                RuntimeError, match=r"cannot be multiplied|Expected size|size mismatch"
            ):
                function(*args)


def test_a_weight_of_another_size():
    """The convolution is that of the weight; kernel_size says nothing."""
    (conv, bn, node), _ = make_layer("1x1", torch.float32)
    conv.weight, x = nn.Parameter(torch.randn(24, 12, 3, 3)), torch.randn(4, 2, 12, 6, 6)
    spikes = layer.conv_bn_lif(x, conv, bn, node)
    node.fused = False
    want = layer.conv_bn_lif(x, conv, bn, node)
    assert spikes.shape == want.shape and (spikes != want).float().mean() < 1e-3


# What a fused layer must leave to modules ---------------------------------------------------------


def test_a_head_with_hooks_or_of_its_own():
    """A hook sees the batch once, as one tensor; another module gets it whole."""
    head, seen = nn.Linear(12, 5).eval(), []
    x = torch.rand(4, 12)
    with torch.no_grad():
        want = head(x)
        torch.testing.assert_close(layer.linear(x, head), want)
        head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        assert torch.equal(layer.linear(x, head), want) and seen == [want.shape]
        assert torch.equal(layer.linear(x, nn.Softmax(0)), x.softmax(0))


@compiled
def test_the_gradient_of_each_step_of_an_image():
    """Where it is asked for; else the first step's may stand for their sum."""
    image = torch.rand(2, 12, 6, 4, dtype=torch.float64)
    for run in ("layer", "neuron"):
        found = []
        for fused in (True, False):
            modules, _ = make_layer("1x1", torch.float64, fused=fused)
            x = image.expand(4, *image.shape).requires_grad_()
            y = layer.conv_bn_lif(x, *modules) if run == "layer" else modules[2](x)
            (y * torch.arange(1.0, 5)[:, None, None, None, None]).sum().backward()
            found.append(x.grad)
        torch.testing.assert_close(*found)


@compiled
def test_rates_of_several_channels():
    """A PLIF whose w is not one number is the plain one's."""
    x, found = whole_numbers(torch.float64), []
    for fused in (True, False):
        modules, _ = make_layer("1x1", torch.float64)
        node = modules[2] = lif.MultiStepPLIF(fused=fused).double()
        node.w = nn.Parameter(torch.linspace(-1, 1, 6).double())
        with torch.no_grad():
            found.append((layer.conv_bn_lif(x, *modules), node(x)))
    assert all(map(torch.equal, *found))


@compiled
def test_constants_that_are_parameters():
    """They may change in place, so nothing is remembered."""
    (conv, bn, node), _ = make_layer("1x1", torch.float64)
    x = whole_numbers(torch.float64)
    node.__dict__.pop("tau")
    node.tau = nn.Parameter(torch.tensor(2.0))
    with torch.no_grad():
        first, state = layer.conv_bn_lif(x, conv, bn, node), bn.state_dict()
        node.tau.fill_(8.0)
        spikes = layer.conv_bn_lif(x, conv, bn, node)
        bn.load_state_dict(state)
        assert torch.equal(spikes, layer.conv_bn_lif(x, conv, bn, lif.MultiStepLIF(8.0)))
    assert not torch.equal(first, spikes)


def test_tensors_without_memory_and_global_backward_hooks():
    with torch.no_grad():
        assert not lif.MultiStepLIF()(torch._efficientzerotensor((4, 3))).any()
    modules = [[module] for module in make_layer("1x1", torch.float32)[0]]
    handle = nn.modules.module.register_module_full_backward_pre_hook(lambda *_: None)
    try:
        assert not layer.can_fuse(whole_numbers(torch.float32), *modules)
    finally:
        handle.remove()
