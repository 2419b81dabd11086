"""The raw files of DVS128 Gesture, checked before use: recordings, labels and the split."""

import struct
import sys

from tqdm import tqdm

from harness.log import UserError, escaped, logger

VERSION = b"3.1"  # of AEDAT
HEADER = struct.Struct("<HHIIIIII")  # of a packet: type, source, bytes an event, ..., three counts
POLARITY, EVENT_BYTES = 1, 8
COLUMNS = "class,startTime_usec,endTime_usec"
GESTURES = range(1, 12)


def check_raw(folder, shown):
    """UserError for a damaged file in folder/DvsGesture; a warning for what may be left out.

    Args:
        folder: links to all files, as make_events collects them.
        shown: {link in it: name of the file for messages}.
    """
    folder = folder / "DvsGesture"
    listed = {}
    for split in ("train", "test"):
        path = folder / f"trials_to_{split}.txt"
        if not path.exists():
            raise UserError(f"DvsGesture/{path.name} is missing; get the data set again")
        for name in filter(None, map(str.strip, lines_of(path, shown[path]))):
            # A name must be a file that is there: one such as ../x would be written elsewhere.
            if folder / name not in shown or "/" in name:
                raise UserError(f"{shown[path]} has {name!r}, but there is no such recording")
            if name in listed:
                raise UserError(f"{shown[path]} has {name}, which {listed[name]} has already")
            listed[name] = path.name
    for path in sorted(folder.glob("*.aedat")):
        if path.name not in listed:
            said = "is left out: neither list of trials has it"
            logger.info(f"warning: {escaped(str(shown[path]))} {said}")
    quiet = not sys.stderr.isatty()
    for name in tqdm(sorted(listed), "checking recordings", leave=False, disable=quiet):
        path = folder / name
        last = check_recording(path, shown[path])
        labels = path.with_name(f"{path.stem}_labels.csv")
        if labels not in shown:
            raise UserError(f"{shown[path]} has no {labels.name} beside it; get it again")
        if check_labels(labels, shown[labels]) > last:
            logger.info(f"warning: {shown[path]} ends before its last trial does: is it whole?")


def check_recording(path, shown):
    """The time of the last event in microseconds. UserError if the packets do not fill the file."""
    last, size = 0, path.stat().st_size
    with open(path, "rb") as file:
        line = check_version(file, shown)
        while line.startswith(b"#") and line != b"#!END-HEADER\r\n":
            line = file.readline(2**16)
        if not line.startswith(b"#"):
            raise UserError(f"{shown} is damaged: its header has no end; get it again")
        while header := file.read(HEADER.size):
            start = file.tell() - len(header)
            if len(header) < HEADER.size:
                raise UserError(f"{shown} is damaged: it ends within a packet; get it again")
            kind, _, width, _, overflow, capacity, number, valid = HEADER.unpack(header)
            end = file.tell() + capacity * width
            wrong = not width or (kind == POLARITY and width != EVENT_BYTES)
            if wrong or not valid <= number <= capacity:
                raise UserError(f"{shown} is damaged: no packet at byte {start:,}; get it again")
            if end > size:
                raise UserError(f"{shown} is damaged: it ends within a packet; get it again")
            if kind == POLARITY and capacity:
                file.seek(end - 4)
                last = int.from_bytes(file.read(4), "little") | overflow << 31
            file.seek(end)
    return last


def check_labels(path, shown):
    """The end of the last trial in microseconds. UserError for a line that can't be a trial's."""
    first, *lines = lines_of(path, shown) or [""]
    if is_trial(first):
        raise UserError(f"{shown} has no header; its first line must be {COLUMNS}")
    trials = {}
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        if not is_trial(line):
            wrong = f"{line[:80]!r} is not {COLUMNS} in whole numbers"
            raise UserError(f"{shown}, line {number}: {wrong}")
        label, start, end = map(int, line.split(","))
        if label not in GESTURES:
            raise UserError(f"{shown}, line {number}: class is {label}; it must be from 1 to 11")
        if not start < end < 2**32:
            wrong = f"a trial from {start} to {end}; it must end after its start, before 2**32"
            raise UserError(f"{shown}, line {number}: {wrong}")
        if start in trials:
            raise UserError(f"{shown}, line {number}: the trial of line {trials[start][0]} again")
        trials[start] = number, label, end
    if len(trials) < 2:
        # spikingjelly reads no table of a single row.
        raise UserError(f"{shown} has {len(trials)} trials, at least 2 are needed; get it again")
    if missing := sorted(set(GESTURES) - {label for _, label, _ in trials.values()}):
        logger.info(f"warning: {shown} has no trial of class {', '.join(map(str, missing))}")
    return max(end for *_, end in trials.values())


def lines_of(path, shown):
    """The lines of a list; UserError where it is longer than any of this data set."""
    if (size := path.stat().st_size) > 2**20:
        raise UserError(f"{shown} is damaged: it has {size:,} bytes; get it again")
    return path.read_text(errors="replace").splitlines()


def is_trial(line):
    values = [value.strip() for value in line.split(",")]
    return len(values) == 3 and all(value.isascii() and value.isdigit() for value in values)


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
