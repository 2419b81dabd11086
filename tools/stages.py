"""The measurements of tools/gpu.py, each for a process of its own."""

import importlib.metadata
import logging
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings

import torch
from spikingjelly.activation_based import functional

import bench
import models

sys.path.append(str(models.ROOT / "tests"))
import conftest

PACKAGES = ("torch", "triton", "spikingjelly", "timm", "numpy", "cupy-cuda13x", "cupy-cuda12x")
GOLDEN = {
    "imagenet-384": ("imagenet", "QKFormer_10_384"),
    "dvs128-gesture": ("dvs128-gesture", "QKFormer"),
}
TESTS = ("native", "lif", "neurons", "fused", "layer", "fused_models", "gpu_steps", "graph")
TESTS += ("pixels",)
SMALL = {"embed_dims": 48, "num_heads": 1}
STEPS = 8  # by graphs; the scaler skips some at first
KERNELS = 25  # of a step, by their time


class LeftOut(Exception):
    """Why a measurement can't be made here."""


class Run:
    """What a measurement is told: `on_gpu`, `small`, and `add`, which keeps figures."""

    def __init__(self, arguments, add):
        self.device, self.small, self.add = torch.device(arguments.device), arguments.small, add
        self.on_gpu = self.device.type == "cuda"
        # What the layers say of how they run is a figure too.
        logger = logging.getLogger("qkformer")
        logger.setLevel(logging.INFO)
        handler = logging.StreamHandler(sys.stdout)
        handler.emit = lambda record: add(said=record.getMessage())
        logger.addHandler(handler)

    def candidate(self, name, T, path, lively=False):
        """bench.py's Candidate of 32 images of 224 x 224; with `lively` its neurons fire."""
        torch.manual_seed(0)
        bench.set_up(name)
        batch, size = (2, 32) if self.small else (32, 224)
        x = models.make_input(name, batch, T, size, self.device)
        modules = models.load(models.folder_of(name))
        model = bench.build(name, path, T, modules, **(SMALL if self.small else {}))
        if lively:
            conftest.Golden.fill(model).float()
        dtype = torch.float16 if self.on_gpu else torch.float32
        return bench.Candidate(model, x, dtype)

    def wait(self):
        if self.on_gpu:
            torch.cuda.synchronize()

    def milliseconds(self, function, rounds=10):
        """Medians {ms: until it is done, host_ms: until the host has launched it}."""
        times = []
        for _ in range(2 if self.small else rounds):
            self.wait()
            start = time.perf_counter()
            function()
            launched = time.perf_counter()
            self.wait()
            times.append((time.perf_counter() - start, launched - start))
        all_, host = (1000 * statistics.median(column) for column in zip(*times, strict=True))
        return {"ms": all_, "host_ms": host}

    def gpu_milliseconds(self, function, rounds=20):
        """Mean time on the GPU itself, which sleeps until the host has launched them all."""
        function()
        if not self.on_gpu:
            return self.milliseconds(function)["ms"]
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(20_000_000)  # cycles: some 10 ms
        begin.record()
        for _ in range(rounds):
            function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / rounds


# What is there ------------------------------------------------------------------------------------


