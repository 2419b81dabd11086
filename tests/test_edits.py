"""A changed model computes what its code says: each edit is made to a copy of a folder, and fused
equals plain.
"""

import functools

import pytest
import torch

from conftest import copy_folder, load

cifar10 = load("cifar10")
compiled = pytest.mark.skipif(
    not cifar10.native.available("cpu", torch.float32, "auto"), reason="needs a C++ compiler"
)

TORCH = "from torch import nn\n"
CLASS = "class DropPath(timm.layers.DropPath):"  # new classes go in front of it
BRANCH = "x = add(x, self.drop_path(getattr(self, self.attn)(x)))"
MLP = "        self.mlp2_lif = lif()\n"  # the end of its __init__
LIF = "neuron_maker(**neurons)"
MASK = "return k.flatten(4).movedim(4, 2), mask.movedim((4, 5), (2, 3))"

# {edit: (word of the line that says what runs module by module, or None, [(old, new), ...])}
EDITS = {
    "neuron": (
        "has a Shifted",
        [
            (
                CLASS,
                "class Shifted(MultiStepLIF):\n    def multi_step_forward(self, x):\n"
                "        return super().multi_step_forward(x + 0.2)\n\n\n" + CLASS,
            ),
            (LIF, "neuron_maker(**{**neurons, 'neuron': Shifted})"),
        ],
    ),
    "analog neuron": (
        "has a Analog",
        [
            (
                CLASS,
                "class Analog(MultiStepLIF):\n    def multi_step_forward(self, x):\n"
                "        return super().multi_step_forward(x) * 0.7\n\n\n" + CLASS,
            ),
            (LIF, "neuron_maker(**{**neurons, 'neuron': Analog})"),
        ],
    ),
    "BatchNorm": (
        "has a Norm",
        [
            (
                CLASS,
                "class Norm(nn.BatchNorm2d):\n    def forward(self, x):\n"
                "        return 1.3 * super().forward(x)\n\n\n" + CLASS,
            ),
            ("self.mlp1_bn = nn.BatchNorm2d", "self.mlp1_bn = Norm"),
        ],
    ),
    "binary convolution": (
        "has a Binary",
        [
            (
                CLASS,
                "class Binary(nn.Conv2d):\n    def forward(self, x):\n"
                "        w = self.weight + (self.weight.sign() * 0.1 - self.weight).detach()\n"
                "        return nn.functional.conv2d(x, w, self.bias, self.stride, "
                "self.padding)\n\n\n" + CLASS,
            ),
            ("self.mlp2_conv = nn.Conv2d", "self.mlp2_conv = Binary"),
        ],
    ),
    "parametrisation": (
        "has a ParametrizedConv2d",
        [
            (
                CLASS,
                "class Standard(nn.Module):\n    def forward(self, w):\n"
                "        return (w - w.mean((1, 2, 3), keepdim=True)) / 3\n\n\n" + CLASS,
            ),
            (
                MLP,
                MLP + "        nn.utils.parametrize.register_parametrization"
                "(self.mlp2_conv, 'weight', Standard())\n",
            ),
        ],
    ),
    "weight norm": (
        "has hooks",
        [(MLP, MLP + "        nn.utils.weight_norm(self.mlp1_conv)\n")],
    ),
    "spectral norm": (
        "has hooks",
        [(MLP, MLP + "        nn.utils.spectral_norm(self.mlp1_conv)\n")],
    ),
    "hook": (
        None,
        [
            (
                MLP,
                MLP
                + "        self.mlp1_bn.register_forward_hook(lambda module, args, out: out + 0.3)\n",
            )
        ],
    ),
    "instance": (
        "forward of its own",
        [
            (
                MLP,
                MLP + "        conv = self.mlp2_conv\n"
                "        conv.forward = lambda x: nn.functional.conv2d(x, conv.weight.tanh(), "
                "conv.bias)\n",
            )
        ],
    ),
    "token convolution": (
        "kernels know no such convolution",
        [("nn.Conv1d(dim, dim, 1, bias=False))", "nn.Conv1d(dim, dim, 3, padding=1, bias=False))")],
    ),
    "scaled residual": (None, [(BRANCH, "x = x + 0.5 * getattr(self, self.attn)(x)")]),
    "spikes in place": (
        None,
        [(BRANCH, "y = getattr(self, self.attn)(x)\n        y.mul_(0.5)\n        x = add(x, y)")],
    ),
    "gate": (  # whole numbers at first
        None,
        [
            (TORCH, "import torch\n" + TORCH),
            (
                "self.drop_path = DropPath(drop_path)",
                "self.drop_path = DropPath(drop_path)\n        self.gate = "
                "nn.Parameter(torch.ones(dim, 1, 1))",
            ),
            (BRANCH, "x = x + self.gate * getattr(self, self.attn)(x)"),
        ],
    ),
    "residual by AND": (None, [(BRANCH, "x = x * (1 - getattr(self, self.attn)(x))")]),
    "analog mask": (None, [(MASK, MASK.replace("mask.", "(0.3 * mask)."))]),
    "counts as mask": (None, [(MASK, MASK.replace("mask.", "q.mean(5, keepdim=True)."))]),
    "attention": (
        None,
        [
            (
                "ATTENTION = {",
                "class Gated(TokenQKAttention):\n    def forward(self, x):\n"
                "        q, k = conv_bn_lif_each(\n"
                "            x, (self.q_conv, self.q_bn, self.q_lif), (self.k_conv, self.k_bn, "
                "self.k_lif)\n        )\n"
                "        x = k * (0.5 + 0.5 * q)\n"
                "        return conv_bn_lif(x, self.proj_conv, self.proj_bn, self.proj_lif)\n\n\n"
                'ATTENTION = {"gated": Gated, ',
            ),
            ('attention=("token", "token", "ssa")', 'attention=("gated", "gated", "ssa")'),
        ],
    ),
    "stage": (
        None,
        [
            (TORCH, "import torch\n" + TORCH),
            (
                "        self.reset_classifier(num_classes)",
                "        self.patch_embed4 = SPEDS(2 * embed_dims, lif)\n"
                "        self.lower = nn.Conv1d(2 * embed_dims, embed_dims, 1)\n"
                "        self.reset_classifier(num_classes)",
            ),
            (
                "        return x.movedim(2, 4)",
                "        x = self.patch_embed4(x)\n"
                "        x = torch.einsum('oc,tbchw->tbohw', self.lower.weight[..., 0], x)\n"
                "        return x.movedim(2, 4)",
            ),
        ],
    ),
    "soft reset": ("attributes", [(MLP, MLP + "        self.mlp1_lif.v_reset = None\n")]),
    "no decay": ("attributes", [(MLP, MLP + "        self.mlp1_lif.decay_input = False\n")]),
    "surrogate": (
        "attributes",
        [
            (
                "from timm.models",
                "from spikingjelly.activation_based import surrogate\nfrom timm.models",
            ),
            (MLP, MLP + "        self.mlp1_lif.surrogate_function = surrogate.S2NN()\n"),
        ],
    ),
}


