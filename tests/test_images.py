"""images.py of cifar10/, cifar100/ and imagenet/: which files count, and what is read from them."""

import io
import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from torchvision.datasets import ImageFolder

from conftest import load

images = load("cifar10").images
PIXELS = np.random.RandomState(0).randint(0, 256, (24, 40, 3), dtype=np.uint8)
FORMATS = {
    "JPEG": {},
    "JPEG progressive": {"progressive": True},
    "PNG": {},
    "BMP": {},
    "PPM": {},
    "TIFF": {},
    "TIFF packed": {"compression": "tiff_lzw"},
    "WEBP": {},
    "WEBP lossless": {"lossless": True},
    "GIF": {},
}


def encode(name, image=None, **options):
    file = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(file, name.split()[0], **options)
    return file.getvalue()


def bad(path, *words):
    """read_image refuses the file in one line that has these words and the path."""
    with pytest.raises(images.BadImage) as error:
        images.read_image(path)
    text = str(error.value)
    assert "\n" not in text and load("cifar10").log.escaped(str(path)) in text, text
    assert all(word in text for word in words), text


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's, on what it takes for metadata
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_cut_anywhere_is_refused(tmp_path, name, capfd):
    content, path, generator = (
        encode(name, **FORMATS[name]),
        tmp_path / "image.jpg",
        random.Random(name),
    )
    path.write_bytes(content)
    np.testing.assert_array_equal(images.read_image(path), Image.open(path).convert("RGB"))
    for _ in range(40):
        path.write_bytes(content[: generator.randrange(len(content))])
        bad(path)


def test_no_flipped_bit_of_a_png_changes_a_pixel(tmp_path):
    content, path, generator, refused = encode("PNG"), tmp_path / "image.png", random.Random(2), 0
    for _ in range(200):
        flipped = bytearray(content)
        flipped[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        try:
            np.testing.assert_array_equal(
                images.read_image(path), PIXELS
            )  # a flip in the end's own checksum
        except images.BadImage:
            refused += 1
    assert refused > 190


@pytest.mark.parametrize("name", ["PNG", "TIFF", "PPM"])
def test_16_bits_keep_their_range(tmp_path, name):
    """A ramp over all of the range; PIL's own convert() clips it, so that 255 of 256 values are
    white.
    """
    ramp, path = np.arange(0, 2**16, 16, dtype=np.uint16).reshape(64, 64), tmp_path / "image"
    Image.fromarray(ramp).save(path, name)
    read = np.asarray(images.read_image(path))
    assert read.shape == (64, 64, 3) and (read == (ramp >> 8)[..., None]).all()
    if name == "TIFF":
        path.write_bytes(b"MM\0*" + path.read_bytes()[4:])  # nonsense in the other order of bytes
        bad(path)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_values_without_a_range_are_refused(tmp_path, dtype):
    Image.fromarray(np.ones((8, 8), dtype)).save(tmp_path / "image", "TIFF")
    bad(tmp_path / "image", "32-bit", "save it with 8 bits")


def test_exif_rotation_is_left_alone(tmp_path):
    """As in timm and the release: both call convert("RGB") on what PIL opens."""
    exif, path = Image.Exif(), tmp_path / "image.jpg"
    exif[0x0112] = 6  # to be turned by 90 degrees
    path.write_bytes(encode("JPEG", exif=exif))
    read = images.read_image(path)
    assert read.size == (40, 24)
    np.testing.assert_array_equal(read, Image.open(io.BytesIO(encode("JPEG"))))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_modes_as_PIL_converts_them(tmp_path, mode):
    path = tmp_path / "image"
    path.write_bytes(
        encode("TIFF" if mode == "CMYK" else "PNG", Image.fromarray(PIXELS).convert(mode))
    )
    np.testing.assert_array_equal(images.read_image(path), Image.open(path).convert("RGB"))


def test_postscript_does_not_reach_ghostscript(tmp_path, monkeypatch):
    def run(*args, **_):
        raise ZeroDivisionError

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    path = tmp_path / "image.jpg"
    path.write_bytes(encode("EPS"))
    with pytest.raises(ZeroDivisionError):
        Image.open(path).load()  # so PIL would run it
    bad(path, "unknown format")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    (tmp_path / "itself.jpg").symlink_to("itself.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe", "endless", "folder"):
        bad(tmp_path / f"{name}.jpg", "not a file")
    bad(tmp_path / "dangling.jpg", "No such file")
    bad(tmp_path / "itself.jpg", "symbolic links")


def fill(folder, *names):
    for name in names:
        path = os.path.join(os.fsencode(folder), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes(encode("PNG"))


def test_the_order_is_torchvision_s(tmp_path):
    names = "b/2.png b/10.PNG b/c/1.jpeg b/c-d/1.png b/c/d/0.webp a/x.bmp a/y.tif C/1.ppm C/2.pgm C/no.txt"
    fill(tmp_path / "train", *names.split())
    (tmp_path / "train" / "d").symlink_to("b")  # links are followed, to files and folders
    (tmp_path / "train" / "a" / "z.png").symlink_to("../b/2.png")
    samples, classes = images.list_split(tmp_path, True)
    want = ImageFolder(tmp_path / "train")
    assert (
        samples == want.samples
        and classes == want.classes == ["C", "a", "b", "d"]
        and len(samples) == 15
    )


def test_hidden_names_do_not_count(tmp_path):
    fill(
        tmp_path,
        "val/a/1.png",
        "val/a/._1.png",
        "val/.cache/1.png",
        "val/a/.x/1.png",
        "train/a/1.png",
    )
    samples, classes = images.list_split(tmp_path, False)
    assert samples == [(str(tmp_path / "val" / "a" / "1.png"), 0)] and classes == ["a"]


@pytest.mark.parametrize(
    ("target", "found"), [(".", "a/1"), ("..", "a/1 a/x/b/1"), ("../b", "a/1 a/x/1")]
)
def test_links_in_a_loop(tmp_path, target, found):
    """A folder counts once, however many links lead to it."""
    fill(tmp_path, "train/a/1.png", "train/b/1.png")
    (tmp_path / "train" / "a" / "x").symlink_to(target)
    (tmp_path / "train" / "b" / "y").symlink_to("../a")
    samples, _ = images.list_split(tmp_path, True)
    names = [
        f"{found} b/1 b/y/1".split(),
        [path[len(f"{tmp_path}/train/") : -4] for path, _ in samples],
    ]
    assert names[0] == names[1]


def test_names_that_are_not_utf_8(tmp_path):
    fill(tmp_path, b"train/a/\xff\xe9.png", b"train/a/\xe4.jpg")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/train/a/\xe4.jpg")).write_bytes(b"")
    samples, _ = images.list_split(tmp_path, True)
    (empty, _), (whole, _) = samples
    assert images.read_image(whole).size == (40, 24)
    bad(empty, r"\udce4.jpg")


def test_layouts_that_can_not_be_trained_on(tmp_path):
    def fails(words, train=True):
        with pytest.raises(images.UserError) as error:
            images.list_split(tmp_path, train)
        assert words in str(error.value) and "\n" not in str(error.value)

    fails(f"no folder {tmp_path / 'train'}")
    (tmp_path / "train").mkdir()
    fails("holds no folders")
    fill(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png")
    fails("only train/ has class b")
    fails("only train/ has class b", train=False)
    fill(tmp_path, "val/b/1.txt")
    fails(f"{tmp_path / 'val' / 'b'} holds no images", train=False)
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "train" / "a" / "1.png", tmp_path / ("x" * 300), tmp_path / "loop"):
        with pytest.raises(images.UserError, match="no folder"):
            images.list_split(path, True)
