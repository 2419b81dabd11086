"""What the stages of tools/gpu.py share: the model that is asked, clocks, commands, the tests'
modules.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import bench as tables
import models

ROOT = Path(__file__).resolve().parent.parent


class Run:
    """What a stage is told: `device`, `small`, `out`."""

    def __init__(self, arguments):
        self.device, self.small, self.out = (
            torch.device(arguments.device),
            arguments.small,
            Path(arguments.out),
        )
        self.on_gpu = self.device.type == "cuda"
        self.dtype = torch.float16 if self.on_gpu else torch.float32
        self.name, self.size, self.T = (
            ("cifar10", 32, 2) if self.small else ("QKFormer_10_384", 224, 4)
        )
        self.batch = 2 if self.small else 32

    def modules(self):
        return models.load(models.folder_of(self.name))

    def candidate(self, path="fast"):
        torch.manual_seed(0)
        tables.set_up(self.name)
        x = models.make_input(self.name, self.batch, self.T, self.size, self.device)
        model = tables.build(self.name, path, self.T, self.modules())
        return tables.Candidate(model, x, self.dtype, False)

    def lively(self):
        """A candidate in evaluation whose neurons fire; with the weights of a start the logits
        could be 0.
        """
        candidate = self.candidate()
        conftest().Golden.fill(candidate.model).float().eval()
        return candidate

    def wait(self):
        if self.on_gpu:
            torch.cuda.synchronize()

    def milliseconds(self, function, rounds=10):
        """(median time until the host has launched it, median time until it is done)."""
        times = []
        function()
        for _ in range(2 if self.small else rounds):
            self.wait()
            start = time.perf_counter()
            function()
            launched = time.perf_counter()
            self.wait()
            times.append((launched - start, time.perf_counter() - start))
        return [1000 * statistics.median(column) for column in zip(*times, strict=True)]

    def gpu_milliseconds(self, function, rounds=30):
        """Mean time on the GPU itself, which sleeps until the host has launched them all."""
        if not self.on_gpu:
            return self.milliseconds(function)[1]
        function()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(20_000_000)  # cycles: some 10 ms
        begin.record()
        for _ in range(rounds):
            function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / rounds

    def command(self, *words, check=True):
        """Output of a command, which is in the stage's log too."""
        words = [*map(str, words)]
        print("$", *words, flush=True)
        done = subprocess.run(
            words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        print(done.stdout, flush=True)
        if check and done.returncode:
            raise RuntimeError(f"exit code {done.returncode} of {' '.join(words[:6])}")
        return done.stdout


def conftest():
    """What the tests share: golden numbers, folders' modules."""
    sys.path.insert(0, str(ROOT / "tests"))
    import conftest

    return conftest
