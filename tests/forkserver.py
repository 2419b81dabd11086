"""Runs of train.py in forks of a process that has PyTorch: each starts in a tenth of a second.

Takes a line of JSON for each run, [folder, flags, file for the output], and answers with the id of
its process, and with its exit code when it has ended.
"""

import json
import os
import runpy
import sys

import sklearn.datasets  # noqa: F401
import spikingjelly.datasets.cifar10_dvs
import spikingjelly.datasets.dvs128_gesture  # noqa: F401
import tensorboard.summary.writer.record_writer  # noqa: F401
import timm  # noqa: F401
import torch
import torch.utils.data
import torchvision  # noqa: F401

torch.set_num_threads(1)
for line in sys.stdin:
    folder, flags, output = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.chdir(folder)
        for descriptor, path in ((0, os.devnull), (1, output), (2, output)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
        sys.stdout.reconfigure(line_buffering=True)
        sys.path[0], sys.argv = folder, ["train.py", *flags]
        runpy.run_path("train.py", run_name="__main__")
        sys.exit()
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
