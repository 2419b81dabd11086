"""The kernels of fused.cu and the sums of events.cpp, each called from Python, as layer.cpp calls
them: for tests of a kernel alone.

Tensors are rows of C channels in memory: [N, C, H, W] in channels_last, [N, C], or a neuron's
[T, B, C, H, W] with channels innermost. `norm` and `rates`: see layer.cpp.
"""

import ctypes

import torch

from conftest import load

compiler, native = load("cifar10").compiler, load("cifar10").native
constants_of, rate_of = native.constants_of, load("cifar10").plain.rate_of


def real(y):
    return torch.float64 if y.dtype == torch.float64 else torch.float32


def in_c(y, args):
    number = ctypes.c_double if y.dtype == torch.float64 else ctypes.c_float
    return [
        ctypes.c_longlong(arg)
        if isinstance(arg, int)
        else number(arg)
        if isinstance(arg, float)
        else pointer(arg)
        for arg in args
    ]


def launch(name, y, *args, T=1, neuron=compiler.NO_NEURON):
    """Run a kernel for tensors of y's type and device; rows and channels, or channels alone, are
    the first of its arguments.
    """
    if not compiler.on_gpu(y.get_device()):
        build = compiler.Build(y.dtype, T, neuron)
        return getattr(compiler.host_library(build), name)(*in_c(y, args))
    launch_cuda(name, y, args, T, neuron)


def launch_cuda(name, y, args, T, neuron):
    device, large = y.get_device(), y.numel() * T >= 2**30
    rows = args[:2] if name not in compiler.OF_COLUMNS else (1, args[0])
    address, grid, block = compiler.kernel_at(name, y.dtype, T, neuron, *rows, large, device)
    values = in_c(y, args)  # a kernel reads as many bytes of each as its parameter has
    places = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    pointers = [ctypes.c_void_p] * 3
    kind = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, *pointers)
    how = (*grid, 1, *block, 1, 0, native.stream_of(device), ctypes.addressof(places), None)
    assert kind(compiler.driver())(address, *how) == 0


def parts(y, rows, channels, T=1):
    """How many partial sums a kernel makes of each channel."""
    if not compiler.on_gpu(y.get_device()):
        return compiler.HOST_PARTS
    return compiler.tiling(y.element_size(), rows, channels, T)[2][1]


def rates_of(lif, x, channels):
    """PLIF's rate for each channel, in the type that the kernels compute in; None for others."""
    return rate_of(x, lif.w).expand(channels).contiguous() if lif.kind == "plif" else None


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def rows(x):
    """[T, B, C, H, W] or [N, C, H, W] -> [N, C, H, W] in channels_last; copied only if need be."""
    return channels_last(x.flatten(0, -4))


def strides_of(shape):
    """Of [T, B, C, H, W] with channels innermost."""
    _, B, C, H, W = shape
    return B * H * W * C, H * W * C, 1, W * C, C


def empty(shape, like, dtype=None):
    """Memory for [T, B, C, H, W], channels innermost; not a view, so that spikes can be marked."""
    return like.new_empty_strided(shape, strides_of(shape), dtype=dtype)


def rows_and_channels(y):
    """(rows, channels)"""
    return y.numel() // y.shape[1], y.shape[1]


# Neurons ------------------------------------------------------------------------------------------


def fire(y, shape, norm, rates, neuron, rate, v_threshold, bytes_too):
    """Spikes [T, B, C, H, W], of such a shape, of neurons whose input is scale * y + shift. y has
    the rows of T steps, or of one, which is read T times.

    With `bytes_too` the spikes again, as bytes, in place of an empty tensor.
    """
    T, B, C, H, W = shape
    spikes, rows = empty(shape, y), B * H * W
    small = empty(shape, y, torch.uint8) if bytes_too else y.new_empty(0, dtype=torch.uint8)
    step = rows * C if y.numel() == spikes.numel() else 0
    args = (y, spikes, small if bytes_too else None, norm, rates, rate, v_threshold)
    launch("fire", y, rows, C, step, *args, T=T, neuron=neuron)
    return spikes, small


