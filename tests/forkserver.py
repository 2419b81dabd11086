"""Runs of train.py and test.py in forks of a process that has PyTorch: each starts in a tenth of a
second.

Takes a line of JSON for each run, [folder, script, flags, file for the output, ranks], and answers
with the ids of its processes, and with their exit codes when they have ended.
"""

import json
import os
import runpy
import socket
import sys

import sklearn.datasets  # noqa: F401
import spikingjelly.datasets.cifar10_dvs
import spikingjelly.datasets.dvs128_gesture  # noqa: F401
import timm  # noqa: F401
import torch
import torch.utils.data
import torch.utils.tensorboard
import torchvision  # noqa: F401

torch.set_num_threads(1)


def fork(folder, script, flags, output, env):
    """The id of a process that runs the script; does not return in that process."""
    if pid := os.fork():
        return pid
    os.setpgid(0, 0)
    os.chdir(folder)
    os.environ.update(env)
    for descriptor, path in ((0, os.devnull), (1, output)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    os.dup2(1, 2)
    sys.stdout.reconfigure(line_buffering=True)
    sys.path[0], sys.argv = folder, [f"{script}.py", *flags]
    runpy.run_path(f"{script}.py", run_name="__main__")
    sys.exit()


for line in sys.stdin:
    folder, script, flags, output, ranks = json.loads(line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"WORLD_SIZE": str(ranks)}
    pids = [
        fork(folder, script, flags, output, {**place, "RANK": str(rank)}) for rank in range(ranks)
    ]
    print(*pids, flush=True)
    print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids), flush=True)
