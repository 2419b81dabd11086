"""Training and evaluation on a GPU that is not there (tools/fakecuda.py): every launch of ours
fits its kernel, every gradient its parameter, and nothing is transposed on the way.
"""

from collections import Counter

import pytest
import torch

import fakecuda
from conftest import load
from on_graphs import FORBIDDEN, name_of, tensors

pytestmark = pytest.mark.skipif(not fakecuda.POSSIBLE, reason="needs a newer PyTorch for CUDA")
SMALL = {"embed_dims": 48, "num_heads": 2, "depths": 3}
IMAGES, EVENTS = (3, 3, 32, 32), (3, 5, 2, 32, 32)
# (folder, file, function, options, shape of a batch, autocast's type)
CASES = [
    ("cifar10", "model", "QKFormer", {"drop_path": 0.2}, IMAGES, torch.float16),
    ("imagenet", "model", "QKFormer_10_384", {}, IMAGES, torch.bfloat16),
    ("cifar10-dvs", "model", "QKFormer", {"cross_sample_lif": True}, EVENTS, torch.float16),
    ("cifar10", "ms", "MSQKFormer", {}, IMAGES, torch.bfloat16),
]
OTHERS = [
    (folder, file, function, options, shape, dtype)
    for folder, file, function, shape in (
        ("cifar10", "model", "QKFormer", IMAGES),
        ("cifar100", "model", "QKFormer", IMAGES),
        ("imagenet", "model", "QKFormer_10_384", (3, 3, 48, 80)),
        ("dvs128-gesture", "model", "QKFormer", EVENTS),
        ("cifar10-dvs", "model", "QKFormer", EVENTS),
        ("cifar10", "ms", "MSQKFormer", IMAGES),
        ("imagenet", "ms", "MSQKFormer_10_384", (3, 3, 48, 80)),
    )
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
    for options in (
        {"drop_path": 0.2},
        {"cross_sample_lif": True},
        {"attention": ("channel", "token", "ssa"), "embed_dims": 80},
        {"num_heads": 1, "embed_dims": 112, "mlp_ratios": 1},
    )
    if file != "ms" or "cross_sample_lif" not in options
]


def trace(case):
    """(machine, model, events of training, events of evaluation): two micro-steps, then the
    scaler's and the optimizer's; then a batch in evaluation.
    """
    folder, file, function, options, shape, dtype = case
    modules = load(folder)
    deep = {"depths": 4} if folder == "imagenet" else {}
    T = {"T": shape[1]} if len(shape) == 5 else {}
    if T and "attention" in options:  # two stages
        options = {**options, "attention": options["attention"][1:]}
    model = getattr(getattr(modules, file), function)(**{**SMALL, **T, **deep, **options}).train()
    with fakecuda.Machine(vars(modules).values()) as machine:
        machine.move(model)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        target = torch.zeros(3, dtype=torch.long, device="cuda")

        def logits():
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                return model(machine.randn(*shape))

        for _ in range(2):
            loss = torch.nn.functional.cross_entropy(logits(), target)
            fakecuda.backward(scaler.scale(loss / 2))
        gradients = {name: p.grad for name, p in model.named_parameters()}
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        trained = list(machine.events)
        machine.events.clear()
        model.eval()
        with torch.inference_mode():
            assert logits().dtype == dtype
        return model, gradients, trained, list(machine.events)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:4])))
def test_trace(case):
    check_trace(case)


@pytest.mark.long
@pytest.mark.parametrize("case", OTHERS, ids=lambda case: "-".join(map(str, case)))
def test_every_trace(case):
    check_trace(case)