def fire_(y, T, norm, rates, neuron, rate, v_threshold):
    """As `fire`, but the spikes overwrite y, which has all T steps."""
    rows, C = rows_and_channels(y)
    args = (y, y, None, norm, rates, rate, v_threshold)
    launch("fire", y, rows // T, C, rows // T * C, *args, T=T, neuron=neuron)


def fire_backward(grad_spikes, y, grad, norm, rates, neuron, rate, v_threshold, alpha):
    """Writes the gradient of scale * y + shift into grad, which is like y.

    Returns [parts, 2, C], whose sums over parts are those of that gradient and of its product with
    y - mean; with `rates` [parts, 3, C], the last for their gradient.
    """
    T, C = len(grad_spikes), y.shape[1]
    if grad_spikes.stride() != strides_of(grad_spikes.shape):
        grad_spikes = rows(grad_spikes)
    count = grad_spikes.numel() // (T * C)
    partial = norm.new_empty(parts(y, count, C, T), 2 if rates is None else 3, C)
    step = count * C if y.numel() == grad_spikes.numel() else 0
    args = (y, grad_spikes, grad, norm, rates, rate, v_threshold, alpha, partial)
    launch("fire_backward", y, count, C, len(partial), step, *args, T=T, neuron=neuron)
    return partial


def kernel_lif(
    x, tau, v_threshold, alpha=4.0, kind="lif", w=None, surrogate="sigmoid", bytes_too=False
):
    """[spikes of x [T, ...]] by layer.cpp; behind it the same as bytes, if they are wanted."""
    constants = constants_of(tau, v_threshold, alpha, kind, w, surrogate)
    return native.fire(x, rate_of(x, w), constants, bytes_too)


# BatchNorm ----------------------------------------------------------------------------------------


def statistics(y):
    """The sums that batch_norm needs of y's rows, in parts."""
    rows, C = rows_and_channels(y)
    partial = y.new_empty(parts(y, rows, C), 2, C, dtype=real(y))
    launch("statistics", y, rows, C, len(partial), y, partial)
    return partial


def batch_norm(
    y, partial, norm, start, repeats, eps, momentum, gamma, beta, bias, mean, var, batches
):
    """Writes `norm` of a BatchNorm, whose channels begin at `start` of those of y, each row of
    which counts `repeats` times. Its running statistics, if there are any, move on; the bias is the
    convolution's, which y lacks.
    """
    rows, C = rows_and_channels(y)
    sizes = (gamma.shape[0], C, start, len(partial), rows, repeats, eps, momentum)
    launch("batch_norm", y, *sizes, y, partial, gamma, beta, bias, norm, mean, var, batches)


def running_norm(norm, start, mean, var, bias, gamma, beta, eps):
    """Writes scale and shift of a BatchNorm's running statistics into `norm`, in which its channels
    begin at `start`. The bias is the convolution's, which y lacks.
    """
    args = (start, eps, mean, var, bias, gamma, beta, norm)
    launch("running_norm", norm, mean.shape[0], norm.shape[1], *args)


def batch_norm_backward(partial, norm, rows):
    """`sums` from the partial sums of y's rows: [7, C], gradients of beta, gamma and `rates`, three
    rows that normalise_backward and pool_backward need, and zeros.
    """
    count, kinds, C = partial.shape
    sums = norm.new_empty(7, C)
    launch("batch_norm_backward", norm, C, count, kinds, rows, partial, norm, sums)
    return sums


def gradient_sums(grad, y, norm):
    """As fire_backward returns, for a BatchNorm without a neuron behind it."""
    rows, C = rows_and_channels(y)
    partial = norm.new_empty(parts(y, rows, C), 2, C)
    args = (y, grad, grad, norm, None, 1.0, 1.0, 1.0, partial)
    launch("fire_backward", y, rows, C, len(partial), rows * C, *args)
    return partial


def normalise(y, norm):
    """scale * y + shift."""
    out, (rows, C) = torch.empty_like(y), rows_and_channels(y)
    launch("fire", y, rows, C, rows * C, y, out, None, norm, None, 1.0, 1.0)
    return out


def normalise_backward(grad, y, out, sums):
    """Writes the gradient of BatchNorm's input y into out, which may be grad, the gradient of its
    output.
    """
    launch("normalise_backward", y, *rows_and_channels(y), y, grad, out, sums)


# Max-pooling --------------------------------------------------------------------------------------


def pool(y, norm, with_taps):
    """What of y, [N, C, H, W], a 3x3 max-pool of stride 2 behind its BatchNorm would take: where
    the scale in `norm` is negative, minima.

    Returns these values and, empty but `with_taps`, for each which of the nine places it came from,
    as a byte.
    """
    N, C, H, W = y.shape
    pooled = y.new_empty(N, (H + 1) // 2, (W + 1) // 2, C).permute(0, 3, 1, 2)
    taps = torch.empty_like(pooled if with_taps else y[:0], dtype=torch.uint8)
    args = (y, norm, pooled, taps if with_taps else None)
    launch("pool", y, *rows_and_channels(pooled), H, W, *args)
    return pooled, taps


def pool_backward(grad, taps, y, sums):
    """The gradient of y where a max-pool comes before BatchNorm; `grad` is of pooled values."""
    grad_y = torch.empty_like(y)
    launch("pool_backward", y, *rows_and_channels(y), *y.shape[2:], y, grad, taps, grad_y, sums)
    return grad_y


def every_kernel(y, shape):
    """Launches all kernels of a layer with a max-pool, and of one without, for y [T*B, C, H, W] in
    channels_last, whose spikes have this shape.
    """
    C = y.shape[1]
    row, norm = torch.rand(C, dtype=real(y), device=y.device), y.new_empty(5, C, dtype=real(y))
    neuron, alpha = (None, "MULTIPLY sigmoid", 0.5, 1.0), 4.0
    batches = torch.zeros((), dtype=torch.long, device=y.device)
    running_norm(norm, 0, row, row, None, row, row, 1e-5)
    batch_norm(y, statistics(y), norm, 0, 1, 1e-5, 0.1, row, row, None, row, row, batches)
    spikes, grad = fire(y, shape, norm, *neuron, True)[0], torch.empty_like(y)
    partial = fire_backward(spikes, y, grad, norm, *neuron, alpha)
    sums = batch_norm_backward(partial, norm, y.numel() // C)
    normalise_backward(grad, y, grad, sums)
    pooled, taps = pool(y, norm, True)
    pool_backward(pooled, taps, y, sums)


# Convolutions of spikes on a CPU ------------------------------------------------------------------


def events_library(dtype):
    library = compiler.events_library(dtype)
    library.find.restype = ctypes.c_long
    return library


def find(x, dtype):
    """(bits of the places of x that are not 0, share of these, x's values or None if all are 1).

    dtype: the weight's, and x's where x is no bytes.
    """
    N, C, H, W = x.shape
    bits = torch.empty(N * H, -(-W * C // 64), dtype=torch.int64)
    count = events_library(dtype).find(*numbers(N * H, W * C), *values_of(x), pointer(bits))
    return bits, abs(count) / x.numel(), x if count < 0 else None


def convolve(x, weight, stride, padding):
    """[N, C, H, W] -> [N, C', H', W'], both in channels_last."""
    if x.dtype not in (weight.dtype, torch.uint8):
        raise ValueError(f"the input is {x.dtype}, but the weight {weight.dtype}")
    weight = weight.contiguous(memory_format=torch.channels_last)
    shape, (N, *_, height, width, channels) = geometry(x.shape, weight, stride, padding)
    y = weight.new_empty(N, height, width, channels)
    args = *values_of(x), pointer(weight), pointer(y), *numbers(torch.get_num_threads())
    events_library(weight.dtype).convolve(shape, *args)
    return y.permute(0, 3, 1, 2)


def unpack(shape, bits, values, dtype):
    """The x, [N, C, H, W] of this shape, that `find` has seen: its values or, from bits, bytes."""
    if values is not None:
        return values
    N, C, H, W = shape
    x = torch.empty(N, H, W, C, dtype=torch.uint8)
    events_library(dtype).unpack(*numbers(N * H, W * C), pointer(bits), pointer(x))
    return x.permute(0, 3, 1, 2)


def weight_gradient(x_shape, bits, values, grad, weight, stride, padding):
    """The weight's gradient, in channels_last; `grad`, in channels_last, is that of the output."""
    shape, _ = geometry(x_shape, weight, stride, padding)
    out = torch.empty_like(weight, memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    args = (pointer(bits), *values_of(values), pointer(grad), pointer(out), *numbers(threads))
    events_library(weight.dtype).weight_gradient(shape, *args)
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
