"""Firing rates and energy: against figures worked out by hand, counts from shapes, spikingjelly's
counters.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import op_counter
from spikingjelly.activation_based.neuron import BaseNode
from torch import nn

import energy
from conftest import ROOT, Golden, load

cifar10, imagenet, gesture = load("cifar10"), load("imagenet"), load("dvs128-gesture")


def tiny(modules=cifar10, ms=False, **kwargs):
    """A narrow model whose BatchNorms have seen data, so that all its neurons fire now and then."""
    torch.manual_seed(0)
    sizes = {"embed_dims": 32, "num_heads": 2, "mlp_ratios": 2, "num_classes": 7, **kwargs}
    model = (modules.ms.MSHST if ms else modules.model.HST)(**sizes)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            torch.nn.init.constant_(module.bias, 1.2)
    with torch.no_grad():
        model.train()(sample(model))
    return model.eval()


def sample(model, batch=3):
    generator = torch.Generator().manual_seed(1)
    if model.in_channels == 3:
        return torch.randn(batch, 3, 32, 32, generator=generator)
    return torch.poisson(torch.full((batch, 5, 2, 32, 48), 0.4), generator)


@torch.inference_mode()
def counted(model, *batches):
    with energy.Counter(model) as counter:
        for batch in batches:
            model(batch)
    return counter


def table(counter):
    return {row.layer: row for row in energy.count(counter)}


def test_rates_set_by_hand():
    """BatchNorm gives a constant: 1.5 makes a neuron fire at steps 2 and 4 of 4, -1 makes it
    silent.
    """
    model = cifar10.model.HST(
        embed_dims=16, num_heads=2, mlp_ratios=2, depths=3, num_classes=5
    ).eval()
    for name, module in model.named_modules():
        if name.endswith("_bn"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.constant_(
                module.bias, -1.0 if "stage1" in name and "q_bn" in name else 1.5
            )
    rows = table(counted(model, torch.randn(2, 3, 8, 12)))
    rate = {name: row.rate for name, row in rows.items() if name != "patch_embed1.proj_conv"}
    assert rate["patch_embed1.proj1_conv"] == 0.5
    assert rate["stage1.0.tssa.q_conv"] == 1.0  # the shortcut's spikes on top
    assert rows["stage1.0.tssa.q_conv"].nonzero == 0.5
    assert rate["stage1.0.tssa: sum of q"] == 0.0 and rate["stage1.0.tssa: mask * k"] == 0.5
    assert rate["stage1.0.tssa.proj_conv"] == 0.0  # no q, no mask
    assert rate["stage1.0.mlp.mlp1_conv"] == 1.5
    assert rate["patch_embed2.proj3_conv"] == 2.0
    assert rate["stage2.0.tssa.proj_conv"] == 0.5  # the mask fires with q
    # Stage 1, 8 x 12 pixels, in pJ: 2 channels, then 4.
    n = 96
    first = 4.6 * 3 * 2 * 9 * n
    embed = 0.9 * 4 * (0.5 * 2 * 4 * 9 + 0.5 * 2 * 4) * n
    attention = (
        0.9 * 4 * (1.0 * 4 * 4 * 2 + 0.5 * 4) * n
    )  # q, k; mask * k; nothing reaches the last convolution
    mlp = 0.9 * 4 * (1.5 * 4 * 8 + 0.5 * 8 * 4) * n
    sums = energy.add_up(rows.values())
    assert math.isclose(
        sums["stage1"].energy, 1e-9 * (first + embed + attention + mlp), rel_tol=1e-12
    )
    # SSA of stage 3: 2 x 3 tokens, 16 channels, 2 heads; q, k and v fire at two steps of four.
    assert rows["stage3.0.ssa: k^T v"].macs == 6 * 16 * 8
    assert rows["stage3.0.ssa: q (k^T v)"].sops == 0.5 * 4 * 6 * 16 * 8
    ann = 4.6e-9 * sum(row.macs for row in rows.values() if row.layer != "head")
    assert math.isclose(sums["all"].ann, ann, rel_tol=1e-12)
    assert rows["head"].sops is None and rows["head"].macs == 16 * 5


def test_hst_10_384_has_the_published_size():
    model = imagenet.model.QKFormer_10_384(T=1).eval()
    counter = counted(model, torch.randn(1, 3, 224, 224))
    layers = [row for row in energy.count(counter) if "_conv" in row.layer]
    assert round(4 * sum(row.macs for row in layers) / 1e9, 1) == 23.3
    assert round(4 * sum(tally.values for tally in counter.neurons.values()) / 1e6, 1) == 49.2
    outputs = [
        row.macs / dict(model.named_modules())[row.layer].weight[0].numel() for row in layers
    ]
    assert round(4 * sum(outputs) / 1e6, 1) == 60.5
    assert math.isclose(
        layers[0].energy, 4.6e-9 * 3 * 48 * 9 * 224**2, rel_tol=1e-12
    )  # once, not T times


CASES = [
    (cifar10, {"depths": 3, "T": 3, "num_heads": 4}),
    (cifar10, {"depths": 4, "attention": ("ssa", "channel", "token"), "cross_sample_lif": True}),
    (imagenet, {"depths": 4, "T": 2}),
    (gesture, {"cross_sample_lif": True}),
    (cifar10, {"ms": True, "depths": 3, "mlp_ratios": 1}),
    (imagenet, {"ms": True, "depths": 4, "T": 2}),
]


@pytest.mark.parametrize("modules, sizes", CASES)
def test_counts_are_those_of_spikingjelly_and_of_shapes(modules, sizes):
    """Each accumulate of a layer counted one by one; spikingjelly does so where the input is
    binary.
    """
    model = tiny(modules, fused=False, **sizes)
    images = sample(model)
    seen = {}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv1d, nn.Conv2d))}
    for name, module in model.named_modules():
        if name in layers or name.endswith("_lif"):
            module.register_forward_hook(
                lambda _, args, out, name=name: seen.update({name: (*args, out)})
            )
    counter = op_counter.SynOpCounter()
    with torch.no_grad(), op_counter.DispatchCounterMode([counter]):
        model(images)
    theirs = {
        scope.split(".", 1)[-1]: sum(ops.values()) for scope, ops in counter.get_counts().items()
    }
    rows = table(counted(model, images))
    compared = 0
    for name, module in layers.items():
        (x, output), row = seen[name], rows[name]
        macs = output.numel() * module.weight[0].numel()
        if name == "patch_embed1.proj_conv":  # an image is convolved once, frames one by one
            times = 1 if modules is gesture else model.T
            assert row.sops is None and times * row.macs * row.steps * len(images) == macs
            continue
        assert row.macs * row.steps * len(images) == macs
        assert row.rate == pytest.approx(x.double().mean().item(), rel=1e-12) and row.rate > 0
        assert row.nonzero == pytest.approx((x != 0).double().mean().item(), rel=1e-12)
        conv = F.conv1d if x.dim() == 3 else F.conv2d
        whole = conv(
            x.double(), torch.ones_like(module.weight).double(), None, module.stride, module.padding
        )
        sops = row.sops * len(images)
        if module.kernel_size[0] == 1 and module.stride[0] == 1:
            assert sops == pytest.approx(whole.sum().item(), rel=1e-12)
        assert sops == pytest.approx(x.double().mean().item() * macs, rel=1e-12)
        if x.max() <= 1:
            assert theirs[name] == whole.sum().item()
            compared += 1
    for name, module in model.named_modules():
        if isinstance(module, modules.model.SpikingSelfAttention):
            q, k, v = (
                seen[f"{name}.{which}_lif"][-1].flatten(3).unflatten(2, (module.num_heads, -1))
                for which in "qkv"
            )
            width = q.shape[3]
            products = [
                rows[f"{name}: {what}"].sops * len(images) for what in ("k^T v", "q (k^T v)")
            ]
            assert products == pytest.approx(
                [k.sum().item() * width, q.sum().item() * width], rel=1e-12
            )
            # spikingjelly counts its convolutions too, and of k^T v where both fire
            inside = sum(value for scope, value in theirs.items() if scope.startswith(f"{name}."))
            assert theirs[name] - inside == (k @ v.transpose(3, 4)).sum() + q.sum() * width
    assert compared >= 8


@pytest.mark.parametrize("modules, sizes", CASES)
def test_the_counters_rule_is_neurobenchs(modules, sizes):
    """Effective operations of each layer, which kind they are, sparsity and footprint."""
    reason = "pip install -r requirements-export.txt"
    macs = pytest.importorskip("neurobench.metrics.utils.layers.macs", reason=reason)
    static = pytest.importorskip("neurobench.metrics.static", reason=reason)
    wrap = pytest.importorskip("neurobench.models").TorchModel
    model = tiny(modules, fused=False, **sizes)
    images, seen, fired, hooks = sample(model), {}, [], []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            hook = lambda _, args, out, name=name: seen.update({name: args[0]})  # noqa: E731
            hooks.append(module.register_forward_hook(hook))
        elif isinstance(module, BaseNode):
            hooks.append(module.register_forward_hook(lambda _, args, out: fired.append(out)))
    with torch.inference_mode():
        model(images)
    for hook in hooks:
        hook.remove()
    theirs = {
        name: macs.single_layer_MACs(x, model.get_submodule(name)) for name, x in seen.items()
    }
    counter = counted(model, images)
    rows = table(counter)
    kinds = set()
    for name, (operations, spiking) in theirs.items():
        times = model.T if name == "patch_embed1.proj_conv" and modules is not gesture else 1
        assert rows[name].effective * times * len(images) == pytest.approx(operations, rel=1e-12)
        if name not in ("patch_embed1.proj_conv", "head"):
            assert rows[name].binary == spiking
            kinds.add(spiking)
        price = 0.9 if rows[name].binary else 4.6
        assert rows[name].counters == pytest.approx(1e-9 * price * rows[name].effective)
    assert kinds == {True, False} or sizes.get("ms")  # sums of spikes are there
    zeros = sum((out == 0).sum().item() for out in fired) / sum(out.numel() for out in fired)
    assert energy.sparsity(counter) == pytest.approx(zeros)
    assert energy.footprint(model) == static.Footprint()(wrap(model))
    for name, rates in energy.step_rates(counter).items():
        assert math.fsum(rates) / len(rates) == pytest.approx(counter.neurons[name].rate)
        assert len(rates) == (5 if modules is gesture else model.T)


def test_memory_is_spikingjellys():
    """It reads the first convolution's weights at every step; its neurons keep no state here."""
    model = tiny(depths=3, fused=False)
    images = sample(model)
    with torch.no_grad():
        report = op_counter.estimate_simple_energy(model, images)
    rows = energy.count(counted(model, images))
    ours = sum(row.memory * (model.T if row == rows[0] else 1) for row in rows) * len(images)
    assert ours == pytest.approx(1e-9 * report.energy_memory_pj, rel=1e-9)


