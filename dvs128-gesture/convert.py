"""Makes frames of recordings, once, with spikingjelly; a killed run leaves no half-made data.

    data_path/download/                          archives or the folders in them    (yours)
    data_path/events_np/                         events of each sample, .npz        (made here)
    data_path/frames_number_T_split_by_number/   T frames of each sample, .npz      (made here)

Everything is made in data_path/.qkformer-building and moved to its place when it is whole. Then a
file events_np.whole or frames_number_T_split_by_number.whole says how many samples there are. A
killed run leaves only the first folder, and the next run begins it anew. A folder without its file
is made again if the recordings are there.
"""

import contextlib
import errno
import fcntl
import io
import itertools
import os
import shutil
import signal
import sys
import threading
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
from spikingjelly import configure
from tqdm import tqdm

from aedat import check_raw
from archives import unpack
from harness.log import UserError, logger

if sys.version_info < (3, 12, 2):  # np.load uses Python's parser, which fails in several threads
    configure.max_threads_number_for_datasets_preprocess = 1

# Errors of the disk or its permissions: no recording is to blame.
PLACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)
# The file system has no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def prepare(root, T, reader, archives, suffixes, page):
    """Make the frames of a data set where they are missing.

    Args:
        root: data_path.
        T: frames of a sample, each with the same number of events.
        reader: spikingjelly's class of the data set.
        archives: {folder: archive that holds it}, looked for in root/download.
        suffixes: of the files in those folders that the reader needs.
        page: where the data set can be downloaded.

    Returns the folder of the frames. UserError if there are neither frames nor recordings, or if
    they can't be read or written.
    """
    root = Path(os.path.realpath(root))  # resolve() fails on links in a loop
    try:
        events, frames = root / "events_np", root / f"frames_number_{T}_split_by_number"
        found, missing = find(root / "download", archives)
        say_newer(found, proof(events) if proof(events).is_file() else proof(frames), suffixes)
        if proven(frames):
            return frames
        if not proven(events):
            fits = holds(frames) and (not holds(events) or files(frames) == files(events))
            if fits and (missing or not os.access(root, os.W_OK)):
                logger.info(
                    f"warning: {frames} may not be whole, and can't be made again; it is used"
                )
                return frames
            if missing and not holds(events):
                raise UserError(
                    f"no frames in {root} and no recordings to make them from: "
                    f"put {', '.join(missing)} from {page} into {root / 'download'} (key data_path)"
                )
        with interruptible(), alone(root), scratch(root / ".qkformer-building") as work:
            # Another run may have made them by now.
            if not proven(frames) and not proven(events):
                if missing:
                    logger.info(f"warning: {events} may not be whole, and recordings are missing")
                    check(events, reader, {})
                else:
                    make_events(found, work, reader, suffixes)
                    move(work / "events_np", events)
            if not proven(frames):
                make_frames(events, work, T, reader)
                move(work / frames.name, frames)
    except OSError as error:
        where = f": {os.path.realpath(error.filename)}" if error.filename else ""
        reason = f"{error.strerror or error}{where}"
        raise UserError(f"{root}: the data set can't be converted there: {reason}") from None
    return frames


def proven(folder):
    """Whether a folder was made here and still has all its samples."""
    if not holds(folder) or not proof(folder).is_file():
        return False
    return proof(folder).read_bytes() == b"%d\n" % len(files(folder))


def holds(folder):
    """Whether a folder has samples, without spikingjelly's mark of an unfinished build."""
    return not mark(folder).exists() and bool(files(folder))


def proof(folder):
    return folder.with_name(f"{folder.name}.whole")


def mark(folder):
    return folder.with_name(f"{folder.name}.building")


def files(folder):
    """The samples in a folder, as paths within it."""
    return {
        os.path.relpath(os.path.join(place, name), folder)
        for place, _, names in os.walk(folder)
        for name in names
        if name.endswith(".npz") and not name.startswith(".")
    }


