"""Layers' nodes in a graph of autograd: hooks on what they save, autocast, modes, threads."""

import contextlib
import ctypes
import functools
import gc

import pytest
import torch
from torch.autograd import forward_ad

import on_gpus
from on_gpus import stand_in
from test_layer import KINDS, compiled, make_layer, whole_numbers
from test_native import cifar10, kernels, layer, make_model

__all__ = ["stand_in"]  # a fixture


def gradients(model, hooks=contextlib.nullcontext, x=None):
    x = torch.rand(2, 3, 16, 24, generator=torch.manual_seed(0)).double() if x is None else x
    with hooks():
        loss = model.train()(x).square().sum()
    on_gpus.forget()  # no plan is known any more but to the graph
    gc.collect()
    loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def strided(x):
    """The same values with gaps in memory."""
    return torch.stack([x, x], -1)[..., 0]


def test_saved_tensors_laid_out_anew():
    """Hooks on saved tensors may return them contiguous, as save_on_cpu does with pinned memory."""
    x = whole_numbers(torch.float64)
    for kind in KINDS:
        gradients = []
        for hooks in (
            contextlib.nullcontext(),
            torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda x: x),
        ):
            modules, pool = make_layer(kind, torch.float64)
            leaf = x.clone().requires_grad_()
            with hooks:
                spikes = layer.conv_bn_lif(leaf, *modules, pool=pool)
            torch.manual_seed(0)
            spikes.backward(torch.randn(spikes.shape, dtype=spikes.dtype))
            gradients.append([leaf.grad, *(parameter.grad for parameter in modules.parameters())])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@compiled
def test_saved_tensors_laid_out_anew_as_on_a_gpu(stand_in):
    test_saved_tensors_laid_out_anew()


HOOKS = {"contiguous": torch.Tensor.contiguous, "strided": strided, "as they are": lambda x: x}


@compiled
@pytest.mark.parametrize("memory", ["fast", "small"])
@pytest.mark.parametrize("unpack", HOOKS)
def test_saved_tensors_come_back_otherwise(unpack, memory):
    """Hooks, as of save_on_cpu, may change how they lie in memory."""
    hooks = functools.partial(torch.autograd.graph.saved_tensors_hooks, lambda x: x, HOOKS[unpack])
    options = {"events": True, "memory": memory, "neuron": "plif"}
    want = gradients(make_model({**options, "fused": False}))
    for ours, plain in zip(gradients(make_model(options), hooks), want, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-7, atol=1e-8)


def layer_of(**options):
    torch.manual_seed(0)
    modules = [torch.nn.Conv2d(3, 8, 1), torch.nn.BatchNorm2d(8)]
    return [*modules, cifar10.neuron.MultiStepLIF(**options)]


@compiled
def test_autocast_in_a_backward_pass_alone(stand_in):
    found = []
    for mixed in (False, True):
        x = torch.rand(2, 2, 3, 6, 5, generator=torch.manual_seed(0), requires_grad=True)
        conv, bn, lif = layer_of(memory="small")
        out = lif(layer.conv_bn_lif(x, conv, bn, lif))
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            out.sum().backward()
        found.append([x.grad, conv.weight.grad, bn.weight.grad])
    assert all(map(torch.equal, *found))


@compiled
def test_gradients_that_begin_anywhere(stand_in):
    """A GPU reads them 16 bytes at a time."""
    for last in (layer.conv_bn, layer.conv_bn_lif, lambda x, conv, bn, lif: lif(x)):
        x = torch.rand(4, 2, 3, 8, 6).requires_grad_()
        stand_in.clear()
        out = last(x, *layer_of())
        torch.cat([torch.ones(1), out.flatten()]).square().sum().backward()
        (launch,) = (each for each in stand_in if each.name == "fire_backward")
        kinds = on_gpus.kinds_of(launch.build, launch.name)
        places = [v for v, kind in zip(launch.args, kinds, strict=True) if kind is ctypes.c_void_p]
        assert not any(place % 16 for place in places if place)


@compiled
def test_a_thread_without_a_context(stand_in, monkeypatch):
    """CUDA's driver refuses a thread's first launch until its runtime has done something."""
    known, refused = kernels.driver(), []
    kind = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3
    )

    @kind
    def driver(*args):
        if not refused:
            return refused.append(1) or 201
        return kind(known)(*args)

    address = ctypes.cast(driver, ctypes.c_void_p).value
    monkeypatch.setattr(kernels, "driver", lambda: address)
    layer.conv_bn_lif(torch.rand(2, 2, 3, 6, 5), *layer_of())
    assert refused


@compiled
def test_modes_of_autograd():
    """Gradients within inference mode, and forward derivatives, are PyTorch's to refuse."""
    x = torch.rand(2, 2, 3, 6, 5)
    with torch.inference_mode(), torch.enable_grad():
        ours, plain = (layer.conv_bn_lif(x, *layer_of(fused=on)) for on in (True, False))
    assert torch.equal(ours, plain)
    modules = torch.nn.ModuleList(layer_of()).eval()
    with (
        forward_ad.dual_level(),
        torch.no_grad(),
        pytest.raises((NotImplementedError, RuntimeError)),
    ):
        layer.conv_bn_lif(forward_ad.make_dual(x, x), *modules)