@pytest.mark.parametrize(("groups", "dilation", "padding"), [(1, 1, 1), (4, 1, 2), (8, 2, 0)])
def test_multiplications_by_what_is_not_0(groups, dilation, padding):
    """The sum of a convolution of ones, groups and dilation among them."""
    conv = nn.Conv2d(8, 16, 3, 1, padding, dilation, groups, bias=False)
    x = (torch.rand(2, 8, 9, 9, generator=torch.manual_seed(0)) < 0.3).float()
    nn.init.ones_(conv.weight)
    assert energy.effective(conv, x) == conv(x).sum().item() > 0


def test_an_attention_without_its_neuron(capsys):
    """What it computes between its neurons is not counted, and a line says so."""
    model = tiny()
    attention = model.stage1[0].tssa
    attention.forward = lambda x: cifar10.layer.conv_bn_lif(
        x, attention.proj_conv, attention.proj_bn, attention.proj_lif
    )
    with energy.Counter(model) as counter, torch.no_grad():
        model(sample(model))
    rows = energy.count(counter)
    assert any(row.layer == "stage1.0.tssa.proj_conv" for row in rows)
    assert "whose own products are not counted" in capsys.readouterr().out


def test_batches_add_up_and_nothing_is_changed():
    model = tiny(depths=3)
    images, state = sample(model, 7), {k: v.clone() for k, v in model.state_dict().items()}
    parts, whole = counted(model, *images.split(3)), counted(model, images)
    assert energy.count(parts) == energy.count(whole) and parts.images == 7
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_report_names_silent_neurons(tmp_path, capsys):
    model = tiny(depths=3)
    nn.init.constant_(model.stage2[0].tssa.q_bn.bias, -9.0)
    counter = counted(model, sample(model))
    energy.report(counter, tmp_path / "best.pth")
    text = capsys.readouterr().out
    result = json.loads((tmp_path / "energy-best.json").read_text())
    lines = (tmp_path / "energy-best.csv").read_text().splitlines()
    assert len(lines) == 1 + len(result["layers"])
    assert lines[0].startswith("layer,stage,rate,nonzero,steps")
    stages = sum(stage["energy"] for stage in result["stages"].values())
    assert math.isclose(stages, result["energy"], rel_tol=1e-12)
    assert result["images"] == 3 and "stage3" in text and "paper" not in text
    silent = [name for name, rate in result["neurons"].items() if rate == 0]
    assert silent[:2] == ["stage2.0.tssa.q_lif", "stage2.0.tssa.attn_lif"]
    assert f"silent layers: {len(silent)} of {len(counter.neurons)}: {silent[0]}, " in text
    with pytest.raises(SystemExit, match=r"energy-best.csv can't be written"):
        energy.report(counter, tmp_path / "gone" / "best.pth")


