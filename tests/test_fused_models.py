"""Models of fused layers against plain ones: recomputed, compiled, in training, on the CPU and on a
GPU.
"""

import copy

import pytest
import torch
from torch import nn

from conftest import load

cifar10 = load("cifar10")
lif, native, layer = cifar10.neuron, cifar10.native, cifar10.layer
models = cifar10.model
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
compiled = pytest.mark.skipif(
    not native.available("cpu", torch.float32, "auto"), reason="needs a C++ compiler"
)

FOLDERS = {
    "cifar10": ({"embed_dims": 48, "num_heads": 2}, (2, 3, 16, 12)),
    "imagenet": ({"embed_dims": 48, "num_heads": 2, "depths": 5, "num_classes": 7}, (2, 3, 64, 48)),
    "dvs128-gesture": ({"embed_dims": 32, "num_heads": 2}, (2, 6, 2, 32, 48)),
}


def make_model(name, **options):
    folder = load(name)
    torch.manual_seed(4)
    keywords, shape = FOLDERS[name]
    entry = getattr(folder.model, "QKFormer_10_384" if name == "imagenet" else "QKFormer")
    return entry(**keywords, **options).double(), torch.rand(shape, dtype=torch.float64) * 2


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


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize(
    "options", [{}, {"cross_sample_lif": True}, {"drop_path": 0.3}, {"T": 3}], ids=str
)
def test_model_is_the_plain_one(name, options):
    (ours, x), (plain, _) = make_model(name, **options), make_model(name, fused=False, **options)
    plain.load_state_dict(ours.state_dict())
    check_same(step(ours, x), step(plain, x))
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(x), plain.eval()(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("attention", ["token", "channel", "ssa"])
def test_every_attention(attention):
    (ours, x), (plain, _) = (
        make_model("cifar10", attention=(attention,) * 3, fused=on) for on in (True, False)
    )
    check_same(step(ours, x), step(plain, x))


def first(model, name):
    return next(module for key, module in model.named_modules() if key.endswith(name))


def replace(model):
    conv = first(model, "mlp2_conv")
    conv.weight = torch.nn.Parameter(conv.weight.detach() * 0.5)


CHANGES = {  # what a user may do between two steps
    "a parameter is replaced": replace,
    "a parameter is written to": lambda m: first(m, "mlp1_conv").weight.data.mul_(-0.5),
    "a BatchNorm is replaced": lambda m: setattr(
        first(m, "mlp"), "mlp1_bn", torch.nn.BatchNorm2d(48, eps=0.1).double()
    ),
    "weights are frozen": lambda m: first(m, "q_conv").requires_grad_(False),
    "a hook is added": lambda m: first(m, "mlp1_lif").register_forward_hook(
        lambda module, inputs, spikes: spikes * 0.5
    ),
    "a threshold is set": lambda m: setattr(first(m, "q_lif"), "v_threshold", 0.3),
    "tau is set": lambda m: setattr(first(m, "mlp2_lif"), "tau", 3.0),
    "momentum is set": lambda m: setattr(first(m, "mlp2_bn"), "momentum", 0.9),
    "a forward is replaced": lambda m: setattr(
        first(m, "mlp2_conv"), "forward", lambda x: torch.zeros_like(x[:, :12])
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_steps(change):
    """A step of a changed model is that of the plain one with the change: nothing old is used."""
    (ours, x), (plain, _) = (make_model("cifar10", depths=3, fused=on) for on in (True, False))
    for model in (ours, plain):
        step(model, x)
        model.zero_grad()
        CHANGES[change](model)
    check_same(step(ours, x), step(plain, x))


@pytest.mark.long
@compiled
def test_whole_model_compiles(monkeypatch):
    model, x = make_model("cifar10", depths=3)
    want = step(copy.deepcopy(model), x)
    check_same(step(torch.compile(model, fullgraph=True, backend="aot_eager"), x), prefixed(want))
    model, _ = make_model("cifar10", cross_sample_lif=True, depths=3)
    model.compile(fullgraph=True, dynamic=False, backend="aot_eager")  # as the scripts do
    with torch.no_grad():
        for batch in (2, 3):  # the number of images may change
            assert model(x[:1].repeat(batch, 1, 1, 1)).shape == (batch, 10)


def prefixed(result):
    logits, *rest = result
    return logits, *(
        {f"_orig_mod.{name}": value for name, value in values.items()} for values in rest
    )


@pytest.mark.long
def test_training_curve():
    """30 steps of the same model on the same data, fused and plain: the same losses as far as
    rounding lets them.
    """
    curves = []
    for on in (True, False):
        torch.manual_seed(6)
        model = models.QKFormer(embed_dims=48, num_heads=2, fused=on)
        x, y = torch.randn(64, 3, 8, 8), torch.arange(64) % 10
        x += y[:, None, None, None] / 5
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        losses = []
        for i in range(30):
            part = slice(i % 4 * 16, i % 4 * 16 + 16)
            loss = nn.functional.cross_entropy(model(x[part]), y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    ours, plain = curves
    torch.testing.assert_close(ours[:3], plain[:3], rtol=1e-3, atol=1e-3)
    assert (ours[-4:].mean() - plain[-4:].mean()).abs() <= 0.06 and plain[
        -4:
    ].mean() < 0.95 * plain[:4].mean()


def test_a_pixel_that_wants_its_gradient():
    """The first layer's input may require a gradient; its pixels are no whole numbers."""
    results = []
    for on in (True, False):
        model, x = make_model("cifar10", fused=on)
        x = (x / 3).requires_grad_()
        results.append((*step(model, x), {"x": x.grad}))
    check_same(*results)


@gpu
def test_model_on_gpu(monkeypatch):
    """A float16 training step of a model, eager, with recomputed convolutions and compiled."""
    model = models.QKFormer(embed_dims=96, num_heads=4).cuda()
    recomputed = models.QKFormer(embed_dims=96, num_heads=4, memory="small").cuda()
    x = torch.randn(8, 3, 32, 32, device="cuda")
    for variant in (model, recomputed, torch.compile(copy.deepcopy(model), fullgraph=True)):
        with torch.autocast("cuda", dtype=torch.float16):
            loss = variant(x).square().mean()
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in variant.parameters())
