"""cifar10/model.py against the golden numbers, the paper's parameter counts and what it
promises.
"""

import pytest
import timm
import torch

from conftest import Golden, load
from on_golden import LONG, OURS, RELEASE, check_golden

cifar10 = load("cifar10")
SMALL = {"embed_dims": 64, "num_heads": 4}


@pytest.mark.parametrize(("semantics", "fused", "losses"), [OURS, RELEASE, *LONG])
def test_golden(semantics, fused, losses):
    golden = Golden("cifar10")

    def build():
        return cifar10.model.QKFormer(
            T=golden.meta["T"], cross_sample_lif=semantics == "release", fused=fused
        )

    check_golden(golden, build, cifar10.neuron.MultiStepLIF, semantics, fused, losses)


def test_state_dict():
    meta = Golden("cifar10").meta
    model = timm.create_model("QKFormer")
    assert [[name, list(value.shape)] for name, value in model.state_dict().items()] == meta[
        "state_dict"
    ]
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_706_234


@pytest.mark.parametrize(
    ("attention", "millions"),  # the paper's ablation on CIFAR-100
    [
        (("token", "token", "ssa"), 6.74),
        (("channel", "channel", "ssa"), 6.74),
        (("token", "token", "channel"), 6.44),
        (("ssa", "ssa", "ssa"), 6.79),
        (("channel", "channel", "channel"), 6.44),
        (("token", "token", "token"), 6.44),
    ],
)
def test_ablation(attention, millions):
    model = cifar10.model.QKFormer(num_classes=100, attention=attention)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == millions
    for stage, kind in zip((model.stage1, model.stage2, model.stage3), attention, strict=True):
        for block in stage:
            names = [name for name, _ in block.named_children()]
            assert names[0] == ("ssa" if kind == "ssa" else "tssa")


def spikes(*shape, rate=0.3):
    return (torch.rand(*shape) < rate).double()


def heads_of(attention, x, which):
    """q, k or v of an attention, by einsum, as [T, B, heads, channels, tokens]."""
    conv, bn, lif = (getattr(attention, f"{which}_{part}") for part in ("conv", "bn", "lif"))
    y = torch.einsum("oc,tbcn->tbon", conv.weight[..., 0], x.flatten(3))
    y = (
        (y - bn.running_mean[:, None])
        / (bn.running_var[:, None] + bn.eps).sqrt()
        * bn.weight[:, None]
    )
    return lif(y + bn.bias[:, None]).unflatten(2, (attention.num_heads, -1))


def project(attention, x, like):
    conv, bn = attention.proj_conv, attention.proj_bn
    y = torch.einsum("oc,tbcn->tbon", conv.weight[..., 0], x) + conv.bias[:, None]
    y = (
        (y - bn.running_mean[:, None])
        / (bn.running_var[:, None] + bn.eps).sqrt()
        * bn.weight[:, None]
    )
    return attention.proj_lif(y + bn.bias[:, None]).reshape(like.shape)


@pytest.mark.parametrize("kind", ["token", "channel", "ssa"])
def test_attention_formula(kind):
    torch.manual_seed(0)
    attention = Golden.fill(cifar10.model.ATTENTION[kind](32, 4)).eval()
    for bn in (attention.q_bn, attention.k_bn):
        bn.bias.data += (
            1.5  # enough spikes for every threshold to be crossed by some sums and missed by others
        )
    x = spikes(3, 2, 32, 4, 6)
    q, k = heads_of(attention, x, "q"), heads_of(attention, x, "k")
    lif = attention.attn_lif
    assert lif.v_threshold == 0.5
    if kind == "token":
        y = lif(torch.einsum("tbhcn->tbhn", q))[:, :, :, None] * k
    elif kind == "channel":
        y = lif(torch.einsum("tbhcn->tbhc", q))[..., None] * k
    else:
        v = heads_of(attention, x, "v")
        weights = torch.einsum(
            "tbhcn,tbhcm->tbhnm", q, k
        )  # the quadratic order: attention map first
        y = lif(0.125 * torch.einsum("tbhnm,tbhcm->tbhcn", weights, v))
    assert 0.02 < y.mean() < 0.98
    assert torch.equal(attention(x), project(attention, y.flatten(2, 3), x))


