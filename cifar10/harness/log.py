"""What a run says: lines of the log, progress bars, and errors that a user can mend."""

import contextlib
import logging
import os
import sys
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent.parent  # the data set's folder
logger = logging.getLogger("qkformer")


def escaped(text: str) -> str:
    """Control characters as \\x1b, line breaks as \\n; of a name of a megabyte the start."""
    text = text if len(text) < 9999 else f"{text[:9999]}..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class UserError(Exception):
    """A mistake that the user can mend. The scripts print it as one line and exit with 1."""

    def __str__(self):
        return escaped(super().__str__())


def first_line(error: Exception | str) -> str:
    """What an error says, on one line, or its kind where it says nothing."""
    text = str(getattr(error, "strerror", None) or error).strip()
    return (text or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def telling(before: str, after: str = "", kinds=Exception):
    """An error within becomes a UserError: what it says, between `before` and `after`. Of all kinds
    by default: what damaged files, networks and libraries raise can be anything.
    """
    try:
        yield
    except kinds as error:
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            error = error.__context__  # a full disk, for which torch.save has no words
        raise UserError(f"{before}{first_line(error)}{after}") from None


def set_up_log(ranks):
    """Lines of rank 0 to standard output; warnings of every rank."""
    with contextlib.suppress(AttributeError):  # where it is no file
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be of any bytes
    logging.raiseExceptions = False  # of a standard output that nobody reads any more
    handler = logging.StreamHandler(sys.stdout)
    # One line of text: what a name in it could make a terminal do is escaped.
    handler.format = lambda record: escaped(record.getMessage())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logger.setLevel(logging.INFO if ranks.main else logging.WARNING)


def progress(steps, title: str, ranks) -> tqdm:
    """A progress bar where rank 0 has a terminal."""
    # None: where there is no terminal
    return tqdm(steps, title, leave=False, dynamic_ncols=True, disable=not ranks.main or None)


def typed(path) -> str:
    """The path as one would type it here: whole or relative, whichever is shorter."""
    return min(str(path), os.path.relpath(path), key=len)
