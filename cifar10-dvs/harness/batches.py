"""Batches of a data set: their share for each rank, made by worker processes."""

import atexit
import hashlib
import multiprocessing
import os
import re
import signal
from multiprocessing import queues, resource_tracker

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, get_worker_info

from .log import UserError
from .process import without_signals
from .seeds import seeded


class LostWorker(UserError):
    """A process that makes batches has ended, or can't send them."""


class Batches(Dataset):
    """One item is a whole batch of (indices, seed), all whose randomness comes from the seed."""

    def __init__(self, dataset, collate):
        self.dataset, self.collate = dataset, collate

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


def start_worker(_):
    """A batch that can't be sent ends its worker: the main process would wait for it for ever."""
    queues.Queue._on_queue_feeder_error = lambda *_: os._exit(1)


class BatchLoader(DataLoader):
    """The batches of [(indices, seed)] in order, by workers; their UserError, or LostWorker."""

    def __init__(self, dataset, collate, batches, workers, pin_memory):
        # More workers than the cores that this process may use would only wait for each other.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = min(workers, len(batches), cores or 1)
        super().__init__(
            Batches(dataset, collate),
            batch_size=None,
            sampler=batches,
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # so that it leaves PyTorch's own alone
        )

    def __iter__(self):
        handler = signal.getsignal(signal.SIGCHLD)
        context = self.multiprocessing_context or multiprocessing
        with without_signals():
            if self.num_workers and context.get_start_method() != "fork":
                resource_tracker.ensure_running()  # which hears some of the signals again
            with without_signals():
                batches = super().__iter__()
            if signal.getsignal(signal.SIGCHLD) != handler:
                # PyTorch's raises anywhere, even within a step; a lost worker is seen without.
                signal.signal(signal.SIGCHLD, handler)
        try:
            for batch in batches:
                if isinstance(batch, str):
                    raise UserError(batch)
                yield batch
        except (RuntimeError, OSError, EOFError) as error:
            text = str(error).strip() or type(error).__name__
            lost = re.match("DataLoader worker|Pin memory thread", text)
            lost = lost or re.search("shm|shared memory|open files", text)
            ours = isinstance(error, RuntimeError) or text.startswith("Caught")
            if not lost and (ours or not self.num_workers):
                raise
            end_workers()  # what one lacks the others lack too
            raise LostWorker(
                f"a worker of the loader was lost ({text.splitlines()[-1]}): killed, perhaps for "
                "lack of memory, or /dev/shm is full (docker run --shm-size=8g), or too many files "
                "are open (ulimit -n 4096); workers: 0 does without all of these"
            ) from None


@atexit.register  # before multiprocessing's own, which would wait for workers without signals
def end_workers():
    for worker in multiprocessing.active_children():
        worker.kill()


def train_batches(size, batch_size, seed, epoch, ranks):
    """[(indices, seed)], this rank's batches of an epoch, in an order of this seed and epoch alone.

    Samples at the end that do not fill a batch on every rank are dropped.
    """
    # Hashed, for seed + epoch would give the epochs of seed 43 to seed 42, one later.
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    steps, many = size // (batch_size * ranks.world_size), ranks.world_size
    order = torch.randperm(size, generator=generator)[: steps * batch_size * many]
    order = order.view(steps, batch_size, many)[:, :, ranks.rank].tolist()
    seeds = torch.randint(2**31, (steps, many), generator=generator)[:, ranks.rank].tolist()
    return list(zip(order, seeds, strict=True))


def test_batches(size, batch_size, ranks):
    """[(indices, seed)] of this rank: every world_size-th batch of the sequential order. They are
    whole, but for the last, because under cross_sample_lif logits depend on the batch.
    """
    starts = range(0, size, batch_size)[ranks.rank :: ranks.world_size]
    return [(range(start, min(start + batch_size, size)), 0) for start in starts]
