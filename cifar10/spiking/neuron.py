"""Multi-step spiking neurons, each with interchangeable backends; plain.py has the formulas."""

from functools import cache, partial

import torch
from spikingjelly.activation_based import functional, neuron
from spikingjelly.activation_based import surrogate as functions

from . import native, plain
from .compiler import CTYPES, fault, say
from .observers import observed, traced
from .plain import membrane_type, potentials, rate_of, torch_lif
from .spikes import mark, wants_bytes

BACKENDS = ("auto", "torch", "cupy", "spikingjelly")
CLASSES = {
    "sigmoid": functions.Sigmoid,
    "atan": functions.ATan,
    "piecewise_quadratic": functions.PiecewiseQuadratic,
    "piecewise_exp": functions.PiecewiseExp,
    "soft_sign": functions.SoftSign,
    "erf": functions.Erf,
    "rect": functions.Rect,
}
NAMES = {kind: name for name, kind in CLASSES.items()}


class OwnSurrogate(functions.SurrogateFunctionBase):
    """One of plain.SURROGATES that spikingjelly does not have."""

    def __init__(self, name, alpha):
        super().__init__(spiking=True, alpha=alpha)
        self.name = name

    def forward(self, x):
        return torch_lif(x[None], 2.0, 0.0, self.alpha, "if", None, self.name)[0]


class MultiStep:
    """What the neurons below have in common: from [T, ...], spikes of the input's shape and type.

    Every call starts anew, so there is nothing to reset. Each is also spikingjelly's node of its
    kind, so that library's monitors, operation counters and `reset_net` work on it.

    Args:
        tau: membrane time constant in steps, > 1; PLIF starts from it, IF has none. Default 2.0.
        v_threshold: firing threshold, > 0. Default 1.0.
        backend: "torch" (any device, float64 to bfloat16), "spikingjelly" (its functional neurons),
            "cupy" (CUDA, float32 to bfloat16; beyond 64 steps spikingjelly), or "auto": cupy on a
            GPU where CuPy works, else spikingjelly there, torch elsewhere and in float64.
        fused: whether this neuron, and the layer that ends in it, may run fused: in one pass over
            memory, see layer.py. Default True.
        alpha: slope of the surrogate gradient, > 0. Default: the surrogate's own, 4.0 of a sigmoid.
        surrogate: a key of plain.SURROGATES, or a class of spikingjelly's kind. Default "sigmoid".
        memory: "small" where a fused layer that ends in it computes its convolution again in the
            backward pass, "fast" where it keeps the output. Default "fast".
        events: whether a layer that ends in it may add up rows of its weight where its input
            spikes, on a CPU and where `fused` is set, see events.cpp. Default True.

    Attributes of the node may be set afterwards. With v_reset, detach_reset or decay_input other
    than above, a surrogate_function that is not in CLASSES, or store_v_seq, spikingjelly's
    functional neuron computes it, whatever the backend, and its layer does not run fused.

    Raises ValueError for a value out of these, or a membrane `v` that is set; RuntimeError where
    cupy is asked for and can't run.
    """

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
        if isinstance(surrogate, str):
            alpha = float(plain.checked_alpha(tau, v_threshold, alpha, surrogate))
            function = CLASSES.get(surrogate, partial(OwnSurrogate, surrogate))(alpha=alpha)
        else:
            plain.checked_alpha(tau, v_threshold, alpha, "sigmoid")
            function = surrogate(**({} if alpha is None else {"alpha": alpha}))
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
        if memory not in ("fast", "small"):
            raise ValueError(f"memory is {memory!r}; it must be fast or small")
        name = {"lif": "tau", "if": None, "plif": "init_tau"}[self.kind]
        super().__init__(
            **({name: float(tau)} if name else {}),
            v_threshold=float(v_threshold),
            surrogate_function=function,
            detach_reset=True,
            step_mode="m",
        )
        self.backend = backend
        self.fused = fused
        self.memory = memory
        self.events = events

    def supported_step_mode(self):
        return ("m",)

    def extra_repr(self):
        tau = "" if self.kind == "if" else f"tau={self.tau:g}, "
        slope = "" if self.alpha == 4.0 else f"alpha={self.alpha}, "
        return f"{tau}v_threshold={self.v_threshold}, {slope}backend={self.backend}"

    @property
    def surrogate(self):
        """The key of plain.SURROGATES, None if the surrogate_function is none of these."""
        f = self._modules["surrogate_function"]
        return f.name if type(f) is OwnSurrogate else NAMES.get(type(f))

    @property
    def alpha(self):
        """Slope of the surrogate gradient; None if the surrogate_function is not known."""
        return self._modules["surrogate_function"].alpha if self.surrogate else None

    def is_usual(self):
        """Whether the neuron is the one of the formulas above, as every backend computes it."""
        # Submodules and memories by their dictionaries: every layer asks at every call.
        v = self._memories["v"]
        usual = self.alpha is not None and self._modules["surrogate_function"].spiking
        usual = usual and self.v_reset == 0.0 and self.detach_reset
        usual = usual and getattr(self, "decay_input", True)  # IF has none
        return usual and type(v) is float and v == 0.0 and not self.store_v_seq

    def constants(self):
        """What every backend gets besides x. tau is there for LIF alone, and w for PLIF alone."""
        tau, w = (self.tau if self.kind == "lif" else 0.0), getattr(self, "w", None)
        return tau, self.v_threshold, self.alpha, self.kind, w, self.surrogate

    def has_kernel(self, x):
        """Whether a kernel computes it: on a GPU cupy's, on a CPU that of layers, if `fused`."""
        if not x.numel() or (self.kind == "plif" and self.w.dim()) or not (self.fused or x.is_cuda):
            return False
        neuron = native.constants_of(*self.constants()).neuron
        return native.available(x.device.type, x.dtype, self.backend, len(x), neuron)

    def multi_step_forward(self, x_seq):
        if not self.is_usual():
            if type(self.v) is not float or self.v not in (0.0, self.v_reset):
                raise ValueError("the neuron's v was set, but calls start from v_reset; reset() it")
            spikes, self.v_seq = spikingjelly_lif(x_seq, self)
            return spikes
        *constants, w, surrogate = self.constants()
        if traced():  # spikes without a gradient, in PyTorch's own operators
            h = potentials(x_seq, rate_of(x_seq, w), (*constants, surrogate))
            return (h >= self.v_threshold).to(x_seq.dtype)
        seen = observed(x_seq) is not None  # operators of PyTorch are wanted
        if not seen and self.has_kernel(x_seq):
            as_bytes = self.fused and wants_bytes()
            constants = native.constants_of(*self.constants())
            spikes, *small = native.fire(x_seq, rate_of(x_seq, w), constants, as_bytes)
            return mark(spikes, 1, small[0]) if small else spikes
        if torch.compiler.is_compiling():  # it takes no `out` of another layout
            return torch_lif(x_seq.contiguous(), *self.constants())
        backend = resolve_backend(self.backend, x_seq.device.type, x_seq.dtype)
        if backend == "spikingjelly" and not (seen and self.backend != backend):
            spikes, _ = spikingjelly_lif(x_seq, self)
        else:
            spikes = torch_lif(x_seq, *self.constants())
        return mark(spikes) if self.fused else spikes


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


