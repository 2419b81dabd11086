"""CIFAR's own files, whole, damaged or in the wrong place, without a network."""

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

from conftest import load, resolve_in

FOLDERS = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}


@pytest.fixture(params=["cifar10"])
def cifar(request, tmp_path, monkeypatch):
    """An archive in CIFAR's layout with two images a file, whose checksums are the published ones;
    no network.
    """
    kind, batches = FOLDERS[request.param], {}
    ten = request.param == "cifar10"
    labels, names = ("labels", "label_names") if ten else ("fine_labels", "fine_label_names")
    count = 10 if ten else 100
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

    def build(where=data_dir, train=True):
        cfg = resolve_in(folder, "--data-path", where, "--workers", 0)
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


@pytest.mark.parametrize("cifar", FOLDERS, indirect=True)
def test_an_archive_is_enough(cifar):
    (cifar.dir / cifar.kind.filename).write_bytes(cifar.archive)
    dataset = cifar.build()
    assert len(dataset) == 2 * len(cifar.kind.train_list) and dataset.classes[3] == "class 3"
    assert len(cifar.build(train=False)) == 2 and cifar.tried == []


def test_nothing_there(cifar):
    text = cifar.fails()
    assert f"is missing or damaged in data_path {cifar.dir}" in text and "no network here" in text
    assert cifar.kind.filename in text and cifar.kind.url in text and cifar.tried
    assert "`-c quickstart.yml` needs no data set" in text


@pytest.mark.parametrize("kind", ["cut", "flipped", "empty", "html"])
def test_a_damaged_archive(cifar, kind):
    path, generator = cifar.dir / cifar.kind.filename, random.Random(1)
    for _ in range(3):
        whole, place = bytearray(cifar.archive), generator.randrange(len(cifar.archive))
        whole[place] ^= 1 << generator.randrange(8)
        contents = {"cut": cifar.archive[:place], "flipped": whole, "empty": b"", "html": b"<html>"}
        content = contents[kind]
        path.write_bytes(content)
        text = cifar.fails()
        assert f"is missing or damaged in data_path {cifar.dir}, " in text
        assert cifar.kind.url in text and path.read_bytes() == content


def test_a_damaged_or_missing_file_of_the_extracted_folder(cifar):
    (cifar.dir / cifar.kind.filename).write_bytes(cifar.archive)
    cifar.build()
    (cifar.dir / cifar.kind.filename).unlink()
    for name in (cifar.kind.train_list[-1][0], cifar.kind.meta["filename"]):
        path = cifar.dir / cifar.kind.base_folder / name
        path.write_bytes(cifar.batches[name][:-1])
        assert "missing or damaged" in cifar.fails()
        path.unlink()
        assert "missing or damaged" in cifar.fails()
        path.write_bytes(cifar.batches[name])
    cifar.build()


def test_a_wrong_place(cifar):
    (cifar.dir / cifar.kind.filename).write_bytes(cifar.archive)
    assert f"in data_path {cifar.dir.parent}, " in cifar.fails(cifar.dir.parent)
    assert str(cifar.dir / cifar.kind.filename) in cifar.fails(cifar.dir / cifar.kind.filename)
    cifar.build()
    inside = cifar.dir / cifar.kind.base_folder
    assert f"in data_path {inside}, " in cifar.fails(inside)
    loop = cifar.dir.parent / "loop"
    loop.symlink_to(loop)
    assert str(loop) in cifar.fails(loop)