@pytest.mark.parametrize("attention", [("token", "token", "ssa"), ("ssa", "channel", "ssa")])
@pytest.mark.parametrize("cross", [False, True])
def test_batch_independence(attention, cross):
    torch.manual_seed(1)
    model = Golden.fill(
        cifar10.model.QKFormer(**SMALL, attention=attention, cross_sample_lif=cross)
    ).eval()
    images = torch.randn(3, 3, 16, 16).double()
    order = torch.tensor([1, 2, 0])
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
        shuffled = model(images[order])
    same = [
        torch.allclose(together, other, rtol=0, atol=1e-12)
        for other in (alone, shuffled[order.argsort()])
    ]
    assert same == [not cross, not cross]


def test_static_image_is_convolved_once(monkeypatch):
    """The same frames as a view of one image and as T copies of it: same output, gradients and
    running statistics.
    """
    torch.manual_seed(2)
    image = torch.randn(3, 3, 16, 8).double()
    models = [Golden.fill(cifar10.model.QKFormer(events=False, **SMALL)) for _ in range(2)]
    calls, plan_of = [], cifar10.native.plan_of

    def counting(*args):
        *_, shape, _, _ = args
        calls.extend([shape[0] * shape[1]] * (shape[2] == 3))
        return plan_of(*args)

    monkeypatch.setattr(cifar10.native, "plan_of", counting)
    outputs = []
    for model, frames in zip(
        models, (image.expand(4, *image.shape), image.repeat(4, 1, 1, 1, 1)), strict=True
    ):
        outputs.append(model.forward_features(frames))
        outputs[-1].square().sum().backward()
    assert calls == [3, 12]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    for (name, one), many in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, many.grad, rtol=1e-9, atol=1e-9, msg=name)
    for (name, one), many in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(one, many, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize(("T", "size"), [(1, (8, 8)), (2, (32, 20)), (6, (12, 24))])
def test_other_T_and_sizes(T, size):
    model = cifar10.model.QKFormer(T=T, **SMALL)
    assert model(torch.randn(2, 3, *size)).shape == (2, 10)
    maps = model.forward_features(torch.randn(3, 2, 3, *size))
    assert maps.shape == (3, 2, 64, size[0] // 4, size[1] // 4)


def test_not_square():
    """Turning the image turns the features of an SSA block with it: height and width are not mixed
    up.
    """
    torch.manual_seed(3)
    block = Golden.fill(
        cifar10.model.Block(16, 4, 4, "ssa", 0.0, cifar10.neuron.MultiStepLIF, False)
    ).eval()
    x = spikes(2, 3, 16, 4, 6)
    assert torch.equal(block(x).transpose(3, 4), block(x.transpose(3, 4)))


def test_drop_path():
    torch.manual_seed(4)
    model = cifar10.model.QKFormer(**SMALL, drop_path=0.3)
    rates = [
        block.drop_path.drop_prob
        for stage in (model.stage1, model.stage2, model.stage3)
        for block in stage
    ]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    x = torch.ones(4, 4000, 1)
    y = cifar10.model.DropPath(0.3).train()(x)
    assert (y == y[:1]).all()  # the same at every time step
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert (y == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    named = timm.create_model("QKFormer", drop_path_rate=0.3, **SMALL)
    assert named.stage3[1].drop_path.drop_prob == pytest.approx(0.3)


def test_head():
    torch.manual_seed(5)
    head = cifar10.model.QKFormer().head
    assert not head.bias.any() and head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert isinstance(cifar10.model.QKFormer(num_classes=0, **SMALL).head, torch.nn.Identity)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"num_heads": 7}, ["num_heads is 7", "96"]),
        ({"embed_dims": 100}, ["100", "multiple of 8"]),
        ({"attention": ("token", "ssa")}, ["attention", "3 stages"]),
        ({"attention": ("token", "tokens", "ssa")}, ["tokens"]),
        ({"depths": 2}, ["2", "3 blocks"]),
        ({"T": 0}, ["T is 0"]),
        ({"backend": "cuda"}, ["'cuda'", "cupy"]),
        ({"pretrained": True}, ["pretrained"]),
    ],
)
def test_wrong_keywords(keywords, words):
    with pytest.raises((ValueError, RuntimeError)) as error:
        cifar10.model.QKFormer(**keywords)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "shape", [(3, 32, 32), (2, 1, 32, 32), (2, 3, 32, 30), (2, 3, 33, 32), (4, 2, 3, 32, 32)]
)
def test_wrong_input(shape):
    with pytest.raises(ValueError, match=str(list(shape)).replace("[", r"\[").replace("]", r"\]")):
        cifar10.model.QKFormer(**SMALL)(torch.zeros(shape))
