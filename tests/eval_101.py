"""Run by test_train.py in a data set folder, on one rank or several: metrics on 101 samples, as
JSON on rank 0.
"""

import json
import sys

import torch

import data
import options
from build import build_model
from harness.config import load_config
from harness.engine import evaluate, make_autocast
from harness.ranks import Ranks
from harness.runtime import run

sys.path.insert(1, sys.argv.pop(1))
from conftest import Golden


def main():
    cross, *flags = sys.argv[1:]
    cfg, *_ = load_config(options.KEYS, options.NO_EFFECT, options.DEFAULT_CONFIG, flags)
    ranks = Ranks(cfg.device)
    model = Golden.fill(build_model(cfg, cross == "true", ranks)).float()
    samples = torch.utils.data.Subset(data.build_dataset(cfg, False, ranks), range(101))
    metrics = evaluate(
        model, data.test_loader(cfg, samples, ranks), ranks, make_autocast(cfg, ranks)
    )
    if ranks.main:
        print("METRICS", json.dumps(metrics[:3]))
    return 0


if __name__ == "__main__":
    run(main)
