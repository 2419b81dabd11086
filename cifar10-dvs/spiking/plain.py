"""What all of spiking/ computes, in plain PyTorch: the spiking neuron and the layers made of it.

    charge   LIF:   h[t] = v[t-1] + (x[t] - v[t-1]) / tau
             IF:    h[t] = v[t-1] + x[t]
             PLIF:  h[t] = v[t-1] + (x[t] - v[t-1]) * sigmoid(w), where the layer learns w
    fire            s[t] = 1 if h[t] >= v_threshold else 0
    reset           v[t] = 0 if s[t] else h[t]; detached: no gradient through s here

v[-1] = 0 in every call. ds/dh is that of a sigmoid with slope alpha, or of another of SURROGATES.
The membrane is in float32, of float64 input in float64. Tensors are [T, B, C, H, W].

Stages, at the end, gives a network timm's methods. A copy of this file, named spiking.py, beside
model.py is all that a model needs besides torch and timm; the rest of the folder computes the same
in less time and memory.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from torch import nn


class Surrogate(NamedTuple):
    """What stands for the derivative of a spike by x = h - v_threshold.

    alpha: its default. derivative: function of a tensor x, which it may overwrite, and alpha.
    kernel: the same as the body of a C++ function of real_t x and alpha.
    """

    alpha: float
    derivative: Callable
    kernel: str


def of_sigmoid(x, alpha):
    g = x.mul_(alpha).sigmoid_()
    return torch.sub(1.0, g).mul_(g).mul_(alpha)


SURROGATES = {  # by spikingjelly's names
    "sigmoid": Surrogate(
        4.0,
        of_sigmoid,
        "real_t g = reciprocal(1 + exponential(-alpha * x)); return alpha * g * (1 - g);",
    ),
    "atan": Surrogate(
        2.0,
        lambda x, alpha: alpha / 2 / (1 + (math.pi / 2 * alpha * x) ** 2),
        f"x *= real_t({math.pi / 2}) * alpha; return alpha / 2 / (1 + x * x);",
    ),
    "piecewise_quadratic": Surrogate(
        1.0,
        lambda x, alpha: (alpha - alpha**2 * x.abs()).clamp(min=0),
        "x = alpha - alpha * alpha * absolute(x); return x > 0 ? x : 0;",
    ),
    "piecewise_exp": Surrogate(
        1.0,
        lambda x, alpha: alpha / 2 * (-alpha * x.abs()).exp(),
        "return alpha / 2 * exponential(-alpha * absolute(x));",
    ),
    "soft_sign": Surrogate(
        2.0,
        lambda x, alpha: 0.5 / alpha / (1 / alpha + x.abs()) ** 2,
        "x = 1 / alpha + absolute(x); return 1 / (2 * alpha * x * x);",
    ),
    "erf": Surrogate(
        2.0,
        lambda x, alpha: alpha / math.pi**0.5 * (-((alpha * x) ** 2)).exp(),
        f"x *= alpha; return alpha * real_t({math.pi**-0.5}) * exponential(-x * x);",
    ),
    "rect": Surrogate(
        1.0,
        lambda x, alpha: alpha * (x.abs() < 0.5 / alpha).to(x),
        "return absolute(x) < real_t(0.5) / alpha ? alpha : 0;",
    ),
}


def membrane_type(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rate_of(x, w):
    """sigmoid(w) of a PLIF neuron in the membrane's type; None of the others."""
    return None if w is None else w.to(membrane_type(x)).sigmoid()


def potentials(x, rate, constants):
    """h of x [T, ...] in the membrane's type; rate, constants: see TorchLIF."""
    tau, v_threshold, _, kind, _ = constants
    h, v = [], torch.zeros_like(x[0], dtype=membrane_type(x))
    # A tensor, not a number: on CUDA, x / number is x * (1 / number), which rounds differently.
    divisor = v.new_full((), tau)
    for step in x.unbind():
        if kind == "if":
            h.append(v + step)
        else:
            h.append(v + ((step - v) / divisor if kind == "lif" else (step - v) * rate))
        v = h[-1].masked_fill(h[-1] >= v_threshold, 0.0)
    return torch.stack(h)


