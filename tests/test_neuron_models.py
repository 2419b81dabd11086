"""Layers and models made of the neurons LIF, IF and PLIF, and the keys that choose them."""

import copy

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import nn

from conftest import build_model, copy_folder, load, resolve_in
from on_digits import CPU, resolve

cifar10 = load("cifar10")
lif, layer = cifar10.neuron, cifar10.layer
KINDS = list(lif.NEURONS)
OTHERS = pytest.mark.parametrize(
    ("kind", "alpha"), [("if", 4.0), ("plif", 4.0), ("lif", 2.5), ("if", 7.0), ("plif", 1.5)]
)


# Layers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@OTHERS
def test_layers(kind, alpha, training):
    """A layer that may run fused, with this neuron: values and gradients of the plain one."""
    torch.manual_seed(7)
    x, grad = torch.rand(4, 2, 6, 8, 8).double().round(), torch.randn(4, 2, 10, 4, 4).double()
    node = lif.NEURONS[kind](1.7, 0.6, alpha=alpha)
    ours = nn.ModuleList([nn.Conv2d(6, 10, 3, padding=1), nn.BatchNorm2d(10), node]).double()
    ours.train(training)
    plain = copy.deepcopy(ours)
    plain[2].fused = False
    results = []
    for modules in (ours, plain):
        leaf = x.clone().requires_grad_(training)
        with torch.set_grad_enabled(training):
            spikes = layer.conv_bn_lif(leaf, *modules, pool=True)
        if training:
            spikes.backward(grad)
        grads = [parameter.grad for parameter in modules.parameters() if training]
        results.append([spikes.detach(), *([leaf.grad] if training else []), *grads])
    assert torch.equal(results[0][0], results[1][0]) and 0 < results[0][0].mean() < 1
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_neuron_of_other_types_alone(kind, dtype):
    """Between membrane shortcuts; w in bfloat16, or in float32 where the input is float64."""
    torch.manual_seed(10)
    x, grad = (torch.randn(4, 2, 6, 5, 5).add(0.5).to(dtype) for _ in range(2))
    results = []
    for fused in (True, False):
        node = lif.NEURONS[kind](1.7, fused=fused)
        node = node if dtype == torch.float64 else node.to(dtype)
        leaf = x.clone().requires_grad_()
        y = node(leaf)
        y.backward(grad)
        results.append([y.detach(), leaf.grad, *(p.grad for p in node.parameters())])
    assert torch.equal(results[0][0], results[1][0]) and 0 < results[0][0].mean() < 1
    rtol = 1e-9 if dtype == torch.float64 else 8e-3
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=rtol, atol=rtol)
    torch.testing.assert_close(results[0][2:], results[1][2:])


def test_own_neuron_with_a_name(tmp_path, monkeypatch):
    """One that docs/changing-the-model.md has in NEURONS: its layers are not taken for LIF's."""
    folder = copy_folder("cifar10", tmp_path).rename(tmp_path / "named")
    text = (folder / "spiking" / "neuron.py").read_text()
    line = 'NEURONS = {"lif": MultiStepLIF,'
    assert line in text
    own = (
        "class ShiftedLIF(MultiStepLIF):\n    def multi_step_forward(self, x):\n"
        "        return super().multi_step_forward(x + 0.2)\n\n\n"
        'NEURONS = {"shifted": ShiftedLIF, "lif": MultiStepLIF,'
    )
    (folder / "spiking" / "neuron.py").write_text(text.replace(line, own))
    modules, x = load(str(folder)), torch.rand(2, 3, 8, 8)
    share_compiled(modules, monkeypatch)
    small = {"embed_dims": 32, "num_heads": 2}
    nets = [
        spiking(modules.model.QKFormer(**small, neuron=kind, fused=fused)).eval()
        for kind, fused in (("shifted", True), ("shifted", False), ("lif", False))
    ]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    with torch.no_grad():
        ours, plain, other = (net(x.double()) for net in nets)
    torch.testing.assert_close(ours, plain)
    assert not torch.allclose(ours, other)


# Models and keys ----------------------------------------------------------------------------------

SMALL = {
    ("cifar10", "QKFormer"): ({"embed_dims": 32, "num_heads": 2}, (2, 3, 8, 8)),
    ("cifar10", "MSQKFormer"): ({"embed_dims": 32, "num_heads": 2}, (2, 3, 8, 8)),
    ("imagenet", "QKFormer_10_384"): (
        {"embed_dims": 32, "num_heads": 2, "depths": 4, "num_classes": 5},
        (2, 3, 32, 32),
    ),
    ("imagenet", "MSQKFormer_10_384"): (
        {"embed_dims": 32, "num_heads": 2, "depths": 4, "num_classes": 5},
        (2, 3, 32, 32),
    ),
    ("dvs128-gesture", "QKFormer"): ({"embed_dims": 32, "num_heads": 2}, (2, 4, 2, 32, 32)),
}


