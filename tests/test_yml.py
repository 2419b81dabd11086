"""Values of ymls and flags, whatever they are: each is what it says, or ends in one clear line."""

import math
import os
import unicodedata
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT, load

FOLDERS = ("cifar10", "cifar100", "dvs128-gesture", "cifar10-dvs", "imagenet")
cifar10 = load("cifar10")
KEYS = cifar10.options.KEYS
UserError = cifar10.config.UserError
repeatable = settings(derandomize=True, deadline=None, database=None)


def read(*argv, folder=cifar10):
    return folder.config.read_settings(folder.options, [*map(str, argv)])


def fault(*argv, folder=cifar10):
    """The one line that these flags end in."""
    with pytest.raises(folder.config.UserError) as error:
        read(*argv, folder=folder)
    text = str(error.value)
    assert text.isprintable() and len(text) < 400, text
    return text


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("yml")


@pytest.fixture
def yml_of(tmp_path):
    def write(text):
        (tmp_path / "mine.yml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "-c", tmp_path / "mine.yml"

    return write


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("epochs: 010", "epochs", 10),
        ("epochs: 1e2", "epochs", 100),
        ("epochs: 64.0", "epochs", 64),
        ("epochs: '7'", "epochs", 7),
        ("lr: 1e-3", "lr", 1e-3),
        ("lr: .5", "lr", 0.5),
        ("lr: +1.e-2", "lr", 0.01),
        ("seed: 2147483648", "seed", 2**31),
        ("aa: rand-m9-mstd0.5-inc1-tweights", "aa", "rand-m9-mstd0.5-inc1-tweights"),
        ("aa: augmix-m5-w4-d2", "aa", "augmix-m5-w4-d2"),
        ("aa: originalr-mstd0.5", "aa", "originalr-mstd0.5"),
        ("experiment: 12:30", "experiment", "12:30"),
        ("experiment: 1.10", "experiment", "1.10"),
        ("experiment: 007", "experiment", "007"),
        ("experiment: 2026-11-25", "experiment", "2026-11-25"),
        ("experiment: ~", "experiment", None),
        ("experiment:", "experiment", None),
        ("data_dir: 2024", "data_path", "2024"),
        ("amp: no", "amp", False),
        ("amp: Yes", "amp", True),
        ("amp: off", "amp", False),
        ("cross_sample_lif: yes", "cross_sample_lif", "true"),
        ("dist_bn: ''", "dist_bn", ""),
        ("mean: [0.5, .4, 3e-1]", "mean", [0.5, 0.4, 0.3]),
        ("mean: 0.5, 0.4, 0.3", "mean", [0.5, 0.4, 0.3]),
        ("mean:\n- 0.5\n- 0.4\n- 0.3", "mean", [0.5, 0.4, 0.3]),
        ("dim: &width 64\nepochs: *width", "epochs", 64),
        ("\ufeffepochs: 5", "epochs", 5),
        ("", "epochs", 400),
        ("# nothing\n---\n", "epochs", 400),
    ],
)
def test_what_a_value_means(yml_of, text, name, value):
    settings = read(*yml_of(text))
    found = getattr(settings.resolve(), name)
    assert found == value == getattr(settings, name) and type(found) is type(value)
    assert not settings.notes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochs: 0o17", "epochs is 0o17; it must be a whole number"),
        ("epochs: 0x1F", "epochs is 0x1F; it must be a whole number"),
        ("epochs: many", "epochs is many; it must be a whole number from 1 to 100000"),
        ("epochs: 1.5", "epochs is 1.5; it must be a whole number"),
        ("epochs: true", "epochs is true; it must be a whole number"),
        ("lr: [1, 2]", "lr is [1, 2]; it must be a number"),
        ("lr: .nan", "lr is .nan; it must be a number"),
        ("amp: 3", "amp is 3; it must be true or false"),
        ("dim: null", "dim is null; it must be a whole number"),
        ("sched: cosin", "sched is cosin; it must be one of cosine, tanh"),
        ("cross_sample_lif: maybe", "it must be one of auto, true, false"),
        ("- a list", "line 1: not a yml of `key: value` lines"),
        ("epochs: 1:30", "line 1: epochs is 1:30; it must be a whole number from 1 to 100000"),
        ("\n\nepochs: \uff11\uff10", "line 3: epochs is"),
        ("epochs: 1_000", "epochs is 1_000"),
        ("epochs: " + "9" * 5000, "epochs is 999"),
        ("epochs: 1e9999999999999999999", "epochs is 1e9999"),
        ("epochs: 2026-02-31", "epochs is 2026-02-31"),
        ("epochs: .inf", "epochs is .inf"),
        ("lr: 1e-400", "lr is 1e-400; it must be a number from 1e-10 to 100"),
        ("lr: 0", "lr is 0; it must be"),
        ("lr: 1e300", "lr is 1e300; it must be"),
        ("layer: 100000", "layer is 100000; it must be a whole number from 3 to 100"),
        ("scale: [1.0, 0.5]", "it must be 2 numbers from 0.01 to 1, the smaller one first"),
        ("ratio: [1.5, 0.5]", "the smaller one first"),
        ("mean: [125, 123, 114]", "it must be 3 numbers from 0 to 1"),
        ("mean: [0.5, null, 0.5]", "mean is [0.5, null, 0.5]"),
        ("attention: [token, ssa]", "it must be 3 words of token, channel, ssa"),
        ("aa: rnd-m9", "it must be a policy of timm's, as in rand-m9-n1-mstd0.4-inc1, or none"),
        ("aa: rand-m9-inc", "aa is rand-m9-inc"),  # timm passes over what it does not know
        ("data_dir: ''", "data_dir is ''; it must be a path"),
        (f"base: {ROOT}/cifar10/cifar10.yml\nbase: other.yml", "line 2: base is there already"),
        ("epochs: 1\nepochs: 2", "line 2: epochs is there already, with another value"),
        ("batch_size: 1\nbatch-size: 2", "line 2: batch_size is there already"),
        ("workers: 1\nnum_workers: 2", "line 2: workers and num_workers are one key"),
        ("lr: {peak: 1}", "line 1: a key is a word, its value a word, a number or a list of them"),
        (
            "mean: [[1], 2, 3]",
            "line 1: a key is a word, its value a word, a number or a list of them",
        ),
        ("[a, b]: 1", "line 1: a key is a word, its value a word, a number or a list of them"),
        ("false", "mine.yml, line 1: not a yml of `key: value` lines"),
        ("[]", "mine.yml, line 1: not a yml of `key: value` lines"),
        ("null", "mine.yml, line 1: not a yml of `key: value` lines"),
        ("lr: 1\n---\nlr: 2", "line 2: not a yml"),
        ("lr: " + "[" * 500, "mine.yml: not a yml: maximum recursion depth"),
        ("a: &a [*a]", "line 1: a key is a word, its value a word, a number or a list of them"),
        ("lr: *unknown", "line 1: not a yml: found undefined alias"),
        ("lr: 1\n  lr: 2\n", "line 2: not a yml"),
        ("\tlr: 1", "line 1: not a yml"),
        ('experiment: "a\\0b"', "experiment is a\\x00b; it must be a word"),
        ('experiment: "\\ud800"', "experiment is \\ud800; it must be a word"),
        ('experiment: "\\UFFFFFFFF"', "mine.yml: not a yml"),
        (b"lr: 1\nexperiment: \xff\xfe", "mine.yml: not a yml: 'utf-8' codec can't decode"),
        (b"lr: 1\nexperiment: a\0b", "mine.yml: not a yml: unacceptable character #x0000"),
        (b"\x80\x02}q\x00", "not a yml"),
        ("base: [a, b]", "line 1: base is [a, b]: no such file in "),
        ('base: "a\\0b"', "base is a\\x00b: no such file in "),
        ("base: " + "x" * 300, ": no such file in "),
        ("base: mine.yml", "base is mine.yml: it leads back in "),
        ("base: .", "base is .: no such file in "),
        ("Epoch: 1", "unknown key Epoch; is epochs meant?"),
        ("batchsize: 3", "unknown key batchsize; is batch_size meant?"),
        ("mixup_of_epoch: 1", "is mixup_off_epoch meant?"),
        ("x" * 500 + ": 1", "unknown key xxxx"),
    ],
)
def test_mistakes_in_a_yml(yml_of, text, words):
    assert words in fault(*yml_of(text))


