# Copied from dvs128-gesture/test.py with output/dvs128-gesture->output/cifar10-dvs
"""Test a checkpoint: top-1, top-5 and loss on the test set, printed and written to a JSON beside
the checkpoint.

Network, input and data set are those that the checkpoint was trained with; a flag goes over them.

Usage:
    python test.py                     # the newest best.pth under output/; writes test-best.json
    python test.py --data-path ./data --checkpoint output/cifar10-dvs/best.pth
    python test.py --energy            # firing rates and energy too: energy-best.csv and .json
    python test.py --attend 8          # draws attention/test-8.png beside the checkpoint
"""

import torch

import data
import options
from attend import show
from build import load_tested, measure
from harness.config import load_config
from harness.ranks import Ranks
from harness.runs import find_checkpoint
from harness.runtime import logger, run, set_up_log


# Copied from cifar10/test.py with CIFAR->events, cfg.output->cfg.output_dir, cudnn.benchmark->cudnn.deterministic
def main(argv=None):
    cfg, notes, given = load_config(
        options.KEYS, options.NO_EFFECT, options.DEFAULT_CONFIG, argv, "Test QKFormer on events."
    )
    ranks = Ranks(cfg.device, cfg.timeout_minutes)
    set_up_log(ranks)
    for note in notes:
        logger.info(note)
    torch.backends.cudnn.deterministic = True  # as in training
    path = find_checkpoint(cfg, cfg.output_dir)
    if cfg.energy or cfg.attend is None:
        measure(cfg, given, ranks, path)
    if cfg.attend is not None:
        model, _ = load_tested(cfg, given, ranks, path)
        show(cfg, ranks, model, path, lambda: data.build_dataset(cfg, False, ranks))
    return 0


if __name__ == "__main__":
    run(main)
