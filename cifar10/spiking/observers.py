"""Who looks on: what must see modules, and operators of PyTorch, called one after another."""

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks
from torch.overrides import _get_current_function_mode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode

PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # PyTorch 2.7 has it


def traced():
    """Whether torch.export or torch.jit.trace wants a graph of PyTorch's own operators."""
    # Within torch.compile is_exporting is always true.
    exporting = is_exporting() and not torch.compiler.is_dynamo_compiling()
    return torch.jit.is_tracing() or exporting


def observed(x):
    """Why modules and PyTorch's own operators must be called with x, since something watches them;
    "" where that needs no line. None: nothing does.
    """
    if torch.compiler.is_compiling() or traced():  # torch.compile fuses in its own way
        return ""
    if type(x) not in PLAIN or x._is_zerotensor():  # such as a FakeTensor, which has no memory
        return ""
    if forward_ad._current_level >= 0:  # no kernel has derivatives forward
        return ""
    before = hooks._global_forward_pre_hooks or hooks._global_backward_pre_hooks
    if before or hooks._global_forward_hooks or hooks._global_backward_hooks:
        return "hooks on all modules are set"
    for mode in (_get_current_dispatch_mode(), _get_current_function_mode()):
        # Such as spikingjelly's operation counters. DeviceContext says where tensors are made.
        known = mode is None or isinstance(mode, DeviceContext)
        if not known and not getattr(mode, "counts_kernels", False):
            return f"{type(mode).__name__} looks at each operation"
    return None