def move(made, place):
    """Put a finished folder in its place, with the file that proves it whole."""
    os.sync()  # all of it must be on the disk before the name says that it is whole
    unfinished = proof(place).exists() or mark(place).exists()
    proof(place).unlink(missing_ok=True)
    if unfinished and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    elif place.exists():  # not made here: it may be wanted
        numbers = itertools.chain([""], itertools.count(2))
        olds = (place.with_name(f"{place.name}.old{number}") for number in numbers)
        old = next(path for path in olds if not path.exists())
        logger.info(f"{place} was not made here, or not to its end: it is {old.name} now")
        os.rename(place, old)
    os.rename(made, place)
    mark(place).unlink(missing_ok=True)
    proof(place).write_text(f"{len(files(place))}\n")


def find(download, archives):
    """({folder: its archive, or itself if there is none}, [archive that is missing])."""
    found = {}
    for folder, archive in archives.items():
        # The archive first: a folder beside it may be half unpacked.
        paths = [download / name for name in (archive, folder) if (download / name).exists()]
        if paths:
            found[folder] = paths[0]
    return found, [archive for folder, archive in archives.items() if folder not in found]


def say_newer(found, made, suffixes):
    """How many recordings are newer than what was made of them, which stays as it is."""
    when, newer = made.stat().st_mtime if made.is_file() else float("inf"), 0
    for source in found.values():
        files = [p for p in source.glob("[!.]*") if p.is_file() and p.suffix.lower() in suffixes]
        newer += sum(path.stat().st_mtime > when for path in files or [source])
    if newer:
        again = "to have all converted again, remove events_np and frames_*"
        say_once(
            f"warning: {newer} files in {made.parent}/download are newer than the frames, "
            f"and left out; {again}"
        )


@cache  # training and test set are opened one after the other
def say_once(line):
    logger.info(line)


def make_events(found, work, reader, suffixes):
    """work/events_np from archives and folders, checked."""
    extract, recordings, events = work / "extract", work / "recordings", work / "events_np"
    for folder in (extract, recordings, events):
        folder.mkdir()
    shown = {}  # what the user knows a file in `recordings` by
    for name, source in found.items():
        content = source
        if not source.is_dir():
            with stage("extracting", source, extract, lambda source=source: source):
                unpack(source, extract)
            content = extract / name
        (recordings / name).mkdir()
        count = 0
        for path in content.glob("[!.]*"):
            suffix = path.suffix.lower()  # cameras' software and some file systems write .AEDAT
            if suffix not in suffixes:
                continue
            link = recordings / name / f"{path.stem}{suffix}"
            known = path if source.is_dir() else f"{path.name} in {source}"
            if link in shown:
                raise UserError(f"{known} and {shown[link]} are one recording twice; remove one")
            if not path.is_file():
                raise UserError(f"{known} is not a file")
            link.symlink_to(path)
            shown[link] = known
            count += suffix == ".aedat"
        if not count:
            raise UserError(f"{source} holds no recordings ({name}/*.aedat); get it again")
    check_raw(recordings, shown)
    origins = {path.stem: known for path, known in shown.items() if path.suffix == ".aedat"}

    def unread():
        """The first recording without a sample, since the reader goes on after a bad one."""
        made = {origin(path, origins) for path in files(events)}
        missing = (known for known in origins.values() if known not in made)
        return next(missing, f"a file of {source.parent}")

    labels = [len(path.read_bytes().splitlines()) - 1 for path in recordings.glob("*/*_labels.csv")]
    total = sum(labels) or len(origins)
    with stage("reading recordings", source.parent, events, unread, total):
        reader.create_raw_from_extracted(recordings, events)
    shutil.rmtree(extract)  # frames need the room
    check(events, reader, origins)


def origin(sample, origins):
    """The recording of a sample: the one of its name, or of its name without the number."""
    stem = Path(sample).stem
    return origins.get(stem, origins.get(stem.rpartition("_")[0], sample))