def test_backward_is_that_of_autograd():
    """fakecuda.backward on real tensors: to the bit the gradients of PyTorch's engine."""
    torch.manual_seed(0)
    model = load("cifar10").model.QKFormer(**SMALL).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    gradients = []
    for backward in (torch.Tensor.backward, fakecuda.backward):
        model.zero_grad()
        for _ in range(2):  # which add up
            backward(model(x).square().sum())
        gradients.append([p.grad.clone() for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)
    assert sum(grad.abs().sum() > 0 for grad in gradients[0]) > len(gradients[0]) / 2


def check_trace(case):
    model, gradients, trained, evaluated = trace(case)
    for name, parameter in model.named_parameters():
        grad = gradients[name]
        assert grad is not None and grad.dtype == torch.float32, name
        assert grad.shape == parameter.shape and grad.device.type == "cuda", name
    ours = [[e for e in events if hasattr(e, "grid")] for events in (trained, evaluated)]
    for launch in ours[0] + ours[1]:
        check_launch(launch)
    check_all_fused(case, model, trained, evaluated)
    check_layouts(case, model, trained, evaluated)
    check_no_waits(trained + evaluated)


def check_no_waits(events):
    """Nothing goes from the host to the GPU or back, as no CUDA graph allows it (graph.py)."""
    for operation in [event for event in events if hasattr(event, "operator")]:
        found = tensors(operation.args, operation.kwargs, operation.result)
        assert len({tensor.device.type for tensor in found}) <= 1, operation
        assert name_of(operation.operator) not in FORBIDDEN, operation


# Launches ---------------------------------------------------------------------------------------

TENSORS = {
    "float": torch.float32,
    "double": torch.float64,
    "__half": torch.float16,
    "__nv_bfloat16": torch.bfloat16,
    "unsigned char": torch.uint8,
    "byte_t": torch.uint8,
    "long long": torch.int64,
}


def check_launch(launch):
    """The kernel exists, takes these arguments, and CUDA takes the grid, which is large enough."""
    parameters = fakecuda.parameters_of(launch.module, launch.name)
    assert len(parameters) == len(launch.args), launch.name
    values = {}
    for (kind, name, pointer), value in zip(parameters, launch.args, strict=True):
        where = f"{name} of {launch.name}"
        values[name] = value
        if not pointer:
            # A float that was handed in as a whole number, or the other way round, is far off.
            whole = kind in ("int", "long long")
            assert 0 <= value < 2**40 if whole else value == 0 or 1e-9 < abs(value) < 1e9, where
        elif isinstance(value, fakecuda.Pointer):
            check_tensor(value, TENSORS[kind], launch, where)
        else:
            assert value == 0, where  # none given
    x, y, z = (*launch.block, 1, 1)[:3]
    assert 192 <= x * y * z <= 1024 and z <= 64
    assert 1 <= launch.grid[0] < 2**31 and all(1 <= size <= 65535 for size in launch.grid[1:])
    threads = launch.grid[0] * x
    # Rows are taken in turns, channels are not.
    lanes = int(launch.module.defines.get("LANES", 1)) if "rows" in values else 1
    assert threads * lanes >= values["channels"] and values["channels"] % lanes == 0
    assert (threads - x) * lanes < values["channels"]  # no block without work
    if parameters[0][0] == "int":
        assert all(arg.tensor.numel() < 2**31 for arg in launch.args if hasattr(arg, "tensor"))


def check_tensor(pointer, dtype, launch, where):
    """Of the kernel's type, its rows of channels dense in memory, and aligned to its loads."""
    tensor = pointer.tensor
    assert tensor.dtype == dtype and tensor.device.type == "cuda", where
    if tensor.dim() < 3:  # numbers of channels, which may be some of a layer's
        assert tensor.dim() == 0 or tensor.stride(-1) == 1, where
        return
    strides = [(s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1 and s]
    dense = 1
    for stride, size in sorted(strides):
        assert stride == dense, f"{where}: {tensor.shape}, {tensor.stride()}"
        dense *= size
    if tensor.dim() >= 4 and "integrate" not in launch.name:  # [T, B, C, H, W] or [N, C, H, W]
        assert tensor.stride(-3) == 1 or tensor.shape[-3] == 1, f"{where}: not in channels_last"
    size = int(launch.module.defines.get("LANES", 1)) * tensor.element_size()
    assert pointer % min(size, 16) == 0 or f"{dtype}" not in f"{launch.module.defines}", where


# Layers and layouts -----------------------------------------------------------------------------


def check_all_fused(case, model, trained, evaluated):
    """No layer ran module by module, and layers launched their kernels as often as they ran."""
    operators = {e.operator._schema.name for e in trained if hasattr(e, "operator")}
    if case[1] == "ms":  # whose BatchNorm is PyTorch's
        return
    plain = ("max_pool2d", "aten::native_batch_norm", "aten::cudnn", "aten::_batch_norm")
    assert not [name for name in operators if name.startswith(plain)]
    names = [name for name, _ in model.named_modules()]
    joined = sum(len(module.inputs) - 1 for module in model.modules() if hasattr(module, "inputs"))
    layers = sum(name.endswith("_conv") for name in names) - joined
    attention = sum(name.endswith("attn_lif") for name in names)
    training, evaluation = (
        Counter(e.name for e in events if hasattr(e, "grid")) for events in (trained, evaluated)
    )
    assert evaluation["fire"] == layers and evaluation["integrate"] == attention
    assert (
        training["fire_backward"] == 2 * layers and training["integrate_backward"] == 2 * attention
    )
    assert training["fire"] == 2 * layers


def check_layouts(case, model, trained, evaluated):
    """Activations and gradients stay in channels_last, but where images come in and in products
    of SSA.
    """
    inputs = 2 if len(case[4]) == 5 else 1
    products = sum(type(module).__name__.endswith("SelfAttention") for module in model.modules())
    blocks = sum(hasattr(module, "inputs") for module in model.modules())
    forward = inputs + 4 * products
    backward = inputs + 5 * products + (blocks - products) + 1  # of masks, sums over q's heads
    for events, most in ((trained, 2 * (forward + backward)), (evaluated, forward)):
        found = Counter(transposed(events, model))
        assert 0 < sum(found.values()) <= most, dict(found)


def transposed(events, model):
    """Names and shapes of copies of activations whose dimensions lie in another order than
    before.
    """
    weights = {tuple(p.shape) for p in model.parameters()}
    weights |= {(*shape, 1) for shape in weights}
    for event in events:
        name = getattr(getattr(event, "operator", None), "__name__", "")
        if not name.startswith(("clone", "copy_", "_to_copy")):
            continue
        source, result = event.args[-1 if name.startswith("copy_") else 0], event.result
        if result.dim() >= 4 and tuple(result.shape) not in weights and result.numel() > 1:
            if order(source) != order(result):
                yield name, tuple(result.shape), source.stride(), result.stride()


def order(tensor):
    """Dimensions of more than one element, from the outermost in memory to the innermost."""
    sizes = [d for d in range(tensor.dim()) if tensor.shape[d] > 1 and tensor.stride(d)]
    return sorted(sizes, key=lambda d: -tensor.stride(d))