def share_compiled(folder, monkeypatch):
    """The kernels of all folders are alike, so that cifar10's need not be compiled again."""
    monkeypatch.setattr(folder.compiler, "host_library", cifar10.compiler.host_library)


def spiking(module):
    """Weights under which most layers of a small model fire."""
    torch.manual_seed(8)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1 and "bn.bias" in name:
            nn.init.uniform_(parameter, 0.0, 1.0)
    return module.double()


@pytest.mark.parametrize("kind", ["if", "plif"])
@pytest.mark.parametrize("which", SMALL, ids="-".join)
def test_models(which, kind, monkeypatch):
    """Each neuron has the options, learns what it has to learn, and fused equals plain."""
    folder, (options, shape) = load(which[0]), SMALL[which]
    share_compiled(folder, monkeypatch)
    build = folder.options.MODELS[which[1]]
    options = {**options, "neuron": kind, "v_threshold": 0.8, "surrogate_alpha": 3.0}
    if kind != "if":
        options["tau"] = 1.7
    model = spiking(build(**options))
    nodes = {n: m for n, m in model.named_modules() if isinstance(m, neuron.BaseNode)}
    for name, node in nodes.items():
        assert type(node) is folder.neuron.NEURONS[kind] and node.alpha == 3.0
        assert node.v_threshold == (0.4 if name.endswith("attn_lif") else 0.8)
        assert kind == "if" or node.tau == pytest.approx(1.7)
    default = build(**SMALL[which][0])
    extra = [f"{name}.w" for name in nodes] if kind == "plif" else []
    assert sorted(model.state_dict()) == sorted([*default.state_dict(), *extra])

    x, results = torch.randint(0, 3, shape).double(), []
    for fused in (True, False):
        ours = copy.deepcopy(model)
        for node in ours.modules():
            if isinstance(node, neuron.BaseNode):
                node.fused = fused
        logits = ours(x)
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad for p in ours.parameters() if p.requires_grad)])
        # DistributedDataParallel wants a gradient of all that is trained.
        lacking = [n for n, p in ours.named_parameters() if p.requires_grad and p.grad is None]
        assert not lacking
        if kind == "plif":
            learnt = [ours.get_parameter(name).grad for name in extra]
            assert sum(grad is not None and grad.item() != 0 for grad in learnt) >= len(learnt) - 6
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-9)


def test_makers_errors():
    make = cifar10.model.QKFormer
    for wrong, words in (
        ({"neuron": "LIF"}, "neuron is 'LIF'; it must be one of lif, if, plif"),
        ({"neuron": "if", "tau": 3.0}, "tau is 3.0, but the neuron `if` has no time constant"),
        ({"tau": 0.5}, "tau is 0.5; it must be larger than 1"),
        ({"v_threshold": 0}, "v_threshold is 0; it must be larger than 0"),
    ):
        with pytest.raises(ValueError, match=words):
            make(embed_dims=32, num_heads=2, **wrong)
    own = make(embed_dims=32, num_heads=2, neuron=type("Own", (lif.MultiStepLIF,), {}), tau=3.0)
    assert type(own.stage1[0].mlp.mlp1_lif).__name__ == "Own"
    assert own.stage1[0].mlp.mlp1_lif.tau == 3.0


@pytest.mark.parametrize("name", ["cifar10", "dvs128-gesture", "imagenet"])
def test_keys_reach_the_model(name):
    folder = load(name)

    def build(*argv):
        small = "--dim", 32, "--num_heads", 2, "--device", "cpu"
        return build_model(folder, resolve_in(folder, *small, *argv))

    flags = ["--tau", "3", "--v-threshold", "0.6", "--surrogate-alpha", "2"]
    first = build("--neuron", "plif", *flags).patch_embed1.proj_lif
    assert type(first) is folder.neuron.MultiStepPLIF and first.tau == pytest.approx(3)
    assert (first.v_threshold, first.alpha) == (0.6, 2.0)
    first = build().patch_embed1.proj_lif
    assert type(first) is folder.neuron.MultiStepLIF
    assert (first.tau, first.v_threshold, first.alpha) == (2.0, 1.0, 4.0)
    for wrong, words in (
        (("--neuron", "if", "--tau", "3"), "leave tau out"),
        (("--neuron", "alif"), "neuron is alif; it must be one of lif, if, plif"),
        (("--tau", "1"), "tau is 1.0; it must be larger than 1"),
        (("--v_threshold", "0"), "v_threshold is 0; it must be a number from"),
    ):
        with pytest.raises(folder.config.UserError, match=words):
            build(*wrong)


