"""The neurons LIF, IF and PLIF, and the slope of the surrogate gradient: formulas, backends, and
kernels on the host.
"""

import copy
import math
from functools import partial

import pytest
import torch
from spikingjelly.activation_based import functional, monitor, neuron, surrogate
from spikingjelly.activation_based.surrogate import S2NN
from torch import nn

import by_hand
from conftest import load
from on_gpus import stand_in

cifar10 = load("cifar10")
lif, native, kernels = cifar10.neuron, cifar10.native, cifar10.compiler
__all__ = ["stand_in"]  # a fixture
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
KINDS = list(lif.NEURONS)
TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
OTHERS = pytest.mark.parametrize(
    ("kind", "alpha"), [("if", 4.0), ("plif", 4.0), ("lif", 2.5), ("if", 7.0), ("plif", 1.5)]
)


def formula(kind, x, tau, v_threshold, alpha):
    """(spikes, dspikes / dx[j], dspikes / dw) of the neuron, a scalar at a time in Python floats.

    The derivatives go forward in time along with h and v, and so share nothing with backpropagation.
    """
    T, n = x.shape
    w = -math.log(tau - 1)
    rate = 1 / (1 + math.exp(-w))
    spikes = torch.zeros(T, n, dtype=torch.float64)
    by_x, by_w = torch.zeros(T, n, T, dtype=torch.float64), torch.zeros(T, n, dtype=torch.float64)
    for i in range(n):
        v, v_by_x, v_by_w = 0.0, [0.0] * T, 0.0
        for t in range(T):
            now = x[t, i].item()
            gain, keep = {"if": (1.0, 1.0), "lif": (1 / tau, 1 - 1 / tau)}.get(
                kind, (rate, 1 - rate)
            )
            h = keep * v + gain * now
            h_by_x = [keep * value for value in v_by_x]
            h_by_x[t] += gain
            h_by_w = keep * v_by_w + (now - v) * rate * (1 - rate)
            g = 1 / (1 + math.exp(-alpha * (h - v_threshold)))
            slope = alpha * g * (1 - g)
            spikes[t, i] = fired = float(h >= v_threshold)
            by_x[t, i] = torch.tensor([slope * value for value in h_by_x], dtype=torch.float64)
            by_w[t, i] = slope * h_by_w
            v, v_by_w = h * (1 - fired), h_by_w * (1 - fired)
            v_by_x = [value * (1 - fired) for value in h_by_x]
    return spikes, by_x, by_w


@pytest.mark.parametrize("backend", ["torch", "spikingjelly"])
@OTHERS
@pytest.mark.parametrize(
    ("T", "tau", "v_threshold"), [(1, 2.0, 1.0), (4, 2.0, 0.5), (19, 1.3, 1.0), (7, 3.7, 0.8)]
)
def test_formula(backend, kind, alpha, T, tau, v_threshold):
    torch.manual_seed(T)
    x = (2 * torch.randn(T, 40, dtype=torch.float64)).requires_grad_()
    grad = torch.randn(T, 40, dtype=torch.float64)
    spikes, by_x, by_w = formula(kind, x, tau, v_threshold, alpha)
    node = lif.NEURONS[kind](tau, v_threshold, backend, alpha=alpha).double()
    if kind == "plif":  # w is made in float32
        with torch.no_grad():
            node.w.fill_(-math.log(tau - 1))
    y = node(x)
    assert torch.equal(y, spikes) and 0 < spikes.mean() < 1
    y.backward(grad)
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(x.grad, torch.einsum("ti,tij->ji", grad, by_x), **close)
    if kind == "plif":
        torch.testing.assert_close(node.w.grad, (grad * by_w).sum(), **close)


def run(function, x, grad, w=None):
    """(spikes, gradient of x, gradient of w or 0) of function(x, w)."""
    leaf = x.detach().requires_grad_()
    w = None if w is None else w.detach().clone().requires_grad_()
    y = function(leaf, w)
    y.backward(grad)
    return y.detach(), leaf.grad, torch.zeros(()) if w is None else w.grad


