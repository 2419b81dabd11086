"""How a run goes: mixed precision, losses, metrics, firing rates, progress."""

import math
import re
import resource
import sys
import time
from collections import Counter, namedtuple
from datetime import timedelta
from functools import partial

import torch
import torch.nn.functional as F
from spikingjelly.activation_based.neuron import BaseNode
from torch.utils.data import Subset

from .log import UserError, logger, progress

SECONDS = 30  # between two lines of progress, at most
SAMPLES = 8  # whose spikes are counted
# Of a test set: mean cross-entropy, top-1 and top-5 in %, and the speed.
Metrics = namedtuple("Metrics", "loss top1 top5 images_per_second")


def make_autocast(cfg, ranks, enabled=True):
    """Maker of a step's mixed-precision context. float16 needs a GPU; on a CPU it means float32."""
    dtype = getattr(torch, cfg.amp_dtype)
    enabled = enabled and cfg.amp and (ranks.device.type == "cuda" or dtype == torch.bfloat16)
    return partial(torch.autocast, ranks.device.type, dtype=dtype, enabled=enabled)


def peak_memory_mb(device):
    """Peak memory in MB: of tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


class Progress:
    """Lines on a Trainer's epoch: of its first and last step, each log_interval steps and 30 s."""

    def __init__(self, run):
        self.run, self.first = run, run.meter.steps
        self.start = self.said = time.perf_counter()

    def speed(self, done):
        """Samples per second up to step `done` of the epoch."""
        return (done - self.first) * self.run.global_batch / (time.perf_counter() - self.start)

    def show(self, done, lr):
        """Say how the epoch goes after step `done`. True at every interval, on every rank."""
        run = self.run
        due = done % run.cfg.log_interval == 0 or done == run.steps
        if due or done == self.first + 1:  # with this very step's loss
            run.meter.flush()  # on all ranks at once, since it may stop them
        elif time.perf_counter() - self.said < SECONDS:
            return due
        self.said, speed = time.perf_counter(), self.speed(done)
        left = ((run.num_epochs - run.epoch) * run.steps - done) * run.global_batch / speed
        text = f"loss {run.meter.mean:.4f}, lr {lr:.3g}, {speed:.0f} {run.samples}/s"
        text += f", {timedelta(seconds=round(left))} left, {peak_memory_mb(run.ranks.device):,} MB"
        logger.info(f"epoch {run.epoch}, step {done}/{run.steps}: {text}")
        return due


@torch.inference_mode()
def evaluate(model, loader, ranks, autocast, stop=False) -> Metrics | None:
    """Metrics over the batches of all ranks, each sample once; None where one of them stops."""
    model.eval()
    start, rows = time.perf_counter(), []  # of each batch: loss, top-1, top-5, samples
    for images, targets in progress(loader, "test", ranks):
        with autocast():
            logits = model(images)
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        loss = F.cross_entropy(logits.double(), targets, reduction="sum")
        count = torch.full_like(loss, len(images))
        rows.append(torch.stack([loss, hits[:, 0].sum(), hits.sum(), count]))
        if stop:
            break
    rows = torch.stack(rows).tolist() if rows else []
    gathered = ranks.gather((rows, bool(stop)))
    if any(stopped for _, stopped in gathered):
        return None
    # fsum is exact: the result does not depend on which rank had which batch
    rows = [row for rows, _ in gathered for row in rows]
    if not rows:
        raise UserError("there is nothing to test on: no test sample could be read, as said above")
    loss, top1, top5, count = (math.fsum(column) for column in zip(*rows, strict=True))
    speed = count / (time.perf_counter() - start)
    return Metrics(loss / count, 100 * top1 / count, 100 * top5 / count, speed)


class LossMeter:
    """Mean loss over ranks and the steps of an epoch; `show(loss, step)` gets each, from step 0 on.
    A step's loss is read one step later, so that nothing waits for the GPU. A rank's stop signal is
    summed with it, so that all ranks set `stop` at the same step.
    """

    def __init__(self, ranks, show=lambda loss, step: None):
        self.ranks, self.show = ranks, show
        self.total, self.steps, self.pending, self.stop = 0.0, 0, None, False

    def update(self, loss, stop):
        """Take one step's loss; FloatingPointError if that of the step before was not finite."""
        stopped = torch.full_like(loss, bool(stop), dtype=torch.float32)
        status = self.ranks.sum(torch.stack([loss.detach().float(), stopped]))
        copied = torch.cuda.Event() if status.is_cuda else None
        status = status.to("cpu", non_blocking=True)  # into pinned memory; kernels go on
        if copied:
            copied.record()
        self.flush()
        self.pending = status, copied
        if self.ranks.world_size == 1:
            self.stop = bool(stop)

    def flush(self):
        """Read the loss of the last step."""
        if self.pending is None:
            return
        (status, copied), self.pending = self.pending, None
        if copied:
            copied.synchronize()
        loss, stop = status.tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.steps + 1}")
        loss /= self.ranks.world_size
        self.show(loss, self.steps)
        self.total += loss
        self.steps += 1
        self.stop = self.stop or stop > 0

    @property
    def mean(self):
        return self.total / max(self.steps, 1)


def tet(criterion, weight, logits, targets):
    """Temporal efficient training (Deng et al., ICLR 2022), which the published runs did without:
    (1 - weight) x the loss of the mean logits + weight x the mean of the losses of all steps.
    Logits [T, B, classes] are of a model whose `per_step` is set, targets [B] or [B, classes].
    """
    steps = targets.repeat(len(logits), *[1] * (targets.dim() - 1))
    loss = weight * criterion(logits.flatten(0, 1), steps)
    return loss + (1 - weight) * criterion(logits.mean(0), targets)


def stage_of(name):
    """stage1 for the modules of patch_embed1 and stage1, head for those behind the last stage."""
    match = re.match(r"(?:patch_embed|stage)(\d+)", name)
    return f"stage{match[1]}" if match else "head"


def spread(dataset):
    """A few samples from all over a data set, whose order is often that of its classes."""
    count = min(SAMPLES, len(dataset))
    return Subset(dataset, [index * len(dataset) // count for index in range(count)])


@torch.inference_mode()
def firing_rates(model, batches, autocast) -> dict:
    """{stage: share of 1 in its spikes} for batches of samples; the model is in evaluation mode."""
    ones, values = Counter(), Counter()

    def count(stage, module, args, spikes):
        ones[stage] += spikes.sum(dtype=torch.float64)
        values[stage] += spikes.numel()

    neurons = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseNode)]
    hooks = [m.register_forward_hook(partial(count, stage_of(name))) for name, m in neurons]
    with autocast():
        for images in batches:
            model.forward(images)  # torch.compile's would not call the hooks
    for hook in hooks:
        hook.remove()
    return {stage: ones[stage].item() / values[stage] for stage in ones}
