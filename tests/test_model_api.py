"""The models as timm's and PyTorch's tools use them: heads, features, meta tensors, exported
graphs, copies.
"""

import copy
import io
import pickle

import pytest
import torch

from conftest import load

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
        assert features.shape == (3 if x.dim() == 5 else 4, 2, 32)
        assert torch.equal(model.forward_head(features), model(x))
        pooled = model.forward_head(features, pre_logits=True)
        assert torch.equal(model.head(pooled), model(x))
        model.double().reset_classifier(5)
        assert model(x.double()).shape == (2, 5) and model.num_classes == 5
        assert not model.head.bias.any() and 0 < model.head.weight.std() < 0.03
        model.reset_classifier(0)
        assert model(x.double()).shape == (2, 32) and isinstance(
            model.get_classifier(), torch.nn.Identity
        )
    wrong = x[:, :, :1] if x.dim() == 5 else x[:, :1]
    with pytest.raises(ValueError, match="input of shape"):
        model.forward_features(wrong)
    with pytest.raises(ValueError, match="input of shape"):
        model.forward_features(x[0] if x.dim() == 4 else x[:, 0])


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
