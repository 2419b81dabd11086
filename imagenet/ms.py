"""MS-QKFormer for ImageNet: QKFormer with membrane shortcuts, the pre-activation variant.

It is the paper's ablation of the shortcut. Every layer is neuron, convolution, BatchNorm, and
shortcuts add membrane inputs in place of spikes. The authors of MaxFormer ("Spiking Transformers
Need High Frequency Information", NeurIPS 2025) trained it and published it as MS-QKFormer, whose
parameter names these are. What the two models have in common is model.py's.
"""

import timm.layers
from timm.models import register_model
from torch import nn

if __package__:  # inside a package of your own
    from . import model
    from .spiking import MultiStepLIF, conv_bn, conv_bn_lif
else:
    import model
    from spiking import MultiStepLIF, conv_bn, conv_bn_lif


# Copied from cifar10/ms.py
class MSTokenQKAttention(model.TokenQKAttention):
    """Q-K token attention of membrane inputs: `proj_lif` comes first, and no neuron last."""

    def forward(self, x):
        k, mask = self.attend(self.proj_lif(x))
        return conv_bn(k, self.proj_conv, self.proj_bn, self.proj_lif, mask=mask)


# Copied from cifar10/ms.py
class MSChannelQKAttention(MSTokenQKAttention):
    """The same with a mask over channels."""

    summed = model.ChannelQKAttention.summed


# Copied from cifar10/ms.py
class MSSelfAttention(model.SpikingSelfAttention):
    """SSA of membrane inputs: `x_lif` comes first, and no neuron last."""

    def __init__(self, dim, num_heads, lif=MultiStepLIF):
        super().__init__(dim, num_heads, lif)
        del self.proj_lif
        self.x_lif = lif()

    def forward(self, x):
        x = self.attend(self.x_lif(x))
        return conv_bn(x, self.proj_conv, self.proj_bn, self.x_lif)


# Copied from cifar10/ms.py
MS_ATTENTION = {
    "token": MSTokenQKAttention,
    "channel": MSChannelQKAttention,
    "ssa": MSSelfAttention,
}


# Copied from cifar10/ms.py
class MSMLP(nn.Module):
    """Two 1x1 convolutions behind neurons, with BatchNorm; `hidden` channels between them. What is
    to be added to x: with `hidden` = `dim` each half has a shortcut of its own.
    """

    def __init__(self, dim, hidden, lif=MultiStepLIF):
        super().__init__()
        self.fc1_lif = lif()
        self.fc1_conv = nn.Conv2d(dim, hidden, 1)
        self.fc1_bn = nn.BatchNorm2d(hidden)
        self.fc2_lif = lif()
        self.fc2_conv = nn.Conv2d(hidden, dim, 1)
        self.fc2_bn = nn.BatchNorm2d(dim)
        self.halves = hidden == dim

    def forward(self, x):
        spikes = self.fc1_lif(x)
        if self.halves:
            y = conv_bn(spikes, self.fc1_conv, self.fc1_bn, self.fc1_lif)
            return y + conv_bn(self.fc2_lif(x + y), self.fc2_conv, self.fc2_bn, self.fc2_lif)
        spikes = conv_bn_lif(spikes, self.fc1_conv, self.fc1_bn, self.fc2_lif)
        return conv_bn(spikes, self.fc2_conv, self.fc2_bn, self.fc2_lif)


