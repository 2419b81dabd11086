"""What tools/gpu.py does in each of its stages."""

import copy
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import warnings
from types import SimpleNamespace

import torch
from timing import ROOT, conftest

GPU_TESTS = [
    f"tests/test_{name}.py"
    for name in ("lif", "neurons", "fused", "layer", "fused_models", "gpu_steps", "graph")
]
GOLDEN = {  # the folder, file and function of each
    "cifar10": ("cifar10", "model", "QKFormer"),
    "cifar10-ms": ("cifar10", "ms", "MSQKFormer"),
    "cifar100": ("cifar100", "model", "QKFormer"),
    "dvs128-gesture": ("dvs128-gesture", "model", "QKFormer"),
    "cifar10-dvs": ("cifar10-dvs", "model", "QKFormer"),
    "imagenet-384": ("imagenet", "model", "QKFormer_10_384"),
    "imagenet-ms-384": ("imagenet", "ms", "MSQKFormer_10_384"),
}
ROWS = {
    401_408: (96, 192, 384),
    100_352: (192, 384, 768),
    25_088: (384, 1152, 1536),
}  # of HST-10-384 at batch 32


# Each returns (a line for the table, [what was found]) --------------------------------------------


def environment(run):
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    found |= {
        "cudnn": torch.backends.cudnn.version(),
        "processor": platform.processor(),
        "cores": os.cpu_count(),
    }
    for tool, flag in (
        ("nvidia-smi", "-q"),
        ("g++", "--version"),
        ("nvcc", "--version"),
        ("compute-sanitizer", "-v"),
    ):
        found[tool] = bool(shutil.which(tool)) and run.command(tool, flag, check=False)
    if run.on_gpu:
        properties = torch.cuda.get_device_properties(run.device)
        found |= {"name": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        found |= {
            "memory_mb": properties.total_memory >> 20,
            "multiprocessors": properties.multi_processor_count,
        }
    compiler = "yes" if found["g++"] else "no"
    line = f"{found.get('name', 'no GPU')}, torch {torch.__version__}, g++ {compiler}"
    return line, [found]


def tests(run):
    if run.on_gpu:
        text = run.command(
            sys.executable,
            "-m",
            "pytest",
            "-n0",
            "-q",
            "-k",
            "gpu or cupy",
            *GPU_TESTS,
            check=False,
        )
        line = text.strip().splitlines()[-1]
    else:
        line = "GPU tests skipped"
    rows = golden(run)
    wrong = [row for row in rows if not row["error"] <= row["allowed"]]
    line += f"; golden numbers: {len(rows) - len(wrong)} of {len(rows)}"
    if wrong or "failed" in line or "error" in line:
        print(json.dumps(wrong, indent=1))
        raise RuntimeError(line)
    return line, rows


def golden(run):
    """Errors of logits in evaluation and training and of gradients' norms, relative to the largest
    number.
    """
    Golden, load = conftest().Golden, conftest().load
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    backends = [
        ("auto", True),
        ("torch", False),
        ("spikingjelly", False),
        *([("cupy", False)] if run.on_gpu else []),
    ]
    rows = []
    for name, (folder, file, function) in itertools.islice(
        GOLDEN.items(), 1 if run.small else None
    ):
        data = Golden(name)
        for (backend, fused), dtype in itertools.product(backends, (torch.float64, torch.float32)):
            if backend == "cupy" and dtype == torch.float64:
                continue
            build = getattr(getattr(load(folder), file), function)
            model = (
                data.fill(build(T=data.meta["T"], backend=backend, fused=fused))
                .to(run.device, dtype)
                .eval()
            )
            x, got = data.input().to(run.device, dtype), {}
            with torch.no_grad():
                got["eval_logits"] = model(x)
            got["train_logits"] = model.train()(x)
            target = data.target(got["train_logits"].shape[1]).to(run.device)
            torch.nn.functional.cross_entropy(got["train_logits"], target).backward()
            parameters = dict(model.named_parameters())
            got["grad_norms"] = torch.stack(
                [parameters[key].grad.norm() for key in data.meta["parameters"]]
            )
            for key, value in got.items():
                want = torch.as_tensor(data.arrays[f"per_sample/{key}"])
                error = (
                    (value.detach().cpu().double() - want).abs().max() / want.abs().max()
                ).item()
                # in float32 a membrane at the threshold may fire where it did not
                allowed = 1e-9 if dtype == torch.float64 else 0.1
                row = {
                    "golden": name,
                    "backend": backend,
                    "fused": fused,
                    "dtype": str(dtype),
                    "of": key,
                }
                rows.append({**row, "error": error, "allowed": allowed})
    return rows


def step(run):
    LossMeter = conftest().load("imagenet").engine.LossMeter
    rows = []
    for path in ("fast", "release-like"):
        for choose in (False, True):
            candidate = run.candidate(path)
            torch.backends.cudnn.benchmark = choose
            for kind in ("train", "infer"):
                host, wall = run.milliseconds(getattr(candidate, kind))
                row = {
                    "path": path,
                    "kind": kind,
                    "cudnn_benchmark": choose,
                    "host_ms": host,
                    "wall_ms": wall,
                }
                rows.append(row)
            meter = LossMeter(SimpleNamespace(world_size=1, sum=lambda loss: loss))
            meter.update(candidate.train(), False)
            rows[-2]["waits"] = waits(
                run, lambda c=candidate, meter=meter: meter.update(c.train(), False)
            )
        profiled(run, candidate, path)
        del candidate
    chosen = [row for row in rows if row["cudnn_benchmark"] and row["kind"] == "train"]
    return ", ".join(
        f"{row['path']} {row['wall_ms']:.1f} ms (host {row['host_ms']:.1f})" for row in chosen
    ), rows


def waits(run, function):
    """The lines at which the host waits for the GPU in one step, as PyTorch's debug
    mode sees them.
    """
    if not run.on_gpu:
        return []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


def profiled(run, candidate, path):
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if run.on_gpu else []
    with torch.profiler.profile(activities=activities) as trace:
        candidate.train()
        run.wait()
    order = "self_cuda_time_total" if run.on_gpu else "self_cpu_time_total"
    table = trace.key_averages().table(sort_by=order, row_limit=80, max_name_column_width=90)
    (run.out / f"profile-{path}.txt").write_text(table)


def kernels(run):
    candidate = run.candidate()
    fused, rows, seen = sys.modules["fused"], [], set()
    launch = fused.launch

    def timed(name, y, *args, **build):
        tensors = {arg.data_ptr(): arg for arg in (y, *args) if torch.is_tensor(arg)}
        shapes = [tuple(tensor.shape) for tensor in tensors.values()]
        signature = (name, *build.values(), *shapes)
        if signature not in seen:
            seen.add(signature)
            kept = [tensor.clone() for tensor in tensors.values()]
            wall = run.gpu_milliseconds(lambda: launch(name, y, *args, **build))
            for tensor, value in zip(
                tensors.values(), kept, strict=True
            ):  # some kernels write where they read
                tensor.data.copy_(value)
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            half = torch.empty(size // 2, dtype=torch.uint8, device=run.device)
            other = torch.empty_like(half)
            bare = run.gpu_milliseconds(lambda: other.copy_(half))
            row = {
                "kernel": name,
                **build,
                "shapes": shapes,
                "mb": size / 2**20,
                "ms": wall,
                "copy_ms": bare,
            }
            rows.append({**row, "of_copy": bare / wall})
        launch(name, y, *args, **build)

    fused.launch = timed
    try:
        candidate.train()
        candidate.infer()
    finally:
        fused.launch = launch
    slow = min(rows, key=lambda row: row["of_copy"])
    return (
        f"{len(rows)} shapes; slowest: {slow['kernel']} at {slow['of_copy']:.2f} of a copy's speed",
        rows,
    )


def products(run):
    rows = []
    for n, channels in {500: (8, 16)}.items() if run.small else ROWS.items():
        for out, into in itertools.combinations_with_replacement(channels, 2):
            torch.manual_seed(0)
            grad = torch.randn(n, out, device=run.device).to(torch.float16)
            x = (torch.rand(n, into, device=run.device) < 0.2).to(torch.float16)
            want = grad[:, :8].double().t() @ x.double()
            ways = {"float16": lambda grad=grad, x=x: grad.t() @ x}
            if run.on_gpu:
                ways["float32"] = lambda grad=grad, x=x: torch.mm(
                    grad.t(), x, out_dtype=torch.float32
                )
            for way, function in ways.items():
                wall = run.gpu_milliseconds(function)
                error = ((function()[:8].double() - want).norm() / want.norm()).item()
                row = {"rows": n, "out": out, "in": into, "result": way, "ms": wall, "error": error}
                rows.append({**row, "tflops": 2e-9 * n * out * into / wall})
    worst = {way: max(row["error"] for row in rows if row["result"] == way) for way in ways}
    return "largest error: " + ", ".join(f"{way} {error:.1e}" for way, error in worst.items()), rows


def bench(run):
    small = [
        "--model",
        "cifar10",
        "--T",
        1,
        "--rounds",
        1,
        "--batch",
        1,
        "--paths",
        "fast",
        "release-like",
    ]
    words = small if run.small else ["--batch", 32, 64]
    path = run.out / "bench-rows.json"
    run.command(
        sys.executable, "tools/bench.py", "--device", run.device, *words, "--json", path.resolve()
    )
    rows = json.loads(path.read_text())["rows"]
    first = [r for r in rows if r["kind"] == "train" and r["batch"] == rows[0]["batch"]]
    return ", ".join(
        f"{row['path']} {row['images_per_second']:.0f} images/s" for row in first
    ), rows


def graphs(run):
    """Inference and training steps by graphs (graph.py) and without, in time and to the bit."""
    Graph = conftest().load("imagenet").graph.Graph
    torch.backends.cudnn.deterministic = True
    rows = []
    for kind in (infer, train):
        found = {}
        for way in ("eager", "graph"):
            candidate = run.lively()
            forward = Graph(candidate.model) if way == "graph" else candidate.model
            steps = 8 if run.on_gpu else 2  # float16's scaler skips some at first
            logits = [kind(candidate, forward) for _ in range(steps)]
            state = [*logits, *candidate.model.state_dict().values()]
            found[way] = [value.clone() for value in state]
            times = run.milliseconds(lambda c=candidate, f=forward, kind=kind: kind(c, f))
            rows.append(
                {"kind": kind.__name__, "way": way, "host_ms": times[0], "wall_ms": times[1]}
            )
        if kind is train and torch.equal(logits[0], logits[-1]):
            raise RuntimeError("no training step was taken, so there is nothing to compare")
        if not all(map(torch.equal, *found.values())):
            raise RuntimeError(f"{kind.__name__}: graphs and eager steps differ")
    walls = [f"{row['way']} {row['wall_ms']:.2f} ms" for row in rows]
    return f"inference: {', '.join(walls[:2])}; training: {', '.join(walls[2:])}; equal", rows


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


@torch.inference_mode()
def compiled(run):
    candidate = run.lively()
    eager = candidate.model
    other = copy.deepcopy(eager)
    other.compile(dynamic=False, backend="inductor" if run.on_gpu else "aot_eager")
    results = {}
    for name, model in (("eager", eager), ("compiled", other)):
        with candidate.autocast():
            results[name] = (
                model(candidate.x),
                *run.milliseconds(lambda model=model: model(candidate.x)),
            )
    error = (
        (results["eager"][0] - results["compiled"][0]).norm() / results["eager"][0].norm()
    ).item()
    rows = [
        {"path": name, "host_ms": r[1], "wall_ms": r[2], "error": error}
        for name, r in results.items()
    ]
    return (
        f"eager {rows[0]['wall_ms']:.2f} ms, compiled {rows[1]['wall_ms']:.2f} ms, differ by "
        f"{error:.1e}",
        rows,
    )


def sanitizer(run):
    if not shutil.which("compute-sanitizer"):
        raise RuntimeError("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    rows = []
    for tool in ("memcheck", "racecheck"):
        words = [sys.executable, "-m", "pytest", "-n0", "-q", "-k", "gpu or cupy", *GPU_TESTS[:2]]
        words = [
            "compute-sanitizer",
            "--tool",
            tool,
            "--target-processes",
            "all",
            "--error-exitcode",
            "9",
            *words,
        ]
        rows.append({"tool": tool, "output": run.command(*words)[-2000:]})
    return "memcheck and racecheck found nothing", rows


def photos(run):
    common = [
        "-c",
        "quickstart.yml",
        "--device",
        run.device,
        "--data_path",
        (run.out / "data").resolve(),
    ]
    common += [
        "--output_dir",
        (run.out / "runs").resolve(),
        "--resume",
        "auto",
        "--epochs",
        2 if run.small else 10,
    ]
    if run.small:
        common += "--input_size 16 --time_step 1 --dim 32 --num_heads 1 --batch_size 64".split()
    rows = []
    for name, amp in (("float16", "true"), ("float32", "false")):
        words = [sys.executable, "train.py", *map(str, common), "--experiment", name, "--amp", amp]
        if amp == "true":  # stopped after some epochs, then resumed
            stop_at(words, "epoch 0: " if run.small else "epoch 4: ")
        print(
            subprocess.run(
                words, cwd=ROOT / "imagenet", check=True, stdout=subprocess.PIPE, text=True
            ).stdout
        )
        log = [
            json.loads(line)
            for line in (run.out / "runs" / name / "log.txt").read_text().splitlines()
        ]
        rows += [{"run": name, **line} for line in log]
        if [line["epoch"] for line in log] != list(range(common[common.index("--epochs") + 1])):
            raise RuntimeError(f"{name}: the log lacks an epoch or has one twice")
    last = {row["run"]: row for row in rows}
    ends = (
        f"{name} loss {row['train_loss']:.3f}, top-1 {row['test_acc1']:.1f} %"
        for name, row in last.items()
    )
    return "; ".join(ends), rows


def stop_at(words, start):
    """Run a command and end it as a scheduler would once a line begins with `start`."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        words, cwd=ROOT / "imagenet", stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        for line in process.stdout:
            print(line, end="")
            if line.startswith(start):
                process.send_signal(signal.SIGTERM)
    if process.returncode != 128 + signal.SIGTERM:
        raise RuntimeError(f"exit code {process.returncode} of a run that was stopped")