class TorchLIF(torch.autograd.Function):
    """(x, PLIF's rate or None, (tau, v_threshold, alpha, kind, a key of SURROGATES)) -> spikes of
    x's shape and type.
    """

    @staticmethod
    def forward(ctx, x, rate, constants):
        h = potentials(x, rate, constants)
        ctx.save_for_backward(h, *((x, rate) if constants[3] == "plif" else ()))
        ctx.constants, ctx.dtype = constants, x.dtype
        return (h >= constants[1]).to(x.dtype)

    @staticmethod
    def backward(ctx, grad_spikes):
        h, *charges = ctx.saved_tensors
        tau, v_threshold, alpha, kind, surrogate = ctx.constants
        grad_h = SURROGATES[surrogate].derivative(h - v_threshold, alpha).mul_(grad_spikes)
        kept = 1.0 if kind == "if" else 1.0 - 1.0 / tau if kind == "lif" else 1.0 - charges[1]
        for t in range(len(h) - 2, -1, -1):  # step t+1 saw v[t] = h[t], unless step t fired
            grad_v = grad_h[t + 1] * kept
            grad_h[t].add_(grad_v.masked_fill_(h[t] >= v_threshold, 0.0))
        grad_rate = None
        if kind == "plif":
            x, rate = charges
            v = h.masked_fill(h >= v_threshold, 0.0).roll(1, 0)  # v[t-1]
            v[0] = 0.0
            grad_rate = v.neg_().add_(x).mul_(grad_h).sum(dtype=torch.float64).to(rate.dtype)
            grad_h.mul_(rate)
        elif kind == "lif":
            grad_h.div_(tau)
        return grad_h.to(ctx.dtype), grad_rate, None


def torch_lif(x, tau, v_threshold, alpha=4.0, kind="lif", w=None, surrogate="sigmoid"):
    """Spikes of x, [T, ...]."""
    return TorchLIF.apply(x, rate_of(x, w), (tau, v_threshold, alpha, kind, surrogate))


def checked_alpha(tau, v_threshold, alpha, surrogate):
    """alpha, or the surrogate's own for None; ValueError for a neuron that can't be."""
    if surrogate not in SURROGATES:
        raise ValueError(f"surrogate is {surrogate!r}; it must be one of {', '.join(SURROGATES)}")
    alpha = SURROGATES[surrogate].alpha if alpha is None else alpha
    if tau <= 1.0:
        raise ValueError(f"tau is {tau}; it must be larger than 1")
    for name, value in (("v_threshold", v_threshold), ("alpha", alpha)):
        if value <= 0.0:
            raise ValueError(f"{name} is {value}; it must be larger than 0")
    return alpha


class MultiStepLIF(nn.Module):
    """The neuron as a module. Arguments: see MultiStep in neuron.py; backend, fused, memory and
    events choose between ways to compute the same, of which there is one here.
    """

    kind = "lif"
    v_threshold = 1.0  # where none is given

    def __init__(
        self,
        tau=2.0,
        v_threshold=1.0,
        backend="auto",
        fused=True,
        alpha=None,
        surrogate="sigmoid",
        memory="fast",
        events=True,
    ):
        super().__init__()
        self.alpha = checked_alpha(tau, v_threshold, alpha, surrogate)
        self.tau, self.v_threshold, self.surrogate, self.w = tau, v_threshold, surrogate, None
        if self.kind == "plif":
            self.w = nn.Parameter(torch.tensor(-math.log(tau - 1.0)))

    def forward(self, x):
        constants = self.tau, self.v_threshold, self.alpha, self.kind, self.w, self.surrogate
        return torch_lif(x, *constants)