# What makes a model's neurons: see plain.py.
neuron_maker = partial(plain.neuron_maker, kinds=NEURONS)


@cache
def resolve_backend(backend, device_type, dtype):
    """What computes tensors of this device and type where no kernel does."""
    if backend == "cupy":
        error = "needs a CUDA tensor" if device_type != "cuda" else fault(native.check_cupy)
        if error is None and dtype not in CTYPES:
            error = f"does not take {dtype}"
        if error is not None:
            raise RuntimeError(f"the cupy backend of the LIF neuron can't run: {error}")
    if backend in ("auto", "cupy"):
        return "spikingjelly" if device_type == "cuda" and dtype in CTYPES else "torch"
    say(f"neurons run on the {backend} backend")
    return backend


# spikingjelly: the baseline -----------------------------------------------------------------------


def spikingjelly_lif(x, node):
    """(spikes, membranes or None) by the node's attributes, whatever they are."""
    v = torch.full(x.shape[1:], node.v_reset or 0.0, dtype=membrane_type(x), device=x.device)
    options = node.v_threshold, node.v_reset, node.surrogate_function, node.detach_reset
    options += (node.store_v_seq,)
    if node.kind == "if":
        spikes, _, v_seq = functional.if_multi_step(x, v, *options)
    elif node.kind == "lif":
        spikes, _, v_seq = functional.lif_multi_step(x, v, node.tau, node.decay_input, *options)
    else:
        w = node.w.to(v.dtype)
        spikes, _, v_seq = functional.plif_multi_step(x, v, w, node.decay_input, *options)
    return spikes.to(x.dtype), v_seq