def environment(run):
    found = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "date": time.strftime("%F"),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    run.add(**found, cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    run.add(**{tool: bool(shutil.which(tool)) for tool in ("g++", "nvcc")})
    if not run.on_gpu:
        return
    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no GPU; --device cpu --small tries the script")
    gpu = torch.cuda.get_device_properties(0)
    run.add(name=gpu.name, capability=f"{gpu.major}.{gpu.minor}", memory_gb=gpu.total_memory / 1e9)
    run.add(gpus=torch.cuda.device_count())
    words = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
    run.add(driver=subprocess.run(words, capture_output=True, text=True).stdout.split("\n")[0])


# Is it right --------------------------------------------------------------------------------------


def golden(run, name):
    """Errors of logits and of gradients' norms, relative to the largest number."""
    folder, function = GOLDEN[name]
    data, modules = conftest.Golden(name), conftest.load(folder)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    double, single = torch.float64, torch.float32
    ways = [("torch", "torch", double), ("torch", "torch", single), ("fused", "auto", single)]
    ways += [("cupy", "cupy", single)] if run.on_gpu else [("fused", "auto", double)]
    wrong = []
    for way, backend, dtype in ways:
        build = getattr(modules.model, function)
        model = data.fill(build(T=data.meta["T"], backend=backend, fused=way == "fused"))
        model, x = model.to(run.device, dtype).eval(), data.input().to(run.device, dtype)
        with torch.no_grad():
            got = {"eval_logits": model(x)}
        got["train_logits"] = model.train()(x)
        target = data.target(got["train_logits"].shape[1]).to(run.device)
        torch.nn.functional.cross_entropy(got["train_logits"], target).backward()
        parameters = dict(model.named_parameters())
        norms = [parameters[key].grad.norm() for key in data.meta["parameters"]]
        got["grad_norms"] = torch.stack(norms)
        errors = {}
        for key, value in got.items():
            want = torch.as_tensor(data.arrays[f"per_sample/{key}"])
            error = (value.detach().cpu().double() - want).abs().max() / want.abs().max()
            errors[key] = error.item()
        run.add(way=way, dtype=str(dtype)[6:], **errors)
        # In float32 a membrane at the threshold may fire where it did not, and takes others along.
        if not max(errors.values()) <= (1e-9 if dtype == double else 0.5):
            wrong.append(f"{way} in {str(dtype)[6:]}")
    if wrong:
        raise RuntimeError(f"other numbers than the golden ones: {', '.join(wrong)}")


# How fast is it -----------------------------------------------------------------------------------


def step(run, name, T, path):
    candidate = run.candidate(name, T, path)
    candidate.adopt_statistics()
    for kind in ("infer", "train"):  # no gradient is in memory at first
        function = getattr(candidate, kind)
        for _ in range(2):  # compiles kernels, chooses algorithms
            function()
        if run.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found = run.milliseconds(function)
        if run.on_gpu:
            found["gb"] = torch.cuda.max_memory_allocated() / 1e9
            found["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        size = "x".join(map(str, candidate.x.shape[2:]))
        what = f"{len(candidate.x)} images of {size}, {'float16' if run.on_gpu else 'float32'}"
        run.add(kind=kind, what=what, **found)
        run.add(kernels_of=kind, **kernels_of(run, function))
    if run.on_gpu and path != "fast":
        run.add(neuron=functional.neuron_implementation("lif", run.device)["implementation"])
    if run.on_gpu and path == "fast":
        run.add(waits=waits(candidate.train))


def kernels_of(run, function):
    """{launches, gpu_ms, kernels: [(name, launches, ms), ...]} of one call."""
    kind = "CUDA" if run.on_gpu else "CPU"
    with torch.profiler.profile(
        activities=[getattr(torch.profiler.ProfilerActivity, kind)]
    ) as seen:
        function()
        run.wait()
    time_of = f"self_{'device' if run.on_gpu else 'cpu'}_time_total"
    device = getattr(torch.autograd.DeviceType, kind)
    rows = [
        (event.key, event.count, getattr(event, time_of) / 1000)
        for event in seen.key_averages()
        if event.device_type == device
    ]
    rows.sort(key=lambda row: -row[2])
    launches, total = sum(row[1] for row in rows), sum(row[2] for row in rows)
    return {"launches": launches, "gpu_ms": total, "kernels": rows[:KERNELS]}


def waits(function):
    """The lines at which the host waits for the GPU, as PyTorch's debug mode sees them."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


def graphs(run, ranks):
    """Inference and training steps by graphs (graph.py) and without, in time and to the bit."""
    if not run.on_gpu or torch.cuda.device_count() < ranks:  # asks NVML, so that forks can use CUDA
        raise LeftOut(f"needs {ranks} GPU{'s' * (ranks > 1)}")
    if ranks == 1:
        return compare(run, 1)
    with tempfile.TemporaryDirectory() as place:
        context = torch.multiprocessing.get_context("fork")
        args = [(run, rank, ranks, f"file://{place}/store") for rank in range(ranks)]
        processes = [context.Process(target=compare_rank, args=one) for one in args]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a rank failed; log.txt has its words")


def compare_rank(run, rank, ranks, store):
    run.device = torch.device("cuda", rank)
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group(init_method=store, rank=rank, world_size=ranks)
    run.add = run.add if rank == 0 else lambda **_: None
    compare(run, ranks)
    torch.distributed.destroy_process_group()


def compare(run, ranks):
    Graph = models.load("imagenet").graph.Graph
    torch.backends.cudnn.deterministic = True
    for kind in (infer, train) if ranks == 1 else (train,):
        found = {}
        for way in ("eager", "graph"):
            candidate = run.candidate("QKFormer_10_384", 4, "fast", lively=True)
            forward = Graph(candidate.model) if way == "graph" else candidate.model
            if ranks > 1:
                forward = torch.nn.parallel.DistributedDataParallel(
                    forward, broadcast_buffers=False
                )
            logits = [kind(candidate, forward) for _ in range(STEPS)]
            state = [*logits, *candidate.model.state_dict().values()]
            found[way] = [value.clone() for value in state]
            times = run.milliseconds(lambda c=candidate, f=forward, kind=kind: kind(c, f))
            run.add(kind=kind.__name__, way=way, ranks=ranks, **times)
        if kind is train and torch.equal(logits[0], logits[-1]):
            raise RuntimeError("no training step was taken, so there is nothing to compare")
        same = all(map(torch.equal, *found.values()))
        run.add(kind=kind.__name__, ranks=ranks, equal=same)
        if not same:
            raise RuntimeError(f"{kind.__name__}: graphs and eager steps differ")


@torch.inference_mode()
def infer(candidate, forward):
    forward.eval()
    with candidate.autocast():
        return forward(candidate.x)


def train(candidate, forward):
    forward.train()
    with candidate.autocast():
        logits = forward(candidate.x)
        loss = torch.nn.functional.cross_entropy(logits, candidate.target)
    candidate.optimizer.zero_grad()
    candidate.scaler.scale(loss).backward()
    candidate.scaler.step(candidate.optimizer)
    candidate.scaler.update()
    return logits.detach()


def kernels(run):
    """Each kernel beside a copy of its bytes, at the shapes of HST-10-384."""
    import by_hand

    candidate = run.candidate("QKFormer_10_384", 4, "fast")
    shapes, dtype = set(), torch.float16 if run.on_gpu else torch.float32
    for module in candidate.model.modules():
        if hasattr(module, "v_threshold"):
            module.register_forward_pre_hook(lambda _, args: shapes.add(tuple(args[0].shape)))
    candidate.infer()
    launch = by_hand.launch

    def timed(name, y, *args, **build):
        tensors = {arg.data_ptr(): arg for arg in args if torch.is_tensor(arg)}
        ms = run.gpu_milliseconds(lambda: launch(name, y, *args, **build))
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        half = torch.empty(size // 2, dtype=torch.uint8, device=run.device)
        other = torch.empty_like(half)
        bare = run.gpu_milliseconds(lambda: other.copy_(half))
        run.add(kernel=name, shapes=[tuple(y.shape)], mb=size / 1e6, ms=ms, copy_ms=bare)

    by_hand.launch = timed
    for shape in sorted(shape for shape in shapes if len(shape) == 5):
        y = by_hand.rows(torch.randn(shape, device=run.device).to(dtype))
        by_hand.every_kernel(y, shape)
    by_hand.launch = launch


# What the tests say -------------------------------------------------------------------------------


def tests(run):
    if not run.on_gpu:
        raise LeftOut("needs a GPU")
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-n0",
        "-v",
        "--color=no",
        "-k",
        "on_gpu or on_a_gpu or cupy",
    ]
    words += [f"tests/test_{name}.py" for name in TESTS]
    process = subprocess.Popen(
        words, cwd=models.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        print(line, end="")
        words = line.split()
        if len(words) > 1 and words[1] in ("PASSED", "FAILED", "ERROR", "SKIPPED"):
            run.add(test=words[0], outcome=words[1])
    if process.wait():
        raise RuntimeError(f"pytest ends with {process.returncode}; log.txt has its words")