def test_no_hint_where_nothing_is_near(yml_of):
    assert fault(*yml_of("colour_of_the_sky: 1")).endswith("unknown key colour_of_the_sky")


def test_files_that_are_no_yml(tmp_path):
    assert "no such file" in fault("-c", tmp_path)
    assert "no such file" in fault("-c", tmp_path / "none.yml")
    assert "no such file" in fault("-c", "x" * 300)
    assert "no such file" in fault("-c", "a\0b")
    assert "no such file" in fault("-c", "/dev/zero")
    (tmp_path / "loop.yml").symlink_to(tmp_path / "loop.yml")
    assert "loop.yml" in fault("-c", tmp_path / "loop.yml")
    (tmp_path / "secret.yml").write_text("lr: 1\n")
    (tmp_path / "secret.yml").chmod(0)
    if not os.access(tmp_path / "secret.yml", os.R_OK):
        assert "not a yml: Permission denied" in fault("-c", tmp_path / "secret.yml")


def test_chains_and_loops_of_bases(tmp_path):
    for number in range(210):
        (tmp_path / f"{number}.yml").write_text(f"base: {number + 1}.yml\nseed: {number}\n")
    (tmp_path / "210.yml").write_text("dim: 64\n")
    found = read("-c", tmp_path / "0.yml")
    assert (found.dim, found.seed) == (64, 0)
    (tmp_path / "210.yml").write_text("dim: 64\nbase: 60.yml\n")
    assert "210.yml, line 2: base is 60.yml" in fault("-c", tmp_path / "0.yml")


