"""Stages of tools/gpu.py that start tests and scripts, or compare with the golden numbers."""

import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys

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


def sanitizer(run):
    if not shutil.which("compute-sanitizer"):
        raise RuntimeError("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    rows = []
    for tool in ("memcheck", "racecheck"):
        words = [sys.executable, "-m", "pytest", "-n0", "-q", "-k", "gpu or cupy", *GPU_TESTS[:3]]
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
