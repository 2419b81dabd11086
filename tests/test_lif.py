"""The neuron: its formula, its backends against each other, and the CUDA kernels compiled, and run
on the host.
"""

import copy
import logging

import pytest
import torch
from spikingjelly.activation_based import functional, monitor, neuron, op_counter

import by_hand
from conftest import load
from on_gpus import stand_in

lif, kernels = load("cifar10").neuron, load("cifar10").compiler
__all__ = ["stand_in"]  # a fixture
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
KERNEL_TYPES = list(kernels.HOST_CTYPES)


def formula(x, tau, v_threshold):
    """The neuron as the paper writes it, a scalar at a time in Python floats, with its gradient by
    hand.
    """
    T, n = x.shape
    spikes, slopes = (
        torch.zeros(T, n, dtype=torch.float64),
        torch.zeros(T, n, T, dtype=torch.float64),
    )
    for i in range(n):
        v, dv = 0.0, torch.zeros(T, dtype=torch.float64)  # dv[j] = dv / dx[j]
        for t in range(T):
            h = v + (x[t, i].item() - v) / tau
            dh = dv * (1 - 1 / tau)
            dh[t] += 1 / tau
            s = float(h >= v_threshold)
            g = 1 / (1 + torch.exp(torch.tensor(-4.0 * (h - v_threshold), dtype=torch.float64)))
            spikes[t, i], slopes[t, i] = s, 4.0 * g * (1 - g) * dh
            v, dv = h * (1 - s), dh * (1 - s)
    return spikes, slopes