def test_the_papers_rates_stand_beside_those_of_hst_10_768_alone():
    for kinds, width, published in [
        (("token", "token", "ssa"), 768, True),
        (("channel", "token", "ssa"), 768, False),
    ]:
        model = imagenet.model.HST(embed_dims=16, num_heads=2, attention=kinds)
        assert not energy.is_published(model)
        model.head = torch.nn.Linear(width, 1)
        assert energy.is_published(model) == published


def test_a_checkpoint_from_the_command_line(tmp_path, capsys, monkeypatch):
    """Its folder is the one above output/, or named; flags of the folder come behind --."""
    monkeypatch.chdir(ROOT)
    path = tmp_path / "cifar10" / "output" / "run" / "best.pth"
    path.parent.mkdir(parents=True)
    model = cifar10.model.QKFormer(embed_dims=16, num_heads=2, num_classes=10, depths=3)
    torch.save(Golden.fill(model).float().state_dict(), path)
    flags = "--device cpu --dataset digits --img_size 16 --workers 0 --num_heads 2 --time_step 3"
    assert energy.main([path, "--", *flags.split()]) == 0
    assert "cross_sample_lif: true" in capsys.readouterr().out
    result = json.loads(path.with_name("energy-best.json").read_text())
    assert (result["images"], result["T"]) == (360, 3)  # digits for testing
    first = model.patch_embed1.proj_conv.weight
    (row,) = [row for row in result["layers"] if row["layer"] == "patch_embed1.proj_conv"]
    assert row["energy"] == pytest.approx(4.6e-9 * first.numel() * 16 * 16)
    alone = tmp_path / "alone.pth"
    alone.write_bytes(b"")
    for argv, words in (
        ([alone], "alone.pth: no data set's folder is above it; name one: --folder cifar10"),
        ([alone, "--folder", "cifar10"], "not a checkpoint, or not whole"),
        ([path, "--folder", "imagenet"], "but this folder is for"),
        ([path, "--", "--dimm", "3"], "unknown flag --dimm; is dim meant?"),
    ):
        with pytest.raises(SystemExit) as end:
            energy.main(argv)
        assert words in end.value.code and end.value.code.startswith("error: "), end.value.code
        assert "\n" not in end.value.code
