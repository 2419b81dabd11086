"""cifar10/ and cifar100/: CIFAR's own files, whole, damaged or in the wrong place, without a
network.
"""

import hashlib
import io
import pickle
import random
import tarfile
import urllib.error
from types import SimpleNamespace

import numpy as np
import pytest
import torchvision

from conftest import load

FOLDERS = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}


@pytest.fixture(params=FOLDERS)
def cifar(request, tmp_path, monkeypatch):
    """An archive in CIFAR's layout with two images a file, whose checksums are the published ones;
    no network.
    """
    kind, batches = FOLDERS[request.param], {}
    labels, names = (
        ("labels", "label_names")
        if request.param == "cifar10"
        else ("fine_labels", "fine_label_names")
    )
    count = 10 if request.param == "cifar10" else 100
    generator = np.random.default_rng(0)
    for name, _ in (*kind.train_list, *kind.test_list):
        pixels = generator.integers(0, 256, (2, 3072), dtype=np.uint8)
        batches[name] = pickle.dumps({"data": pixels, labels: [3, count - 1]})
    batches[kind.meta["filename"]] = pickle.dumps(
        {names: [f"class {index}" for index in range(count)]}
    )

    def checksums(rows):
        return [[name, hashlib.md5(batches[name]).hexdigest()] for name, _ in rows]

    monkeypatch.setattr(
        kind, "meta", kind.meta | {"md5": checksums([[kind.meta["filename"], ""]])[0][1]}
    )
    monkeypatch.setattr(kind, "train_list", checksums(kind.train_list))
    monkeypatch.setattr(kind, "test_list", checksums(kind.test_list))
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in batches.items():
            info = tarfile.TarInfo(f"{kind.base_folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(file.getvalue()).hexdigest())
    tried = []

    def offline(url, **_):
        tried.append(url)
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", offline)
    folder, data_dir = load(request.param), tmp_path / "data"
    data_dir.mkdir()
    options = folder.options

    def build(where=data_dir, train=True):
        argv = ["--data-dir", str(where), "--workers", "0"]
        cfg, *_ = folder.config.load_config(
            options.KEYS, options.NO_EFFECT, options.DEFAULT_CONFIG, argv
        )
        return folder.data.build_dataset(cfg, train, folder.process.Ranks("cpu"))

    def fails(where=data_dir):
        with pytest.raises(folder.config.UserError) as error:
            build(where)
        assert "\n" not in str(error.value)
        return str(error.value)

    return SimpleNamespace(
        kind=kind,
        dir=data_dir,
        archive=file.getvalue(),
        build=build,
        fails=fails,
        tried=tried,
        batches=batches,
    )


def test_an_archive_is_enough(cifar):
    (cifar.dir / cifar.kind.filename).write_bytes(cifar.archive)
    dataset = cifar.build()
    assert len(dataset) == 2 * len(cifar.kind.train_list) and dataset.classes[3] == "class 3"
    assert len(cifar.build(train=False)) == 2 and cifar.tried == []


def test_nothing_there(cifar):
    text = cifar.fails()
    assert f"not in data_dir {cifar.dir}" in text and "no network here" in text
    assert cifar.kind.filename in text and cifar.kind.url in text and cifar.tried


@pytest.mark.parametrize("kind", ["cut", "flipped", "empty", "html"])
def test_a_damaged_archive_is_called_damaged(cifar, kind):
    path, generator = cifar.dir / cifar.kind.filename, random.Random(1)
    for _ in range(3):
        whole, place = bytearray(cifar.archive), generator.randrange(len(cifar.archive))
        whole[place] ^= 1 << generator.randrange(8)
        content = {
            "cut": cifar.archive[:place],
            "flipped": whole,
            "empty": b"",
            "html": b"<html>404",
        }[kind]
        path.write_bytes(content)
        text = cifar.fails()
        for words in (
            path,
            hashlib.md5(content).hexdigest(),
            cifar.kind.tgz_md5,
            "damaged",
            cifar.kind.url,
        ):
            assert str(words) in text
        assert "not in data_dir" not in text and path.read_bytes() == content


def test_a_damaged_or_missing_file_of_the_extracted_folder(cifar):
    (cifar.dir / cifar.kind.filename).write_bytes(cifar.archive)
    cifar.build()
    (cifar.dir / cifar.kind.filename).unlink()
    for name in (cifar.kind.train_list[-1][0], cifar.kind.meta["filename"]):
        path = cifar.dir / cifar.kind.base_folder / name
        path.write_bytes(cifar.batches[name][:-1])
        text = cifar.fails()
        assert f"{path} is damaged" in text and hashlib.md5(cifar.batches[name]).hexdigest() in text
        path.unlink()
        assert f"{path} is missing" in cifar.fails()
        path.write_bytes(cifar.batches[name])
    cifar.build()


def test_a_wrong_place(cifar):
    (cifar.dir / cifar.kind.filename).write_bytes(cifar.archive)
    assert f"data_dir {cifar.dir} has {cifar.kind.filename}" in cifar.fails(cifar.dir.parent)
    assert "is a file" in cifar.fails(cifar.dir / cifar.kind.filename)
    cifar.build()
    inside = cifar.dir / cifar.kind.base_folder
    assert f"{inside} is one folder too deep; data_dir must be {cifar.dir}" in cifar.fails(inside)
    loop = cifar.dir.parent / "loop"
    loop.symlink_to(loop)
    assert str(loop) in cifar.fails(loop)
    other = cifar.dir.parent / "other"
    other.mkdir()
    (other / cifar.kind.filename.replace("python", "binary")).write_bytes(b"")
    assert "another format" in cifar.fails(other)
