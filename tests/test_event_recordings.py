"""dvs128-gesture/ and cifar10-dvs/: raw recordings, labels and lists of trials that are not what
they should be.
"""

import os
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from spikingjelly.datasets import cifar10_dvs, utils

from conftest import load
from on_events import FOLDERS, check_frames, cpu, resolve, write

FEW = {"dvs128-gesture": {"train": 1, "trials": 1}, "cifar10-dvs": {"samples": 2}}
EVENTS = np.random.default_rng(0).integers([0] * 4, [10**6, 128, 128, 2], (900, 4))  # t, x, y, p
LOAD = {"dvs128-gesture": utils.load_aedat_v3, "cifar10-dvs": cifar10_dvs._load_origin_data}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """{data set: (folder with download/, events of each sample)}."""
    made = {}
    for name in FOLDERS:
        root = tmp_path_factory.mktemp(name)
        made[name] = root, write(name, root, archive=False, **FEW[name])
    return made


@pytest.fixture
def root(folder, originals, tmp_path):
    return shutil.copytree(originals[folder.name][0], tmp_path / "data")


@pytest.fixture
def recording(root):
    return max(root.rglob("*.aedat"))


def convert(folder, root):
    return folder.data.build_dataset(
        resolve(folder, "--data-path", root, "--T", 3), True, cpu(folder)
    )


def refused(folder, root, *words):
    """The conversion ends in one line with these words, and leaves nothing but its lock."""
    with pytest.raises(folder.config.UserError) as error:
        convert(folder, root)
    text = str(error.value)
    assert "\n" not in text and all(str(word) in text for word in words), text
    assert {path.name for path in root.iterdir()} <= {"download", ".qkformer-building.lock"}


def test_a_web_page_and_an_empty_file(folder, root, recording):
    recording.write_bytes(b"<!DOCTYPE html><html>Sign in</html>" * 100)
    refused(folder, root, recording, "a web page", "get it again")
    recording.write_bytes(b"\0" + os.urandom(800))
    refused(folder, root, recording, "no AEDAT file")
    recording.write_bytes(b"")
    refused(folder, root, recording, "empty")


def test_the_other_data_set_s_format(folder, root, recording):
    other, wanted = ("2.0", "3.1") if folder.name == "dvs128-gesture" else ("3.1", "2.0")
    writer = load(next(name for name in FOLDERS if name != folder.name)).shapes.write_aedat
    writer(recording, np.array([[1, 2, 3, 0], [5, 6, 7, 1]]))
    refused(folder, root, recording, f"AEDAT {other}", f"must be AEDAT {wanted}")


def outcome(folder, content, place):
    """What the checks and the reader make of a recording: None if it is refused, else
    its events.
    """
    name = "DvsGesture" if folder.name == "dvs128-gesture" else "airplane"
    path = place / name / "x.aedat"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    try:
        if folder.name == "dvs128-gesture":
            folder.aedat.check_recording(path, path)
        else:
            folder.aedat.check_raw(place, {path: path})
    except folder.config.UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return None
    return {key: value.tolist() for key, value in LOAD[folder.name](path).items()}


def test_a_recording_that_lost_a_byte(folder, tmp_path):
    """Wherever: it is refused, or (in the header's text) its events are as before."""
    path, generator, counts = tmp_path / "whole", random.Random(0), [0, 0]
    folder.shapes.write_aedat(path, EVENTS)
    whole = path.read_bytes()
    want = outcome(folder, whole, tmp_path)
    assert len(want["t"]) == 900
    for place in (*range(150), *(generator.randrange(len(whole)) for _ in range(100))):
        have = outcome(folder, whole[:place] + whole[place + 1 :], tmp_path)
        assert have is None or have == want, place
        counts[have is None] += 1
    assert counts[1] > 100 and counts[0] > 0


def test_a_recording_that_ends_in_the_middle(folder, tmp_path):
    """It is refused where the cut can be seen: within a packet, or within an event where there are
    no packets.
    """
    path, generator = tmp_path / "whole", random.Random(1)
    gesture = folder.name == "dvs128-gesture"
    folder.shapes.write_aedat(path, EVENTS)
    whole = path.read_bytes()
    want = outcome(folder, whole, tmp_path)
    start = len(whole) - 900 * 8 - (28 if gesture else 0)  # of the packet with all the events
    for cut in (generator.randrange(len(whole)) for _ in range(100)):
        have = outcome(folder, whole[:cut], tmp_path)
        if cut < 12 or (gesture and cut > start) or ((cut - start) % 8 and cut > start):
            assert have is None, cut
        elif have is not None:
            assert all(values == want[key][: len(values)] for key, values in have.items()), cut


def test_upper_case_suffixes(folder, root, originals):
    for path in (root / "download").rglob("*.*"):
        path.rename(path.with_suffix(path.suffix.upper()) if path.suffix != ".txt" else path)
    convert(folder, root)
    check_frames(root / "frames_number_3_split_by_number", originals[folder.name][1])


def test_one_name_twice_and_what_is_no_file(folder, root, recording):
    twin = recording.with_suffix(".AEDAT")
    shutil.copy(recording, twin)
    refused(folder, root, recording, twin, "twice")
    twin.unlink()
    whole = recording.read_bytes()
    recording.unlink()
    os.mkfifo(recording)
    refused(folder, root, recording, "not a file")
    recording.unlink()
    recording.write_bytes(whole)


# Gesture's labels and lists -----------------------------------------------------------------------


