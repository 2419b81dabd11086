"""What training and testing share for all data sets: batches for each rank, progress, metrics."""

import atexit
import math
import multiprocessing
import os
import signal
import sys
import time
from collections import namedtuple
from datetime import timedelta
from functools import partial
from multiprocessing import resource_tracker

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from config import UserError
from runtime import deaf, logger, peak_memory_mb, seeded

SKIPPED = 50  # steps in a row: the scale is 1e15 times smaller then
LOST = "lost: "  # begins what a worker says that can't hand over its batch
Metrics = namedtuple("Metrics", "loss top1 top5 images_per_second")


class Batches(Dataset):
    """One item is one whole batch, made from (indices, seed).

    All randomness of a batch comes from its seed. So it is the same whatever process makes it and
    whatever came before, and a run that is resumed within an epoch goes on with the very next
    batch.
    """

    def __init__(self, dataset, collate):
        self.dataset = dataset
        self.collate = collate

    def __getitem__(self, key):
        indices, seed = key
        try:
            with seeded(seed):
                batch = self.collate([self.dataset[index] for index in indices])
            if get_worker_info():  # now: in the thread that sends it, a failure would be lost
                batch = tree_map_only(torch.Tensor, torch.Tensor.share_memory_, batch)
            return batch
        except UserError as error:
            return str(error)  # for BatchLoader: raised in a worker, it would come as a traceback
        except (OSError, RuntimeError) as error:
            if get_worker_info() and "shm" in str(error):
                return LOST + str(error)
            raise


def usable_cores():
    """Cores that this process may use: more workers than these would only wait for each other."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class BatchLoader(DataLoader):
    """The batches of [(indices, seed)] in order, made by worker processes; raises their UserError.

    Where a worker is lost, `fault` says how, and this process makes what is left.
    """

    def __init__(self, dataset, collate, batches, workers, pin_memory):
        super().__init__(
            Batches(dataset, collate),
            batch_size=None,
            sampler=batches,
            num_workers=min(workers, len(batches), usable_cores()),
            pin_memory=pin_memory,
            generator=torch.Generator(),  # so that it leaves PyTorch's own alone
        )
        self.fault = None

    def __iter__(self):
        done = 0
        for batch in self.from_workers():
            if isinstance(batch, str) and batch.startswith(LOST):
                self.fault = batch.removeprefix(LOST)
                break
            if isinstance(batch, str):
                raise UserError(batch)
            done += 1
            yield batch
        if self.fault:
            logger.warning(
                f"warning: a worker of the loader was lost ({self.fault}): killed, perhaps for "
                "lack of memory, or /dev/shm is full (docker run --shm-size=8g, or workers: 0)"
            )
            for key in self.sampler[done:]:
                batch = self.dataset[key]
                if isinstance(batch, str):
                    raise UserError(batch)
                yield batch

    def from_workers(self):
        """The batches up to the last, or to the loss of a worker."""
        handler = signal.getsignal(signal.SIGCHLD)
        context = self.multiprocessing_context or multiprocessing
        with deaf():
            if self.num_workers and context.get_start_method() != "fork":
                resource_tracker.ensure_running()  # which hears some of the signals again
            with deaf():
                batches = super().__iter__()
        if signal.getsignal(signal.SIGCHLD) != handler:
            # PyTorch's handler raises anywhere, even within a step; a lost worker is seen without.
            signal.signal(signal.SIGCHLD, handler)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker"):
                    raise
                self.fault = str(error).splitlines()[0]
                return
            yield batch


@atexit.register  # before multiprocessing's own, which would wait for workers that are deaf
def end_workers():
    for worker in multiprocessing.active_children():
        worker.kill()


def train_batches(size, batch_size, seed, epoch, ranks):
    """[(indices, seed)], this rank's batches of an epoch, in the random order of seed + epoch.

    Samples at the end that do not fill a batch on every rank are dropped.
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    steps = size // (batch_size * ranks.world_size)
    if steps == 0:
        whole = f"batch_size {batch_size}" + (
            f" x {ranks.world_size} ranks" if ranks.world_size > 1 else ""
        )
        raise UserError(
            f"{whole} is more than the {size} training samples; make batch_size smaller"
        )
    order = torch.randperm(size, generator=generator)[: steps * batch_size * ranks.world_size]
    order = order.view(steps, batch_size, ranks.world_size)[:, :, ranks.rank].tolist()
    seeds = torch.randint(2**31, (steps, ranks.world_size), generator=generator)[
        :, ranks.rank
    ].tolist()
    return list(zip(order, seeds, strict=True))


