"""MS-QKFormer, cifar10/ms.py and imagenet/ms.py: golden numbers, formulas, recipes."""

import pytest
import timm
import torch
from spikingjelly.activation_based.model import maxformer
from torch import nn

from conftest import Golden, build_model, load, resolve_in
from on_golden import check_golden
from on_ms import SMALL, cifar10, cifar100, imagenet, make_model

lif = cifar10.neuron


# The model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_golden_cifar10(fused):
    """With the steps of an optimizer where it runs fused."""
    golden = Golden("cifar10-ms")

    def build():
        return timm.create_model("MSQKFormer", T=golden.meta["T"], fused=fused)

    check_golden(golden, build, lif.MultiStepLIF, "per_sample", fused, fused)


@pytest.mark.parametrize(
    ("fused", "losses"),
    [
        (True, False),
        pytest.param(True, True, marks=pytest.mark.long),
        pytest.param(False, True, marks=pytest.mark.long),
    ],
)
def test_golden_imagenet(fused, losses):
    golden = Golden("imagenet-ms-384")

    def build():
        return timm.create_model("MSQKFormer_10_384", T=golden.meta["T"], fused=fused)

    check_golden(golden, build, imagenet.neuron.MultiStepLIF, "per_sample", fused, losses)


def test_state_dict():
    models = {
        "cifar10-ms": (cifar10.ms.MSQKFormer(), 6_706_234),
        "imagenet-ms-384": (imagenet.ms.MSQKFormer_10_384(), 16_473_688),
    }
    for name, (model, parameters) in models.items():
        have = [[key, list(value.shape)] for key, value in model.state_dict().items()]
        assert have == Golden(name).meta["state_dict"]
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    for model, parameters, heads in (
        (cifar100.ms.MSQKFormer(), 6_740_884, 8),
        (imagenet.ms.MSQKFormer_10_768(T=1), 64_962_760, 12),
    ):
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters
        assert {
            block.attn.num_heads for block in (*model.stage1, *model.stage2, *model.stage3)
        } == {heads}


def test_initialisation():
    model = imagenet.ms.MSQKFormer_10_384()
    convolution, line = model.patch_embed3.proj4_conv.weight, model.stage3[0].attn.q_conv.weight
    assert (
        convolution.std().item() == pytest.approx(0.02, rel=0.02) and convolution.abs().max() > 0.07
    )
    assert model.stage3[0].mlp.fc1_conv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert line.abs().max() <= 384**-0.5  # PyTorch's default, uniform
    assert (
        model.head.weight.std().item() == pytest.approx(0.02, rel=0.02)
        and not model.head.bias.any()
    )
    assert (
        cifar10.ms.MSQKFormer().patch_embed3.max_embed1.embed_conv.weight.abs().max()
        <= (384 * 9) ** -0.5
    )


