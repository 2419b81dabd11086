"""Test a checkpoint: top-1, top-5 and loss on the test set, printed and written to a JSON beside
the checkpoint.

Network, input and data set are those that the checkpoint was trained with; a flag goes over them.

Usage:
    python test.py                     # the newest best.pth under output/; writes test-best.json
    python test.py --checkpoint output/cifar10/best.pth
    torchrun --nproc_per_node=8 test.py             # the same figures, sooner
"""

import harness  # noqa: F401  # isort: skip  # sets what torch reads from the environment

import data
import options
from harness.build import load_tested, measure
from harness.config import read_settings
from harness.process import run
from harness.run import enter


def main(argv=None):
    settings = read_settings(options, argv, "test", "Test QKFormer on CIFAR.")
    measure(load_tested(settings, options, data, enter(settings)), data)
    return 0


if __name__ == "__main__":
    run(main)
