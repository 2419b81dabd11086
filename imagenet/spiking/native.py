"""Layers, neurons and products on a GPU in one call each, so that it does not wait for Python.

layer.cpp, in the words of PyTorch's C++, does the same as layer.py, neuron.py and spikes.py, by the
same kernels. The compiler takes some twenty seconds for it, once: the library is kept among
PyTorch's extensions, in TORCH_EXTENSIONS_DIR or ~/.cache/torch_extensions; their own loader,
torch.utils.cpp_extension, would need ninja. Where it can't be built, Python calls each kernel.
"""

import ctypes
import functools
import hashlib
import math
import os
import tempfile
from pathlib import Path

import torch

from . import compiler
from .compiler import compile_to, first_line, is_called_as_operator, kernel_at, say
from .ops import CHUNK, channels_in_time

SOURCE = Path(__file__).with_name("layer.cpp").read_text()
ROOT = Path(torch.__file__).parent
OPTIONS = ["-O1", "-std=c++20", "-w", f"-I{ROOT}/include"]
OPTIONS += [f"-I{ROOT}/include/torch/csrc/api/include", f"-L{ROOT}/lib", "-lc10", "-ltorch_cpu"]
OPTIONS += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
# Of the library and its operators; folders whose layers are equal share them.
NAME = hashlib.sha256(f"{SOURCE}{torch.__version__}{OPTIONS}".encode()).hexdigest()
NAME = f"qkformer_{NAME[:16]}"

# The kernels, in the order of layer.cpp.
NAMES = ("statistics", "batch_norm", "running_norm", "pool", "fire", "normalise", "fire_backward")
NAMES += ("gradient_sums", "batch_norm_backward", "pool_backward", "normalise_backward")
NAMES += ("integrate", "integrate_backward")

# Plans that are kept: a schedule of alpha or of a momentum makes new ones in each step, of some
# kilobytes. A backward pass, which has the address alone, comes long before so many others.
PLANS = 2**14


class Kernel(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("grid", ctypes.c_uint * 2)]
    _fields_ += [("block", ctypes.c_uint * 2)]


class Plan(ctypes.Structure):
    """What layer.cpp needs besides tensors, as it declares it."""

    _fields_ = [("driver", ctypes.c_void_p), ("kernels", Kernel * len(NAMES))]
    _fields_ += [("channels", ctypes.POINTER(ctypes.c_longlong))]
    _fields_ += [("momenta", ctypes.POINTER(ctypes.c_double))]
    numbers = "layers has_bias training product pool fires small T columns".split()
    _fields_ += [(name, ctypes.c_longlong) for name in numbers]
    _fields_ += [(name, ctypes.c_longlong * 2) for name in ("stride", "padding")]
    _fields_ += [(name, ctypes.c_double) for name in ("eps", "rate", "threshold", "alpha")]

    def __init__(self, neuron, kernels):
        """kernels: {name: arguments of kernel_at behind it}"""
        super().__init__(ctypes.cast(compiler.driver(), ctypes.c_void_p))
        self.rate, self.threshold, self.alpha = neuron[1:]
        for name, args in kernels.items():
            kernel = self.kernels[NAMES.index(name)]
            kernel.address, kernel.grid[:], kernel.block[:] = kernel_at(name, *args)