def test_paths_are_expanded(yml_of, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.delenv("UNSET", raising=False)
    text = "output: ~/runs\ndata_dir: $DATA/cifar"
    said = read(*yml_of(text), "--resume", "${DATA}/~x")
    want = "/home/me/runs", "/data/cifar", "/data/~x"
    assert (said.output, said.data_path, said.resume) == want
    assert read(*yml_of("output: ~")).output is None  # YAML's null
    assert read(*yml_of("experiment: ~x$DATA")).experiment == "~x$DATA"  # no path
    line = fault(*yml_of("\noutput: $UNSET/x"))
    wanted = "it must be a path, or none; $UNSET stands for nothing here"
    assert line == f"mine.yml, line 2: output is $UNSET/x; {wanted}"
    assert "; ~nobody-of-this-name stands for nothing here" in fault(
        "--data-dir", "~nobody-of-this-name/x"
    )
    paths = {name for name, key in KEYS.items() if key.kind is Path}
    ours = "data_path output resume finetune checkpoint"
    assert paths == {*ours.split()}


# The names of all folders, of the release and of timm for one thing.
ALIASES = "T time_step, data_dir data_path, num_workers workers, nb_classes num_classes, "
ALIASES += "output_dir output, print_freq log_interval, initial_checkpoint finetune"
MORE = {"dvs128-gesture": ", eval test_only", "imagenet": ", test_only eval, input_size img_size"}
MORE["cifar10-dvs"] = MORE["dvs128-gesture"]


@pytest.mark.parametrize("name", FOLDERS)
def test_names_of_the_other_folders(name, tmp_path):
    folder = load(name)
    table = {alias: key for key, row in folder.options.KEYS.items() for alias in row.aliases}
    assert table == dict(pair.split() for pair in (ALIASES + MORE.get(name, "")).split(", "))
    assert not table.keys() & {*folder.options.KEYS, *folder.options.NO_EFFECT}
    for alias, key in table.items():
        kind = folder.options.KEYS[key].kind
        value, other = {int: (17, 18), bool: (True, False)}.get(kind, ("x", "y"))
        (tmp_path / "a.yml").write_text(f"{alias}: {value}\n")
        for argv in ("-c", tmp_path / "a.yml"), (f"--{alias.replace('_', '-')}", value):
            found = read(*argv, folder=folder)
            assert found.said[key][0] == value == getattr(found.resolve(), key)
        assert not hasattr(found.resolve(), alias)
        both = read(f"--{alias}", value, f"--{key}", value, folder=folder)
        assert getattr(both, key) == value
        assert "are one key" in fault(f"--{alias}", value, f"--{key}", other, folder=folder)
        # A flag goes over the yml.
        over = read("-c", tmp_path / "a.yml", f"--{key}", other, folder=folder)
        assert getattr(over, key) == other == getattr(over.resolve(), key)


@pytest.mark.parametrize("name", FOLDERS)
def test_every_number_has_a_range_and_every_default_is_in_it(name):
    options = load(name).options
    groups = (options.MODEL, options.DATA, options.AUGMENTATION, options.OPTIMISATION, options.RUN)
    assert sum(map(len, groups)) == len(options.KEYS)
    for key_name, key in options.KEYS.items():
        kind = key.kind
        assert kind not in (int, float) or -math.inf < key.low < key.high < math.inf, key_name
        if kind in (int, float) and not key.length:  # its ends too, as they are written
            ends = key.low, key.high
            assert tuple(key.convert(f"{end}") for end in ends) == ends, key_name
        assert fits(key, key.default) and key.convert(key.default) == key.default, key_name
        assert key.help and not key.help.endswith("."), key_name


def fits(key, value):
    """Whether a value is one that this key may have."""
    if value is None:
        return key.is_optional
    if key.length:
        falls = key.rising and sorted(value) != value
        if falls or not key.length[0] <= len(value) <= key.length[1]:
            return False
        return all(fit_one(key, item) for item in value)
    return fit_one(key, value)


def fit_one(key, value):
    kind = key.kind
    if kind in (str, Path):
        if type(value) is not str or (key.choices and value not in key.choices):
            return False
        return {"Cc", "Cs", "Zl", "Zp"}.isdisjoint(map(unicodedata.category, value))
    if kind is bool:
        return type(value) is bool
    return type(value) in (int, kind) and math.isfinite(value) and key.low <= value <= key.high


# What is thrown at it: texts of any kind, and those that look like values, in one of many ways.
NUMBERS = st.one_of(
    st.integers().map(str),
    st.floats().map(repr),
    st.from_regex(r"[-+]?[0-9]{0,4}\.?[0-9]{0,30}([eE][-+]?[0-9]{1,3})?", fullmatch=True),
    st.from_regex(r"0[xob]?[0-9A-Fa-f_]{1,20}|[0-9]{1,3}:[0-9]{2}", fullmatch=True),
    st.from_regex(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", fullmatch=True),
    st.text("0123456789.eE+-_:xo \uff11\u0663", max_size=12),
)
WORDS = st.sampled_from(
    "true false yes No ON off null none ~ auto cuda token ssa channel batch reduce adamw cosine "
    "rand-m9 $HOME ~/x $NO_SUCH_VARIABLE .inf .nan !!float !!timestamp *a &a {} [] [[1]] {a:1} ? - "
    "| > % @ ` '' \"".split()
)
LISTS = st.lists(NUMBERS, max_size=4).map(", ".join)
TEXTS = st.one_of(NUMBERS, WORDS, st.text(max_size=20), LISTS)
ALL = [*KEYS, *sum((key.aliases for key in KEYS.values()), ()), *cifar10.options.NO_EFFECT]
NAMES = st.sampled_from(ALL)
LINES = st.one_of(
    st.tuples(NAMES, TEXTS).map(": ".join),
    st.tuples(NAMES, LISTS).map(lambda pair: f"{pair[0]}: [{pair[1]}]"),
    st.tuples(st.text(max_size=10), TEXTS).map(": ".join),
    st.text(max_size=30),
)


def check(*argv):
    """A configuration within the table, or one line."""
    try:
        found = read(*argv)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 500
        return
    cfg = found.resolve()
    assert vars(cfg).keys() == KEYS.keys() and all(isinstance(note, str) for note in found.notes)
    for name, key in KEYS.items():
        assert fits(key, getattr(cfg, name)), name
        assert name not in found.said or found.said[name][0] == getattr(cfg, name)


@settings(repeatable, max_examples=80)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode)))
def test_any_bytes(place, content):
    (place / "any.yml").write_bytes(content)
    check("-c", place / "any.yml")


