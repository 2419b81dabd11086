"""Other test sets: class folders, CIFAR-10-C's arrays, frames."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import shifted
from conftest import ROOT, load, resolve_in
from on_digits import cifar10
from on_images import CLASSES, write_images
from on_photos import imagenet
from test_imagenet_checkpoints import golden_file, probabilities

UserError = cifar10.config.UserError


def measured(run, capsys, *argv):
    """(what the tool said, its JSON, which is removed)."""
    capsys.readouterr()
    try:
        shifted.main([run / "best.pth", *argv, "--folder", "cifar10", "--", "--device", "cpu"])
        text = capsys.readouterr().out
    except SystemExit as end:
        text = end.code
    files = [*run.glob("shifted-*.json")]
    found = [json.loads(file.read_text()) for file in files]
    for file in files:
        file.unlink()
    return text, *found


@pytest.fixture
def run(trained_on_images, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("best.pth", "args.yaml"):
        (tmp_path / name).write_bytes((trained_on_images / name).read_bytes())
    return tmp_path


def figures(run, images, labels, columns):
    """(top-1 in %, loss) of PIL images, computed with the model as torch.hub has it."""
    model, transform, _ = cifar10.build.load(cifar10.options, cifar10.data, run / "best.pth")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.stack([transform(image) for image in images]))[:, columns]
    labels = torch.as_tensor(labels)
    loss = torch.nn.functional.cross_entropy(logits.double(), labels).item()
    top1 = 100 * (logits.argmax(1) == labels).double().mean().item()
    return pytest.approx(top1), pytest.approx(loss, rel=2e-3)


def test_class_folders(run, capsys, tmp_path):
    """All classes, some by name, some by number, and one that the model has not."""
    train = write_images(tmp_path / "all") / "train"
    for number, names in enumerate(
        ({0: CLASSES[0], 1: CLASSES[1], 2: CLASSES[2]}, {0: CLASSES[0], 2: CLASSES[2]}, {2: "2"})
    ):
        root, images = tmp_path / str(number), []
        for label, name in names.items():
            shutil.copytree(train / CLASSES[label], root / name)
            images += [Image.open(path) for path in sorted((root / name).iterdir())]
        labels = [place for place in range(len(names)) for _ in range(4)]
        text, found = measured(run, capsys, root)
        assert (found["top1"], found["loss"]) == figures(run, images, labels, [*names])
        assert f"test_path {root}: {len(images)} samples" in text
        assert found["test_path"] == str(root) and found["samples"] == len(images)
        some = f"{len(names)} of the model's 3 classes, whose logits alone are compared"
        assert (some in text) == (len(names) < 3)
    (root / "2").rename(root / "cat")
    text, *found = measured(run, capsys, root)
    assert text.startswith(f"error: test_path is {root}: its class cat is none of the model's")
    text, *more = measured(run, capsys, root, "--severity", 2)
    assert text == f"error: severity is 2, but test_path is {root}, no .npy" and not found + more
    text, *_ = measured(run, capsys, tmp_path / "none")
    assert text == f"error: {tmp_path / 'none'}: No such file or directory"


def test_cifar_c(run, capsys, tmp_path):
    """A severity is its fifth of the file; all are the whole."""
    images = np.random.default_rng(0).integers(0, 255, (20, 12, 12, 3), dtype=np.uint8)
    labels = np.arange(20) % 4 % 3
    np.save(tmp_path / "fog.npy", images)
    np.save(tmp_path / "labels.npy", labels)
    for flags, part in ((["--severity", 3], slice(8, 12)), ([], slice(None))):
        text, found = measured(run, capsys, tmp_path / "fog.npy", *flags)
        own = [Image.fromarray(image) for image in images[part]]
        assert (found["top1"], found["loss"]) == figures(run, own, labels[part], [0, 1, 2])
        assert found.get("severity") == (3 if flags else None)
        said = f"test_path {tmp_path / 'fog.npy'}{', severity 3' * bool(flags)}: {len(own)} samples"
        assert said in text


def test_arrays_that_do_not_fit(tmp_path):
    """The size that a header says is compared with the file's before memory is taken."""
    path, labels = tmp_path / "fog.npy", tmp_path / "labels.npy"

    def fails(words):
        with pytest.raises(UserError, match=words) as error:
            shifted.read_corrupted(cifar10, path, 1)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)

    fails("no such file")
    np.save(labels, np.zeros(5, int))
    np.save(path, np.zeros((5, 8, 8, 3), np.uint8))
    assert shifted.read_corrupted(cifar10, path, 5)[0].shape == (1, 8, 8, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    fails("fog.npy: not a whole array")
    path.write_bytes(whole.replace(b"(5, 8, 8, 3)", b"(9000000000000, 8, 8, 3)").ljust(128))
    fails("fog.npy: not a whole array")
    np.save(path, np.array([{}]), allow_pickle=True)
    fails("fog.npy: not a whole array")
    np.save(path, np.zeros((5, 8, 8, 3)))
    fails("are float64 ")
    np.save(path, np.zeros((5, 8, 8, 3), np.uint8))
    for other in (np.zeros(4, int), np.zeros(5), np.full(5, -1), np.full(5, 10**12)):
        np.save(labels, other)
        fails("not uint8")
    for size, other in ((6, np.zeros(6, int)), (5, np.arange(5))):  # one severity alone
        np.save(path, np.zeros((size, 8, 8, 3), np.uint8))
        np.save(labels, other)
        fails("severity is 1, but .*fog.npy is not five parts with the same labels")


def test_imagenet_and_frames(tmp_path):
    """ImageNet's wnids are known where a checkpoint has no names; labels of frames stay what they
    are, whichever classes there are.
    """

    def columns_of(tested, classes):
        return shifted.columns_of(imagenet, tested, "x", classes)

    model = torch.nn.Linear(1, 1000)
    model.num_classes = 1000
    empty = imagenet.build.Tested(None, None, None, model, {}, None)
    wnids = [*imagenet.data.ImageNetInfo().label_names()]
    some = columns_of(empty._replace(classes=wnids), [wnids[7], wnids[3]])
    assert some == [7, 3] and wnids[7] == "n01514668"
    assert columns_of(empty, ["0", "10", "2"]) == [0, 10, 2]
    assert columns_of(empty, [f"c{n}" for n in range(1000)]) == [*range(1000)]
    with pytest.raises(imagenet.config.UserError, match="its class c0 is none of the model's"):
        columns_of(empty, ["c0"])
    # names that are numbers: a folder 1 is not the model's class 1, which is called 2
    model.num_classes, named = 3, empty._replace(classes=["1", "2", "10"])
    assert columns_of(named, ["10", "2"]) == [2, 1]
    with pytest.raises(imagenet.config.UserError, match="its class 0 is none of the model's"):
        columns_of(named, ["0", "1", "2"])
    gesture = load("dvs128-gesture")
    for name in ("0", "10"):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "a.npz", frames=np.zeros((2, 2, 128, 128), np.uint8))
    cfg = resolve_in(gesture, "-T", 2)
    dataset = shifted.open_test_set(gesture, cfg, tmp_path)
    assert [label for _, label in dataset] == [0, 2] and len(dataset.classes) == 11
    assert dataset.classes[2] == "other gestures"  # of the folder 10


