"""dvs128-gesture/ and cifar10-dvs/: archives that are hostile or damaged."""

import gzip
import io
import os
import random
import stat
import tarfile
import zipfile

import pytest

from on_events import cpu, resolve, write

MODULE = b"raise SystemExit('planted')\n"
NAMES = [
    "../planted.py",
    "../../../planted.py",
    "{}/../../../../planted.py",
    "{outside}/planted.py",
]
CONTENT = {f"a{number}.aedat": random.Random(number).randbytes(700 * number) for number in range(4)}


def make(folder, path, extra=()):
    """The first archive of the data set with CONTENT and [(name, type, link)]; the type is
    tarfile's.
    """
    name, archive = next(iter(folder.data.ARCHIVES.items()))
    path.mkdir(exist_ok=True)
    members = [
        (f"{name}/{file}", tarfile.REGTYPE, "", content) for file, content in CONTENT.items()
    ]
    members += [
        (file.format(name, outside=path.parent), kind, link, MODULE) for file, kind, link in extra
    ]
    if archive.endswith(".zip"):
        with zipfile.ZipFile(path / archive, "w") as file:
            for member, kind, link, content in members:
                info = zipfile.ZipInfo(member)
                mode = {tarfile.REGTYPE: stat.S_IFREG, tarfile.SYMTYPE: stat.S_IFLNK}.get(
                    kind, stat.S_IFIFO
                )
                info.external_attr = (mode | 0o644) << 16
                file.writestr(info, link or content, zipfile.ZIP_DEFLATED)
    else:
        with tarfile.open(path / archive, "w:gz") as file:
            for member, kind, link, content in members:
                info = tarfile.TarInfo(member)
                info.type, info.linkname, info.size = (
                    kind,
                    link,
                    len(content) if kind == tarfile.REGTYPE else 0,
                )
                file.addfile(info, io.BytesIO(content))
    return path / archive


def everything(root):
    return {
        path: path.lstat().st_mtime_ns
        for path in root.rglob("*")
        if not path.name.endswith(".lock")
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leads_outside(folder, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    fails(folder, outside, make(folder, outside / "data", [(name, tarfile.REGTYPE, "")]))


LINKS = [(tarfile.SYMTYPE, "/"), (tarfile.SYMTYPE, "a0.aedat"), (tarfile.LNKTYPE, "/etc/passwd")]
LINKS += [(tarfile.CHRTYPE, ""), (tarfile.BLKTYPE, ""), (tarfile.FIFOTYPE, "")]


@pytest.mark.parametrize(("kind", "link"), LINKS)
def test_links_and_devices(folder, tmp_path, kind, link):
    """A link, followed by a file behind it, and what else is no file."""
    members = [
        ("{}/link", kind, link),
        ("{}/link" + str(tmp_path / "planted.py"), tarfile.REGTYPE, ""),
    ]
    fails(folder, tmp_path, make(folder, tmp_path / "data", members))


def fails(folder, root, archive):
    """The conversion refuses the archive in a line that names it, and leaves every file
    as it was.
    """
    root_of_data = archive.parent
    (root_of_data / "download").mkdir()
    archive = archive.rename(root_of_data / "download" / archive.name)
    for name in list(folder.data.ARCHIVES)[1:]:
        (root_of_data / "download" / name).mkdir()
    before = everything(root)
    with pytest.raises(
        folder.config.UserError, match=f"^{archive} is refused: .* in it is "
    ) as error:
        cfg = resolve(folder, "--data-path", root_of_data, "--T", 2)
        folder.data.build_dataset(cfg, True, cpu(folder))
    assert "\n" not in str(error.value) and everything(root).keys() == before.keys()
    assert all(everything(root)[path] == before[path] for path in before if path.is_file())


def unpacked(folder, archive, place):
    """{path: content} of what the archive becomes; None if it is refused."""
    place.mkdir()
    try:
        folder.archives.unpack(archive, place)
    except Exception:
        return None
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in place.rglob("*")
        if path.is_file()
    }


def test_no_flipped_bit_passes(folder, tmp_path):
    archive, generator, refused = make(folder, tmp_path / "data"), random.Random(0), 0
    whole = archive.read_bytes()
    want = unpacked(folder, archive, tmp_path / "whole")
    assert {name.rpartition("/")[2]: content for name, content in want.items()} == CONTENT
    for number in range(300):
        flipped = bytearray(whole)
        flipped[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        archive.write_bytes(flipped)
        have = unpacked(folder, archive, tmp_path / str(number))
        assert have is None or have == want, number
        refused += have is None
    assert refused > 250


def test_no_cut_archive_passes(folder, tmp_path):
    archive, generator = make(folder, tmp_path / "data"), random.Random(1)
    whole = archive.read_bytes()
    for number in range(60):
        archive.write_bytes(whole[: generator.randrange(len(whole))])
        assert unpacked(folder, archive, tmp_path / str(number)) is None, number


def test_damage_behind_the_last_recording_is_named(folder, tmp_path):
    """The last bytes of a .tar.gz hold its checksum, which reading the files alone
    never gets to.
    """
    write(
        folder.name,
        tmp_path,
        **({"samples": 1} if folder.name == "cifar10-dvs" else {"train": 1, "trials": 1}),
    )
    archive = tmp_path / "download" / next(iter(folder.data.ARCHIVES.values()))
    content = bytearray(archive.read_bytes())
    if archive.suffix == ".zip":
        content[200] ^= 1  # of the first recording
    else:
        content[-6] ^= 1
        assert gzip.open(archive).read(1) and len(content) > 8
    archive.write_bytes(content)
    with pytest.raises(folder.config.UserError, match=f"{archive} can't be read .*; get it again"):
        folder.data.build_dataset(
            resolve(folder, "--data-path", tmp_path, "--T", 2), True, cpu(folder)
        )
    assert not (tmp_path / "events_np").exists()


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x1f\x8b\x08", b"PK\x03\x04"])
def test_what_is_no_archive(folder, tmp_path, content):
    archive = tmp_path / "download" / next(iter(folder.data.ARCHIVES.values()))
    for name in list(folder.data.ARCHIVES)[1:]:
        (tmp_path / "download" / name).mkdir(parents=True)
    archive.parent.mkdir(exist_ok=True)
    cfg = resolve(folder, "--data-path", tmp_path, "--T", 2)
    archive.write_bytes(content)
    with pytest.raises(folder.config.UserError, match=f"{archive} can't be read"):
        folder.data.build_dataset(cfg, True, cpu(folder))
    archive.unlink()
    os.mkfifo(archive)
    with pytest.raises(folder.config.UserError, match=f"{archive} is not a file"):
        folder.data.build_dataset(cfg, True, cpu(folder))
