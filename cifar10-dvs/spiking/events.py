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
    options = [*HOST_OPTIONS, "-ffp-contract=fast", f"-Dscalar_t={HOST_CTYPES[dtype]}"]
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


def convolve(x, weight, stride, padding):
    """[N, C, H, W] -> [N, C', H', W'], both in channels_last."""
    if x.dtype not in (weight.dtype, torch.uint8):
        raise ValueError(f"the input is {x.dtype}, but the weight {weight.dtype}")
    weight = weight.contiguous(memory_format=torch.channels_last)
    shape, (N, *_, height, width, channels) = geometry(x.shape, weight, stride, padding)
    y = weight.new_empty(N, height, width, channels)
    args = *values_of(x), pointer(weight), pointer(y), *numbers(torch.get_num_threads())
    library(weight.dtype).convolve(shape, *args)
    return y.permute(0, 3, 1, 2)


def unpack(shape, bits, values, dtype):
    """The x, [N, C, H, W] of this shape, that `find` has seen: its values or, from bits, bytes."""
    if values is not None:
        return values
    N, C, H, W = shape
    x = torch.empty(N, H, W, C, dtype=torch.uint8)
    library(dtype).unpack(*numbers(N * H, W * C), pointer(bits), pointer(x))
    return x.permute(0, 3, 1, 2)


def weight_gradient(x_shape, bits, values, grad, weight, stride, padding):
    """The weight's gradient, in channels_last; `grad`, in channels_last, is that of the output."""
    shape, _ = geometry(x_shape, weight, stride, padding)
    out = torch.empty_like(weight, memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    args = (pointer(bits), *values_of(values), pointer(grad), pointer(out), *numbers(threads))
    library(weight.dtype).weight_gradient(shape, *args)
    return out


def product(a, b):
    """a @ b of [T, B, heads, rows, depth] and [T, B, heads, depth, columns], in float32 or float64.

    A row's sums do not depend on the others.
    """
    if 1 not in a.stride()[3:]:
        a = a.contiguous()
    b = b if b.stride(4) == 1 else b.contiguous()
    T, B, heads, rows, columns = (*a.shape[:4], b.shape[4])
    out = a.new_empty(T, B, rows, heads, columns).transpose(2, 3)
    sizes = (T, B, heads, rows, a.shape[4], columns, *a.stride(), *b.stride(), *out.stride())
    args = (ctypes.c_long * len(sizes))(*sizes), *map(pointer, (a, b, out))
    library(a.dtype).multiply(*args)
    return out


def geometry(x_shape, weight, stride, padding):
    (N, C, H, W), (channels, _, *kernel) = x_shape, weight.shape
    out = [
        (size + 2 * pad - k) // step + 1
        for size, pad, k, step in zip((H, W), padding, kernel, stride, strict=True)
    ]
    if min(out) < 1:
        raise ValueError(f"a kernel of {list(kernel)} does not fit in an input of {[H, W]}")
    sizes = (N, H, W, C, *out, channels)
    return (ctypes.c_long * 13)(*sizes, *kernel, *stride, *padding), sizes


def numbers(*values):
    return map(ctypes.c_long, values)


def pointer(x):
    return ctypes.c_void_p(0 if x is None else x.data_ptr())


def values_of(x):
    return pointer(x), ctypes.c_bool(x is not None and x.dtype == torch.uint8)
