# Copied from dvs128-gesture/archives.py
"""Downloaded archives: unpacked into one folder and nowhere else, checked to the last byte."""

import gzip
import stat
import tarfile
import zipfile

from harness.log import UserError

MOST = 2**36  # bytes that an archive may hold; those of the published ones are a tenth of it


def unpack(archive, folder):
    """Unpack a .tar.gz or .zip into `folder`.

    UserError for a member that could write elsewhere. Damage raises the errors of gzip, tarfile and
    zipfile.
    """
    if not archive.is_file():  # a pipe would never end
        raise UserError(f"{archive} is not a file")
    (unpack_zip if archive.suffix == ".zip" else unpack_tar)(archive, folder)


def unpack_tar(archive, folder):
    size = 0
    with gzip.open(archive) as file:
        with tarfile.open(fileobj=file, mode="r|") as tar:
            for member in tar:
                whole = not member.issparse()  # else of any size, for a few bytes
                check(archive, member.name, whole and (member.isreg() or member.isdir()))
                check_size(archive, size := size + member.size)
                tar.extract(member, folder, filter="data")
        while rest := file.read(2**20):  # gzip's checksum comes after the end of the tar
            check_size(archive, size := size + len(rest))


def unpack_zip(archive, folder):
    with zipfile.ZipFile(archive) as file:
        check_size(archive, sum(member.file_size for member in file.infolist()))
        for member in file.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            check(archive, member.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
            file.extract(member, folder)  # checks its checksum


def check_size(archive, size):
    """UserError for more bytes than any data set has, before they are written."""
    if size > MOST:
        raise UserError(f"{archive} is refused: it holds more than {MOST >> 30} GiB")


def check(archive, name, plain):
    """UserError for a member that is a link or a device, or whose name leads out of the folder."""
    parts = name.replace("\\", "/").split("/")
    if not plain:
        wrong = "neither a file nor a folder"
    elif parts[0] == "" or ".." in parts or parts[0].endswith(":"):
        wrong = "outside of the folder"
    else:
        return
    raise UserError(f"{archive} is refused: {name!r} in it is {wrong}; get the published archive")
