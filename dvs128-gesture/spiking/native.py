"""Plans of the layers, neurons and products that layer.cpp computes, and the calls to it.

All of a layer, forward or backward, is one call: on a GPU nothing waits for Python. What does not
change from call to call is a Plan: which kernels, for how many rows, with which constants.
"""

import ctypes
import functools
import math
from typing import NamedTuple

import torch

from . import compiler
from .compiler import NO_NEURON, Build, events_library, fault, kernel_at, load_layers, say

# The kernels, in the order of layer.cpp.
NAMES = ("statistics", "batch_norm", "running_norm", "pool", "fire", "fire_backward")
NAMES += ("batch_norm_backward", "pool_backward", "normalise_backward")
OF_EVENTS = ("find", "convolve", "unpack", "weight_gradient")  # likewise
OPERATORS = getattr(torch.ops, compiler.NAME)

# Plans that are kept, of some kilobytes each: a schedule of alpha makes new ones in each step.
PLANS = 2**12


class Constants(NamedTuple):
    """Of a neuron: its charge in fused.cu and its surrogate, as in "MULTIPLY sigmoid"; numbers."""

    neuron: str
    rate: float
    v_threshold: float
    alpha: float


def constants_of(tau, v_threshold, alpha, kind, _, surrogate):
    """Constants of MultiStep.constants()."""
    charge, rate = {"plif": "PARAMETRIC", "if": "INTEGRATE"}.get(kind, "DIVIDE"), 1.0
    if kind == "lif":
        rate = float(tau)
        if math.frexp(rate)[0] == 0.5:
            # Where 1 / tau is exact, a product with it has the bits of the division, in less time.
            charge, rate = "MULTIPLY", 1 / rate
    return Constants(f"{charge} {surrogate}", rate, float(v_threshold), float(alpha))


class Kernel(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("grid", ctypes.c_uint * 2)]
    _fields_ += [("block", ctypes.c_uint * 2)]


class Plan(ctypes.Structure):
    """What layer.cpp needs besides tensors, as it declares it."""

    _fields_ = [("driver", ctypes.c_void_p), ("kernels", Kernel * len(NAMES))]
    _fields_ += [("events", ctypes.c_void_p * len(OF_EVENTS)), ("shape", ctypes.c_long * 13)]
    _fields_ += [("channels", ctypes.POINTER(ctypes.c_longlong))]
    _fields_ += [("momenta", ctypes.POINTER(ctypes.c_double))]
    numbers = "layers has_bias training pool fires small T steps repeats".split()
    _fields_ += [(name, ctypes.c_longlong) for name in numbers]
    _fields_ += [(name, ctypes.c_double) for name in ("eps", "rate", "threshold", "alpha")]

    def __init__(self, neuron, T, channels, kernels, device):
        """kernels: {name: arguments of kernel_at behind it, without the device}"""
        super().__init__(compiler.driver() if compiler.on_gpu(device) else None)
        self.T, (_, self.rate, self.threshold, self.alpha) = T, neuron
        self.channels = (ctypes.c_longlong * len(channels))(*channels)
        for name, args in kernels.items():
            kernel = self.kernels[NAMES.index(name)]
            kernel.address, kernel.grid[:], kernel.block[:] = kernel_at(name, *args, device)


