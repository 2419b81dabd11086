# Copied from dvs128-gesture/model.py with num_classes=11->num_classes=10, mlp_ratios=4->mlp_ratios=1, "num_classes": 11->"num_classes": 10
"""QKFormer for event data: a hierarchical spiking transformer (HST) with Q-K attention.

Zhou et al., "QKFormer: Hierarchical Spiking Transformer using Q-K Attention", NeurIPS 2024.
Parameter names are those of the authors' release, whose checkpoints load as they are. Tensors are
[T, B, C, H, W]: T time steps, B samples. The neuron integrates over T; all else merges T and B.

Five functions stand for the expressions at their right; spiking/plain.py has them in plain PyTorch.
The rest of spiking/ computes the same in less time and memory.
    conv_bn_lif(x, conv, bn, lif)   lif(bn(conv(x))); pool=True: max_pool in front of lif; mask=m:
                                    of x * m, where m has one value for a head's token or channel
    conv_bn_lif_each(x, *layers)    [conv_bn_lif(x, *layer) for layer in layers]; heads=n: each as
                                    [T, B, H, W, n, channels]
    add(x, y), matmul(x, y, lif)    x + y, x @ y
    linear(x, layer)                layer(x)
"""

from functools import partial

import timm.layers
import torch
from timm.models import register_model
from torch import nn

if __package__:  # inside a package of your own
    from . import spiking
    from .spiking import MultiStepLIF, add, conv_bn_lif, conv_bn_lif_each, linear, matmul
else:
    import spiking
    from spiking import MultiStepLIF, add, conv_bn_lif, conv_bn_lif_each, linear, matmul


# Copied from cifar10/model.py
class DropPath(timm.layers.DropPath):
    """Stochastic depth on [T, B, ...]: one draw per sample, the same at every time step."""

    def forward(self, x):
        if not self.training or not self.drop_prob:
            return x
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


# Copied from cifar10/model.py
class Attention(nn.Module):
    """The layers of Q, K (and V) and of the projection; a subclass says how.

    Args:
        dim: channels of input and output.
        num_heads: heads of dim / num_heads channels.
        lif: called to make a neuron; `attn_lif` gets half its threshold: 0.5 by default.
    """

    inputs = "qk"

    def __init__(self, dim, num_heads, lif=MultiStepLIF):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}; it must divide each stage's width: {dim}")
        self.num_heads = num_heads
        for name in self.inputs:
            setattr(self, f"{name}_conv", nn.Conv1d(dim, dim, 1, bias=False))
            setattr(self, f"{name}_bn", nn.BatchNorm1d(dim))
            setattr(self, f"{name}_lif", lif())
        self.attn_lif = lif(v_threshold=lif.v_threshold / 2)
        self.proj_conv = nn.Conv1d(dim, dim, 1)
        self.proj_bn = nn.BatchNorm1d(dim)
        self.proj_lif = lif()

    def heads(self, x):
        """The spikes of Q, K (and V), each [T, B, H, W, heads, channels]."""
        parts = ("conv", "bn", "lif")
        layers = ([getattr(self, f"{name}_{part}") for part in parts] for name in self.inputs)
        return conv_bn_lif_each(x, *layers, heads=self.num_heads)


# Copied from cifar10/model.py
class TokenQKAttention(Attention):
    """Q-K token attention (paper, section 3.2): a binary mask over tokens, made from Q, on K."""

    summed = 5  # of [T, B, H, W, heads, channels]: one value per token

    def attend(self, x):
        """K [T, B, C, H, W] and its mask: [T, B, heads, 1, H, W], or [.., channels, 1, 1]."""
        q, k = self.heads(x)
        # in q's type, not autocast's float32: large counts are rounded, but fire the neuron anyway
        mask = self.attn_lif(q.sum(self.summed, keepdim=True, dtype=q.dtype))
        return k.flatten(4).movedim(4, 2), mask.movedim((4, 5), (2, 3))

    def forward(self, x):
        k, mask = self.attend(x)
        return conv_bn_lif(k, self.proj_conv, self.proj_bn, self.proj_lif, mask=mask)


# Copied from cifar10/model.py
class ChannelQKAttention(TokenQKAttention):
    """Q-K channel attention (paper, section 3.2): as above with a mask over channels."""

    summed = (2, 3)  # of [T, B, H, W, heads, channels]: one value per channel


