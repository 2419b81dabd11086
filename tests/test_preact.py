"""MS-QKFormer's layers, spiking/layer.py: the fused path against the plain one."""

import copy

import pytest
import torch
from torch import nn

from on_ms import SMALL, cifar10, compiled, make_model

layer, lif = cifar10.layer, cifar10.neuron


# Its paths ----------------------------------------------------------------------------------------


def step(model, x):
    """Logits, gradients and buffers after a training step."""
    torch.manual_seed(5)
    logits = model.train()(x)
    logits.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return logits.detach(), gradients, dict(model.named_buffers())


def check_same(ours, want, exact=False):
    assert torch.equal(ours[0], want[0]) if exact else (ours[0] - want[0]).abs().max() <= 1e-12
    for a, b in zip(ours[1:], want[1:], strict=True):
        for name, value in b.items():
            tolerance = 0.0 if exact else 1e-10
            torch.testing.assert_close(a[name], value, rtol=tolerance, atol=tolerance, msg=name)


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Within it, `total` grows by the bytes that autograd saves, each memory once."""

    def __init__(self):
        self.kept = {}
        super().__init__(self.pack, lambda tensor: tensor)

    def __enter__(self):
        super().__enter__()
        return self

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        self.kept[storage.data_ptr()] = storage
        return tensor

    @property
    def total(self):
        return sum(storage.nbytes() for storage in self.kept.values())


@compiled
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "options",
    [{}, {"drop_path": 0.3}, {"T": 3, "mlp_ratios": 1}, {"attention": ("channel", "ssa", "token")}],
    ids=str,
)
def test_fused_is_the_plain_one(name, options):
    (ours, x), (plain, _) = make_model(name, **options), make_model(name, fused=False, **options)
    with Saved() as small:
        result = step(ours, x)
    with Saved() as large:
        want = step(plain, x)
    check_same(result, want)
    assert small.total < 0.75 * large.total
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(x), plain.eval()(x), rtol=1e-10, atol=1e-12)


@pytest.mark.long
@compiled
def test_model_compiles(monkeypatch):
    model, x = make_model("cifar10", depths=3)
    want = step(copy.deepcopy(model), x)
    model.compile(fullgraph=True, dynamic=False, backend="aot_eager")  # as the scripts do
    check_same(step(model, x), want)


# Its layers ---------------------------------------------------------------------------------------

KINDS = {
    "1x1": (nn.Conv2d, (12, 24, 1), {}, False),
    "token": (nn.Conv1d, (12, 12, 1), {}, False),
    "3x3": (nn.Conv2d, (12, 9, 3), {"padding": 1, "bias": False}, False),
    "strided": (nn.Conv2d, (12, 24, 1), {"stride": 2, "bias": False}, False),
    "pooled": (nn.Conv2d, (12, 16, 3), {"padding": 1, "bias": False}, True),
}


def make_layer(kind, on, dtype=torch.float64):
    torch.manual_seed(len(kind))
    convolution, sizes, keywords, pool = KINDS[kind]
    conv = convolution(*sizes, **keywords)
    bn = (nn.BatchNorm1d if convolution is nn.Conv1d else nn.BatchNorm2d)(sizes[1])
    nn.init.normal_(bn.weight, 0.3, 1.0)
    nn.init.normal_(bn.bias, 0.7, 1.0)
    nn.init.normal_(bn.running_mean, 0.0, 0.3)
    return nn.ModuleList([conv, bn, lif.MultiStepLIF(fused=on)]).to(dtype), pool


@compiled
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("static", [False, True])
def test_conv_bn_is_the_plain_one(kind, static):
    """Of spikes, and of an image that is shown T times: computed once."""
    torch.manual_seed(1)
    x = torch.randn(3, 12, 8, 6).double() if static else (torch.rand(4, 3, 12, 8, 6) < 0.3).double()
    results = []
    for on in (True, False):
        modules, pool = make_layer(kind, on)
        leaf = x.clone().requires_grad_()
        y = layer.conv_bn(leaf.expand(4, 3, 12, 8, 6), *modules, pool=pool)
        if on:
            grad = torch.randn(y.shape, dtype=y.dtype)
            assert y.stride(2) == 1 and (y.stride(0) == 0) == static
        y.backward(grad)
        gradients = {**{name: p.grad for name, p in modules.named_parameters()}, "x": leaf.grad}
        with torch.no_grad():
            tested = layer.conv_bn(x.expand(4, 3, 12, 8, 6), *modules.eval(), pool=pool)
        results.append((y.detach(), gradients, {**dict(modules.named_buffers()), "tested": tested}))
    check_same(*results)
    assert (
        results[0][1].get("0.bias", torch.zeros(1)) == 0
    ).all()  # in front of BatchNorm, exactly


@compiled
@pytest.mark.parametrize("static", [False, True])
def test_fire_is_the_neuron(static):
    torch.manual_seed(2)
    x = torch.randn(1 if static else 4, 3, 12, 8, 6, dtype=torch.float64) * 2
    grad, results = torch.randn(4, 3, 12, 8, 6, dtype=x.dtype), []
    for on in (True, False):
        leaf = x.clone().requires_grad_()
        spikes = lif.MultiStepLIF(fused=on, v_threshold=0.8)(leaf.expand(grad.shape))
        spikes.backward(grad)
        results.append((spikes.detach(), {"x": leaf.grad}))
    check_same(*results)
    assert torch.equal(results[0][0], results[1][0]) and 0.1 < spikes.mean() < 0.9


@compiled
def test_who_hooks_a_module_sees_it_called():
    modules, _ = make_layer("1x1", True)
    x, called = torch.rand(4, 3, 12, 8, 6).double(), []
    for module in modules:
        handle = module.register_forward_hook(
            lambda module, *_: called.append(type(module).__name__)
        )
        layer.conv_bn(modules[2](x), *modules)
        handle.remove()
    assert called == ["Conv2d", "BatchNorm2d", "MultiStepLIF"]


@compiled
def test_a_single_value_has_no_variance():
    modules, _ = make_layer("1x1", True)
    with pytest.raises(ValueError, match="single value"):
        layer.conv_bn(torch.ones(1, 1, 12, 1, 1).double(), *modules)


@compiled
def test_float32_gradients_are_those_of_float64():
    """Through a whole model, of most initialisations: now and then rounding flips a spike, in the
    plain path too.
    """
    errors = []
    for seed in range(3):
        torch.manual_seed(seed)
        ours = cifar10.ms.MSQKFormer(embed_dims=64, num_heads=4, depths=3)
        x, y = torch.rand(16, 3, 16, 16), torch.randint(0, 10, (16,))
        true = copy.deepcopy(ours).double()
        nn.functional.cross_entropy(ours(x), y).backward()
        nn.functional.cross_entropy(true(x.double()), y).backward()
        got, want = (
            torch.cat([p.grad.double().flatten() for p in m.parameters()]) for m in (ours, true)
        )
        errors.append(((got - want).norm() / want.norm()).item())
    assert sorted(errors)[1] <= 1e-4, errors