@pytest.mark.parametrize("kind", ["token", "channel", "ssa"])
def test_attention_formula(kind):
    """By einsum, from the membrane inputs to what is added to them."""
    torch.manual_seed(0)
    attention = Golden.fill(cifar10.ms.MS_ATTENTION[kind](32, 4)).eval()
    for bn in (attention.q_bn, attention.k_bn):
        bn.bias.data += (
            1.5  # enough spikes for every threshold to be crossed by some sums and missed by others
        )
    x = torch.randn(3, 2, 32, 4, 6, dtype=torch.float64) * 2
    first = attention.x_lif if kind == "ssa" else attention.proj_lif

    def normalised(which, x):
        conv, bn = getattr(attention, f"{which}_conv"), getattr(attention, f"{which}_bn")
        y = torch.einsum("oc,tbcn->tbon", conv.weight[..., 0], x)
        y = y if conv.bias is None else y + conv.bias[:, None]
        y = (y - bn.running_mean[:, None]) / (bn.running_var[:, None] + bn.eps).sqrt()
        return y * bn.weight[:, None] + bn.bias[:, None]

    def heads(which):
        spikes = lif.torch_lif(first(x).flatten(3), 2.0, 1.0)
        assert torch.equal(spikes, spikes.bool().double())
        return lif.torch_lif(normalised(which, first(x).flatten(3)), 2.0, 1.0).unflatten(2, (4, -1))

    q, k = heads("q"), heads("k")
    if kind == "token":
        y = lif.torch_lif(torch.einsum("tbhcn->tbhn", q), 2.0, 0.5)[:, :, :, None] * k
    elif kind == "channel":
        y = lif.torch_lif(torch.einsum("tbhcn->tbhc", q), 2.0, 0.5)[..., None] * k
    else:
        weights = torch.einsum(
            "tbhcn,tbhcm->tbhnm", q, k
        )  # the quadratic order: attention map first
        y = lif.torch_lif(0.125 * torch.einsum("tbhnm,tbhcm->tbhcn", weights, heads("v")), 2.0, 0.5)
    assert 0.005 < y.mean() < 0.98 and 0.02 < first(x).mean() < 0.98
    want = normalised("proj", y.flatten(2, 3)).reshape(x.shape)
    torch.testing.assert_close(attention(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ratio", [1, 2])
def test_mlp_is_maxformers(ratio):
    """spikingjelly's own MLP with membrane shortcuts, with a second one where the ratio is 1."""
    torch.manual_seed(0)
    ours = Golden.fill(cifar10.ms.MSMLP(16, 16 * ratio)).train()
    neurons = {
        "tau": 2.0,
        "detach_reset": True,
        "surrogate_function": ours.fc1_lif.surrogate_function,
    }
    theirs = maxformer._SpatialMLP(16, 16 * ratio, None, neurons).double().train()
    names = {"fc1_conv": "fc1", "fc1_bn": "bn1", "fc2_conv": "fc2", "fc2_bn": "bn2"}
    theirs.load_state_dict(
        {
            names[key.split(".")[0]] + "." + key.split(".")[1]: v
            for key, v in ours.state_dict().items()
        }
    )
    x = torch.randn(4, 2, 16, 3, 5, dtype=torch.float64) * 2
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    results = [leaves[0] + ours(leaves[0]), theirs(leaves[1])]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    for result in results:
        result.square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("attention", [("token", "token", "ssa"), ("ssa", "channel", "token")])
def test_batch_independence(name, attention):
    model, x = make_model(name, attention=attention)
    with torch.no_grad():
        together = model.eval()(x)
        alone = torch.cat([model(image[None]) for image in x])
    assert together.std() > 0.01
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_not_square():
    """Turning the image turns a block's features with it: height and width are not mixed up."""
    torch.manual_seed(3)
    for kind in cifar10.ms.MS_ATTENTION:
        block = Golden.fill(cifar10.ms.MSBlock(16, 4, 4, kind, 0.0, lif.MultiStepLIF)).eval()
        x = torch.randn(2, 3, 16, 4, 6, dtype=torch.float64)
        torch.testing.assert_close(
            block(x).transpose(3, 4), block(x.transpose(3, 4)), rtol=1e-12, atol=1e-12
        )


def test_keywords():
    model, _ = make_model("cifar10", T=3, in_channels=2, num_classes=0, depths=5, drop_path=0.2)
    assert model.eval()(torch.rand(2, 2, 8, 20).double()).shape == (2, 48)
    features = model.pool(model.forward_features(torch.rand(5, 2, 2, 8, 8).double()))
    assert features.shape == (5, 2, 48) and set(features.unique().tolist()) <= {0.0, 1.0}
    rates = [
        block.drop_path.drop_prob
        for stage in (model.stage1, model.stage2, model.stage3)
        for block in stage
    ]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    assert (
        cifar10.ms.MSQKFormer(cross_sample_lif="auto", **SMALL["cifar10"][0]).head.out_features
        == 10
    )
    assert timm.create_model("MSQKFormer_10_384", T=1, embed_dims=32, num_heads=2, depths=4)(
        torch.rand(1, 3, 32, 16)
    ).shape == (1, 1000)
    assert isinstance(model.head, nn.Identity)


@pytest.mark.parametrize("make", [cifar10.ms.MSQKFormer, imagenet.ms.MSQKFormer_10_384])
@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"cross_sample_lif": True}, ["cross_sample_lif is True", "MS-QKFormer"]),
        ({"num_heads": 7}, ["num_heads is 7", "96"]),
        ({"embed_dims": 100}, ["100", "multiple of 8"]),
        ({"attention": ("token", "tokens", "ssa")}, ["tokens"]),
        ({"depths": 2}, ["depths", "2"]),
        ({"T": 0}, ["T is 0"]),
        ({"mlp_ratios": 0.001}, ["mlp_ratios is 0.001"]),
        ({"backend": "cuda"}, ["'cuda'", "cupy"]),
        ({"pretrained": True}, ["pretrained"]),
    ],
)
def test_wrong_keywords(make, keywords, words):
    with pytest.raises((ValueError, RuntimeError)) as error:
        make(**keywords)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(("name", "size"), [("cifar10", 30), ("imagenet", 40)])
def test_wrong_input(name, size):
    with pytest.raises(ValueError, match=rf"\[2, 3, {size}, {size}\]"):
        make_model(name)[0](torch.zeros(2, 3, size, size))


# Its recipes --------------------------------------------------------------------------------------


def recipe(folder, name):
    return resolve_in(folder, "-c", name)


def changes(ours, base):
    return {key: value for key, value in vars(ours).items() if value != getattr(base, key)}


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_recipe_cifar(name):
    folder = load(name)
    ours = recipe(folder, "ms.yml")
    want = {"model": "MSQKFormer", "batch_size": 128, "lr": 1.5e-3, "cutmix": 0.5}
    assert changes(ours, recipe(folder, f"{name}.yml")) == {**want, "warmup_lr": 8e-5}
    model = build_model(folder, ours)
    assert type(model).__name__ == "MSHST"
    with pytest.raises(folder.config.UserError, match="cross_sample_lif is True"):
        build_model(folder, ours, cross_sample_lif=True)


def test_recipe_imagenet():
    names = "ms_10_384", "ms_10_768_t1", "imagenet"
    small, large, base = (recipe(imagenet, f"{name}.yml") for name in names)
    want = {"blr": 1.35e-3, "min_lr": 2.5e-6, "mixup": 0.25, "cutmix": 1.0, "mixup_prob": 0.5}
    want |= {"reprob": 0.0, "model": "MSQKFormer_10_384", "batch_size": 64, "accum_iter": 1}
    assert changes(small, base) == want
    assert changes(large, small) == {"model": "MSQKFormer_10_768", "time_step": 1}
    assert large.model in imagenet.options.MODELS
