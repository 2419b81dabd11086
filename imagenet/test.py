"""Test a checkpoint: top-1, top-5 and loss on data_path/val, printed and written to a JSON beside
the checkpoint.

Network and input are those that the checkpoint was trained with; a flag goes over them.

Usage:
    python test.py --data_path /data/imagenet --checkpoint output/imagenet/best.pth
    python test.py --checkpoint hst_10_384.pth     # one of the release's: model and size are known
    torchrun --nproc_per_node=8 test.py --checkpoint hst_10_384.pth  # the same figures, sooner
"""

import harness  # noqa: F401  # isort: skip  # sets what torch reads from the environment

import options
from harness.config import read_settings
from harness.process import run
from harness.run import enter
from released import measure_released


def main(argv=None):
    settings = read_settings(options, argv, "test", "Test QKFormer on ImageNet.")
    measure_released(settings, enter(settings))
    return 0


if __name__ == "__main__":
    run(main)
