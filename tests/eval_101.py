"""Run by test_train.py in a data set folder, on one rank or several: metrics on 101 samples, as
JSON on rank 0.
"""

import json
import sys

import torch

import data
import options
from harness.build import build_model
from harness.config import read_settings
from harness.meters import evaluate, make_autocast
from harness.process import Ranks, run

sys.path.insert(1, sys.argv.pop(1))
from conftest import Golden


def main():
    cross, *flags = sys.argv[1:]
    cfg = read_settings(options, flags).resolve()
    ranks = Ranks(cfg.device)
    model = Golden.fill(build_model(cfg, options, data, cross == "true", 10, ranks)).float()
    samples = torch.utils.data.Subset(data.build_dataset(cfg, False, ranks), range(101))
    metrics = evaluate(
        model, data.test_loader(cfg, samples, ranks), ranks, make_autocast(cfg, ranks)
    )
    if ranks.main:
        print("METRICS", json.dumps(metrics[:3]))
    return 0


if __name__ == "__main__":
    run(main)