def test_batches(size, batch_size, ranks):
    """[(indices, seed)] of this rank: every world_size-th batch of the sequential order, the last
    one may be short.

    Batches are whole and in order because under cross_sample_lif an image's logits depend on its
    batch.
    """
    starts = range(0, size, batch_size)[ranks.rank :: ranks.world_size]
    return [(range(start, min(start + batch_size, size)), 0) for start in starts]


def make_autocast(cfg, ranks, enabled=True):
    """Maker of the mixed-precision context of a step. float16 needs a GPU; on a CPU it means
    float32.
    """
    dtype = getattr(torch, cfg.amp_dtype)
    enabled = enabled and cfg.amp and (ranks.device.type == "cuda" or dtype == torch.bfloat16)
    return partial(torch.autocast, ranks.device.type, dtype=dtype, enabled=enabled)


def progress(steps, title, ranks):
    """A progress bar where rank 0 has a terminal."""
    return tqdm(
        steps,
        title,
        leave=False,
        dynamic_ncols=True,
        disable=not (ranks.main and sys.stderr.isatty()),
    )


class Progress:
    """Where an epoch stands: a bar where rank 0 has a terminal, else a line every `interval` steps.

    Args:
        steps: iterable of the epoch's remaining steps.
        run: the Trainer: its epoch of num_epochs, meter, steps of an epoch and global_batch.
        unit: what a batch is of, for samples per second.
        interval: steps between lines; the last step has one too.
    """

    def __init__(self, steps, run, unit, interval):
        self.bar = progress(steps, f"epoch {run.epoch}", run.ranks)
        self.run, self.unit, self.interval = run, unit, interval
        self.first, self.start = run.meter.steps, time.perf_counter()

    def __iter__(self):
        return iter(self.bar)

    def speed(self, done):
        """Samples per second up to step `done` of the epoch."""
        return (done - self.first) * self.run.global_batch / (time.perf_counter() - self.start)

    def show(self, done, lr):
        """Say how the epoch goes after step `done`. True where a line is due, on every rank."""
        run = self.run
        due = done % self.interval == 0 or done == run.steps
        if due:
            run.meter.flush()  # with the loss of this very step
        if due or not self.bar.disable:
            speed = self.speed(done)
            left = ((run.num_epochs - run.epoch) * run.steps - done) * run.global_batch / speed
            text = (
                f"loss {run.meter.mean:.4f}, lr {lr:.3g}, {speed:.0f} {self.unit}/s, "
                f"{timedelta(seconds=round(left))} left, {peak_memory_mb(run.ranks.device):,} MB"
            )
            self.bar.set_postfix_str(text, refresh=False)
            if due and self.bar.disable:
                logger.info(f"epoch {run.epoch}, step {done}/{run.steps}: {text}")
        return due


