"""Firing rates and energy: against figures worked out by hand, counts from shapes, spikingjelly's
counters.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import op_counter
from torch import nn

from conftest import load, on_cpu

cifar10, imagenet, gesture = load("cifar10"), load("imagenet"), load("dvs128-gesture")
ALONE = SimpleNamespace(gather=lambda value: [value], main=True)


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
def counted(modules, model, *batches):
    with modules.firing.Counter(model) as counter:
        for batch in batches:
            model(batch)
    return counter.gather(ALONE)


def table(modules, counter):
    return {row.layer: row for row in modules.energy.count(counter)}


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
    rows = table(cifar10, counted(cifar10, model, torch.randn(2, 3, 8, 12)))
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
    sums = cifar10.energy.add_up(rows.values())
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
    counter = counted(imagenet, model, torch.randn(1, 3, 224, 224))
    layers = [row for row in imagenet.energy.count(counter) if "_conv" in row.layer]
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
    rows = table(modules, counted(modules, model, images))
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


def test_ranks_give_what_one_gives():
    model = tiny(depths=3, cross_sample_lif=True)
    batches = sample(model, 7).split(3)
    alone = counted(cifar10, model, *batches)
    shares = []
    for share in (batches[0::4], batches[1::4], batches[2::4], batches[3::4]):
        with torch.inference_mode(), cifar10.firing.Counter(model) as counter:
            for batch in share:
                model(batch)
        shares.append((counter.images, counter.T, counter.static, counter.layers, counter.neurons))
    together = cifar10.firing.Counter(model).gather(SimpleNamespace(gather=lambda mine: shares))
    assert shares[3][0] == 0  # this rank had no batch
    assert cifar10.energy.count(together) == cifar10.energy.count(alone)
    assert cifar10.energy.block_rates(together) == cifar10.energy.block_rates(alone)


def test_report(tmp_path, caplog):
    model = tiny(depths=3)
    with caplog.at_level("INFO", "qkformer"):
        result = cifar10.energy.report(
            counted(cifar10, model, sample(model)), ALONE, tmp_path / "best.pth"
        )
    assert json.loads((tmp_path / "energy-best.json").read_text()) == json.loads(json.dumps(result))
    lines = (tmp_path / "energy-best.csv").read_text().splitlines()
    assert len(lines) == 1 + len(result["layers"]) and lines[0].startswith(
        "layer,stage,rate,nonzero,steps"
    )
    assert math.isclose(
        sum(stage["energy"] for stage in result["stages"].values()), result["energy"], rel_tol=1e-12
    )
    assert result["images"] == 3 and "stage3" in caplog.text and "paper" not in caplog.text


def test_the_papers_rates_stand_beside_those_of_hst_10_768_alone():
    for kinds, width, published in [
        (("token", "token", "ssa"), 768, True),
        (("channel", "token", "ssa"), 768, False),
    ]:
        model = imagenet.model.HST(embed_dims=16, num_heads=2, attention=kinds)
        assert not imagenet.energy.is_published(model)
        model.head = torch.nn.Linear(width, 1)
        assert imagenet.energy.is_published(model) == published


def test_peeking_changes_nothing_and_names_silent_neurons(caplog):
    model = tiny(depths=3)
    nn.init.constant_(model.stage2[0].tssa.q_bn.bias, -9.0)
    batches = [(images, None) for images in sample(model, 24).split(12)]
    peek = cifar10.firing.Peek(batches)
    assert [*peek] == batches and len(peek) == 2
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    with caplog.at_level("INFO", "qkformer"):
        rates = [peek.rates(model, torch.no_grad) for _ in range(2)]
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state()) and rates[0] == rates[1]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    counter = counted(cifar10, model, batches[0][0][:8])
    stage = [
        tally for name, tally in counter.neurons.items() if "stage1" in name or "embed1" in name
    ]
    want = sum(tally.sums[0].item() for tally in stage) / sum(tally.values for tally in stage)
    assert rates[0]["stage1"] == want and [*rates[0]] == ["stage1", "stage2", "stage3"]
    said = [record.message for record in caplog.records if "no spike" in record.message]
    assert len(said) == 1 and "stage2.0.tssa.q_lif, stage2.0.tssa.attn_lif" in said[0]


def test_test_py_counts_and_draws(trained_on_digits, tmp_path, capsys):
    """--energy tells the same accuracy as without, --attend draws; training has logged its firing
    rates.
    """
    run, _ = trained_on_digits
    lines = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
    assert all([*line["firing_rate"]] == ["stage1", "stage2", "stage3"] for line in lines)
    path = tmp_path / "best.pth"
    path.symlink_to(run / "best.pth")
    args = ["--checkpoint", str(path), "--workers", "0", "--fused", "false"]
    results = []
    for flags in ([], ["--energy"]):
        assert cifar10.test.main(on_cpu([*args, *flags])) == 0
        results.append(json.loads((tmp_path / "test-best.json").read_text()))
        results[-1].pop("images_per_second")
    assert results[0] == results[1]
    energy = json.loads((tmp_path / "energy-best.json").read_text())
    assert energy["images"] == 360 and energy["T"] == 2 and energy["energy"] > 0
    assert cifar10.test.main(on_cpu([*args, "--attend", "5"])) == 0
    assert (tmp_path / "attention" / "test-5.png").stat().st_size > 10_000
    with pytest.raises(
        cifar10.config.UserError, match="attend is 360; the test set ends with sample 359"
    ):
        cifar10.test.main(on_cpu([*args, "--attend", "360"]))
    capsys.readouterr()
