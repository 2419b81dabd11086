"""Convolutions of spikes on a CPU, whose time falls with the firing rate; events.cpp says how.

Inputs are [N, C, H, W] in channels_last, of the weight's type or whole numbers as bytes.
"""

import ctypes
import functools
from pathlib import Path

import torch

from .compiler import HOST_CTYPES, HOST_OPTIONS, build_library, first_line, say

SOURCE = Path(__file__).with_name("events.cpp").read_text()
DTYPES = (torch.float32, torch.float64)
# Above this share of inputs that are not 0 the dense gradient of the weight takes less time.
DENSE = 0.4


@functools.cache
def library(dtype):
    options = [*HOST_OPTIONS, "-O2", "-ffp-contract=fast", f"-Dscalar_t={HOST_CTYPES[dtype]}"]
    found = build_library(SOURCE, *options)
    found.find.restype = ctypes.c_long
    return found


@torch.compiler.assume_constant_result
@functools.cache
def available(device_type, dtype):
    """Whether convolutions of such tensors can be sums of events; logged once if they can't."""
    if device_type != "cpu" or dtype not in DTYPES:
        return False
    try:
        library(dtype)
    except (OSError, ValueError) as error:  # ValueError: of shlex
        say(f"convolutions of spikes are dense: {first_line(error)}")
        return False
    return True


def find(x, dtype):
    """(bits of the places of x that are not 0, share of these, x's values or None if all are 1).

    dtype: the weight's, and x's where x is no bytes.
    """
    N, C, H, W = x.shape
    bits = torch.empty(N * H, -(-W * C // 64), dtype=torch.int64)
    count = library(dtype).find(*numbers(N * H, W * C), *values_of(x), pointer(bits))
    return bits, abs(count) / x.numel(), x if count < 0 else None


def convolve(x_shape, bits, values, weight, stride, padding):
    """[N, C, H, W] of an input that `find` has seen -> [N, C', H', W'], both channels_last."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    shape, (N, *_, height, width, channels) = geometry(x_shape, weight, stride, padding)
    y = weight.new_empty(N, height, width, channels)
    args = (pointer(bits), *values_of(values), pointer(weight), pointer(y))
    library(weight.dtype).convolve(shape, *args)
    return y.permute(0, 3, 1, 2)


def weight_gradient(x_shape, bits, values, grad, weight, stride, padding):
    """The weight's gradient, in channels_last; `grad`, in channels_last, is that of the output."""
    shape, _ = geometry(x_shape, weight, stride, padding)
    out = torch.empty_like(weight, memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    args = (pointer(bits), *values_of(values), pointer(grad), pointer(out), *numbers(threads))
    library(weight.dtype).weight_gradient(shape, *args)
    return out


def geometry(x_shape, weight, stride, padding):
    (N, C, H, W), (channels, _, *kernel) = x_shape, weight.shape
    out = [
        (size + 2 * pad - k) // step + 1
        for size, pad, k, step in zip((H, W), padding, kernel, stride, strict=True)
    ]
    sizes = (N, H, W, C, *out, channels)
    return (ctypes.c_long * 13)(*sizes, *kernel, *stride, *padding), sizes


def numbers(*values):
    return map(ctypes.c_long, values)


def pointer(x):
    return ctypes.c_void_p(0 if x is None else x.data_ptr())


def values_of(x):
    return pointer(x), ctypes.c_bool(x is not None and x.dtype == torch.uint8)