class MultiStepIF(MultiStepLIF):
    kind = "if"


class MultiStepPLIF(MultiStepLIF):
    kind = "plif"


NEURONS = {"lif": MultiStepLIF, "if": MultiStepIF, "plif": MultiStepPLIF}


def neuron_maker(
    neuron="lif", tau=2.0, v_threshold=1.0, surrogate_alpha=None, kinds=NEURONS, **rest
):
    """What makes a model's neurons, called with no argument, or with v_threshold to have another
    than its own, `.v_threshold`.

    `neuron` is a key of `kinds`, or a class that takes the arguments of MultiStepLIF, which the
    others are. ValueError for an unknown neuron, and for a tau of neurons that have none.
    """
    kind = kinds.get(neuron, neuron)
    if not callable(kind):
        raise ValueError(f"neuron is {neuron!r}; it must be one of {', '.join(kinds)}")
    if neuron == "if" and tau != 2.0:
        raise ValueError(f"tau is {tau}, but the neuron `if` has no time constant; leave tau out")
    maker = partial(kind, tau=tau, v_threshold=v_threshold, alpha=surrogate_alpha, **rest)
    maker.v_threshold = v_threshold
    return maker


# Layers -------------------------------------------------------------------------------------------


def add(x, y):
    return x + y


def matmul(a, b, lif=None):
    return a @ b


def masked(x, mask):
    """x [T, B, C, H, W], each head of it multiplied with mask [T, B, heads, 1 or channels, H or 1,
    W or 1].
    """
    return (x.unflatten(2, (mask.shape[2], -1)) * mask).flatten(2, 3)


def conv_bn(x, conv, bn, lif=None, pool=False, mask=None):
    """bn(conv(x)) of all T*B samples. A convolution with a weight of three dimensions, or without
    one but with a BatchNorm1d, gets the H*W tokens as one. `pool`: a 3x3 max-pool of stride 2 comes
    last. `mask`: see masked. `lif`, the neuron before, is not used.
    """
    x = x if mask is None else masked(x, mask)
    steps, space = x.shape[:2], x.shape[3:]
    x, weight = x.flatten(0, 1), getattr(conv, "weight", None)
    tokens = weight.dim() == 3 if torch.is_tensor(weight) else isinstance(bn, nn.BatchNorm1d)
    x = bn(conv(x.flatten(2))).unflatten(2, space) if tokens else bn(conv(x))
    x = F.max_pool2d(x, 3, 2, 1) if pool else x
    return x.unflatten(0, steps)


def conv_bn_lif(x, conv, bn, lif, pool=False, mask=None):
    return lif(conv_bn(x, conv, bn, lif, pool, mask))


def linear(x, layer):
    return layer(x)


def conv_bn_lif_each(x, *layers, heads=None):
    return [in_heads(conv_bn_lif(x, *layer), heads) for layer in layers]


def in_heads(x, heads):
    """[T, B, C, H, W] -> [T, B, H, W, heads, channels]; None: x as it is."""
    return x if heads is None else x.movedim(2, -1).unflatten(-1, (heads, -1))


# The network among timm's -------------------------------------------------------------------------

NEUTRAL = {"drop_rate": 0, "attn_drop_rate": 0, "drop_block_rate": None, "qkv_bias": False}
NEUTRAL |= {"qk_scale": None, "drop_connect_rate": None}
UNUSED = ("sr_ratios", "norm_layer", "img_size")  # by the release's models too; any size works


