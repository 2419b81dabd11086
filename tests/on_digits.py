"""What the tests of cifar10/'s scripts share: a small model's flags on the embedded digits, and a
run with them.
"""

import pytest

from conftest import load, on_cpu, resolve_in, script

cifar10 = load("cifar10")
CPU = cifar10.process.Ranks("cpu")
SMALL = [
    "-c",
    "quickstart.yml",
    "--dim",
    16,
    "--num-heads",
    2,
    "--time-step",
    2,
    "--batch-size",
    64,
]
# randomness in every place: mixup and flips in a worker, random erasing and drop path in the main
# process
RANDOM = [
    *SMALL,
    "--mixup",
    0.5,
    "--hflip",
    0.5,
    "--reprob",
    0.5,
    "--drop-path",
    0.2,
    "--epochs",
    2,
    "--workers",
    1,
]


def resolve(*argv):
    return resolve_in(cifar10, *argv)


@pytest.fixture(scope="session")
def trained_on_digits(tmp_path_factory):
    """A run of RANDOM that nothing interrupts."""
    output = tmp_path_factory.mktemp("output")
    done = script("cifar10", "train", *RANDOM, "--output", output, "--experiment", "whole")
    return output / "whole", done.stdout


def call(main, capsys, *argv):
    """What main() printed, and its cifar10.config.UserError as the scripts print it."""
    capsys.readouterr()
    try:
        main(on_cpu(argv))
        return capsys.readouterr().out
    except cifar10.config.UserError as error:
        return capsys.readouterr().out + f"error: {error}"
