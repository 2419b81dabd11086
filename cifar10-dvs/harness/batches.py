"""Batches of a data set, each rank's share, made by worker processes; random states."""

import atexit
import contextlib
import copy
import hashlib
import multiprocessing
import os
import random
import re
import signal
from functools import partial
from multiprocessing import queues, resource_tracker

import numpy as np
import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Subset, get_worker_info

from .log import UserError, logger, telling
from .process import without_signals


class LostWorker(UserError):
    """A process that makes batches has ended, or can't send them."""


def make_batch(dataset, collate, key):
    """The batch of (indices, seed), all whose randomness comes from the seed."""
    indices, seed = key
    try:
        with seeded(seed):
            batch = collate([dataset[index] for index in indices])
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
        make = {"batch_size": None, "collate_fn": partial(make_batch, dataset, collate)}
        make |= {"num_workers": workers, "worker_init_fn": start_worker, "pin_memory": pin_memory}
        # With a generator that leaves PyTorch's own alone.
        super().__init__(batches, **make, generator=torch.Generator())

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
            lost = "^(DataLoader worker|Pin memory thread)|shm|shared memory|open files"
            ours = isinstance(error, RuntimeError) or text.startswith("Caught")
            if not re.search(lost, text) and (ours or not self.num_workers):
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
    """[(indices, seed)]: this rank's whole batches of an epoch, by the seed and the epoch alone."""
    # Hashed, for seed + epoch would give the epochs of seed 43 to seed 42, one later.
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    steps, many = size // (batch_size * ranks.world_size), ranks.world_size
    order = torch.randperm(size, generator=generator)[: steps * batch_size * many]
    order = order.view(steps, batch_size, many)[:, :, ranks.rank].tolist()
    seeds = torch.randint(2**31, (steps, many), generator=generator)[:, ranks.rank].tolist()
    return list(zip(order, seeds, strict=True))


def test_batches(size, batch_size, ranks):
    """[(indices, seed)] of this rank: every world_size-th batch of the sequential order."""
    # Whole ones but for the last: under cross_sample_lif logits depend on the batch.
    starts = range(0, size, batch_size)[ranks.rank :: ranks.world_size]
    return [(range(start, min(start + batch_size, size)), 0) for start in starts]


def divide(cfg, data, dataset, seed):
    """(what trains, what validates or None) of a training set, by the seed, within each class."""
    if not cfg.val_split and cfg.train_share == 1:
        return dataset, None
    place, low = places(dataset, seed), cfg.val_split
    trains = (place >= low) & (place <= low + (1 - low) * cfg.train_share)
    trains, held_out = (which.nonzero()[:, 0].tolist() for which in (trains, place < low))
    if low and not held_out:
        raise UserError(f"val_split is {low}, which is no sample of any class; make it more")
    held_out = part(data.as_tested(cfg, dataset), held_out) if low else None
    return part(dataset, trains), held_out


def places(dataset, seed):
    """[samples]: places between 0 and 1, evenly over each class, in an order of the seed alone."""
    # As torchvision's data sets have them; without labels all are one class.
    labels = [label for _, label in getattr(dataset, "samples", ())]
    labels = torch.tensor(labels or getattr(dataset, "targets", [0] * len(dataset)))
    generator, found = torch.Generator().manual_seed(seed), torch.empty(len(labels))
    for label in labels.unique():
        of_class = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(of_class), generator=generator)
        found[of_class] = (order + 0.5) / len(of_class)
    return found


def part(dataset, indices):
    """The samples `indices` of a data set, as a data set."""
    if hasattr(dataset, "samples"):  # files, one of which may take the place of a damaged one
        dataset = copy.copy(dataset)
        dataset.samples = [dataset.samples[index] for index in indices]
        return dataset
    subset = Subset(dataset, indices)
    subset.classes = dataset.classes
    return subset


def digest_of_files(dataset):
    """Of names, without folders, and labels of a data set's files; None for one without files."""
    if not hasattr(dataset, "samples"):
        return None
    names = "".join(f"{os.path.basename(path)}/{label}/" for path, label in dataset.samples)
    return hashlib.sha256(os.fsencode(names)).hexdigest()


def get_rng_state(device, statistics=()):
    """All generators' states, and this rank's `statistics`, of types that torch.load takes."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        **({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}),
        "statistics": [values.cpu() for values in statistics],
    }


def set_rng_state(states, ranks, path, statistics=()):
    """Set this rank's of a checkpoint's states; those of another number of ranks fit none."""
    with telling(f"{path}: can't be resumed: its rng is no random state (", ")"):
        if len(states) != ranks.world_size:
            if states:
                logger.info(f"warning: {path} is of {len(states)} ranks: random numbers begin anew")
            return
        state = states[ranks.rank]
        random.setstate(state["python"])
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if ranks.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], ranks.device)
        for values, saved in zip(statistics, state.get("statistics", ()), strict=False):
            if not saved.isfinite().all():
                raise ValueError("statistics are not finite")
            values.copy_(saved)


@contextlib.contextmanager
def seeded(seed: int):
    """The generators of this CPU start from `seed` within, and go on as before after."""
    with contextlib.ExitStack() as stack, torch.random.fork_rng(devices=()):
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        yield