# Copied from cifar10/ms.py
class MSBlock(nn.Module):
    """x + attention(x), then x + mlp(x): membrane inputs add up. See model.Block."""

    def __init__(self, dim, num_heads, mlp_ratio, attention, drop_path, lif, *_):
        super().__init__()
        self.attn = MS_ATTENTION[attention](dim, num_heads, lif)
        if int(dim * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratios is {mlp_ratio}; no hidden channel is left of {dim}")
        self.mlp = MSMLP(dim, int(dim * mlp_ratio), lif)
        self.drop_path = model.DropPath(drop_path)

    def forward(self, x):
        x = x + self.drop_path(self.attn(x))
        return x + self.drop_path(self.mlp(x))


class MSEmbeddingInit(nn.Module):
    """First patch embedding: [T, B, in_channels, H, W] -> membrane inputs [T, B, dim, H/4, W/4]."""

    def __init__(self, in_channels, dim, lif):
        super().__init__()
        self.proj_conv = nn.Conv2d(in_channels, dim // 2, 3, padding=1, bias=False)
        self.proj_bn = nn.BatchNorm2d(dim // 2)
        self.proj_lif1 = lif()
        self.proj_conv1 = nn.Conv2d(dim // 2, dim, 3, padding=1, bias=False)
        self.proj_bn1 = nn.BatchNorm2d(dim)
        self.proj_lif2 = lif()
        self.proj_conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.proj_bn2 = nn.BatchNorm2d(dim)
        self.rpe_conv = nn.Conv2d(dim // 2, dim, 1, stride=2, bias=False)
        self.rpe_bn = nn.BatchNorm2d(dim)

    def forward(self, x):
        shortcut = conv_bn_lif(x, self.proj_conv, self.proj_bn, self.proj_lif1, pool=True)
        x = conv_bn_lif(shortcut, self.proj_conv1, self.proj_bn1, self.proj_lif2, pool=True)
        x = conv_bn(x, self.proj_conv2, self.proj_bn2, self.proj_lif2)
        return x + conv_bn(shortcut, self.rpe_conv, self.rpe_bn, self.proj_lif2)


class MSEmbedding(nn.Module):
    """Patch embedding of membrane inputs: [T, B, dim/2, H, W] -> [T, B, dim, H/2, W/2]."""

    def __init__(self, dim, lif):
        super().__init__()
        self.init_lif = lif()
        self.proj3_conv = nn.Conv2d(dim // 2, dim, 3, padding=1, bias=False)
        self.proj3_bn = nn.BatchNorm2d(dim)
        self.proj3_lif = lif()
        self.proj4_conv = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.proj4_bn = nn.BatchNorm2d(dim)
        self.proj_res_conv = nn.Conv2d(dim // 2, dim, 1, stride=2, bias=False)
        self.proj_res_bn = nn.BatchNorm2d(dim)
        self.proj_res_lif = lif()  # never called, in the published model too
        self.proj_res_lif.requires_grad_(False)

    def forward(self, x):
        spikes = self.init_lif(x)
        x = conv_bn_lif(spikes, self.proj3_conv, self.proj3_bn, self.proj3_lif, pool=True)
        x = conv_bn(x, self.proj4_conv, self.proj4_bn, self.proj3_lif)
        return x + conv_bn(spikes, self.proj_res_conv, self.proj_res_bn, self.init_lif)


class MSHST(model.HST):
    """HST with membrane shortcuts: a last neuron before the head. Keywords: see HST.

    No layer of it runs over T*B: ValueError for a cross_sample_lif of True.
    """

    first_embedding, embedding, block = MSEmbeddingInit, MSEmbedding, MSBlock

    def __init__(self, *args, cross_sample_lif=False, **kwargs):
        if cross_sample_lif not in (False, "auto"):
            why = "no neuron of MS-QKFormer runs on from sample to sample"
            raise ValueError(f"cross_sample_lif is {cross_sample_lif}; {why}")
        super().__init__(*args, **kwargs)
        self.head_lif = self.lif()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                timm.layers.trunc_normal_(module.weight, std=0.02)

    # Copied from cifar10/ms.py
    def pool(self, x):
        """Membrane inputs [T, B, C, H, W] -> spikes [T, B, C] of the mean over space."""
        return self.head_lif(super().pool(x))


SOURCE = {"origin_url": "https://github.com/bic-L/MaxFormer/releases/tag/checkpoints"}


@register_model
def MSQKFormer_10_384(T=4, pretrained=False, **kwargs):
    """MS-QKFormer-10-384, 16.47 M parameters; keywords: see MSHST, HST and Stages.create."""
    return model.build("MSQKFormer_10_384", T, pretrained, kwargs, MSHST, **SOURCE)


@register_model
def MSQKFormer_10_512(T=4, pretrained=False, **kwargs):
    """MS-QKFormer-10-512, 29.08 M parameters; keywords: see MSHST, HST and Stages.create."""
    return model.build("MSQKFormer_10_512", T, pretrained, kwargs, MSHST, **SOURCE)


@register_model
def MSQKFormer_10_768(T=4, pretrained=False, **kwargs):
    """MS-QKFormer-10-768, 64.96 M parameters; keywords: see MSHST, HST and Stages.create."""
    return model.build("MSQKFormer_10_768", T, pretrained, kwargs, MSHST, **SOURCE)