# Copied from cifar10/model.py
class SpikingSelfAttention(Attention):
    """SSA: Q (K^T V) of spikes, without softmax, linear in the number of tokens.

    Args:
        dim, num_heads, lif: see Attention.
        cross_sample_lif: False: the last neuron integrates over T, as the paper defines it. True:
            over T*B as one sequence, as the release does: the membrane runs on from one sample of
            the batch to the next.
    """

    inputs = "qkv"
    scale = 0.125  # as in the release, whatever the width of a head; a power of 2: exact anywhere

    def __init__(self, dim, num_heads, lif=MultiStepLIF, cross_sample_lif=False):
        super().__init__(dim, num_heads, lif)
        self.cross_sample_lif = cross_sample_lif

    def attend(self, x):
        H, W = x.shape[3:]
        q, k, v = (y.flatten(2, 3).transpose(2, 3) for y in self.heads(x))  # [.., tokens, channels]
        x = matmul(q, matmul(k.transpose(3, 4), v, self.k_lif) * self.scale, self.q_lif)
        x = x.transpose(2, 3).flatten(3).unflatten(2, (H, W))  # [T, B, H, W, C]
        return self.attn_lif(x.movedim(4, 2))

    def forward(self, x):
        shape, x = x.shape, self.attend(x)
        if self.cross_sample_lif:  # T*B steps of one sample
            x = x.flatten(0, 1).unsqueeze(1)
        return conv_bn_lif(x, self.proj_conv, self.proj_bn, self.proj_lif).reshape(shape)


# Copied from cifar10/model.py
ATTENTION = {"token": TokenQKAttention, "channel": ChannelQKAttention, "ssa": SpikingSelfAttention}


# Copied from cifar10/model.py
class MLP(nn.Module):
    """Two 1x1 convolutions, each with BatchNorm and neuron; `hidden` channels between them."""

    def __init__(self, dim, hidden, lif=MultiStepLIF):
        super().__init__()
        self.mlp1_conv = nn.Conv2d(dim, hidden, 1)
        self.mlp1_bn = nn.BatchNorm2d(hidden)
        self.mlp1_lif = lif()
        self.mlp2_conv = nn.Conv2d(hidden, dim, 1)
        self.mlp2_bn = nn.BatchNorm2d(dim)
        self.mlp2_lif = lif()

    def forward(self, x):
        x = conv_bn_lif(x, self.mlp1_conv, self.mlp1_bn, self.mlp1_lif)
        return conv_bn_lif(x, self.mlp2_conv, self.mlp2_bn, self.mlp2_lif)


# Copied from cifar10/model.py
class Block(nn.Module):
    """x + attention(x), then x + mlp(x): spikes add up. `attention` is a key of ATTENTION."""

    def __init__(self, dim, num_heads, mlp_ratio, attention, drop_path, lif, cross_sample_lif):
        super().__init__()
        if attention == "ssa":
            self.ssa = SpikingSelfAttention(dim, num_heads, lif, cross_sample_lif)
        else:
            self.tssa = ATTENTION[attention](dim, num_heads, lif)
        hidden = int(dim * mlp_ratio)
        if hidden < 1:
            raise ValueError(f"mlp_ratios is {mlp_ratio}; no hidden channel is left of {dim}")
        self.mlp = MLP(dim, hidden, lif)
        self.attn = "ssa" if attention == "ssa" else "tssa"
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = add(x, self.drop_path(getattr(self, self.attn)(x)))
        return add(x, self.drop_path(self.mlp(x)))


