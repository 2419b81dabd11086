"""Multi-step spiking neurons, each with three interchangeable backends.

    charge   LIF:   h[t] = v[t-1] + (x[t] - v[t-1]) / tau
             IF:    h[t] = v[t-1] + x[t]
             PLIF:  h[t] = v[t-1] + (x[t] - v[t-1]) * sigmoid(w), where the layer learns w
    fire            s[t] = 1 if h[t] >= v_threshold else 0
    reset           v[t] = 0 if s[t] else h[t]; detached: no gradient through s here

v[-1] = 0 in every call. The surrogate gradient is that of a sigmoid with slope alpha:
ds/dh = alpha * g * (1 - g), g = sigmoid(alpha * (h - v_threshold)). The membrane is kept in float32
(float64 for float64 input), whatever the type of the input.
"""

import functools
import logging
from functools import partial

import torch
from spikingjelly.activation_based import functional, neuron, surrogate

from .cupy_lif import CTYPES, cupy_error, lif_forward
from .spikes import mark, traced

ALPHA = 4.0
BACKENDS = ("auto", "torch", "cupy", "spikingjelly")
logger = logging.getLogger("qkformer")


class MultiStep:
    """What the neurons below have in common: from [T, ...], spikes of the input's shape and type.

    Every call starts anew, so there is nothing to reset. Each is also spikingjelly's node of its
    kind, so that library's monitors, operation counters and `reset_net` work on it.

    Args:
        tau: membrane time constant in steps, > 1; PLIF starts from it, IF has none. Default 2.0.
        v_threshold: firing threshold, > 0. Default 1.0.
        backend: "torch" (any device, float64 to bfloat16), "cupy" (CUDA, float32 to bfloat16),
            "spikingjelly" (its functional neurons), or "auto": cupy on a GPU where CuPy works, else
            spikingjelly there, torch on any other device and in float64.
        fused: whether the layer that ends in this neuron may run fused, see layer.py. Default True.
        alpha: slope of the surrogate gradient, > 0. Default 4.0.
        byte_spikes: whether the spikes may wait for the backward pass as bytes, see spikes.py.
            Default True.

    Attributes of the node may be set afterwards. With v_reset, detach_reset or decay_input other
    than above, a surrogate_function that is no sigmoid, or store_v_seq, spikingjelly's functional
    neuron computes it, whatever the backend, and its layer does not run fused.

    Raises ValueError for a value out of these, or a membrane `v` that is set; RuntimeError where
    cupy is asked for and can't run.
    """

    def __init__(
        self,
        tau=2.0,
        v_threshold=1.0,
        backend="auto",
        fused=True,
        alpha=ALPHA,
        byte_spikes=True,
    ):
        if tau <= 1.0:
            raise ValueError(f"tau is {tau}; it must be larger than 1")
        for name, value in (("v_threshold", v_threshold), ("alpha", alpha)):
            if value <= 0.0:
                raise ValueError(f"{name} is {value}; it must be larger than 0")
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
        name = {"lif": "tau", "if": None, "plif": "init_tau"}[self.kind]
        super().__init__(
            **({name: float(tau)} if name else {}),
            v_threshold=float(v_threshold),
            surrogate_function=surrogate.Sigmoid(alpha=float(alpha)),
            detach_reset=True,
            step_mode="m",
        )
        self.backend = backend
        self.fused = fused
        self.byte_spikes = byte_spikes

    def supported_step_mode(self):
        return ("m",)

    def extra_repr(self):
        tau = "" if self.kind == "if" else f"tau={self.tau:g}, "
        slope = "" if self.alpha == ALPHA else f"alpha={self.alpha}, "
        return f"{tau}v_threshold={self.v_threshold}, {slope}backend={self.backend}"

    @property
    def alpha(self):
        """Slope of the surrogate gradient; None if it is not a sigmoid's."""
        f = self.surrogate_function
        return f.alpha if type(f) is surrogate.Sigmoid else None

    def is_usual(self):
        """Whether the neuron is the one of the formulas above, as every backend computes it."""
        usual = self.alpha is not None and self.surrogate_function.spiking
        usual = usual and self.v_reset == 0.0 and self.detach_reset
        usual = usual and getattr(self, "decay_input", True)  # IF has none
        return usual and type(self.v) is float and self.v == 0.0 and not self.store_v_seq

    def constants(self):
        """What every backend gets besides x. tau is there for LIF alone, and w for PLIF alone."""
        tau, w = (self.tau if self.kind == "lif" else 0.0), getattr(self, "w", None)
        return tau, self.v_threshold, self.alpha, self.kind, w

    def multi_step_forward(self, x_seq):
        if self.is_usual():
            if traced():
                return traced_lif(x_seq, *self.constants())
            backend = resolve_backend(self.backend, x_seq.device.type, x_seq.dtype)
            spikes = IMPLEMENTATIONS[backend](x_seq, *self.constants())
            return mark(spikes) if self.byte_spikes else spikes
        if type(self.v) is not float or self.v not in (0.0, self.v_reset):
            raise ValueError("the neuron's v was set, but calls start from v_reset; reset() it")
        spikes, self.v_seq = spikingjelly_lif(x_seq, *self.constants(), node=self)
        return spikes


