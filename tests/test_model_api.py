"""The models as timm's and PyTorch's tools use them: heads, features, meta tensors, exported
graphs, copies.
"""

import copy
import io
import pickle

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from conftest import load, register

FOLDERS = {
    "cifar10": ("QKFormer", {"depths": 3}, (2, 3, 16, 8)),
    "cifar100": ("QKFormer", {"depths": 3}, (2, 3, 16, 8)),
    "imagenet": ("QKFormer_10_384", {"depths": 4}, (2, 3, 32, 16)),
    "dvs128-gesture": ("QKFormer", {}, (2, 3, 2, 16, 32)),
    "cifar10-dvs": ("QKFormer", {}, (2, 3, 2, 16, 32)),
}


def make(name, **kwargs):
    entry, options, shape = FOLDERS[name]
    torch.manual_seed(0)
    model = getattr(load(name).model, entry)(
        embed_dims=32, num_heads=2, num_classes=7, **options, **kwargs
    )
    return model, torch.rand(shape)


@pytest.mark.parametrize("name", FOLDERS)
def test_head_and_features(name):
    model, x = make(name, fused=False)
    model.eval()
    assert model.num_features == 32 and model.get_classifier() is model.head
    with torch.no_grad():
        frames = x.transpose(0, 1) if x.dim() == 5 else x
        features = model.forward_features(frames)
        assert torch.equal(features, model.forward_features(model.frames(x)))
        assert features.shape[:3] == (3 if x.dim() == 5 else 4, 2, 32)
        assert torch.equal(model.forward_head(features), model(x))
        pooled = model.forward_head(features, pre_logits=True)
        assert torch.equal(model.head(pooled), model(x))
        model.double().reset_classifier(5)
        assert model(x.double()).shape == (2, 5) and model.num_classes == 5
        assert not model.head.bias.any() and 0 < model.head.weight.std() < 0.03
        maps = model.forward_features(frames.double())
        model.reset_classifier(0, "")
        assert torch.equal(model(x.double()), maps.mean(0))
        model.reset_classifier(0, "avg")
        assert model(x.double()).shape == (2, 32) and isinstance(
            model.get_classifier(), torch.nn.Identity
        )
    wrong = x[:, :, :1] if x.dim() == 5 else x[:, :1]
    with pytest.raises(ValueError, match="input of shape"):
        model.forward_features(wrong)
    with pytest.raises(ValueError, match="input of shape"):
        model.forward_features(x[0] if x.dim() == 4 else x[:, 0])


CALL = {  # the release's, of its training scripts
    "drop_rate": 0.0,
    "drop_path_rate": 0.2,
    "drop_block_rate": None,
    "img_size_h": 32,
    "img_size_w": 32,
    "patch_size": 4,
    "mlp_ratios": 4,
    "qkv_bias": False,
    "sr_ratios": 1,
}


@pytest.fixture(params=FOLDERS)
def created(request):
    """(function of keywords that calls timm.create_model, its folder's module, an input)."""
    modules, (name, options, shape) = load(request.param), FOLDERS[request.param]
    register(modules)

    def create(**kwargs):
        torch.manual_seed(0)
        return timm.create_model(name, **{"embed_dims": 32, "num_heads": 2, **options, **kwargs})

    yield create, modules.model, torch.rand(shape)
    register(load("cifar10"))


def test_keywords_of_timm_and_the_release(created):
    create, module, x = created
    channels = x.shape[-3]
    model = create(pretrained=False, in_channels=channels, **CALL).eval()
    assert model.stage1[0].drop_path.drop_prob == 0 and type(model) is module.HST
    assert [*model.children()][-2][-1].drop_path.drop_prob == pytest.approx(
        0.2
    )  # of the last stage's last block
    assert model.num_classes == model.pretrained_cfg["num_classes"] == len(model(x)[0])
    assert model.pretrained_cfg["input_size"][0] == channels
    assert model.get_submodule(model.pretrained_cfg["first_conv"]).in_channels == channels
    grey = create(in_chans=1, num_classes=3, img_size=(32, 64))
    assert grey(x[..., :1, :, :]).shape == (2, 3)
    assert create(num_classes=0)(x).shape == (2, 32)
    maps = create(num_classes=0, global_pool="")
    assert torch.equal(maps(x), maps.forward_intermediates(x)[1][-1])
    for wrong in ({"drop_rate": 0.1}, {"qkv_bias": True}, {"global_pool": "max"}, {"nothing": 1}):
        with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
            create(**wrong)