@functools.lru_cache(PLANS)
def plan_of(layer, dtype, T, pool, fires, events, momenta, x_shape, weights, device):
    """The bytes of the Plan of layers that read such an x.

    layer: see Layer in fusible.py. dtype: that they compute in. T: steps of the spikes. pool and
    fires: whether a max-pool and a neuron come behind BatchNorm. events: whether the convolution is
    a sum of events. momenta: of BatchNorms. weights: shapes.
    """
    steps, B, inputs, *size = x_shape
    channels = [shape[0] for shape in weights]
    C, kernel = sum(channels), (1, 1) if layer.tokens else weights[0][2:]
    spaces = zip(size, layer.padding, kernel, layer.stride, strict=True)
    out = [(length + 2 * pad - k) // step + 1 for length, pad, k, step in spaces]
    if min(out) < 1:
        padded = f"an input of {size}, padded by {list(layer.padding)}"
        raise ValueError(f"a kernel of {list(kernel)} does not fit in {padded}")
    rows = steps * B * math.prod(out)
    if layer.training and B * math.prod(out) * T == 1:
        raise ValueError(f"a single value per channel, in {[steps * B, C, *out]}, has no variance")
    shape = (steps * B, *size, inputs, *out, C, *kernel, *layer.stride, *layer.padding)
    out = [(length + 1) // 2 for length in out] if pool else out
    fired, large = B * math.prod(out), rows * C * T >= 2**30

    def args(rows, T=1, neuron=NO_NEURON):
        return dtype, T, neuron, rows, C, large

    last = args(fired, T, layer.neuron.neuron) if fires else args(steps * fired)
    kernels = dict.fromkeys(NAMES, args(rows)) | {"pool": args(steps * fired)}
    kernels |= {"fire": last, "fire_backward": last}
    plan = Plan(layer.neuron, T if fires else 1, channels, kernels, device)
    if events:
        library = events_library(dtype)
        addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in OF_EVENTS]
        plan.events[:] = [address.value for address in addresses]
    plan.shape[:], plan.layers, plan.steps, plan.repeats = shape, len(channels), steps, T // steps
    plan.momenta = (ctypes.c_double * len(channels))(*momenta)
    for name in ("has_bias", "training", "small", "eps"):
        setattr(plan, name, getattr(layer, name))
    plan.pool, plan.fires = pool, fires
    return torch.frombuffer(plan, dtype=torch.uint8)  # which keeps the Plan


@functools.lru_cache(PLANS)
def plan_of_neuron(constants, dtype, T, size, channels, device):
    """The bytes of the Plan of `size` neurons, `channels` of them in a row."""
    args = dtype, T, constants.neuron, size // channels, channels, size * T >= 2**30
    plan = Plan(constants, T, [channels], dict.fromkeys(("fire", "fire_backward"), args), device)
    return torch.frombuffer(plan, dtype=torch.uint8)


# What there is ------------------------------------------------------------------------------------


def check_cupy():
    """Any error where CuPy does not compile and run the kernels."""
    constants = Constants("MULTIPLY sigmoid", 0.5, 0.5, 4.0)
    for dtype in compiler.CTYPES:
        compiler.cuda_module(Build(dtype))  # without CuPy: says so first
        load_layers()
        x = torch.ones(1, 8, dtype=dtype, device="cuda")
        if not torch.equal(fire(x, None, constants)[0], x):
            raise RuntimeError(f"a kernel computes other numbers in {dtype}")


@functools.cache
def available(device_type, dtype, backend, T=4, neuron="MULTIPLY sigmoid"):
    """Whether layers of such tensors, of T steps and with such neurons, can run fused; logged once.
    All kernels that they launch on a CPU are there then.
    """
    build, most = Build(dtype, T, neuron), compiler.MAX_T
    long = f"T is {T}, kernels take {most} steps" if T > most else None
    if device_type == "cuda" and dtype in compiler.CTYPES and backend in ("auto", "cupy"):
        error = long or fault(check_cupy) or fault(compiler.cuda_module, build)
    elif device_type == "cpu" and dtype in compiler.HOST_CTYPES and backend == "auto":
        faults = (fault(compiler.host_library, each) for each in (build, Build(dtype)))
        error = long or next(filter(None, faults), None) or fault(load_layers)
    else:
        return False
    if error is None:
        say(f"fused kernels on the {'CPU' if device_type == 'cpu' else 'GPU'}")
    else:
        say(f"layers run module by module on {device_type}: {error}")
    return error is None


# Calls --------------------------------------------------------------------------------------------


def stream_of(device):
    return torch._C._cuda_getCurrentRawStream(device) if compiler.on_gpu(device) else 0


def shown_once(x):
    """x, or its first step where all are the same memory and nobody asks for x's own gradient."""
    asked = x.requires_grad and (x.is_leaf or x.retains_grad or x._backward_hooks)
    return x if x.stride(0) or asked else x[:1]


def layer(x, saved, rates, tensors, options):
    """[spikes of all layers [T, B, C, H, W] or, without a neuron, BatchNorm's output of x's steps];
    behind it spikes as bytes, where `saved`, x as it waits for the backward pass, is not None.
    Running statistics move on in training. rates: PLIF's, of all channels. tensors: see can_fuse.
    options: the first arguments of plan_of.
    """
    device, weights = x.get_device(), tuple([own[0].shape for own in tensors])
    plan = plan_of(*options, x.shape, weights, device)
    flat = [own[0] if tensor is None else tensor for own in tensors for tensor in own]
    args = flat, options[1], plan, stream_of(device)
    return OPERATORS.layer.default(x, saved, rates, *args)


def fire(x, rate, constants, bytes_too=False):
    """[spikes of x [T, ...] of any shape]; behind it the same as bytes, if they are wanted. rate:
    PLIF's, one number.
    """
    T, x = len(x), shown_once(x)
    device, size = x.get_device(), x[0].numel()
    # Rows begin at multiples of it in memory: a GPU loads several channels at such places alone.
    channels = math.gcd(size, x.storage_offset(), 1024)
    plan = plan_of_neuron(constants, x.dtype, T, size, channels, device)
    return OPERATORS.fire.default(x, rate, bytes_too, plan, stream_of(device))


def product(a, b, saved_a, saved_b, matmul, by_events=False):
    """a @ b or, without `matmul`, a * b; the backward pass reads saved_a and saved_b, which may be
    bytes. by_events: on a CPU, what is 0 in a takes no time.
    """
    function = events_library(a.dtype).multiply if by_events else None
    address = ctypes.cast(function, ctypes.c_void_p).value or 0
    return OPERATORS.product.default(a, b, saved_a, saved_b, matmul, address)
