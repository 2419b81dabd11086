"""Training steps on a GPU that is not there: PyTorch's fake tensors, which have all but values, on
a device "cuda", and a CuPy that writes down what it is asked to launch. No memory is used, so any
batch fits, and nothing is computed.

    with fakecuda.Machine(folder's modules) as machine:
        machine.move(model)
        loss = model(machine.randn(32, 3, 224, 224)).sum()
        fakecuda.backward(loss)
    machine.events                                    # [Launch or Operation, ...]

It finds tensors and operators on the wrong device, kernels that are called wrongly, copies into
another layout and layers that run module by module; no value. PyTorch's CUDA build is needed, though no driver. Its engine for the backward pass asks the driver
for streams, so `backward` walks the graph itself.
"""

import contextlib
import ctypes
import functools
import itertools
import re
import sys
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

# PyTorch's CUDA build, of a version that knows how to do without a driver.
POSSIBLE = torch.version.cuda is not None and hasattr(torch._C, "_ensureCUDADeviceGuardSet")


class Pointer(int):
    """The address of a fake tensor, with the tensor."""


class Launch(NamedTuple):
    """A kernel that would have run, and how it was called; arguments as numbers and Pointers."""

    name: str
    module: "Module"
    grid: tuple
    block: tuple
    args: tuple


def parameters_of(module, name):
    """[(type, name, whether it is a pointer), ...] of a kernel, as the source has them; typedefs
    and -D are resolved.
    """
    (parameters,) = re.findall(rf"ENTRY\s+{name}\(([^)]*)\)\s*\{{", module.code)
    typedefs = re.findall(r"typedef ([\w ]+) (\w+);", module.code)
    known = {short: long for long, short in typedefs} | module.defines
    found = []
    for parameter in parameters.split(","):
        words = parameter.replace("const ", "").replace("__restrict__ ", "")
        kind, own_name = re.fullmatch(r"\s*([\w ]+?\*?)\s+(\w+)\s*", words).groups()
        plain = kind.rstrip("*")
        while plain in known:
            plain = known[plain]
        found.append((plain, own_name, kind.endswith("*")))
    return found


CTYPES = {"int": "c_int", "long long": "c_longlong", "float": "c_float", "double": "c_double"}


class Operation(NamedTuple):
    """An operator of PyTorch that ran."""

    operator: object
    args: tuple
    kwargs: dict
    result: object


class Module:
    """In the place of cupy.RawModule: source, options and what of them are definitions."""

    def __init__(self, machine, code, options):
        self.machine, self.code, self.options = machine, code, options
        words = (re.fullmatch(r"-D(\w+)=(.*)", option) for option in options)
        self.defines = dict(word.groups() for word in words if word)

    def compile(self):
        pass

    def get_function(self, name):
        """A kernel whose address is its place among the machine's."""
        self.machine.kernels.append((name, self))
        return SimpleNamespace(kernel=SimpleNamespace(ptr=len(self.machine.kernels) - 1))


class Fake(FakeTensorMode):
    """Writes down PyTorch's operators, and those within our own; not what they are made of."""

    counts_kernels = True  # layers may go on running fused

    def __init__(self, events):
        super().__init__()
        self.events, self.within = events, False

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        ours = operator.namespace.startswith("qkformer_")
        if self.within or ours or operator.namespace == "prim":
            return self.answer(operator, types, args, kwargs or {})
        if composed(operator):
            with self:
                return operator.decompose(*args, **(kwargs or {}))
        self.within = True
        try:
            result = self.answer(operator, types, args, kwargs or {})
        finally:
            self.within = False
        self.events.append(Operation(operator, args, kwargs or {}, result))
        return result

    def answer(self, operator, types, args, kwargs):
        if operator is torch.ops.aten.batch_norm_update_stats.default:  # PyTorch has no fake of it
            with self:
                return tuple(args[1].new_empty(args[1].shape) for _ in range(2))
        result = super().__torch_dispatch__(operator, types, args, kwargs)
        if operator in CONVOLUTIONS:
            with self:
                return tree_map(lambda x: as_cudnn(x, args), result)
        return result


CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


def as_cudnn(result, args):
    """cuDNN answers in channels_last if an image or a weight is so. PyTorch's fake knows that too,
    but for bfloat16 it asks for a GPU.
    """
    if not torch.is_tensor(result) or result.dim() != 4:
        return result
    tensors = [x for x in args if torch.is_tensor(x) and x.dim() == 4]
    if any(x.is_contiguous(memory_format=torch.channels_last) for x in tensors):
        return result.contiguous(memory_format=torch.channels_last)
    return result


@functools.cache
def composed(operator):
    """Whether an operator only calls others, as conv2d does where no gradient is asked for."""
    key = "CompositeImplicitAutograd"
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), key)