@torch.inference_mode()
def evaluate(model, loader, ranks, autocast, stop=False):
    """Metrics over the batches of all ranks, each sample once: plain cross-entropy, top-1 and top-5
    in %.

    Returns None if `stop` turned true on some rank on the way.
    """
    model.eval()
    start = time.perf_counter()
    rows = []  # of each batch: loss, top-1, top-5, samples
    for images, targets in progress(loader, "test", ranks):
        with autocast():
            logits = model(images)
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        loss = F.cross_entropy(logits.double(), targets, reduction="sum")
        rows.append(
            torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.full_like(loss, len(images))])
        )
        if stop:
            break
    rows = torch.stack(rows).tolist() if rows else []
    gathered = ranks.gather((rows, bool(stop)))
    if any(stopped for _, stopped in gathered):
        return None
    # fsum is exact: the result does not depend on which rank had which batch
    rows = [row for rows, _ in gathered for row in rows]
    if not rows:
        raise UserError("there is nothing to test on: no sample could be read")
    loss, top1, top5, count = (math.fsum(column) for column in zip(*rows, strict=True))
    seconds = time.perf_counter() - start
    return Metrics(loss / count, 100 * top1 / count, 100 * top5 / count, count / seconds)


class Skips:
    """Counts the steps in a row that the scaler left out; FloatingPointError if they are many."""

    def __init__(self, optimizer):
        self.count = 0
        inner = getattr(optimizer, "_base_optimizer", optimizer)  # of timm's Lookahead
        inner.register_step_post_hook(self.reset)  # costs nothing; the scale is on the GPU

    def reset(self, *_):
        self.count = 0

    def step(self, scaler, optimizer):
        """scaler.step(optimizer)."""
        self.count += 1
        scaler.step(optimizer)
        if self.count >= SKIPPED:
            raise FloatingPointError(f"gradients are not finite in {self.count} steps in a row")


def check_weights(model, step):
    """FloatingPointError if a weight is not finite.

    The loss would show it one step later, but these weights are about to be saved.
    """
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise FloatingPointError(f"weights are not finite after step {step}")


def load_optimizer(optimizer, state):
    """Load an optimizer's state, also that of a run on another kind of device.

    `foreach` and `fused`, which choose its kernels, stay as they were made for this device.
    """
    own = {
        name: optimizer.defaults[name]
        for name in ("foreach", "fused")
        if name in optimizer.defaults
    }
    optimizer.load_state_dict(
        {**state, "param_groups": [{**group, **own} for group in state["param_groups"]]}
    )


class LossMeter:
    """Mean loss over ranks and the steps of an epoch.

    A step's loss is read one step later, so that nothing waits for the GPU. A rank's stop signal is
    summed with the loss, so that all ranks set `stop` at the same step. `show(step, loss)`, where
    given, is called for each step, counted from 0 in the epoch.
    """

    def __init__(self, ranks, show=None):
        self.ranks, self.total, self.steps = ranks, 0.0, 0
        self.pending, self.show_loss = None, show
        self.stop = False

    def update(self, loss, stop):
        """Take one step's loss; FloatingPointError if that of the step before was not finite."""
        status = torch.stack(
            [loss.detach().float(), torch.full_like(loss, bool(stop), dtype=torch.float32)]
        )
        pending, self.pending = self.pending, to_host(self.ranks.sum(status))
        self._read(pending)
        if self.ranks.world_size == 1:
            self.stop = bool(stop)

    def flush(self):
        pending, self.pending = self.pending, None
        self._read(pending)

    def _read(self, pending):
        if pending is None:
            return
        status, copied = pending
        if copied is not None:
            copied.synchronize()
        loss, stop = status.tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.steps + 1}")
        loss /= self.ranks.world_size
        if self.show_loss:
            self.show_loss(self.steps, loss)
        self.total += loss
        self.steps += 1
        self.stop = self.stop or stop > 0

    @property
    def mean(self):
        return self.total / max(self.steps, 1)


def to_host(values):
    """(values on the CPU, event): they are there once the event has happened; None: already.

    The CPU does not wait for the copy, but goes on launching kernels.
    """
    if not values.is_cuda:
        return values, None
    copy, copied = values.to("cpu", non_blocking=True), torch.cuda.Event()  # into pinned memory
    copied.record()
    return copy, copied
