"""What a step would do on a GPU, without one: where it waits, how gradients lie in memory and are
summed.
"""

import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import ROOT, load, resolve_in
from on_gpus import stand_in
from on_graphs import FORBIDDEN, RECIPES, name_of
from test_bench import bench
from test_layer import compiled

__all__ = ["stand_in"]  # a fixture
cifar10, imagenet = load("cifar10"), load("imagenet")
engine, layer = cifar10.meters, cifar10.layer
RANKS = SimpleNamespace(
    world_size=1, main=True, sum=lambda tensor: tensor, gather=lambda value: [value]
)


@pytest.fixture
def fake(monkeypatch):
    """Tensors of a GPU that have no values; the list of what the host has waited for."""
    waits = []

    class Event:
        def record(self):
            waits.append("recorded")

        def synchronize(self):
            waits.append("event")

    def tolist(tensor):
        waits.append(f"tolist on {tensor.device.type}")
        return (
            [[1.0] * size for size in tensor.shape[1:]] * len(tensor)
            if tensor.dim() > 1
            else [1.0, 0.0]
        )

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(FakeTensor, "tolist", tolist)
    with FakeTensorMode():  # which refuses every other way to a value
        yield waits


def test_a_loss_is_read_a_step_late(fake):
    """A step starts the copy of its own loss, and only then waits for that of the step before."""
    meter = engine.LossMeter(RANKS)
    for _ in range(3):
        meter.update(torch.zeros((), device="cuda"), False)
    assert fake == ["recorded", *["recorded", "event", "tolist on cpu"] * 2]
    meter.flush()
    assert fake[-2:] == ["event", "tolist on cpu"] and (meter.steps, meter.mean) == (3, 1.0)


def test_a_test_waits_once(fake):
    model = torch.nn.Linear(4, 10, device="cuda")
    batches = [
        (torch.zeros(5, 4, device="cuda"), torch.zeros(5, dtype=torch.long, device="cuda"))
    ] * 3
    engine.evaluate(model, batches, RANKS, lambda: torch.autocast("cuda", enabled=False))
    assert fake == ["tolist on cuda"]


def test_adamw_is_fused(fake):
    """Then the scaler hands its flag to the kernel and does not read it."""
    for folder in (cifar10, imagenet, load("dvs128-gesture")):
        for device in ("cpu", "cuda"):
            cfg = resolve_in(folder)
            model = torch.nn.ModuleDict({"stage3": torch.nn.Linear(2, 2, device=device)})
            build = (folder.optim if folder is imagenet else folder.train).build_optimizer
            optimizer = build(cfg, model)
            optimizer = optimizer[0] if isinstance(optimizer, tuple) else optimizer
            assert optimizer._step_supports_amp_scaling
            assert all(group["fused"] for group in optimizer.param_groups)


@pytest.mark.parametrize("there", [None, True])
def test_optimizer_states_go_between_devices(there):
    """A state of the fused kernel goes on without it, and the other way round; the steps are the
    same.
    """
    weights = []
    for here in (there, None if there else True):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 12))
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=there)
        for step in range(6):
            if step == 3:
                state = {"optimizer": optimizer.state_dict()}
                optimizer = torch.optim.AdamW([weight], lr=0.1, fused=here)
                cifar10.checkpoint.load_optimizer(optimizer, None, state, "a.pth", "adamw")
                assert optimizer.param_groups[0]["fused"] == here
            weight.grad = weight.detach().sin() + step
            optimizer.step()
        assert optimizer.state[weight]["step"] == 6
        weights.append(weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


@compiled
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["cifar10", "dvs128-gesture", "imagenet"])
def test_gradients_lie_as_their_parameters(name, memory_format):
    """As backward() hands them over, before autograd or DistributedDataParallel would copy them."""
    models = load(name).model
    sizes = {
        "T": 2,
        "embed_dims": 32,
        "num_heads": 2,
        "depths": {"dvs128-gesture": 2, "cifar10": 3, "imagenet": 4}[name],
    }
    model = (models.QKFormer_10_384 if name == "imagenet" else models.QKFormer)(**sizes)
    model = model.to(memory_format=memory_format)
    strides = {}
    for key, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, key=key: strides.update({key: grad.stride()}))
    model(
        torch.rand(2, 2, 2, 32, 32) if name == "dvs128-gesture" else torch.rand(2, 3, 32, 32)
    ).sum().backward()
    want = {key: parameter.stride() for key, parameter in model.named_parameters()}
    assert len(strides) == len(want)
    assert strides == want, {
        key: (strides[key], want[key]) for key in want if strides[key] != want[key]
    }


@compiled
def test_weight_gradients_are_summed_in_float32(stand_in):
    """50,000 rows of spikes in bfloat16, where a sum of 256 would swallow another 1."""
    check_sums("cpu", torch.bfloat16)