@pytest.mark.parametrize("kind", ["if", "plif"])
@pytest.mark.parametrize("dtype", TYPES)
def test_against_spikingjelly(kind, dtype):
    """Its own nodes, multi-step, and our two backends, on a layer's worth of inputs."""
    torch.manual_seed(0)
    x, grad = (2 * torch.randn(5, 3, 4, 6)).to(dtype), torch.randn(5, 3, 4, 6).to(dtype)
    nodes = [lif.NEURONS[kind](1.7, 0.8, name, alpha=3.0) for name in ("torch", "spikingjelly")]
    options = {"surrogate_function": surrogate.Sigmoid(3.0), "detach_reset": True}
    theirs = neuron.IFNode(0.8, step_mode="m", **options)
    if kind == "plif":
        theirs = neuron.ParametricLIFNode(1.7, v_threshold=0.8, step_mode="m", **options)
    if dtype in (torch.float32, torch.float64):  # its membrane takes the type of the input
        nodes.append(theirs.to(dtype))
    if dtype == torch.float64:
        nodes = [node.double() for node in nodes]
    results = []
    for node in nodes:
        leaf = x.clone().requires_grad_()
        y = node(leaf)
        y.backward(grad)
        assert y.dtype == leaf.grad.dtype == dtype
        results.append([y.detach(), leaf.grad, *(p.grad for p in node.parameters())])
        assert len(results[0]) == (3 if kind == "plif" else 2)
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        torch.testing.assert_close(results[0][1:], other[1:], check_dtype=False)


