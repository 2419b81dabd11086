"""Random states of Python, NumPy and PyTorch."""

import contextlib
import random

import numpy as np
import torch

from .log import UserError, logger


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
    try:
        if len(states) != ranks.world_size:
            if states:
                many = f"{len(states)} ranks, here are {ranks.world_size}"
                logger.info(f"warning: {path} is of {many}: random numbers begin anew")
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
    except Exception as error:  # whatever the file has there
        raise UserError(f"{path}: can't be resumed: its rng is no random state ({error})") from None


@contextlib.contextmanager
def seeded(seed: int):
    """The generators of this CPU start from `seed` within, and go on as before after."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