def check_sums(device, dtype):
    """The weight's gradient of a layer of one pixel, in `dtype`, against float64."""
    torch.manual_seed(0)
    conv, bn = torch.nn.Conv2d(16, 8, 1, bias=False).to(device), torch.nn.BatchNorm2d(8).to(device)
    spikes = (torch.rand(1, 50, 16, 40, 25, device=device) < 0.2).float()
    node, grads = cifar10.neuron.MultiStepLIF(), []
    with torch.autocast(device, dtype):
        out = layer.conv_bn(spikes, conv, bn, node)
    out.register_hook(grads.append)
    out.backward(torch.rand_like(out))
    # BatchNorm's gradient by PyTorch, from the layer's own rounded numbers
    weight = conv.weight.detach().to(dtype)
    y = torch.nn.functional.conv2d(spikes[0].to(dtype), weight).double().requires_grad_()
    torch.nn.functional.batch_norm(
        y, None, None, bn.weight.double(), bn.bias.double(), True
    ).backward(grads[0][0].double())
    want = torch.einsum("nohw,nihw->oi", y.grad, spikes[0].double())
    error = (conv.weight.grad.double()[:, :, 0, 0] - want).norm() / want.norm()
    assert error < 2**-5  # rounding in y's gradient, whose sums nearly vanish
    return conv.weight.grad


@pytest.mark.parametrize("name", ["imagenet", "cifar10", "dvs128-gesture"])
def test_cudnn_is_timed_as_it_is_used(name, monkeypatch, tmp_path):
    """tools/bench.py and test.py set cuDNN as train.py of the folder does."""
    folder, cudnn = load(name), torch.backends.cudnn
    found, before = [], (cudnn.benchmark, cudnn.deterministic)

    def evaluate(*_, **__):
        found.append((cudnn.benchmark, cudnn.deterministic))
        return folder.meters.Metrics(1.0, 2.0, 3.0, 4.0)

    monkeypatch.setattr(folder.build, "evaluate", evaluate)
    samples = type("Samples", (list,), {"classes": []})()
    monkeypatch.setattr(folder.data, "build_dataset", lambda *_: samples)
    monkeypatch.setattr(folder.data, "test_loader", lambda *_: None)
    ranks, path = folder.process.Ranks("cpu"), tmp_path / "a.pth"
    path.touch()
    model = torch.nn.Linear(1, 1)
    model.num_classes = 1
    tested = resolve_in(folder), ranks, path, model, {}, None
    try:
        folder.build.measure(folder.build.Tested(*tested), folder.data)
        bench.set_up("QKFormer_10_384" if name == "imagenet" else name)
        found.append((cudnn.benchmark, cudnn.deterministic))
        folder.run.set_up_torch(tested[0], folder.data, 0)
        found.append((cudnn.benchmark, cudnn.deterministic))
    finally:
        cudnn.benchmark, cudnn.deterministic = before
    assert found == [found[0]] * 3 and found[0] == (name != "dvs128-gesture", "dvs" in name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_rows_on_gpu(dtype):
    gradient = check_sums("cuda", dtype)
    # The sum leaves the product in float32, so that it is not rounded to 16 bits.
    assert (gradient != gradient.to(dtype).float()).float().mean() > 0.5


# The whole step -----------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """The functions of ours in which the host asks for a tensor's values, or makes it of numbers."""

    counts_kernels = True  # layers may go on running fused

    def __init__(self):
        super().__init__()
        self.functions = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if name_of(operator) in FORBIDDEN:
            self.note()
        return operator(*args, **(kwargs or {}))

    def note(self, *_):
        frames = [(Path(f.filename).parent, f.name) for f in traceback.extract_stack()]
        ours = [
            name for place, name in frames if ROOT in place.parents[:2] and place.name != "tests"
        ]
        self.functions.add(ours[-1])


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_waits_for_nothing(name, trainer, monkeypatch):
    """Only the meter asks, a step late."""
    run = trainer(name)
    with Waits() as waits:
        for method in ("tolist", "cpu", "numpy", "__bool__", "__float__"):
            known = getattr(torch.Tensor, method)
            monkeypatch.setattr(torch.Tensor, method, lambda *a, f=known: (waits.note(), f(*a))[1])
        before = [p.detach().clone() for p in run.model.parameters()]
        run.train_epoch()
    assert run.meter.steps == run.steps and waits.functions == {"flush"}
    changed = [not torch.equal(*p) for p in zip(before, run.model.parameters(), strict=True)]
    assert any(changed)


# What to install ----------------------------------------------------------------------------------


def test_what_to_install_is_in_the_log(monkeypatch, capsys):
    """The line as a run prints it: no fast path on a GPU."""
    cifar10.log.set_up_log(cifar10.process.Ranks("cpu"))
    reason = "No module named 'cupy', for this test"
    monkeypatch.setattr(torch.version, "cuda", "12.6")

    def check_cupy():
        raise ImportError(reason)

    monkeypatch.setattr(cifar10.native, "check_cupy", check_cupy)
    asked_anew = cifar10.native.available.__wrapped__
    monkeypatch.setattr(cifar10.native, "available", asked_anew)
    said = f"ImportError: {reason}; pip install cupy-cuda12x"
    for _ in range(2):
        assert not cifar10.native.available("cuda", torch.float32, "auto")
    assert capsys.readouterr().out == f"layers run module by module on cuda: {said}\n"


def test_a_missing_cupy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    reason = cifar10.compiler.fault.__wrapped__(cifar10.native.check_cupy)
    assert reason.startswith("ModuleNotFoundError: ")
    assert reason.endswith("cupy halted; None in sys.modules; pip install cupy-cuda12x")


def test_requirements_for_cuda_12():
    """The same versions, of other builds."""
    pins = [
        [
            line
            for line in (ROOT / name).read_text().splitlines()
            if not line.startswith(("#", "--"))
        ]
        for name in ("requirements.txt", "requirements-cu12.txt")
    ]
    assert pins[0] == [line.replace("+cu126", "").replace("cuda12x", "cuda13x") for line in pins[1]]
    assert pins[0] != pins[1]
