"""What the tests of imagenet/ share: a narrow model, photographs for it (imagenet/photos.py), and
runs with them.
"""

import argparse
import contextlib
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml

from conftest import ROOT, load, on_cpu, resolve_in, script, start

imagenet = load("imagenet")
photos = imagenet.photos
CPU = imagenet.process.Ranks("cpu")
UserError = imagenet.config.UserError
NARROW = {  # HST-5-64 at 32 x 32
    "base": str(ROOT / "imagenet" / "imagenet.yml"),
    "input_size": 32,
    "layer": 5,
    "dim": 64,
    "num_heads": 2,
    "batch_size": 16,
    "accum_iter": 1,
    "epochs": 8,
    "warmup_epochs": 1,
    "lr": "1e-2",
    "aa": None,
    "reprob": 0,
    "num_workers": 0,
}


def resolve(*argv):
    return resolve_in(imagenet, *argv)


def build(cfg, cross_sample_lif=False, classes=2):
    """The configuration's model."""
    args = cfg, imagenet.options, imagenet.data, cross_sample_lif, classes, CPU
    return imagenet.build.build_model(*args)


def load_weights(cfg, path, classes=2, **how):
    """build.load_model of a file: (model, cross_sample_lif)."""
    checkpoint = imagenet.checkpoint.load_checkpoint(path)
    args = cfg, imagenet.options, imagenet.data, CPU, classes, checkpoint, path
    return imagenet.build.load_model(*args, **how)


@pytest.fixture(scope="session")
def photo_data(tmp_path_factory):
    return photos.make(tmp_path_factory.mktemp("photos") / "data")


@pytest.fixture(scope="session")
def narrow(tmp_path_factory, photo_data):
    """Flags of a run with a narrow model on the photographs."""
    path = tmp_path_factory.mktemp("narrow") / "narrow.yml"
    path.write_text(yaml.safe_dump(NARROW))
    return "-c", path, "--data_path", photo_data


@pytest.fixture
def lines(capsys):
    """What main() of a script printed, called here with the given flags; its UserError too."""

    def call(main, *argv):
        capsys.readouterr()
        try:
            assert main(on_cpu(argv)) == 0
        except UserError as error:
            print(f"error: {error}")
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="session")
def trained_narrow(tmp_path_factory, narrow):
    output = tmp_path_factory.mktemp("output")
    done = script("imagenet", "train", *narrow, "--output_dir", output, "--experiment", "one")
    return output / "one", done.stdout


def slurm(*args):
    """Two tasks as srun starts them; the output of the first."""
    processes = []
    for rank in ("0", "1"):
        env = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_NUM_TASKS": "2"}
        env |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
        processes.append(start("imagenet", *args, env=env))
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs[0]


def kill_at(process, words):
    """SIGKILL to a run and its ranks (in sessions of their own under torchrun) once a line starts
    with `words`.
    """
    for line in process.stdout:
        if line.startswith(words):
            break
    else:
        raise AssertionError("the run ended before it could be killed")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal.SIGKILL)
    for child in map(int, children):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    process.wait()


def release_file(path, model, optimizer=None):
    """A file with the keys of the release's checkpoints, its optimizer's groups as torch 1.12
    writes them.
    """
    optimizer = (optimizer or imagenet.optim.build_optimizer(resolve(), model)).state_dict()
    kept = "lr betas eps weight_decay amsgrad foreach maximize capturable lr_scale params".split()
    groups = [{name: group[name] for name in kept} for group in optimizer["param_groups"]]
    args = argparse.Namespace(model="QKFormer_10_384", batch_size=32, device="cuda", lr=None)
    content = {"model": model.state_dict(), "epoch": 199, "scaler": {}, "args": args}
    content["optimizer"] = {"state": optimizer["state"], "param_groups": groups}
    torch.save(content, path)
    return path
