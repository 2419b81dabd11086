"""tools/export.py: a folder in timm's layout has the weights and the logits of the checkpoint, for
timm, for this project and for onnxruntime; checkpoints by URL.
"""

import functools
import hashlib
import http.server
import json
import threading

import pytest
import timm
import torch

import export
from conftest import Golden, load, register
from on_digits import call

SIZES = {"embed_dims": 32, "num_heads": 2, "depths": 3, "num_classes": 10}
KEYS = {"dim": 32, "num_heads": 2, "layer": 3, "num_classes": 10, "time_step": 3, "img_size": 16}
FLAGS = ("--workers", 0, "--device", "cpu")


def checkpoint(folder, name="cifar10", path="best.pth", **config):
    """(a file as a run leaves it, its model)."""
    modules = load(name)
    kind = modules.ms.MSHST if config.get("model") == "MSQKFormer" else modules.model.HST
    model = Golden.fill(kind(T=3, **SIZES)).float().eval()
    content = {"model": model.state_dict(), "cross_sample_lif": False, "classes": [*"0123456789"]}
    content["config"] = {**KEYS, "dataset": "digits", "model": "QKFormer", **config}
    torch.save(content, folder / path)
    return folder / path, model


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "onnx"), [("MSQKFormer", []), ("QKFormer", ["--onnx"])])
def test_export(name, onnx, tmp_path, monkeypatch, capsys):
    reason = "pip install -r requirements-export.txt"
    runtime = onnx and pytest.importorskip("onnxruntime", reason=reason)
    monkeypatch.chdir(tmp_path)
    path, model = checkpoint(tmp_path, model=name)
    folder, x = tmp_path / "out", torch.randn(5, 3, 16, 16)
    argv = [path, "--folder", "cifar10", "--to", folder, *onnx, "--", "--device", "cpu"]
    assert export.main([*map(str, argv)]) == 0
    files = [file.name for file in sorted(folder.iterdir())]
    known = ["README.md", "config.json", "model.onnx", "model.safetensors"]
    assert files == [file for file in known if onnx or file != "model.onnx"]
    with torch.no_grad():
        want = model(x)
        cifar10 = load("cifar10")
        ours, _, classes = cifar10.build.load(cifar10.options, cifar10.data, folder)
        theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert torch.equal(ours(x), want) and classes == [*"0123456789"]
        assert torch.equal(theirs(x), want) and type(theirs) is type(model)
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == name and config["model_args"]["T"] == 3
    assert [*timm.data.resolve_model_data_config(theirs)["input_size"]] == [3, 16, 16]
    for batch in (x, x[:2]) if onnx else ():
        session = runtime.InferenceSession(folder / "model.onnx")
        (logits,) = session.run(None, {"input": batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), want[: len(batch)], rtol=0, atol=1e-5)
    card = (folder / "README.md").read_text()
    for file in (path, *folder.glob("model.*")):
        assert hashlib.sha256(file.read_bytes()).hexdigest() in card
    parameters = sum(p.numel() for p in model.parameters())
    assert f"{name}, {parameters:,} parameters" in card and "the paper's" in card
    with pytest.raises(SystemExit, match="is there already"):
        export.main([*map(str, argv)])
    capsys.readouterr()
    text = call(cifar10.test.main, capsys, "--checkpoint", folder, *FLAGS)
    (result,) = folder.glob("test-*.json")
    assert "error" not in text and json.loads(result.read_text())["samples"] == 360
    register(cifar10)


def test_without_onnx(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"^error: .* -r requirements-export.txt"):
        export.main(["best.pth", "--to", str(tmp_path / "new"), "--onnx"])


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(address of a server of tmp_path / "served", that folder, the paths it was asked for)."""
    served, asked = tmp_path / "served", []
    served.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, form, *args):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=served)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield f"http://127.0.0.1:{server.server_port}", served, asked
    server.shutdown()
    server.server_close()


def test_url(server, capsys, tmp_path):
    """Downloaded once; a hash in the name is checked; two files of one name are two files."""
    address, served, asked = server
    cifar10 = load("cifar10")
    path, _ = checkpoint(served)
    for _ in range(2):
        text = call(cifar10.test.main, capsys, "--checkpoint", f"{address}/best.pth", *FLAGS)
        assert "error" not in text and "top-1" in text and "no checksum of it is known" in text
    assert asked == ["/best.pth"]
    fetch, digest = cifar10.folder.fetch, hashlib.sha256(path.read_bytes()).hexdigest()
    first = fetch(f"{address}/best.pth")
    (served / "other").mkdir()
    checkpoint(served / "other", dim=32, T=4)
    assert fetch(f"{address}/other/best.pth") != first
    good, bad = f"net-{digest[:8]}.pth", "net-00000000.pth"
    for name in (good, bad):
        (served / name).write_bytes(path.read_bytes())
    assert fetch(f"{address}/{good}").read_bytes() == path.read_bytes()
    for name, why in ((bad, "invalid hash value"), ("none.pth", "404")):
        with pytest.raises(cifar10.log.UserError, match=f"{name}: can't be downloaded: .*{why}"):
            fetch(f"{address}/{name}")
    assert not [*(tmp_path / "hub").rglob("net-0*")]


def test_short_names(monkeypatch):
    """MS-QKFormer's two files; a file of that name that is there comes first."""
    modules, urls = load("imagenet"), []

    def download(url, file, prefix):
        urls.append(url)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    paths = [modules.folder.fetch(name) for name in ("ms_qk_10-384_T4", "ms_qk_10-768_T1")]
    start = "https://github.com/bic-L/MaxFormer/releases/download/checkpoints/ms_qk_10-"
    assert urls == [f"{start}384_T4.pth.tar", f"{start}768_T1.pth.tar"]
    assert [modules.build.steps_of({}, path)["time_step"] for path in paths] == [4, 1]
