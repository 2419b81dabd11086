"""tools/gpu.py as far as a CPU goes: what it keeps of measurements that fail, take too long or are
stopped, its tables of what is there, and its measurements.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gpu
import gpu_report
import stages
from forks import ended, forked, wait_for


@pytest.fixture
def plan(monkeypatch):
    """Measurements with one figure each."""

    def measurement(then):
        def function(run):
            run.add(pid=os.getpid(), forked=torch.cuda._is_in_bad_fork())
            then()

        return function

    def fail():
        raise ValueError("no luck")

    def leave_out():
        raise stages.LeftOut("needs a second GPU")

    ways = {
        "slow": lambda: time.sleep(600),
        "well": lambda: None,
        "wrong": fail,
        "less": leave_out,
        "crash": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "last": lambda: None,
    }
    for name, way in ways.items():
        monkeypatch.setattr(stages, name, measurement(way), raising=False)
    items = tuple(gpu.Item(0.05 if name == "slow" else 1.0, name) for name in ways)
    monkeypatch.setattr(gpu, "PLAN", items)
    monkeypatch.setattr(gpu, "STAGES", tuple(ways))


def run(out, minutes):
    gpu.START = time.monotonic()
    return gpu.main(["--out", str(out), "--device", "cpu", "--minutes", str(minutes)])


def test_each_measurement_stands_alone(plan, tmp_path, capsys):
    """One that fails, crashes or takes too long takes nothing from the others, nor from its own
    figures.
    """
    assert run(tmp_path, sum(item.minutes for item in gpu.PLAN)) == 1
    found = gpu_report.read(tmp_path)
    assert {name: (one["status"], one["why"]) for name, one in found.items()} == {
        "well": ("done", ""),
        "wrong": ("failed", "ValueError: no luck"),
        "less": ("left out", "needs a second GPU"),
        "crash": ("failed", "SIGKILL"),
        "slow": ("out of time", "its time was over"),
        "last": ("done", ""),
    }
    used = bool(ended(forked(torch.cuda._is_in_bad_fork)))  # CUDA, here, by an earlier test
    for one in found.values():  # if not, it can be used there
        assert [row["forked"] for row in one["rows"]] == [used]
    assert found["slow"]["rows"] and "no luck" in (tmp_path / "log.txt").read_text()
    assert len(capsys.readouterr().out.splitlines()) == len(found)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stop_keeps_what_was_measured(plan, tmp_path, number):
    pid = forked(lambda: run(tmp_path, 60), tmp_path / "said")

    def measuring():
        file = tmp_path / "results.jsonl"
        return file.exists() and gpu_report.read(tmp_path)["slow"]["rows"]

    wait_for(measuring, 60)
    os.kill(pid, number)
    assert ended(pid, 10) == (128 + number if number == signal.SIGTERM else -number)
    found = gpu_report.read(tmp_path)
    assert found["slow"]["status"] == "started"
    process = Path(f"/proc/{found['slow']['rows'][0]['pid']}/stat")
    wait_for(lambda: not process.exists() or process.read_text().split()[2] == "Z", 10)


def test_what_is_needed_is_said(tmp_path, monkeypatch, capsys):
    for name in ("stages", "bench"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "spikingjelly.activation_based", None)
    assert run(tmp_path, 1) == 1
    assert "our neurons are its nodes: pip install" in capsys.readouterr().out
    assert {one["why"] for one in gpu_report.read(tmp_path).values()} == {"needs spikingjelly"}


def test_shares(capsys):
    assert sum(item.minutes for item in gpu.PLAN) == pytest.approx(gpu.MINUTES)
    assert gpu.PLAN[-1].stage == "tests" and {item.stage for item in gpu.PLAN} == {*gpu.STAGES}
    gpu.main(["--dry", "--minutes", "18"])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["tests", "4.4", "18.0"]


def test_tables_of_what_is_there(tmp_path, monkeypatch):
    """Of a folder that lacks most, and whose last line was cut off."""
    lines = [
        {"item": "environment", "name": "NVIDIA Z1", "torch": "2.11.0"},
        {"item": "environment", "status": "done"},
        {"item": "step QKFormer_10_768 1 fast", "kind": "train", "ms": 50.0, "host_ms": 9.0},
        {"item": "step QKFormer_10_768 1 release-like", "kind": "train", "ms": 125.0, "gb": 18.25},
        {"item": "kernels", "kernel": "fire", "mb": 64.0, "ms": 0.5, "copy_ms": 0.25},
        {"item": "graphs 1", "kind": "infer", "ms": 1.0},
        {"item": "graphs 1", "status": "started"},  # anew
        {"item": "graphs 1", "kind": "infer", "equal": True},
        {"item": "tests", "outcome": "PASSED"},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"item": "kernels", "ker'
    (tmp_path / "results.jsonl").write_text(text)
    text = gpu_report.tables(gpu_report.read(tmp_path), gpu.PLAN)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    none = gpu_report.NONE
    assert ["HST-10-768, T 1", "fast", "50.0", "1.00x", "9.0", *[none] * 6] in rows
    assert ["", "release-like", "125.0", "2.50x", *[none] * 3, "18.2", *[none] * 3] in rows
    assert ["HST-10-768, T 4", "fast", *[none] * 9] in rows
    assert ["`fire`", "1", "0.50", "0.25", "0.50"] in rows
    assert ["1 GPU", "infer", *[none] * 4, "yes"] in rows
    assert "NVIDIA Z1" in text and "1 passed" in text and "anything of a GPU" not in text
    (tmp_path / "results.jsonl").write_text("")
    monkeypatch.setattr(gpu_report, "A30", ())
    cells = gpu_report.tables(gpu_report.read(tmp_path), gpu.PLAN).split("|")
    assert none in map(str.strip, cells)
    assert not [cell for cell in cells if cell.strip().replace(".", "").isdigit()]


# Measurements -------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """(Run, the figures that it keeps)."""
    figures = []
    arguments = SimpleNamespace(device="cpu", small=True)
    monkeypatch.setattr(stages.logging.Logger, "addHandler", lambda *_: None)
    return stages.Run(arguments, lambda **row: figures.append(row)), figures


def test_kernels(small):
    """Every kernel is timed at every shape."""
    run, figures = small
    stages.kernels(run)
    names, shapes = (
        {*map(str, column)}
        for column in zip(*((row["kernel"], row["shapes"]) for row in figures), strict=True)
    )
    assert names == {*stages.models.load("imagenet").native.NAMES} and len(shapes) > 3
    assert all(row["ms"] > 0 and row["copy_ms"] > 0 and row["mb"] > 0 for row in figures)


@pytest.fixture
def graphs(small, cuda, monkeypatch, tmp_path):
    """graphs(ranks) of stages.py with stand-ins for graphs; it returns the figures."""
    run, _ = small
    results = gpu.Results(tmp_path)
    run.on_gpu, candidate = True, run.candidate
    run.add = lambda **figures: results.add("graphs", **figures)
    monkeypatch.setattr(stages, "STEPS", 2)
    monkeypatch.setattr(run, "wait", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda rank: None)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)  # and so it will be again

    def on_cpu(name, T, path, **options):  # the tape sees PyTorch's operators alone
        run.device, run.on_gpu = torch.device("cpu"), False
        made = candidate(name, T, "plain", **options)
        run.on_gpu = True
        return made

    def measure(ranks):
        stages.graphs(run, ranks)
        return gpu_report.read(tmp_path)["graphs"]["rows"]

    monkeypatch.setattr(run, "candidate", on_cpu)
    return measure


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "kinds"), [(1, ["infer", "train"]), (2, ["train"])])
def test_graphs(graphs, ranks, kinds):
    rows = graphs(ranks)
    assert [row["kind"] for row in rows if row.get("equal")] == kinds
    assert [row["way"] for row in rows if "way" in row] == ["eager", "graph"] * len(kinds)


@pytest.mark.long
def test_graphs_that_leave_something_out(graphs, monkeypatch):
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: None)
    with pytest.raises(RuntimeError, match="infer: graphs and eager steps differ"):
        graphs(1)
    with pytest.raises(RuntimeError, match="a rank failed"):
        graphs(2)


@pytest.mark.long
def test_all_measurements(tmp_path):
    gpu.START = time.monotonic()
    words = ["--device", "cpu", "--small", "--minutes", "60"]
    assert gpu.main(["--out", str(tmp_path), *words]) == 0
    found = gpu_report.read(tmp_path)
    out = {name for name, one in found.items() if one["status"] == "left out"}
    assert out == {"graphs 1", "graphs 2", "tests"} and len(found) == len(gpu.PLAN)
    text = gpu_report.tables(found, gpu.PLAN)
    assert "says anything of a GPU" in text and "`fire_backward`" in text
