"""How long the host takes for a training step and for an inference, told without a GPU.

Usage:
    python tools/host.py                    # HST-10-384, narrow, one core; about a minute
    python tools/host.py --model MSQKFormer_10_384 --rounds 200

On a GPU the host prepares each kernel while the one before runs. Here it prepares as much, and
nothing runs: what takes the GPU's time (convolutions, products, our kernels, AdamW's) is an empty
call, and tensors are small. A pass of other operators over a few values remains; the driver's time
for a launch, some 2 us, does not. Steps are in bfloat16 autocast. Paths take turns:

    fast      layers, neurons and products by spiking/layer.cpp
    plain     module by module as in the release, with a CuPy neuron
"""

import argparse
import ctypes
import gc
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from models import IMAGENET, entry, load

EMPTY = """
#include <ATen/ATen.h>
#include <torch/library.h>
using namespace at;
Tensor empty_convolution(const Tensor& x, const Tensor& w, const std::optional<Tensor>&,
                         IntArrayRef step, IntArrayRef pad, IntArrayRef, bool, IntArrayRef,
                         int64_t) {
    auto sizes = x.sizes().vec();
    sizes[1] = w.size(0);
    for (size_t i = 2; i < sizes.size(); ++i)
        sizes[i] = (sizes[i] + 2 * pad[i - 2] - w.size(i)) / step[i - 2] + 1;
    return empty(sizes, x.options().memory_format(x.suggest_memory_format()));
}
std::tuple<Tensor, Tensor, Tensor> empty_backward(
    const Tensor&, const Tensor& x, const Tensor& w, OptionalIntArrayRef, IntArrayRef, IntArrayRef,
    IntArrayRef, bool, IntArrayRef, int64_t, std::array<bool, 3> wanted) {
    return {wanted[0] ? empty_like(x) : Tensor(), wanted[1] ? empty_like(w) : Tensor(),
            wanted[2] ? empty({w.size(0)}, w.options()) : Tensor()};
}
Tensor empty_mm(const Tensor& a, const Tensor& b) {
    return empty({a.size(0), b.size(1)}, a.options());
}
Tensor empty_bmm(const Tensor& a, const Tensor& b) {
    return empty({a.size(0), a.size(1), b.size(2)}, a.options());
}
void empty_count(TensorList, const Scalar&) {}
void empty_adamw(TensorList, TensorList, TensorList, TensorList, TensorList, TensorList, double,
                 double, double, double, double, bool, bool, const std::optional<Tensor>&,
                 const std::optional<Tensor>&) {}
TORCH_LIBRARY_IMPL(aten, CPU, m) {
    m.impl("convolution", empty_convolution), m.impl("convolution_backward", empty_backward);
    m.impl("mm", empty_mm), m.impl("bmm", empty_bmm);
    m.impl("_foreach_add_.Scalar", empty_count), m.impl("_fused_adamw_", empty_adamw);
}
extern "C" int launch(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                      void*, void**, void**) { return 0; }
"""
PATHS = ("fast", "plain")
POINTER, NUMBER = ctypes.c_void_p, ctypes.c_uint
KIND = ctypes.PYFUNCTYPE(ctypes.c_int, POINTER, *[NUMBER] * 7, *[POINTER] * 3)


class Neuron(torch.autograd.Function):
    """A kernel of CuPy's that Python launches, forward and backward, as the release has it."""

    driver = None  # cuLaunchKernel

    @staticmethod
    def launch(*args):
        values = [
            POINTER(arg.data_ptr()) if torch.is_tensor(arg) else ctypes.c_int(arg) for arg in args
        ]
        places = (POINTER * len(values))(*map(ctypes.addressof, values))
        with torch.cuda.device(-1):
            Neuron.driver(1, 1, 1, 1, 256, 1, 1, 0, None, ctypes.addressof(places), None)

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        spikes, membranes = torch.empty_like(x), torch.empty_like(x)
        Neuron.launch(x, spikes, membranes, len(x), x[0].numel())
        ctx.save_for_backward(membranes)
        return spikes

    @staticmethod
    def backward(ctx, grad):
        (membranes,) = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), torch.empty_like(grad)
        Neuron.launch(grad, membranes, grad_x, len(grad), grad[0].numel())
        return grad_x


def pretend(modules):
    """The folder's modules take the CPU for a GPU on which nothing has to run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "empty.so")
        modules.compiler.compile_to(path, EMPTY, *modules.compiler.LAYER_OPTIONS)
        torch.ops.load_library(path)
        driver = ctypes.cast(ctypes.PyDLL(path).launch, POINTER).value
    Neuron.driver = KIND(driver)
    compiler = modules.compiler

    for module, name, value in (
        (compiler, "driver", lambda: driver),
        (compiler, "address_of", lambda name, build, device: 1),
        (compiler, "on_gpu", lambda device: True),
        (modules.fusible, "available", lambda *args: True),
        (modules.layer, "events_available", lambda *args: False),
        (modules.spikes, "events_available", lambda *args: False),
        (modules.native, "available", lambda *args: True),
        (torch._C, "_cuda_getCurrentRawStream", lambda device: 0),
        (modules.neuron, "torch_lif", lambda x, *constants: Neuron.apply(x)),
    ):
        setattr(module, name, value)


def measure(modules, name, rounds):
    """{"step" or "inference": {path: [seconds, ...]}}"""
    make, x = entry(name, modules), torch.randn(1, 3, 32, 32)
    models, optimizers = {}, {}
    for path in PATHS:
        options = {"fused": False, "backend": "torch"} if path == "plain" else {}
        models[path] = make(embed_dims=48, num_classes=10, **options)
        optimizers[path] = torch.optim.AdamW(models[path].parameters(), fused=True)

    def step(path):
        with torch.autocast("cpu", torch.bfloat16):
            logits = models[path](x)
        logits.float().sum().backward()
        optimizers[path].step()
        optimizers[path].zero_grad()

    def inference(path):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            models[path](x)

    times = {}
    for kind in (step, inference):
        found = times[kind.__name__] = {path: [] for path in PATHS}
        for path in PATHS:
            models[path].train(kind is step)
        gc.collect()
        gc.disable()  # it would stop one path for what the other has left
        for number in range(rounds + 3):
            for path in PATHS:
                start = time.perf_counter()
                kind(path)
                seconds = time.perf_counter() - start
                if number >= 3:
                    found[path].append(seconds)
        gc.enable()
    return times


def main(args=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="\n".join(__doc__.splitlines()[1:])
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", choices=IMAGENET, default="QKFormer_10_384", metavar="NAME")
    parser.add_argument("--rounds", type=int, default=150)
    args = parser.parse_args(args)
    torch.set_num_threads(1)
    modules = load("imagenet")
    if error := modules.compiler.fault(modules.compiler.load_layers):
        print(error, file=sys.stderr)
        return 1
    pretend(modules)
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread,",
        end=" ",
    )
    print(f"{args.model}, {args.rounds} rounds: least and median ms, ratio of the least to plain's")
    for kind, found in measure(modules, args.model, args.rounds).items():
        for path in PATHS:
            least, median = 1000 * min(found[path]), 1000 * statistics.median(found[path])
            ratio = min(found[path]) / min(found["plain"])
            print(f"{kind:10} {path:7} {least:7.2f} {median:7.2f} {ratio:6.2f}x", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
