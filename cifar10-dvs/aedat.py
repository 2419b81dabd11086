"""The recordings of CIFAR10-DVS, checked before they are read."""

import sys

from tqdm import tqdm

from harness.log import UserError

VERSION = b"2.0"  # of AEDAT
EVENT_BYTES = 8


def check_raw(folder, shown):
    """UserError for a damaged recording in folder/*/.

    The format has no end and no checksums: what is missing can be seen if it is part of an event.

    Args:
        shown: {path: what the user knows it by}.
    """
    paths = sorted(folder.glob("*/*.aedat"))
    for path in tqdm(paths, "checking recordings", leave=False, disable=not sys.stderr.isatty()):
        with open(path, "rb") as file:
            line, start = check_version(file, shown[path]), 0
            while line.startswith(b"#"):
                start = file.tell()
                line = file.readline(2**16)
        if (path.stat().st_size - start) % EVENT_BYTES:
            raise UserError(f"{shown[path]} is damaged: it ends within an event; get it again")


# Copied from dvs128-gesture/aedat.py
def check_version(file, shown):
    """The first line of a recording; UserError if it is not that of AEDAT in our version."""
    line = file.readline(2**16)
    if line.startswith(b"#!AER-DAT" + VERSION):
        return line
    if line.startswith(b"#!AER-DAT"):
        what = f"in AEDAT {line[9:20].strip().decode(errors='replace')}, another version"
    elif line.lstrip().startswith(b"<"):
        what = "a web page"
    else:
        what = "no AEDAT file" if line else "empty"
    raise UserError(f"{shown} is {what}; it must be AEDAT {VERSION.decode()}, get it again")