class Nothing:
    """In the place of CuPy's devices and streams, which are contexts."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class Machine(contextlib.ExitStack):
    """Context in which a folder's modules find a GPU with CuPy; its tensors are fake."""

    def __init__(self, modules):
        super().__init__()
        self.modules, self.events, self.pointers, self.kernels = [*modules], [], {}, []
        self.mode = Fake(self.events)

    def __enter__(self):
        super().__enter__()
        cupy = SimpleNamespace(RawModule=functools.partial(Module, self))
        self.enter_context(mock.patch.dict(sys.modules, cupy=cupy))
        self.patch(torch.cuda, "current_device", lambda: 0)
        self.patch(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)
        self.patch(torch.cuda, "is_bf16_supported", lambda *args: True)
        self.patch(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        self.patch(torch.cuda, "device", lambda device: Nothing())
        for module, name, value in [*self.replacements()]:
            self.patch(module, name, value)
        self.patch(FakeTensor, "data_ptr", lambda tensor: int(self.pointer_to(tensor)))
        self.enter_context(self.mode)
        return self

    def launch(self, address, *how):
        """In the place of CUDA's cuLaunchKernel."""
        name, module = self.kernels[address.value or 0]
        grid, block, places, args = how[:3], how[3:6], how[8], []
        for place, (kind, _, pointer) in zip(places, parameters_of(module, name), strict=True):
            ctype = ctypes.c_longlong if pointer else getattr(ctypes, CTYPES[kind])
            value = ctype.from_address(place).value
            args.append(self.pointers.get(value, value) if pointer else value)
        self.events.append(Launch(name, module, tuple(grid[:2]), tuple(block[:2]), tuple(args)))
        return 0

    def pointer_to(self, tensor):
        """An address as an allocator gives it, a multiple of 512 where a storage begins."""
        start = 512 * (tensor.untyped_storage()._cdata >> 4)
        pointer = Pointer(start + tensor.storage_offset() * tensor.element_size())
        pointer.tensor = tensor  # which keeps its memory, so that the address stays its own
        self.pointers[int(pointer)] = pointer
        return pointer

    def replacements(self):
        """(module, name, value): what modules are to find instead of their own."""
        fresh = {}  # functions with a cache: what they know of this machine waits meanwhile
        for module in self.modules:
            for name, value in vars(module).items():
                if name == "driver":
                    yield module, name, lambda: self.launch
                elif name == "cupy_error":
                    yield module, name, lambda: None
                elif name in ("is_called_as_operator", "is_fake", "takes"):
                    yield module, name, lambda *args: False
                elif hasattr(value, "cache_clear"):
                    new = fresh.setdefault(value, functools.cache(value.__wrapped__))
                    yield module, name, new

    def patch(self, target, name, value):
        self.enter_context(mock.patch.object(target, name, value))

    def randn(self, *shape, **options):
        return torch.randn(shape, device="cuda", **options)

    def move(self, model):
        """The model's tensors become fake ones on the GPU, in place."""
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = self.like(tensor)
        return model

    def like(self, tensor):
        size, strides = tensor.shape, tensor.stride()
        fake = torch.empty_strided(size, strides, dtype=tensor.dtype, device="cuda")
        if not isinstance(tensor, torch.nn.Parameter):
            return fake
        return torch.nn.Parameter(fake, tensor.requires_grad)


# The backward pass --------------------------------------------------------------------------------


@torch.no_grad()
def backward(out, grad=None):
    """out.backward(grad); parameters get their gradients by PyTorch's own nodes."""
    grad = torch.ones_like(out) if grad is None else grad
    with mock.patch.object(torch._C, "_current_graph_task_id", lambda: 0):  # checkpoint asks
        places = [None] * len(out.grad_fn._input_metadata)
        places[out.output_nr] = grad
        walk(out.grad_fn, places)


def walk(root, places):
    users, found = {root: 0}, [root]
    while found:
        for node, _ in found.pop().next_functions:
            if node is not None:
                if node not in users:
                    users[node] = 0
                    found.append(node)
                users[node] += 1
    grads, ready = {root: places}, [root]
    while ready:
        node = ready.pop()
        results = call(node, grads.pop(node))
        for (user, index), result in zip(node.next_functions, results, strict=True):
            if user is None:
                continue
            wanted = user._input_metadata
            places = grads.setdefault(user, [None] * len(wanted))
            if result is not None:
                result = fit(result, wanted[index])
                places[index] = result if places[index] is None else places[index] + result
            users[user] -= 1
            if users[user] == 0:
                ready.append(user)


def call(node, grads):
    """Gradients for node.next_functions."""
    parameter = getattr(node, "variable", None)  # of a node that keeps a parameter's gradient
    if parameter is not None and parameter.grad is None:
        (grad,) = grads
        if grad.stride() == parameter.stride():  # the engine then takes it without a copy
            parameter.grad = grad
            return ()
    own = isinstance(
        node, torch.autograd.function.BackwardCFunction
    )  # of a torch.autograd.Function
    results = node.apply(*grads) if own else node(*grads)
    results = results if isinstance(results, tuple) else (results,)
    extra = len(results) - len(node.next_functions)
    if extra > 0:  # a Function answers for its inputs that are no tensors too, with None
        nones = [i for i, result in enumerate(results) if result is None]
        for left_out in itertools.combinations(nones, extra):
            kept = [result for i, result in enumerate(results) if i not in left_out]
            if all(
                (result is None) == (user is None)
                for result, (user, _) in zip(kept, node.next_functions, strict=True)
            ):
                return kept
        raise RuntimeError(f"{node.name()} returns {len(results)} gradients")
    return results


def fit(grad, wanted):
    """As the engine hands gradients on: in the type and the shape of what they are of."""
    grad = grad if tuple(grad.shape) == tuple(wanted.shape) else grad.sum_to_size(wanted.shape)
    return grad.to(wanted.dtype)