class SPEDSInit(nn.Module):
    """First embedding, deformed shortcut: [T, B, in_channels, H, W] -> [T, B, dim, H/8, W/8]."""

    def __init__(self, in_channels, dim, lif):
        super().__init__()
        self.proj_conv = nn.Conv2d(in_channels, dim // 8, 3, padding=1, bias=False)
        self.proj_bn = nn.BatchNorm2d(dim // 8)
        self.proj_lif = lif()
        self.proj1_conv = nn.Conv2d(dim // 8, dim // 4, 3, padding=1, bias=False)
        self.proj1_bn = nn.BatchNorm2d(dim // 4)
        self.proj1_lif = lif()
        self.proj2_conv = nn.Conv2d(dim // 4, dim // 2, 3, padding=1, bias=False)
        self.proj2_bn = nn.BatchNorm2d(dim // 2)
        self.proj2_lif = lif()
        self.proj3_conv = nn.Conv2d(dim // 2, dim, 3, padding=1, bias=False)
        self.proj3_bn = nn.BatchNorm2d(dim)
        self.proj3_lif = lif()
        self.proj_res_conv = nn.Conv2d(dim // 4, dim, 1, stride=4, bias=False)
        self.proj_res_bn = nn.BatchNorm2d(dim)
        self.proj_res_lif = lif()

    def forward(self, x):
        x = conv_bn_lif(x, self.proj_conv, self.proj_bn, self.proj_lif)
        shortcut = conv_bn_lif(x, self.proj1_conv, self.proj1_bn, self.proj1_lif, pool=True)
        x = conv_bn_lif(shortcut, self.proj2_conv, self.proj2_bn, self.proj2_lif, pool=True)
        x = conv_bn_lif(x, self.proj3_conv, self.proj3_bn, self.proj3_lif, pool=True)
        shortcut = conv_bn_lif(shortcut, self.proj_res_conv, self.proj_res_bn, self.proj_res_lif)
        return add(x, shortcut)


# Copied from cifar10/model.py with proj3->proj
class SPEDS(nn.Module):
    """Patch embedding with deformed shortcut: [T, B, dim/2, H, W] -> [T, B, dim, H/2, W/2]."""

    def __init__(self, dim, lif):
        super().__init__()
        self.proj_conv = nn.Conv2d(dim // 2, dim, 3, padding=1, bias=False)
        self.proj_bn = nn.BatchNorm2d(dim)
        self.proj_lif = lif()
        self.proj4_conv = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.proj4_bn = nn.BatchNorm2d(dim)
        self.proj4_lif = lif()
        self.proj_res_conv = nn.Conv2d(dim // 2, dim, 1, stride=2, bias=False)
        self.proj_res_bn = nn.BatchNorm2d(dim)
        self.proj_res_lif = lif()

    def forward(self, x):
        y = conv_bn_lif(x, self.proj_conv, self.proj_bn, self.proj_lif)
        y = conv_bn_lif(y, self.proj4_conv, self.proj4_bn, self.proj4_lif, pool=True)
        shortcut = conv_bn_lif(x, self.proj_res_conv, self.proj_res_bn, self.proj_res_lif)
        return add(y, shortcut)


class HST(spiking.Stages):
    """Hierarchical spiking transformer: two stages of D/2 and D channels, each behind a SPEDS.

    Args:
        T: time steps of the recipe. The frames of the input decide: any number of them works.
        img_size_h, img_size_w, patch_size: as in the release; any H and W that 16 divides work.
        in_channels, num_classes: 2 polarities; 0 classes: no head, features [B, embed_dims].
        embed_dims: D, a multiple of 16.
        num_heads: heads of every attention; must divide D/2.
        mlp_ratios: hidden channels of an MLP over its input's.
        depths: blocks (the yml's `layer`), >= 2: stage 1 has one, stage 2 the rest.
        attention: "token", "channel" or "ssa" for each stage.
        drop_path: stochastic depth; rises linearly from 0 at the first block to this at the last.
        cross_sample_lif: see SpikingSelfAttention.
        **neurons: neuron ("lif", "if", "plif"), tau, v_threshold, surrogate, surrogate_alpha,
            backend, fused, memory, events: see MultiStep in spiking/neuron.py.

    Raises ValueError, with the number that is wrong, for values out of these.
    """

    per_step = False  # see forward_head
    frozen = 0  # see freeze

    def __init__(
        self,
        T=16,
        img_size_h=128,
        img_size_w=128,
        patch_size=16,
        in_channels=2,
        num_classes=10,
        embed_dims=256,
        num_heads=16,
        mlp_ratios=1,
        depths=2,
        attention=("token", "ssa"),
        drop_path=0.0,
        cross_sample_lif=False,
        **neurons,
    ):
        super().__init__()
        if T < 1:
            raise ValueError(f"T is {T}; it must be at least 1")
        if depths < 2:
            raise ValueError(f"depths (the yml's layer) is {depths}; two stages need 2 blocks")
        if embed_dims % 16:
            raise ValueError(f"embed_dims (the yml's dim) is {embed_dims}, not a multiple of 16")
        if len(attention) != 2 or any(kind not in ATTENTION for kind in attention):
            names = ", ".join(ATTENTION)
            raise ValueError(f"attention is {attention}; it must name one of {names} for 2 stages")
        self.T, self.in_channels, self.num_features = T, in_channels, embed_dims
        self.feature_info = [
            {"num_chs": embed_dims >> (1 - i), "reduction": 8 * 2**i, "module": f"stage{i + 1}"}
            for i in range(2)
        ]
        lif = spiking.neuron_maker(**neurons)
        rates = iter([drop_path * i / max(depths - 1, 1) for i in range(depths)])

        def stage(index, dim, blocks):
            block = partial(Block, dim, num_heads, mlp_ratios, attention[index])
            return nn.ModuleList(block(next(rates), lif, cross_sample_lif) for _ in range(blocks))

        self.patch_embed1 = SPEDSInit(in_channels, embed_dims // 2, lif)
        self.stage1 = stage(0, embed_dims // 2, 1)
        self.patch_embed2 = SPEDS(embed_dims, lif)
        self.stage2 = stage(1, embed_dims, depths - 1)
        self.reset_classifier(num_classes)  # self.head, one linear layer

    # Copied from cifar10/model.py
    def parts(self, index):
        return getattr(self, f"patch_embed{index}"), *getattr(self, f"stage{index}")

    # Copied from cifar10/model.py
    def freeze(self, stages):
        """The first stages learn no more: no gradient; training runs them as evaluation does."""
        self.frozen = stages
        for index in range(1, stages + 1):
            nn.ModuleList(self.parts(index)).requires_grad_(False)

    # Copied from cifar10/model.py
    def train(self, mode=True):
        super().train(mode)
        for index in range(1, self.frozen + 1):
            nn.ModuleList(self.parts(index)).eval()
        return self

    # Copied from cifar10/model.py
    def run_stage(self, index, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and index > self.frozen):
            for module in self.parts(index):
                x = module(x)
        return x

    def frames(self, x):
        """Event counts of any type [B, T, C, H, W] -> [T, B, C, H, W] of the weights' type."""
        right = x.dim() == 5 and x.shape[1] > 0 and x.shape[2] == self.in_channels
        if not right or x.shape[3] % 16 or x.shape[4] % 16:
            want = f"[B, T, {self.in_channels}, H, W] with H and W multiples of 16"
            raise ValueError(f"input of shape {list(x.shape)}; this model takes {want}")
        return x.transpose(0, 1).to(self.patch_embed1.proj_conv.weight.dtype)

    def forward_features(self, x):
        """Frames [T, B, C, H, W], T first -> spikes [T, B, embed_dims, H / 16, W / 16]."""
        if x.dim() != 5 or x.shape[2] != self.in_channels:
            want = f"[T, B, {self.in_channels}, H, W]"
            raise ValueError(f"input of shape {list(x.shape)}; forward_features takes {want}")
        return self.run_stage(2, self.run_stage(1, x))

    def forward(self, x):
        """Event counts [B, T, C, H, W], any T -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(self.frames(x)))

    # Copied from cifar10/model.py
    def pool(self, x):
        """[T, B, C, H, W] -> [T, B, C], the mean over space."""
        return x.movedim(2, 4).flatten(2, 3).mean(2)  # its gradient has channels innermost

    # Copied from cifar10/model.py
    def forward_head(self, x, pre_logits=False):
        """What forward_features gives -> logits [B, num_classes]; in training with `per_step` those
        of each step, [T, B, num_classes]; with pre_logits the means alone.
        """
        x = self.pool(x) if self.global_pool else x
        if self.per_step and self.training:
            return self.head(x)
        return x.mean(0) if pre_logits else linear(x.mean(0), self.head)


CFG = {  # a pretrained_cfg of timm's; frames are counts, so nothing is normalised
    "input_size": (2, 128, 128),
    "num_classes": 10,
    "mean": (0.0, 0.0),
    "std": (1.0, 1.0),
    "crop_pct": 1.0,
    "first_conv": "patch_embed1.proj_conv",
}


# Copied from cifar10/model.py with T=4->T=16, HST-4-384 of the paper's CIFAR->HST-2-256 of the paper's event
@register_model
def QKFormer(T=16, pretrained=False, **kwargs):
    """HST-2-256 of the paper's event experiments; keywords: see HST and Stages.create."""
    return HST.create("QKFormer", pretrained, CFG, T=T, **kwargs)