@pytest.fixture
def gesture(originals, tmp_path):
    folder = SimpleNamespace(name="dvs128-gesture", **vars(load("dvs128-gesture")))
    root = shutil.copytree(originals["dvs128-gesture"][0], tmp_path / "data")
    return folder, root, root / "download" / "DvsGesture"


LABELS = {
    "no header": (lambda rows: rows[1:], ["no header", "class,startTime_usec,endTime_usec"]),
    "empty": (lambda rows: [], ["0 trials"]),
    "header only": (lambda rows: rows[:1], ["0 trials"]),
    "one trial": (lambda rows: rows[:2], ["1 trials"]),
    "class 12": (lambda rows: [*rows, "12,1,2"], ["line 13", "class is 12", "from 1 to 11"]),
    "class 0": (lambda rows: [*rows, "0,1,2"], ["line 13", "class is 0"]),
    "doubled": (lambda rows: [*rows, "", rows[3]], ["line 14", "the trial of line 4 again"]),
    "relabelled": (
        lambda rows: [*rows, "1," + rows[3].split(",", 1)[1]],
        ["line 13", "line 4 again"],
    ),
    "two columns": (lambda rows: [*rows, "3,4"], ["line 13", "'3,4' is not"]),
    "semicolons": (lambda rows: [row.replace(",", ";") for row in rows], ["line 2", "is not"]),
    "words": (lambda rows: [*rows, "clap,1,2"], ["line 13", "'clap,1,2'"]),
    "a float": (lambda rows: [*rows, "1,1.5,2"], ["line 13"]),
    "negative": (lambda rows: [*rows, "1,-1,2"], ["line 13"]),
    "backwards": (lambda rows: [*rows, "1,9,2"], ["line 13", "from 9 to 2"]),
    "endless": (lambda rows: [*rows, " " * 2**20], ["bytes; get it again"]),
    "too late": (lambda rows: [*rows, "1,9,4294967296"], ["line 13", "4294967296"]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels(gesture, kind):
    folder, root, place = gesture
    change, words = LABELS[kind]
    path = place / "user00_train_labels.csv"
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    refused(folder, root, path, *words)


def test_random_damage_to_labels(gesture):
    """Each of 300 changes is refused in a line that names the file, or leaves rows as spikingjelly
    reads them.
    """
    folder, _, place = gesture
    path, generator, refusals = place / "user00_train_labels.csv", random.Random(0), 0
    whole = path.read_bytes()
    for _ in range(300):
        content = bytearray(whole)
        at = generator.randrange(len(content))
        content[at : at + generator.randrange(3)] = generator.choice(
            [b"", b"\n", b",", b"9", b"x", b"\xff"]
        )
        path.write_bytes(content)
        try:
            end = folder.aedat.check_labels(path, path)
        except folder.config.UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refusals += 1
        else:
            rows = np.loadtxt(path, dtype=np.uint32, delimiter=",", skiprows=1, encoding="latin-1")
            assert (
                rows.shape[1] == 3
                and rows[:, 2].max() == end
                and set(rows[:, 0]) <= set(range(1, 12))
            )
    assert refusals > 100


def test_missing_trials_and_recordings_are_warned_of(gesture, caplog):
    folder, _, place = gesture
    caplog.set_level("INFO")
    labels = place / "user00_train_labels.csv"
    rows = labels.read_text().splitlines()
    labels.write_text("\n".join(row for row in rows if not row.startswith(("3,", "11,"))) + "\n")
    (place / "trials_to_test.txt").write_text("")
    shown = {path: path for path in place.iterdir()}
    folder.aedat.check_raw(place.parent, shown)
    assert [message for message in caplog.messages if message.startswith("warning: ")] == [
        f"warning: {place / 'user00_test.aedat'} is left out: neither list of trials has it",
        f"warning: {labels} has no trial of class 3, 11",
    ]
    labels.write_text("\n".join([*rows, "1,1,4000000000"]) + "\n")
    folder.aedat.check_raw(place.parent, shown)
    assert "user00_train.aedat ends before its last trial does" in caplog.text


@pytest.mark.parametrize(
    "name", ["../../../planted.aedat", "{outside}/planted.aedat", "gone.aedat"]
)
def test_a_list_of_trials_can_not_name_files_elsewhere(gesture, name):
    """spikingjelly would read them and write samples beside them."""
    folder, root, place = gesture
    outside = root.parent / "planted.aedat"
    shutil.copy(place / "user00_train.aedat", outside)
    shutil.copy(place / "user00_train_labels.csv", root.parent / "planted_labels.csv")
    before = set(root.parent.iterdir())
    (place / "trials_to_train.txt").write_text(
        f"user00_train.aedat\n{name.format(outside=root.parent)}\n"
    )
    refused(
        folder,
        root,
        place / "trials_to_train.txt",
        "planted.aedat" if "planted" in name else "gone",
    )
    assert set(root.parent.iterdir()) == before


def test_lists_of_trials(gesture):
    folder, root, place = gesture
    (place / "trials_to_test.txt").write_text("user00_train.aedat\n")
    refused(
        folder,
        root,
        place / "trials_to_test.txt",
        "user00_train.aedat",
        "trials_to_train.txt has already",
    )
    (place / "trials_to_test.txt").unlink()
    refused(folder, root, "trials_to_test.txt is missing")
    (place / "trials_to_test.txt").write_text("user00_test.aedat\n")
    (place / "user00_test_labels.csv").unlink()
    refused(folder, root, place / "user00_test.aedat", "user00_test_labels.csv")
