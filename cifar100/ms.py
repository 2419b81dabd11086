# Copied from cifar10/ms.py
"""MS-QKFormer for CIFAR: QKFormer with membrane shortcuts, the pre-activation variant.

The paper has it as its ablation of the shortcut. A layer is neuron, convolution, BatchNorm, in
this order, and shortcuts add membrane inputs, not spikes. The authors of MaxFormer ("Spiking
Transformers Need High Frequency Information", NeurIPS 2025) trained it and published it as
MS-QKFormer; parameter names are those of their weights. What both models share is in model.py.
"""

from timm.models import register_model
from torch import nn

if __package__:  # inside a package of your own
    from . import model
    from .spiking import MultiStepLIF, conv_bn, conv_bn_lif
else:
    import model
    from spiking import MultiStepLIF, conv_bn, conv_bn_lif


class MSTokenQKAttention(model.TokenQKAttention):
    """Q-K token attention of membrane inputs: `proj_lif` comes first, and no neuron last."""

    def forward(self, x):
        k, mask = self.attend(self.proj_lif(x))
        return conv_bn(k, self.proj_conv, self.proj_bn, self.proj_lif, mask=mask)


class MSChannelQKAttention(MSTokenQKAttention):
    """The same with a mask over channels."""

    summed = model.ChannelQKAttention.summed


class MSSelfAttention(model.SpikingSelfAttention):
    """SSA of membrane inputs: `x_lif` comes first, and no neuron last."""

    def __init__(self, dim, num_heads, lif=MultiStepLIF):
        super().__init__(dim, num_heads, lif)
        del self.proj_lif
        self.x_lif = lif()

    def forward(self, x):
        x = self.attend(self.x_lif(x))
        return conv_bn(x, self.proj_conv, self.proj_bn, self.x_lif)


MS_ATTENTION = {
    "token": MSTokenQKAttention,
    "channel": MSChannelQKAttention,
    "ssa": MSSelfAttention,
}


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


class Embed(nn.Module):
    """The modules of a layer of an embedding: neuron, convolution, BatchNorm."""

    def __init__(self, in_channels, channels, kernel, stride, lif):
        super().__init__()
        self.embed_lif = lif()
        self.embed_conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False)
        self.embed_bn = nn.BatchNorm2d(channels)


class MSEmbeddingInit(nn.Module):
    """First patch embedding: [T, B, in_channels, H, W] -> membrane inputs [T, B, dim, H, W]."""

    def __init__(self, in_channels, dim, lif):
        super().__init__()
        self.proj_conv = nn.Conv2d(in_channels, dim // 2, 3, padding=1, bias=False)
        self.proj_bn = nn.BatchNorm2d(dim // 2)
        self.embed1 = Embed(dim // 2, dim, 3, 1, lif)
        self.embed2 = Embed(dim // 2, dim, 1, 1, lif)

    def forward(self, x):
        x = conv_bn(x, self.proj_conv, self.proj_bn, self.embed1.embed_lif)
        main, shortcut = (
            conv_bn(part.embed_lif(x), part.embed_conv, part.embed_bn, part.embed_lif)
            for part in (self.embed1, self.embed2)
        )
        return main + shortcut


class MSEmbedding(nn.Module):
    """Patch embedding of membrane inputs: [T, B, dim/2, H, W] -> [T, B, dim, H/2, W/2]."""

    def __init__(self, dim, lif):
        super().__init__()
        self.embed1 = Embed(dim // 2, dim, 3, 1, lif)
        self.max_embed1 = Embed(dim, dim, 3, 1, lif)
        self.embed2 = Embed(dim // 2, dim, 1, 2, lif)  # reads embed1's spikes, not its own neuron's
        self.embed2.embed_lif.requires_grad_(False)  # so there is nothing to learn

    def forward(self, x):
        first, second, shortcut = self.embed1, self.max_embed1, self.embed2
        spikes = first.embed_lif(x)
        x = conv_bn_lif(spikes, first.embed_conv, first.embed_bn, second.embed_lif)
        x = conv_bn(x, second.embed_conv, second.embed_bn, second.embed_lif, pool=True)
        return x + conv_bn(spikes, shortcut.embed_conv, shortcut.embed_bn, first.embed_lif)


class MSHST(model.HST):
    """HST with membrane shortcuts, and one more neuron before the head. Keywords: see HST; with
    cross_sample_lif=True ValueError, since no neuron of it runs over T*B.
    """

    first_embedding, embedding, block = MSEmbeddingInit, MSEmbedding, MSBlock

    def __init__(self, *args, cross_sample_lif=False, **kwargs):
        if cross_sample_lif not in (False, "auto"):
            why = "no neuron of MS-QKFormer runs on from sample to sample"
            raise ValueError(f"cross_sample_lif is {cross_sample_lif}; {why}")
        super().__init__(*args, **kwargs)
        self.head_lif = self.lif()

    def pool(self, x):
        """Membrane inputs [T, B, C, H, W] -> spikes [T, B, C] of the mean over space."""
        return self.head_lif(super().pool(x))


@register_model
def MSQKFormer(T=4, pretrained=False, **kwargs):
    """MS-QKFormer 4-384 of the CIFAR experiments; keywords: see MSHST, HST and Stages.create."""
    return MSHST.create("MSQKFormer", pretrained, model.CFG, T=T, **kwargs)