@pytest.mark.parametrize(
    ("dtype", "real"), [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)]
)
def test_rate_is_computed_in_the_membranes_type(dtype, real):
    """For w in float32 and float64 input, or w and input in bfloat16."""
    torch.manual_seed(1)
    x = torch.randn(4, 500, dtype=real).to(dtype).to(real)
    node = lif.MultiStepPLIF(1.9).to(dtype)
    exact = copy.deepcopy(node).to(real)
    y, want = (n(x.to(n.w.dtype) if real == torch.float32 else x) for n in (node, exact))
    y.sum().backward()
    want.sum().backward()
    assert torch.equal(y.to(real), want) and node.w.grad.dtype == node.w.dtype == dtype
    torch.testing.assert_close(node.w.grad, exact.w.grad.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_is_what_it_says(kind):
    node = lif.NEURONS[kind](1.7, 0.8, "torch", alpha=3.0)
    assert node.kind == kind and node.alpha == 3.0 and node.v_threshold == 0.8
    parents = {"lif": neuron.LIFNode, "if": neuron.IFNode, "plif": neuron.ParametricLIFNode}
    assert isinstance(node, parents[kind])
    assert [*copy.deepcopy(node).state_dict()] == (["w"] if kind == "plif" else [])
    if kind != "if":
        assert node.tau == pytest.approx(1.7, rel=1e-6) and "tau=1.7" in repr(node)
    if kind == "plif":
        assert node.w.shape == () and node.w.item() == pytest.approx(-math.log(0.7), rel=1e-6)
        assert lif.MultiStepPLIF().w.sigmoid().item() == 0.5  # tau 2 exactly
    for wrong in ({"tau": 1.0}, {"v_threshold": 0.0}, {"alpha": -1.0}, {"backend": "cpu"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            lif.NEURONS[kind](**wrong)
    with pytest.raises(RuntimeError, match="CUDA tensor"):
        lif.NEURONS[kind](backend="cupy")(torch.zeros(2, 2))


@pytest.mark.parametrize("kind", ["if", "plif"])
def test_spikingjelly_tools(kind):
    """reset_net, monitors, and attributes that only spikingjelly's functional neurons know."""
    torch.manual_seed(2)
    net = nn.Sequential(lif.NEURONS[kind]())
    x = 2 * torch.randn(4, 30)
    spikes = net(x)
    functional.reset_net(net)
    functional.set_step_mode(net, "m")
    assert torch.equal(net(x), spikes)
    with monitor.OutputMonitor(net, neuron.BaseNode) as outputs:
        net(x)
    assert torch.equal(outputs.records[0], spikes)
    net[0].store_v_seq = True
    assert torch.equal(net(x), spikes) and net[0].v_seq.shape == x.shape
    net[0].store_v_seq = False
    for name, value in (("v_reset", None), ("surrogate_function", surrogate.ATan())):
        changed = copy.deepcopy(net)
        setattr(changed[0], name, value)
        options = {"v_reset": 0.0, "surrogate_function": surrogate.Sigmoid(4.0), name: value}
        theirs = neuron.IFNode if kind == "if" else neuron.ParametricLIFNode
        theirs = theirs(detach_reset=True, step_mode="m", **options)
        grads = []
        for node in (changed, theirs):
            leaf = x.clone().requires_grad_()
            y = node(leaf)
            y.sum().backward()
            grads.append((y.detach(), leaf.grad))
        torch.testing.assert_close(*grads)
        assert not torch.equal(grads[0][0], spikes) or name != "v_reset"


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_and_exports(kind, monkeypatch):
    torch.manual_seed(3)
    node = lif.NEURONS[kind](1.7, alpha=3.0)
    x, grad = 2 * torch.randn(4, 30), torch.randn(4, 30)
    results = []
    for function in (node, torch.compile(node, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        node.zero_grad()
        y = function(leaf * 1.5)
        y.backward(grad)
        results.append([y.detach(), leaf.grad, *(p.grad for p in node.parameters())])
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        want = node(x)
        assert torch.equal(torch.export.export(node, (x,)).module()(x), want)
        assert torch.equal(torch.jit.trace(node, x)(x), want)


# Surrogates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, 1.3])
@pytest.mark.parametrize(
    ("name", "kind"),  # each is compiled
    [
        pytest.param(
            name, kind, marks=[] if kind == "lif" or name == "triangle" else pytest.mark.long
        )
        for name in [*lif.CLASSES, "triangle"]
        for kind in KINDS
    ],
)
def test_surrogates(name, kind, alpha, monkeypatch):
    """Fused and plain neurons have the gradients of spikingjelly's neuron with its own surrogate
    function; one of your own is a formula in Python and one in C++.
    """
    if name == "triangle":  # wider than piecewise_quadratic's of the same height
        own = lif.plain.Surrogate(
            2.0,
            lambda x, alpha: (alpha - x.abs()).clamp(min=0),
            "x = alpha - absolute(x); return x > 0 ? x : 0;",
        )
        monkeypatch.setitem(lif.plain.SURROGATES, name, own)
    torch.manual_seed(3)
    x, grad = 2 * torch.randn(6, 2, 5, 4, 3).double(), torch.randn(6, 2, 5, 4, 3).double()
    theirs = {"if": neuron.IFNode, "plif": neuron.ParametricLIFNode}.get(kind, neuron.LIFNode)
    options = {} if alpha is None else {"alpha": alpha}
    grads, leaves = [], []
    for path in ("fused", "torch", "theirs"):
        leaf = x.clone().requires_grad_()
        node = lif.NEURONS[kind](surrogate=name, fused=path == "fused", **options)
        if path == "theirs" and name != "triangle":
            node = theirs(
                surrogate_function=lif.CLASSES[name](**options), detach_reset=True, step_mode="m"
            ).double()
        elif path == "theirs":
            node = lif.NEURONS[kind](surrogate=name, backend="spikingjelly", **options)
        y = node(leaf)
        y.backward(grad)
        leaves.append(leaf)
        grads.append([y.detach(), leaf.grad, *(p.grad.double() for p in node.parameters())])
    assert grads[0][1].abs().sum() > 0
    for other in grads[:-1]:
        torch.testing.assert_close(other, grads[-1], rtol=1e-6, atol=1e-9, check_dtype=False)


def test_a_surrogate_of_spikingjelly_set_afterwards(caplog):
    node = lif.MultiStepLIF()
    node.surrogate_function = lif.CLASSES["atan"]()
    assert node.is_usual() and (node.surrogate, node.alpha) == ("atan", 2.0)
    node = lif.MultiStepLIF(surrogate=S2NN, alpha=3.0)  # a class that no kernel knows
    assert not node.is_usual() and node.surrogate_function.alpha == 3.0
    assert lif.MultiStepLIF(surrogate=lif.CLASSES["erf"]).surrogate == "erf"
    with pytest.raises(ValueError, match="surrogate is 'tan'; it must be one of sigmoid, atan"):
        lif.MultiStepLIF(surrogate="tan")


# The kernels' source on this processor ------------------------------------------------------------


def by_kernel(*args):
    return by_hand.kernel_lif(*args)[0]


def check_kernels(kind, x, grad, tau=2.0, v_threshold=1.0, alpha=4.0):
    """cupy's operators against the torch backend: spikes equal, gradients to rounding."""
    w = torch.tensor(-math.log(tau - 1), device=x.device) if kind == "plif" else None
    constants = tau, v_threshold, alpha, kind
    ours, plain = (
        run(lambda x, w, f=f: f(x, *constants, w), x, grad, w) for f in (by_kernel, lif.torch_lif)
    )
    assert ours[0].dtype == ours[1].dtype == x.dtype
    assert torch.equal(ours[0], plain[0]) and 0 < ours[0].float().mean() < 1
    rtol = {2: 8e-3, 4: 2e-6, 8: 1e-12}[
        x.element_size()
    ]  # the sigmoid's last bits; in 16 bits a rounding
    torch.testing.assert_close(ours[1], plain[1], rtol=rtol, atol=2e-6)
    torch.testing.assert_close(ours[2], plain[2], rtol=1e-5, atol=1e-4)
    return ours


@OTHERS
@pytest.mark.parametrize("dtype", list(kernels.HOST_CTYPES))
@pytest.mark.parametrize("shape", [(4, 3, 5, 2, 7), (1, 2, 3, 4, 5), (16, 1, 9), (4, 6)])
def test_kernels_on_host(kind, alpha, dtype, shape):
    torch.manual_seed(sum(shape))
    x, grad = (2 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    for tau, v_threshold in ((2.0, 1.0), (3.7, 0.8)):
        check_kernels(kind, x, grad, tau, v_threshold, alpha)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    check_kernels(kind, turned, grad, 2.0, 0.5, alpha)


def test_kernels_sum_over_many_samples():
    """The sum for w, of many parts, against float64."""
    torch.manual_seed(4)
    x, grad = torch.randn(4, 75, 70) + 0.5, torch.randn(4, 75, 70)
    got = check_kernels("plif", x, grad, 2.6)[2]
    w = torch.tensor(-math.log(1.6)).double()
    want = run(lambda x, w: lif.torch_lif(x, 0.0, 1.0, 4.0, "plif", w), x.double(), grad, w)[2]
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_kernels_with_an_image_shown_many_times(stand_in):
    torch.manual_seed(5)
    image, grad = 2 * torch.randn(3, 5, 4), torch.randn(4, 3, 5, 4)
    for kind in ("if", "plif"):
        w = torch.tensor(0.0) if kind == "plif" else None

        def frames(function, x, w, kind=kind):
            return function(x.expand(4, 3, 5, 4), 2.0, 1.0, 4.0, kind, w)

        ours = run(partial(frames, by_kernel), image, grad, w)
        plain = run(partial(frames, lif.torch_lif), image, grad, w)
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
        places = [launch.args[3 if launch.name == "fire" else 4] for launch in stand_in]
        assert {*places} == {image.data_ptr()}  # no copies


@gpu
@OTHERS
@pytest.mark.parametrize("dtype", list(kernels.CTYPES))
def test_cupy(kind, alpha, dtype):
    torch.manual_seed(6)
    x, grad = (2 * torch.randn(20, 8, 64, 7, device="cuda").to(dtype) for _ in range(2))
    first, again = (check_kernels(kind, x, grad, 1.7, 0.8, alpha) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