def test_weight_decay():
    """A time constant does not decay, whoever makes the groups."""
    cfg = resolve("--weight-decay", "0.5", "--opt", "adamw")
    small = {"embed_dims": 32, "num_heads": 2, "neuron": "plif"}
    optimizer = cifar10.train.build_optimizer(cfg, cifar10.model.QKFormer(**small))[0]
    imagenet = load("imagenet")
    model = imagenet.model.QKFormer_10_384(**small, depths=4)
    groups = imagenet.optim.parameter_groups(model, 0.5, 0.9)
    for name, group in [("timm", g) for g in optimizer.param_groups] + [("own", g) for g in groups]:
        scalars = [parameter for parameter in group["params"] if parameter.dim() == 0]
        assert not scalars or group["weight_decay"] == 0, name
    assert sum(p.dim() == 0 for g in groups for p in g["params"]) > 20


def checkpoint_of(tmp_path, neurons, config=(), record=True):
    """A checkpoint file of a model with these neurons, and what its run's configuration says."""
    cfg = resolve("--dim", 32, "--num-heads", 2, "--device", "cpu")
    model = cifar10.model.QKFormer(embed_dims=32, num_heads=2, fused=False, **neurons)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lif.w"):
                parameter.uniform_(-1, 1)
    config = {**vars(cfg), **neurons, **dict(config)}
    content = {"model": model.state_dict(), "cross_sample_lif": False}
    path = tmp_path / "some.pth"
    torch.save({**content, "config": config} if record else content, path)
    return path, model


def settled(path, *argv, purpose="test"):
    """The configuration of a call of test.py, or train.py, with this checkpoint."""
    checkpoint = cifar10.checkpoint.load_checkpoint(path)
    argv = [*map(str, argv), "--dim", "32", "--num-heads", "2"]
    back = cifar10.build.recorded_values(cifar10.options, checkpoint, path)
    return cifar10.config.read_settings(cifar10.options, argv).resolve(purpose, back, path)


def load_model(path):
    settings = cifar10.config.read_settings(cifar10.options, ["--fused", "false"])
    parts = cifar10.options, cifar10.data, CPU, path
    return cifar10.build.load_tested(settings, *parts).model.eval()


NEURONS = {"neuron": "plif", "tau": 3.0, "v_threshold": 0.7, "surrogate_alpha": 2.0}


def test_checkpoint_says_the_neurons(tmp_path):
    for neurons in (NEURONS, {"neuron": "if", "v_threshold": 0.3}, {"tau": 5.0}):
        path, model = checkpoint_of(tmp_path, neurons)
        loaded = load_model(path)
        x = torch.randn(2, 3, 8, 8)
        assert torch.equal(loaded(x), model.eval()(x))
        ours, theirs = loaded.stage1[0].mlp.mlp1_lif, model.stage1[0].mlp.mlp1_lif
        assert type(ours) is type(theirs) and repr(ours) == repr(theirs)
    # without a record: w is there, or the neuron is the default's
    path, model = checkpoint_of(tmp_path, {"neuron": "plif"}, record=False)
    assert torch.equal(load_model(path)(x), model.eval()(x))
    path, model = checkpoint_of(tmp_path, {})
    older = torch.load(path)
    for name in ("neuron", "tau", "v_threshold"):
        del older["config"][name]
    torch.save(older, path)
    (tmp_path / "if.yml").write_text("neuron: if\n")
    assert settled(path).neuron == "lif"
    assert settled(path, "-c", tmp_path / "if.yml").neuron == "if"  # goes over what files lack


@pytest.mark.parametrize("purpose", ["test", "resume", "finetune"])
def test_flags_against_a_checkpoint(tmp_path, caplog, purpose):
    caplog.set_level("INFO", logger="qkformer")
    path, _ = checkpoint_of(tmp_path, NEURONS)
    cfg = settled(path, purpose=purpose)
    assert {name: getattr(cfg, name) for name in NEURONS} == NEURONS
    caplog.clear()
    cfg = settled(path, "--v_threshold", 0.9, purpose=purpose)
    assert (cfg.v_threshold, cfg.neuron) == (0.9, "plif")
    assert (
        "v_threshold is 0.9, but" in caplog.text and "trained with 0.7; 0.9 is used" in caplog.text
    )
    with pytest.raises(cifar10.config.UserError, match=r"neuron is lif, but .* is of neuron plif"):
        settled(path, "--neuron", "lif", purpose=purpose)
    path, _ = checkpoint_of(tmp_path, {})
    with pytest.raises(cifar10.config.UserError, match=r"neuron is plif, but .* is of neuron lif"):
        settled(path, "--neuron", "plif", purpose=purpose)
    assert settled(path, "--neuron", "if", purpose=purpose).neuron == "if"  # the same weights
    path, _ = checkpoint_of(tmp_path, {}, config={"neuron": "no such"})
    with pytest.raises(cifar10.config.UserError, match=r"damaged: its neuron is 'no such'"):
        settled(path, purpose=purpose)
