"""Stages of tools/gpu.py that measure here: a step, kernels, products, graphs, compiled."""

import copy
import itertools
import warnings
from types import SimpleNamespace

import torch

import models

ROWS = {
    401_408: (96, 192, 384),
    100_352: (192, 384, 768),
    25_088: (384, 1152, 1536),
}  # of HST-10-384 at batch 32


# Each returns (a line for the table, [what was found]) --------------------------------------------


def step(run):
    LossMeter = models.load("imagenet").meters.LossMeter
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
    fused, rows, seen = run.modules().ops, [], set()
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


def graphs(run):
    """Inference and training steps by graphs (graph.py) and without, in time and to the bit."""
    Graph = models.load("imagenet").graph.Graph
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