class Stages(nn.Module):
    """A network of stages, each `patch_embed1` and the blocks `stage1` or so, with timm's methods.

    A subclass has num_features, feature_info (of each stage), frames(x), pool(x) and
    run_stage(index, x), and calls reset_classifier.
    """

    global_pool = "avg"

    @classmethod
    def create(cls, name, pretrained, cfg, **kwargs):
        """A model by timm's builder; with features_only=True what gives the maps of its stages.

        Args:
            name: of the model.
            pretrained: whether to load the weights that the pretrained_cfg names.
            cfg: the pretrained_cfg where none is given.
            **kwargs: the class's, or in_chans, drop_path_rate and global_pool as timm has them.

        Raises ValueError for what the model does not have.
        """
        for key, neutral in NEUTRAL.items():
            if (value := kwargs.pop(key, neutral)) not in (neutral, None):
                raise ValueError(f"{key} is {value}, which {name} does not have; leave it out")
        kwargs = {key: value for key, value in kwargs.items() if key not in UNUSED}
        for theirs, ours in (("in_channels", "in_chans"), ("drop_path_rate", "drop_path")):
            if (value := kwargs.pop(theirs, None)) is not None:
                kwargs[ours] = value
        kwargs["pretrained_cfg"] = kwargs.get("pretrained_cfg") or {**cfg, "classifier": "head"}

        def make(in_chans, num_classes, global_pool="avg", **rest):
            try:
                model = cls(in_channels=in_chans, num_classes=num_classes, **rest)
            except TypeError as error:  # a keyword that nothing knows
                raise TypeError(f"{name}(){str(error).rpartition('()')[2]}") from None
            if global_pool != "avg":
                model.reset_classifier(num_classes, global_pool)
            return model

        features = {"out_indices": None, "feature_cls": "getter"}  # None: of all stages
        return build_model_with_cfg(make, name, pretrained, feature_cfg=features, **kwargs)

    def reset_classifier(self, num_classes, global_pool=None):
        """A new head; 0 classes: none. global_pool: "avg" or, without a head, "" (maps)."""
        pool = global_pool if global_pool is not None else self.global_pool
        if pool not in ("avg", "") or (num_classes and not pool):
            raise ValueError(f"global_pool is {pool!r}; there is 'avg', or '' with num_classes=0")
        self.num_classes, self.global_pool = num_classes, pool
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes)
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
            self.head.to(next(self.parameters()))  # on the device and of the type of the network

    def get_classifier(self):
        return self.head

    def set_grad_checkpointing(self, enable=True):
        for module in self.modules():
            if hasattr(module, "memory"):  # small: the backward pass computes convolutions again
                module.memory = "small" if enable else "fast"

    def no_weight_decay(self):
        return set()  # biases and parameters of one dimension are left out by timm itself

    def group_matcher(self, coarse=False):
        blocks = [(r"^patch_embed(\d+)", (-1,)), (r"^stage(\d+)\.(\d+)", None)]
        return {"stem": "^$", "blocks": r"^(?:patch_embed|stage)(\d+)" if coarse else blocks}

    def prune_intermediate_layers(self, indices=None, prune_norm=False, prune_head=True):
        """Take off what forward_intermediates does not need for these stages; their list."""
        indices, last = feature_take_indices(len(self.feature_info), indices)
        for index in range(last + 2, len(self.feature_info) + 1):
            delattr(self, f"patch_embed{index}")
            delattr(self, f"stage{index}")
        if prune_head:
            self.reset_classifier(0, "")
        return indices

    def forward_intermediates(
        self,
        x,
        indices=None,
        norm=False,
        stop_early=False,
        output_fmt="NCHW",
        intermediates_only=False,
        steps=False,
    ):
        """Images or frames -> (forward_features, maps of the stages `indices`, from 0), as in timm.

        Maps are the mean over T, [B, C, H, W]; with `steps` [T, B, C, H, W]. norm: there is none.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}; there is 'NCHW'")
        taken, last = feature_take_indices(len(self.feature_info), indices)
        x, maps = self.frames(x), []
        stop = last + 1 if stop_early or intermediates_only else len(self.feature_info)
        for index in range(stop):
            x = self.run_stage(index + 1, x)
            if index in taken:
                maps.append(x if steps else x.mean(0))
        return maps if intermediates_only else (x, maps)