@pytest.mark.parametrize("backend", ["torch", "spikingjelly"])
@pytest.mark.parametrize(
    ("T", "tau", "v_threshold"), [(1, 2.0, 1.0), (4, 2.0, 0.5), (19, 2.0, 1.0), (7, 3.7, 0.8)]
)
def test_formula(backend, T, tau, v_threshold):
    torch.manual_seed(T)
    x = (3 * torch.randn(T, 40, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(T, 40, dtype=torch.float64)
    spikes, slopes = formula(x, tau, v_threshold)
    y = lif.MultiStepLIF(tau, v_threshold, backend)(x)
    assert torch.equal(y, spikes) and 0 < spikes.mean() < 1
    (y * weights).sum().backward()
    torch.testing.assert_close(
        x.grad, torch.einsum("ti,tij->ji", weights, slopes), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_backends_agree(dtype):
    torch.manual_seed(0)
    x = (2 * torch.randn(5, 3, 4, 6)).to(dtype)
    grad = torch.randn(5, 3, 4, 6).to(dtype)
    results = []
    for backend in ("torch", "spikingjelly"):
        leaf = x.clone().requires_grad_()
        y = lif.MultiStepLIF(backend=backend)(leaf)
        y.backward(grad)
        assert y.dtype == leaf.grad.dtype == dtype
        results.append((y.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_stateless():
    torch.manual_seed(1)
    node = lif.MultiStepLIF()
    x = torch.randn(4, 50) + 0.5
    first = node(x)
    node(torch.randn(4, 7))
    assert torch.equal(node(x), first)
    assert copy.deepcopy(node).state_dict() == {} and node.v == 0.0


def test_compiles_without_graph_breaks(monkeypatch):
    torch.manual_seed(2)
    node = lif.MultiStepLIF()
    compiled = torch.compile(lambda x: node(x) * 2, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 30).requires_grad_()
    y = compiled(x)
    y.sum().backward()
    other = x.detach().clone().requires_grad_()
    z = node(other) * 2
    z.sum().backward()
    assert torch.equal(y, z)
    torch.testing.assert_close(x.grad, other.grad)


def test_spikingjelly_tools():
    """Monitors, operation counters, reset_net and set_step_mode take our neuron for one of
    spikingjelly's.
    """
    torch.manual_seed(3)
    models = load("cifar10").model
    model = models.QKFormer(embed_dims=32, num_heads=2).eval()
    names = [name for name, module in model.named_modules() if isinstance(module, neuron.LIFNode)]
    image = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        logits = model(image)
        with monitor.OutputMonitor(model, neuron.BaseNode) as outputs:
            model(image)
        assert sorted(outputs.monitored_layers) == sorted(names)
        assert all(set(spikes.unique().tolist()) <= {0.0, 1.0} for spikes in outputs.records)

        functional.set_step_mode(model, "m")
        functional.reset_net(model)
        assert torch.equal(model(image), logits)

        node = model.stage1[0].mlp.mlp1_lif
        node.store_v_seq = True
        with monitor.AttributeMonitor("v_seq", False, model, neuron.LIFNode) as potentials:
            assert torch.equal(model(image), logits)
        stored = [v for v in potentials.records if v is not None]
        assert len(stored) == 1 and stored[0].shape == (4, 2, 32, 8, 8) and stored[0].max() < 1.0

        node.store_v_seq = False
        # Operation counters see as much of a fused model as of a plain one.
        plain = models.QKFormer(embed_dims=32, num_heads=2, fused=False).eval()
        plain.load_state_dict(model.state_dict())
        for kind in (op_counter.SynOpCounter, op_counter.ACCounter):
            totals = []
            for counted in (model, plain):
                counter = kind()
                with op_counter.DispatchCounterMode([counter]):
                    counted(image)
                totals.append(counter.get_total())
            assert totals[0] == totals[1] > 0


def test_log_line(caplog):
    lif.resolve_backend.cache_clear()
    lif.say.cache_clear()
    with caplog.at_level(logging.INFO, logger="qkformer"):
        for backend in ("torch", "auto", "torch"):
            lif.MultiStepLIF(backend=backend, fused=False)(torch.zeros(2, 2))
    assert [record.getMessage() for record in caplog.records] == [
        "neurons run on the torch backend"
    ]


def test_errors():
    with pytest.raises(ValueError, match=r"tau is 1\.0"):
        lif.MultiStepLIF(tau=1.0)
    with pytest.raises(ValueError, match="'cpu'"):
        lif.MultiStepLIF(backend="cpu")
    with pytest.raises(RuntimeError, match="CUDA tensor"):
        lif.MultiStepLIF(backend="cupy")(torch.zeros(2, 2))
    with pytest.raises(ValueError):
        lif.MultiStepLIF().step_mode = "s"


# The kernel of neurons alone, on this processor ----------------------------------------------------


def layouts(x):
    """The same values in different memory layouts, T outermost in all but the last."""
    yield x.clone()
    yield x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
    yield x.permute(0, 4, 2, 1, 3).contiguous().permute(0, 3, 2, 4, 1)
    yield x.repeat_interleave(2, 0)[::2]
    yield x.transpose(0, 1).contiguous().transpose(0, 1)


def check_against_torch(x, grad, tau=2.0, v_threshold=1.0):
    """The kernels on x, in any layout, against the torch backend; returns the strides of the
    output.
    """
    ours, plain = x.detach().requires_grad_(), x.detach().clone().requires_grad_()
    y, z = by_hand.kernel_lif(ours, tau, v_threshold)[0], lif.torch_lif(plain, tau, v_threshold)
    y.backward(grad)
    z.backward(grad)
    assert y.dtype == x.dtype and torch.equal(y, z) and 0 < z.float().mean() < 1
    assert ours.grad.dtype == x.dtype
    # the sigmoid's last bits; in 16 bits then one rounding
    torch.testing.assert_close(
        ours.grad, plain.grad, rtol={2: 8e-3, 4: 2e-6, 8: 1e-12}[x.element_size()], atol=1e-6
    )
    return y.stride()


@pytest.mark.parametrize("dtype", KERNEL_TYPES)
@pytest.mark.parametrize(
    "shape", [(4, 3, 5, 2, 7), (1, 2, 3, 4, 5), (16, 1, 2, 3, 3), (7, 2, 1, 3, 2)]
)
def test_kernels_on_host(stand_in, dtype, shape):
    torch.manual_seed(sum(shape))
    values, grads = (2 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    for index, x in enumerate(layouts(values)):
        assert torch.equal(x, values)
        for tau, v_threshold in ((2.0, 1.0), (2.0, 0.5), (3.7, 0.8)):
            strides = check_against_torch(x, grads.clone().contiguous(), tau, v_threshold)
        if shape[0] > 1 and index in (1, 2):
            assert strides == x.stride()  # the layout is kept
        copied = stand_in[-2].args[3] != x.data_ptr()  # of rows, channels, step, x, ...
        # and nothing is copied that is dense, the steps outermost
        assert copied == (shape[0] > 1 and (index == 3 or (index == 4 and shape[1] > 1)))


def test_broadcast_input_is_not_copied(stand_in):
    torch.manual_seed(7)
    image = (2 * torch.randn(3, 5, 4)).requires_grad_()
    frames = image.expand(4, 3, 5, 4)
    grad = torch.randn(4, 3, 5, 4)
    (y,) = by_hand.kernel_lif(frames, 2.0, 1.0)
    assert stand_in[-1].args[2:4] == (0, image.data_ptr())
    y.backward(grad)
    ours, image.grad = image.grad, None
    z = lif.torch_lif(frames, 2.0, 1.0)
    z.backward(grad)
    assert torch.equal(y, z)
    torch.testing.assert_close(ours, image.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_cupy_within_torch_compile():
    x, node = torch.randn(4, 3, 5, requires_grad=True), lif.MultiStepLIF(backend="cupy")
    compiled = torch.compile(lambda x: node(x * 1.5), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), lif.torch_lif(x * 1.5, 2.0, 1.0))
    with torch.inference_mode():
        assert torch.equal(by_hand.kernel_lif(x, 2.0, 1.0)[0], lif.torch_lif(x, 2.0, 1.0))


# On a GPU -----------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("dtype", kernels.CTYPES)
@pytest.mark.parametrize(
    "shape", [(4, 3, 5, 2, 7), (1, 2, 3, 4, 5), (16, 1, 2, 3, 3), (64, 8, 64, 7, 7)]
)
def test_cupy(dtype, shape):
    torch.manual_seed(sum(shape))
    values, grads = (2 * torch.randn(shape)).to(dtype).cuda(), torch.randn(shape).to(dtype).cuda()
    for x in layouts(values):
        for tau, v_threshold in ((2.0, 1.0), (3.7, 0.8)):
            check_against_torch(x, grads, tau, v_threshold)
    assert load("cifar10").native.available("cuda", dtype, "auto")


@gpu
def test_cupy_on_another_stream_and_compiled(monkeypatch):
    torch.manual_seed(8)
    x = torch.randn(4, 1 << 20, device="cuda")
    want = lif.torch_lif(x * 1.5, 2.0, 1.0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        (got,) = by_hand.kernel_lif(x * 1.5, 2.0, 1.0)
    stream.synchronize()
    assert torch.equal(got, want)
    node = lif.MultiStepLIF(backend="cupy")
    compiled = torch.compile(lambda x: node(x * 1.5), fullgraph=True)
    leaf = x.clone().requires_grad_()
    y = compiled(leaf)
    y.sum().backward()
    assert torch.equal(y, want) and leaf.grad.isfinite().all()