class MultiStepLIF(MultiStep, neuron.LIFNode):
    """Leaky integrate-and-fire, the neuron of the paper. Arguments: see MultiStep."""

    kind = "lif"


class MultiStepIF(MultiStep, neuron.IFNode):
    """Integrate-and-fire: no leak, and the input is not divided by tau. Arguments: see MultiStep.

    tau is accepted, so that all neurons are made alike, and not used.
    """

    kind = "if"


class MultiStepPLIF(MultiStep, neuron.ParametricLIFNode):
    """LIF with a learnable time constant (Fang et al., ICCV 2021): 1 / tau = sigmoid(w).

    `w` is a parameter of one value, so the time constant is the layer's. Arguments: see MultiStep.
    """

    kind = "plif"

    @property
    def tau(self):
        """The time constant that the layer has learnt, a float."""
        return 1.0 / self.w.detach().double().sigmoid().item()


NEURONS = {"lif": MultiStepLIF, "if": MultiStepIF, "plif": MultiStepPLIF}


def neuron_maker(
    neuron="lif",
    tau=2.0,
    v_threshold=1.0,
    surrogate_alpha=ALPHA,
    backend="auto",
    fused=True,
    byte_spikes=True,
):
    """What makes a model's neurons, called with no argument.

    `neuron` is a key of NEURONS, or a class that takes the arguments of MultiStep, which the others
    are. ValueError for an unknown neuron, and for a tau of neurons that have none.
    """
    kind = NEURONS.get(neuron, neuron)
    if not callable(kind):
        raise ValueError(f"neuron is {neuron!r}; it must be one of {', '.join(NEURONS)}")
    if neuron == "if" and tau != 2.0:
        raise ValueError(f"tau is {tau}, but the neuron `if` has no time constant; leave tau out")
    return partial(kind, tau, v_threshold, backend, fused, surrogate_alpha, byte_spikes)


@torch.compiler.assume_constant_result
def resolve_backend(backend, device_type, dtype):
    """The implementation that `backend` means for tensors of this device and type."""
    return _resolve(backend, device_type, dtype)


@functools.cache
def _resolve(backend, device_type, dtype):
    name, why = backend, ""
    if backend == "auto":
        name = "torch"
        if device_type == "cuda" and dtype != torch.float64:
            error = cupy_error()
            name, why = ("cupy", "") if error is None else ("spikingjelly", f" (no CuPy: {error})")
    elif backend == "cupy":
        error = "needs a CUDA tensor" if device_type != "cuda" else cupy_error()
        if error is None and dtype not in CTYPES:
            error = f"does not take {dtype}"
        if error is not None:
            raise RuntimeError(f"the cupy backend of the LIF neuron can't run: {error}")
    say(f"LIF neurons: {name} backend on {device_type}{why}")
    return name


@functools.cache
def say(line):
    logger.info(line)  # once for each line


# torch: the plain formulas ------------------------------------------------------------------------