def test_maps_of_the_stages(created):
    create, _, x = created
    model, maps = create().eval(), create(features_only=True, out_indices=(0, -1)).eval()
    frames = x.transpose(0, 1) if x.dim() == 5 else x.expand(4, *x.shape)
    with torch.no_grad():
        want, y = [], frames
        for index in range(1, len(model.feature_info) + 1):
            want.append(y := model.run_stage(index, y))
        found = maps(x)
        final, means = model.forward_intermediates(x)
        steps = model.forward_intermediates(x, indices=1, steps=True, intermediates_only=True)
    assert torch.equal(final, want[-1]) and torch.equal(steps[0], want[-1]) and len(steps) == 1
    assert all(torch.equal(a, b.mean(0)) for a, b in zip(means, want, strict=True))
    assert all(torch.equal(a, b.mean(0)) for a, b in zip(found, (want[0], want[-1]), strict=True))
    assert [y.shape[1] for y in found] == maps.feature_info.channels()
    assert [x.shape[-1] // y.shape[-1] for y in found] == maps.feature_info.reduction()
    first = create(features_only=True, out_indices=(0,))
    assert not any("stage2" in name for name, _ in first.named_parameters()) and first(x)


def test_training_helpers(created):
    create, _, x = created
    model = create(drop_path_rate=0.1)
    names = [name for name, _ in model.named_parameters()]
    groups = param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5)
    scales = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    ordered = [scales[id(p)] for p in model.parameters()]
    assert len(scales) == len(names) and ordered[-1] == 1
    by_name = dict(zip(names, ordered, strict=True))
    first, last = (by_name[f"patch_embed{i}.proj_res_conv.weight"] for i in (1, 2))
    (kind,) = (n for n, _ in model.stage1[0].mlp.named_children() if n.endswith("1_conv"))
    assert first < scales[id(model.stage1[0].mlp.get_submodule(kind).weight)] < last
    gradients = []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        model.zero_grad()
        torch.manual_seed(1)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class Own(torch.nn.Module):
    """A neuron that reads its threshold once."""

    def __init__(self, tau=2.0, v_threshold=1.0, **_):
        super().__init__()
        self.levels = (v_threshold, 2 * v_threshold)

    def forward(self, x):
        return (x >= self.levels[0]).to(x)


class Wrapped(torch.nn.Module):
    """A convolution in something else, as of low-rank or quantised layers."""

    def __init__(self, conv):
        super().__init__()
        self.inner = conv

    def forward(self, x):
        return self.inner(x)


def test_neuron_and_convolution_of_ones_own():
    model, x = make("cifar10", neuron=Own, v_threshold=0.6)
    assert model.stage1[0].tssa.attn_lif.levels == (0.3, 0.6)
    assert model.stage1[0].tssa.q_lif.levels == (0.6, 1.2)
    want = model.eval()(x)
    model.stage1[0].tssa.q_conv = Wrapped(model.stage1[0].tssa.q_conv)
    model.stage3[0].ssa.proj_conv = Wrapped(model.stage3[0].ssa.proj_conv)
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("name", FOLDERS)
def test_meta(name):
    model, x = make(name, drop_path=0.1, fused=False)
    with torch.device("meta"):
        empty, _ = make(name, drop_path=0.1)
    logits = empty(x.to("meta"))
    logits.sum().backward()
    assert logits.is_meta and logits.shape == (2, 7)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(empty.eval()(x), model.eval()(x))


@pytest.mark.parametrize(("name", "grad"), [("cifar10", True), ("dvs128-gesture", False)])
@pytest.mark.filterwarnings("ignore")
def test_exported_graphs(name, grad):
    model, x = make(name, T=2)
    model.eval()
    with torch.no_grad():
        want = model(x)
    with torch.set_grad_enabled(grad):
        exported = torch.export.export(model, (x,)).module()
        traced = torch.jit.trace(model, x, check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    with torch.no_grad():
        for graph in (exported, torch.jit.load(file)):
            torch.testing.assert_close(graph(x), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["cifar10", "dvs128-gesture"])
def test_copies_and_types(name):
    model, x = make(name)
    model(x).sum().backward()
    with torch.no_grad():
        want = model.eval()(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), want)
        for dtype in (torch.float16, torch.bfloat16):
            assert copy.deepcopy(model).to(dtype)(x.to(dtype)).dtype == dtype
    half = copy.deepcopy(model).half().train()
    half(x.half()).float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())