def check(events, reader, origins):
    """UserError for a sample that can't be integrated: its recording is damaged."""
    H, W = reader.get_H_W()
    logger.info(f"checking events: {events} (once)")
    quiet = not sys.stderr.isatty()
    for name in tqdm(sorted(files(events)), "checking events", leave=False, disable=quiet):
        try:
            t, x, y, p = (read_array(events / name, array) for array in "txyp")
            damage = None
            if not (t.ndim == 1 and t.shape == x.shape == y.shape == p.shape):
                damage = "its arrays differ in length"
            elif len(t) == 0:
                damage = "a sample without events"
            elif not (0 <= x.min() and x.max() < W and 0 <= y.min() and y.max() < H):
                damage = f"events outside of {W} x {H} pixels"
            elif not (0 <= p.min() and p.max() <= 1):
                damage = "polarities other than 0 and 1"
        except Exception as error:  # whatever NumPy, zipfile and zlib make of a bad file
            damage = f"{type(error).__name__}: {error}".splitlines()[0]
        if damage:
            known = origin(name, origins) if origins else events / name
            raise UserError(f"{known} is damaged ({damage}); get it again")


def read_array(path, name, most=2**28):
    """An array of an .npz of at most `most` bytes, its checksum verified; np.load does not if it
    reads less than all.
    """
    with zipfile.ZipFile(path) as file:
        size = file.getinfo(f"{name}.npy").file_size
        if size > most:  # before it is unpacked
            raise ValueError(f"its {name} has {size:,} bytes, more than {most:,}")
        return np.load(io.BytesIO(file.read(f"{name}.npy")), allow_pickle=False)


def make_frames(events, work, T, reader):
    """work/frames_number_T_split_by_number from the events, by spikingjelly's data set itself."""
    shutil.rmtree(work / "events_np", ignore_errors=True)
    samples = files(events)
    for name in samples:  # other files, and classes without a sample, stop spikingjelly
        link = work / "events_np" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(events / name)
    frames = work / f"frames_number_{T}_split_by_number"
    with stage("integrating frames", events, frames, lambda: f"a file of {events}", len(samples)):
        reader(str(work), data_type="frame", frames_number=T, split_by="number")


@contextlib.contextmanager
def stage(title, source, target, blame, total=None):
    """A context for one long step: progress, and a UserError in place of the reader's error.

    Args:
        title, source: what is done, and with what, for the log.
        target: folder whose files are counted as progress, up to `total`.
        blame: called after an error; returns the file that is at fault.
    """
    done = threading.Event()

    def watch():
        quiet = not sys.stderr.isatty()
        with tqdm(desc=title, total=total, unit=" files", leave=False, disable=quiet) as bar:
            for seconds in itertools.count(1):
                if done.wait(1.0):
                    break
                if not bar.disable or seconds % 60 == 0:
                    bar.n = sum(len(names) for _, _, names in os.walk(target))
                    bar.refresh()
                if bar.disable and seconds % 60 == 0:
                    logger.info(f"{title}: {bar.n}{f' of {total}' if total else ''} files so far")

    logger.info(f"{title}: {source} (once)")
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or getattr(error, "errno", None) in PLACE_ERRORS:
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if isinstance(error, OSError) and error.filename:  # in the scratch folder
            reason = f"{error.strerror}: {Path(error.filename).name}"
        raise UserError(f"{title}: {blame()} can't be read ({reason}); get it again") from None
    finally:
        done.set()
        watcher.join()


@contextlib.contextmanager
def alone(root):
    """One run at a time, where the file system has locks."""
    with open(root / ".qkformer-building.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info(f"waiting for the run that converts {root}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield


@contextlib.contextmanager
def scratch(folder):
    """An empty folder, removed at the end. What a killed run left there goes first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def interruptible():
    """A context in which Ctrl-C and SIGTERM kill at once.

    With our handler spikingjelly's threads would finish all files first.
    """
    numbers = signal.SIGINT, signal.SIGTERM
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