class TorchLIF(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rate, tau, v_threshold, alpha, kind):
        h = torch.empty_like(x, dtype=membrane_type(x))
        v = torch.zeros_like(h[0])
        # A tensor, not a number: on CUDA, x / number is x * (1 / number), which rounds differently.
        divisor = h.new_full((), tau)
        for t in range(len(x)):
            if kind == "if":
                torch.add(x[t], v, out=h[t])
            elif kind == "lif":
                torch.sub(x[t], v, out=h[t]).div_(divisor).add_(v)
            else:
                torch.sub(x[t], v, out=h[t]).mul_(rate).add_(v)
            v = h[t].masked_fill(h[t] >= v_threshold, 0.0)
        ctx.save_for_backward(h, *((x, rate) if kind == "plif" else ()))
        ctx.constants, ctx.dtype = (tau, v_threshold, alpha, kind), x.dtype
        return (h >= v_threshold).to(x.dtype)

    @staticmethod
    def backward(ctx, grad_spikes):
        h, *charges = ctx.saved_tensors
        tau, v_threshold, alpha, kind = ctx.constants
        g = torch.sub(h, v_threshold).mul_(alpha).sigmoid_()
        grad_h = torch.sub(1.0, g).mul_(g).mul_(alpha).mul_(grad_spikes)
        kept = 1.0 if kind == "if" else 1.0 - 1.0 / tau if kind == "lif" else 1.0 - charges[1]
        for t in range(len(h) - 2, -1, -1):  # step t+1 saw v[t] = h[t], unless step t fired
            grad_v = grad_h[t + 1] * kept
            grad_h[t].add_(grad_v.masked_fill_(h[t] >= v_threshold, 0.0))
        if kind != "plif":
            grad_x = grad_h if kind == "if" else grad_h.div_(tau)
            return grad_x.to(ctx.dtype), None, None, None, None, None
        x, rate = charges
        v = h.masked_fill(h >= v_threshold, 0.0).roll(1, 0)  # v[t-1]
        v[0] = 0.0
        grad_rate = v.neg_().add_(x).mul_(grad_h).sum(dtype=torch.float64).to(rate.dtype)
        return grad_h.mul_(rate).to(ctx.dtype), grad_rate, None, None, None, None


def membrane_type(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rate_of(x, w):
    """sigmoid(w) of a PLIF neuron in the membrane's type; None of the others."""
    return None if w is None else w.to(membrane_type(x)).sigmoid()


def torch_lif(x, tau, v_threshold, alpha=ALPHA, kind="lif", w=None):
    return TorchLIF.apply(x, rate_of(x, w), tau, v_threshold, alpha, kind)


def traced_lif(x, tau, v_threshold, alpha=ALPHA, kind="lif", w=None):
    """The formulas in PyTorch's own operators, for exported graphs: spikes without a gradient."""
    v, spikes = torch.zeros_like(x[0], dtype=torch.promote_types(x.dtype, torch.float32)), []
    rate = rate_of(x, w)
    for step in x.unbind():
        if kind == "if":
            h = v + step
        else:
            h = v + ((step - v) / tau if kind == "lif" else (step - v) * rate)
        spikes.append(h >= v_threshold)
        v = h.masked_fill(spikes[-1], 0.0)
    return torch.stack(spikes).to(x.dtype)


# spikingjelly: the baseline -----------------------------------------------------------------------


def spikingjelly_lif(x, tau, v_threshold, alpha=ALPHA, kind="lif", w=None, node=None):
    """Spikes of the usual neuron; with a `node`, (spikes, membranes or None) by its attributes."""
    if node is None:
        options = (0.0, surrogate.Sigmoid(alpha=alpha), True, False)
    else:
        options = (node.v_reset, node.surrogate_function, node.detach_reset, node.store_v_seq)
    decay_input = getattr(node, "decay_input", True)
    v = torch.full(x.shape[1:], options[0] or 0.0, dtype=membrane_type(x), device=x.device)
    if kind == "if":
        spikes, _, v_seq = functional.if_multi_step(x, v, v_threshold, *options)
    elif kind == "lif":
        spikes, _, v_seq = functional.lif_multi_step(x, v, tau, decay_input, v_threshold, *options)
    else:
        w = w.to(v.dtype)
        spikes, _, v_seq = functional.plif_multi_step(x, v, w, decay_input, v_threshold, *options)
    return spikes.to(x.dtype) if node is None else (spikes.to(x.dtype), v_seq)


# cupy: a thread per neuron ------------------------------------------------------------------------


def cupy_lif(x, tau, v_threshold, alpha=ALPHA, kind="lif", w=None):
    return lif_forward(x, tau, v_threshold, alpha, kind, rate_of(x, w))


IMPLEMENTATIONS = {"torch": torch_lif, "spikingjelly": spikingjelly_lif, "cupy": cupy_lif}
