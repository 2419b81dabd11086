# Copied from dvs128-gesture/test.py with output/dvs128-gesture->output/cifar10-dvs
"""Test a checkpoint: top-1, top-5 and loss on the test set, printed and written to a JSON beside the checkpoint.

Network, input and data set are those that the checkpoint was trained with; a flag goes over them.

Usage:
    python test.py --data-path ./data                          # the newest best.pth under output/
    python test.py --data-path ./data --checkpoint output/cifar10-dvs/best.pth
"""

import options
from build import measure
from config import load_config
from runs import find_checkpoint
from runtime import Ranks, logger, run, set_up_log


# Copied from cifar10/test.py with CIFAR->events, cfg.output->cfg.output_dir
def main(argv=None):
    cfg, notes, given = load_config(
        options.KEYS, options.NO_EFFECT, options.DEFAULT_CONFIG, argv, "Test QKFormer on events."
    )
    ranks = Ranks(cfg.device)
    set_up_log(ranks)
    for note in notes:
        logger.info(note)
    measure(cfg, given, ranks, find_checkpoint(cfg, cfg.output_dir))
    return 0


if __name__ == "__main__":
    run(main)
