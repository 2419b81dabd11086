# Copied from dvs128-gesture/convert.py
"""Raw recordings to frames, once: spikingjelly's own extraction, reading and integration, safe against interruption.

    data_path/download/                          archives, or the folders that are in them     (yours)
    data_path/events_np/                         events of each sample, .npz                   (made here)
    data_path/frames_number_T_split_by_number/   T frames of each sample, .npz                 (made here)

Everything is made in data_path/building and moved to its place when it is whole. A run that was killed leaves
only that folder, and the next run starts it anew.
"""

import contextlib
import fcntl
import itertools
import logging
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

from tqdm import tqdm

from config import UserError

logger = logging.getLogger("qkformer")


def prepare(root, T, reader, archives, page):
    """Make the frames of a data set where they are missing.

    Args:
        root: data_path.
        T: frames of a sample, each with the same number of events.
        reader: spikingjelly's class of the data set.
        archives: {folder: archive that holds it}, looked for in root/download.
        page: where the data set is to be had.

    Returns the folder of the frames. UserError if there are neither frames nor recordings, or if they can't be
    read or written.
    """
    root = Path(root).resolve()
    events, frames = root / "events_np", root / f"frames_number_{T}_split_by_number"
    if not whole(frames, events):
        sources = [] if whole(events) else find(root / "download", archives, page)
        try:
            with interruptible(), alone(root), scratch(root / "building") as work:
                if not whole(events):
                    make_events(sources, work, reader)
                    move(work / "events_np", events)
                if not whole(frames, events):
                    make_frames(events, work, T, reader)
                    move(work / frames.name, frames)
        except OSError as error:
            raise UserError(f"{root}: the data set can't be converted there: {error}") from None
    return frames


def whole(folder, source=None):
    """Whether a folder is there and finished: spikingjelly's mark of a build under way is not, no file is missing."""
    if not folder.is_dir() or mark(folder).exists():
        return False
    return source is None or not whole(source) or files(folder) == files(source)


def mark(folder):
    return folder.with_name(f"{folder.name}.building")


def files(folder):
    return {os.path.relpath(os.path.join(place, name), folder) for place, _, names in os.walk(folder) for name in names}


def move(made, place):
    """Put a finished folder in its place, at once and whole."""
    os.sync()  # before its name says that it is whole
    shutil.rmtree(place, ignore_errors=True)  # an unfinished one, not made here
    os.rename(made, place)
    mark(place).unlink(missing_ok=True)


def find(download, archives, page):
    """[folder or archive] for each of `archives`."""
    found = [next((download / name for name in pair if (download / name).exists()), None) for pair in archives.items()]
    missing = [archive for archive, path in zip(archives.values(), found, strict=True) if path is None]
    if missing:
        raise UserError(
            f"no frames in {download.parent} and no recordings to make them from: "
            f"put {', '.join(missing)} from {page} into {download} (key data_path)"
        )
    return found


def make_events(sources, work, reader):
    """work/events_np from archives and extracted folders."""
    download, extract, events = work / "download", work / "extract", work / "events_np"
    for folder in (download, extract, events):
        folder.mkdir()
    for source in sources:
        (extract if source.is_dir() else download).joinpath(source.name).symlink_to(source)
    if any(download.iterdir()):
        with stage("extracting", download, extract):
            reader.extract_downloaded_files(download, extract)
    with stage("reading recordings", extract, events):
        reader.create_raw_from_extracted(extract, events)


def make_frames(events, work, T, reader):
    """work/frames_number_T_split_by_number from the events, by spikingjelly's data set itself."""
    if not (work / "events_np").exists():
        (work / "events_np").symlink_to(events)
    with stage("integrating frames", events, work / f"frames_number_{T}_split_by_number", len(files(events))):
        reader(str(work), data_type="frame", frames_number=T, split_by="number")


@contextlib.contextmanager
def stage(title, source, target, total=None):
    """Show how many files there are in `target` by now; whatever a reader throws at a bad file is one line."""
    done = threading.Event()

    def watch():
        with tqdm(desc=title, total=total, unit=" files", leave=False, disable=not sys.stderr.isatty()) as bar:
            for seconds in itertools.count(1):
                if done.wait(1.0):
                    break
                if not bar.disable or seconds % 60 == 0:
                    bar.n = len(files(target))
                    bar.refresh()
                if bar.disable and seconds % 60 == 0:
                    logger.info(f"{title}: {bar.n} files so far")

    logger.info(f"{title}: {source} (once)")
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{title}: a file of {source.resolve()} can't be read ({reason}); get it again") from None
    finally:
        done.set()
        watcher.join()


@contextlib.contextmanager
def alone(root):
    """One run at a time, where the file system has locks."""
    with open(root / "building.lock", "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def scratch(folder):
    """An empty folder, removed at the end; what a killed run left there is removed first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def interruptible():
    """Ctrl-C and SIGTERM end the process at once: spikingjelly's threads would first work off all their files."""
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