def test_a_released_file(tmp_path, narrow, photo_data, monkeypatch):
    """Without names its 1,000 classes are ImageNet's; no published figure is of another test set."""
    monkeypatch.chdir(ROOT)
    path, model = golden_file(tmp_path / "released.pth", narrow, 1000)
    released = imagenet.released
    entry = released.Released("QKFormer_10_384", 32, 78.80, 24)
    monkeypatch.setitem(released.RELEASED, released.md5(path), entry)
    wnids, photographs = imagenet.data.ImageNetInfo().label_names(), []
    for number, part in ((3, "n01000001"), (7, "n02000002")):
        shutil.copytree(photo_data / "val" / part, tmp_path / "own" / wnids[number])
        own = sorted((tmp_path / "own" / wnids[number]).iterdir())
        photographs += own[:9]
        for photo in own[9:]:
            photo.unlink()
    flags = "--num_heads 2 --num_workers 0 --fused no --device cpu".split()
    shifted.main([path, tmp_path / "own", "--folder", "imagenet", "--", *flags])
    found = json.loads((tmp_path / "shifted-released.json").read_text())
    labels = torch.tensor([0] * 9 + [1] * 9)
    right = probabilities(model, photographs)[:, [3, 7]].argmax(1) == labels
    assert found["top1"] == 100 * right.double().mean().item() > 0 and found["samples"] == 18
    assert found["cross_sample_lif"] is True and "published_top1" not in found
