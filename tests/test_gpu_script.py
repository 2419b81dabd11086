"""tools/gpu.py as far as a CPU goes: its stages, its table, and what it says of one that fails or
takes too long.
"""

import json
from types import SimpleNamespace

import pytest
import torch

import checks
import gpu
import stages
import timing


@pytest.fixture
def run(tmp_path, monkeypatch):
    return timing.Run(SimpleNamespace(device="cpu", small=True, out=tmp_path))


def test_kernels_and_products(run):
    """Every kernel of a step is timed at every shape, and what it writes in place is as if it had
    run once.
    """
    line, rows = stages.kernels(run)
    names = {row["kernel"] for row in rows}
    assert names == {
        "fire",
        "fire_backward",
        "normalise_backward",
        "pool",
        "pool_backward",
        "statistics",
        "batch_norm",
        "batch_norm_backward",
        "update",
        "running_norm",
    }
    assert (
        all(row["ms"] > 0 and row["copy_ms"] > 0 and row["mb"] > 0 for row in rows)
        and "slowest" in line
    )
    line, rows = stages.products(run)
    assert all(0 < row["error"] < 1e-2 for row in rows) and "float16" in line


def test_kernels_leave_the_step_as_it_was(run, monkeypatch):
    """A step whose kernels are timed has the gradients and weights of a plain one."""
    plain, timed = run.lively(), run.lively()
    plain.train()
    monkeypatch.setattr(run, "candidate", lambda: timed)
    stages.kernels(run)
    assert any(parameter.grad.any() for parameter in plain.model.parameters())
    for one, other in zip(plain.model.parameters(), timed.model.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad) and torch.equal(one, other)


@pytest.mark.long
def test_compiled_and_environment(run):
    line, rows = stages.compiled(run)
    assert rows[1]["error"] < 1e-5 and "differ by" in line
    assert torch.__version__ in checks.environment(run)[0]


@pytest.mark.long
def test_graphs(run, cuda, monkeypatch):
    """The stage's own code; a replay that leaves something out is found."""
    run.size, run.T = 8, 1
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)  # and so it will be again
    line, rows = stages.graphs(run)
    assert "equal" in line and [row["way"] for row in rows] == ["eager", "graph"] * 2
    monkeypatch.setattr(type(cuda.graphs[0]), "replay", lambda graph: None)
    with pytest.raises(RuntimeError, match="infer: graphs and eager steps differ"):
        stages.graphs(run)


def test_summary(tmp_path, monkeypatch, capsys):
    """A stage that fails, one that takes too long and one that needs a GPU, beside one
    that works.
    """
    monkeypatch.setitem(gpu.LIMITS, "step", 0.2)
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "stage.py"))
    (tmp_path / "stage.py").write_text(
        "import json, sys, time\n"
        "name, out = sys.argv[2], sys.argv[4]\n"
        "if name == 'kernels': raise RuntimeError('no luck')\n"
        "if name == 'step': time.sleep(600)\n"
        "open(f'{out}/{name}.json', 'w').write(json.dumps({'line': 'well', 'rows': []}))\n"
    )
    chosen = ["step", "kernels", "graphs", "products"]
    assert (
        gpu.main(
            ["--out", str(tmp_path / "out"), "--device", "cpu", "--small", "--stages", *chosen]
        )
        == 1
    )
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["status"] for row in rows] == ["timed out", "failed", "skipped", "ok"]
    assert rows[1]["line"] == "RuntimeError: no luck" and rows[3]["line"] == "well"
    table = capsys.readouterr().out
    assert all(name in table for name in chosen)


@pytest.mark.long
def test_all_stages(tmp_path):
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--small"]) == 0
    rows = {row["stage"]: row for row in json.loads((tmp_path / "summary.json").read_text())}
    assert {name for name, row in rows.items() if row["status"] == "skipped"} == set(gpu.NEEDS_GPU)
    assert "self_cpu" in (tmp_path / "profile-fast.txt").read_text().lower().replace(" ", "_")
    epochs = json.loads((tmp_path / "photos.json").read_text())["rows"]
    assert [(row["run"], row["epoch"]) for row in epochs] == [
        (name, e) for name in ("float16", "float32") for e in (0, 1)
    ]