@settings(repeatable, max_examples=100)
@given(st.lists(LINES, min_size=1, max_size=4))
def test_any_yml(place, lines):
    (place / "any.yml").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    check("-c", place / "any.yml")


SPELLINGS = [*ALL, *(name.replace("_", "-") for name in ALL)]
FLAGS = st.sampled_from([f"--{spelled}" for spelled in SPELLINGS])
SHORT = st.sampled_from("-T -L -b -vb -j -d -data-dir -c --config".split())
TOKENS = st.one_of(FLAGS, SHORT, TEXTS, st.tuples(FLAGS, TEXTS).map("=".join))


@settings(repeatable, max_examples=100)
@given(st.one_of(st.lists(TOKENS, max_size=6), st.tuples(FLAGS, TEXTS).map(list)))
def test_any_flags(place, argv):
    (place / "any.yml").write_text("")
    if not {"-h", "--help"} & set(argv):
        check("-c", place / "any.yml", *argv)


@settings(repeatable, max_examples=500)
@given(st.sampled_from(sorted(KEYS)), st.one_of(NUMBERS, TEXTS))
def test_what_converts_is_equal(name, text):
    key = KEYS[name]
    try:
        value = key.convert(text)
    except ValueError as wanted:
        assert str(wanted).isprintable()
        return
    assert fits(key, value)
    if key.kind in (int, float) and not key.length and value is not None:
        exact = Fraction(text)
        assert text.isascii() and "_" not in text and " " not in text
        assert value == float(exact)
    assert key.convert(value) == value  # as a checkpoint and args.yaml record it
