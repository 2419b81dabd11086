"""Models against the golden numbers."""

import numpy as np
import pytest
import torch

# (semantics, whether fused, whether with the steps of an optimizer): the plain path is checked in
# CI with the smallest model, and the steps with cifar10/'s MS-QKFormer.
OURS, RELEASE, PLAIN = (
    ("per_sample", True, False),
    ("release", True, False),
    ("per_sample", False, False),
)
LONG = [
    pytest.param(semantics, fused, True, marks=pytest.mark.long)
    for semantics in ("per_sample", "release")
    for fused in (True, False)
]


def check_golden(golden, build, lif_class, semantics, fused, with_losses):
    """Every array of one semantics ("per_sample" or "release") to a relative 1e-9; `build()` makes
    the model. Firing rates come from the plain path.
    """

    def equal(name, value):
        want = golden.arrays[f"{semantics}/{name}"]
        assert np.shape(value) == want.shape, name
        assert np.abs(np.asarray(value) - want).max() <= 1e-9 * np.abs(want).max(), name

    model = golden.fill(build())
    x, criterion = golden.input(), torch.nn.functional.cross_entropy
    rates = {}

    def record(name):
        def hook(module, inputs, output):
            rates[name] = output.mean().item()

        return hook

    neurons = [pair for pair in model.named_modules() if isinstance(pair[1], lif_class)]
    # Hooks would send the fused path the plain way.
    hooks = [m.register_forward_hook(record(name)) for name, m in neurons if not fused]
    model.eval()
    with torch.no_grad():
        logits = model(x)
    equal("eval_logits", logits)
    if not fused:
        assert list(rates) == golden.meta["lif_modules"]
        equal("firing_rates", list(rates.values()))
    for hook in hooks:
        hook.remove()

    target = golden.target(logits.shape[1])
    model.train()
    logits = model(x)
    equal("train_logits", logits.detach())
    criterion(logits, target).backward()
    parameters = dict(model.named_parameters())
    equal("grad_norms", [parameters[name].grad.norm().item() for name in golden.meta["parameters"]])
    buffers = dict(model.named_buffers())
    equal("buffer_norms", [buffers[name].double().norm().item() for name in golden.meta["buffers"]])

    if not with_losses:
        return
    model = golden.fill(build()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.06)
    losses = []
    for _ in range(3):
        loss = criterion(model(x), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    equal("losses", losses)