@functools.lru_cache(PLANS)
def plan_of(options, x_shape, weights, device):
    """The Plan of layers that read such an x, with its address.

    options: see layer.Options. weights: shapes.
    """
    layer, (steps, B, _, *size) = options.layer, x_shape
    channels = [shape[0] for shape in weights]
    C, kernel = sum(channels), (1, 1) if layer.tokens else weights[0][2:]
    spaces = zip(size, layer.padding, kernel, layer.stride, strict=True)
    size = [(length + 2 * pad - k) // step + 1 for length, pad, k, step in spaces]
    rows = steps * B * math.prod(size)
    if layer.training and rows * options.T == steps:
        raise ValueError(f"a single value per channel, in {[steps * B, C, *size]}, has no variance")
    size = [(length + 1) // 2 for length in size] if options.pool else size
    fired, large = B * math.prod(size), rows * C * options.T >= 2**30

    def args(rows, T=1, neuron="MULTIPLY sigmoid", dtype=options.dtype):
        return dtype, T, neuron, rows, C, large, device

    kernels = dict.fromkeys(NAMES[:-2], args(rows))
    kernels |= dict.fromkeys(("pool", "normalise", "gradient_sums"), args(steps * fired))
    of_neuron = args(fired, options.T, layer.neuron.neuron)
    kernels |= dict.fromkeys(("fire", "fire_backward"), of_neuron)
    of_norm = args(rows, dtype=torch.float32)
    kernels |= dict.fromkeys(("running_norm", "batch_norm_backward"), of_norm)
    plan = Plan(layer.neuron, kernels)
    plan.channels = (ctypes.c_longlong * len(channels))(*channels)
    plan.momenta = (ctypes.c_double * len(channels))(*options.momenta)
    plan.layers, plan.columns = len(channels), compiler.COLUMNS[0]
    for name in ("has_bias", "training", "small", "eps", "stride", "padding"):
        setattr(plan, name, getattr(layer, name))
    for name in ("product", "pool", "fires", "T"):
        setattr(plan, name, getattr(options, name))
    return plan, ctypes.addressof(plan)


@functools.lru_cache(PLANS)
def plan_of_neuron(constants, dtype, steps, size, channels, device):
    """The Plan of `size` neurons, with its address. channels: of them in a row for the kernels."""
    large = steps * size * CHUNK >= 2**30
    args = dtype, CHUNK, constants.neuron, size // channels, channels, large, device
    plan = Plan(constants, dict.fromkeys(("integrate", "integrate_backward"), args))
    return plan, ctypes.addressof(plan)


@functools.cache
def error():
    """None where the compiler builds layer.cpp and PyTorch loads it, else why not, in one line."""
    try:
        cache = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions"
        path = Path(cache, f"{NAME}.so")
        if not path.exists():
            say("compiling layers for the GPU, once: about 20 s")
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # other ranks do the same
                part = Path(folder, path.name)
                compile_to(part, SOURCE, *OPTIONS, f"-DNAMESPACE={NAME}")
                part.replace(path)
        torch.ops.load_library(path)
    except (OSError, ValueError, RuntimeError) as failure:  # RuntimeError: there is no home
        return first_line(failure)
    return None


def takes(x):
    """Whether x is for the functions below: on a GPU, unless something looks at operators."""
    if not x.is_cuda or is_called_as_operator():
        return False
    if (reason := error()) is not None:
        say(f"Python calls each kernel on the GPU, which takes the host longer: {reason}")
        return False
    return x.get_device() == torch.cuda.current_device()


@functools.cache
def operators():
    return getattr(torch.ops, NAME)


def stream_of(device):
    return torch._C._cuda_getCurrentRawStream(device)


def layer(x, saved, rates, options, tensors):
    """[as ConvBNLIF.apply(x, rates, options, *tensors) or, in evaluation, fused_layers]; behind it
    spikes as bytes, where x is `saved` for the backward pass.
    """
    device, weights = x.get_device(), tuple([own[0].shape for own in tensors])
    _, plan = plan_of(options, x.shape, weights, device)
    flat = [own[0] if tensor is None else tensor for own in tensors for tensor in own]
    args = flat, options.dtype, plan, stream_of(device)
    return operators().layer.default(x, saved, rates, *args)


def neuron(x, rate, constants):
    """Neuron.apply(x, rate, constants)"""
    device, steps, channels = x.get_device(), len(x), channels_in_time(x)
    size = x.numel() // steps
    _, plan = plan_of_neuron(constants, x.dtype, steps, size, channels, device)
    return operators().neuron.default(x, rate, channels, plan, stream_of(device))


def product(operator, a, b, saved_a, saved_b):
    """Product.apply(operator, a, b); in the place of a and b `saved_a` and `saved_b` are saved."""
    return operators().product.default(a, b, saved_a, saved_b, operator is torch.matmul)