def train_step(model, x):
    """Logits and gradients."""
    logits = model.train()(x)
    logits.square().sum().backward()
    return logits.detach(), {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


@functools.cache
def unchanged():
    torch.manual_seed(0)
    model = cifar10.model.QKFormer(embed_dims=32, num_heads=2, depths=3).double()
    return train_step(
        model, torch.rand(2, 3, 16, 8, generator=torch.Generator().manual_seed(1)).double()
    )


@compiled
@pytest.mark.parametrize("name", EDITS)
def test_edit(tmp_path, monkeypatch, name):
    word, changes = EDITS[name]
    folder = copy_folder("cifar10", tmp_path).rename(tmp_path / f"edit {name}")
    text = (folder / "model.py").read_text()
    for old, new in changes:
        assert text.count(old) >= 1, old
        text = text.replace(old, new)
    (folder / "model.py").write_text(text)
    modules = load(str(folder))
    monkeypatch.setattr(
        modules.compiler, "host_library", cifar10.compiler.host_library
    )  # compiled already
    lines = []
    for module in (modules.native, modules.fusible):
        monkeypatch.setattr(module, "say", lines.append)
    results = []
    for on in (True, False):
        torch.manual_seed(0)
        model = modules.model.QKFormer(embed_dims=32, num_heads=2, depths=3, fused=on).double()
        x = torch.rand(2, 3, 16, 8, generator=torch.Generator().manual_seed(1)).double()
        results.append(train_step(model, x))
    (logits, gradients), (plain_logits, plain_gradients) = results
    torch.testing.assert_close(logits, plain_logits, rtol=1e-10, atol=1e-10)
    for key, want in plain_gradients.items():
        torch.testing.assert_close(gradients[key], want, rtol=1e-8, atol=1e-9, msg=key)
    before, before_gradients = unchanged()
    differ = gradients.keys() != before_gradients.keys() or not torch.equal(before, logits)
    assert differ or any(
        not torch.equal(before_gradients[k], g) for k, g in gradients.items()
    )  # it is an edit
    said = [line for line in set(lines) if "module by module" in line]
    assert (word is None and not said) or any(word in line for line in said), lines
    assert "fused kernels on the CPU" in lines or name in ("neuron", "analog neuron")
