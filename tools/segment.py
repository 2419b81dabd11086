"""Semantic segmentation: a small head on three stages' maps, as timm's features_only gives them.

Usage:
    python tools/segment.py                            # a minute on 2 CPU cores; segment.png
    python tools/segment.py --steps 2000 --figure docs/segmentation.png

Squares, discs and crosses of one colour lie on crops of scikit-learn's two photographs; masks are
what was drawn. Test images show the right third of the photographs, training images the rest. The
backbone is a narrow HST-4 of imagenet/ with random weights.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn

import models

CLASSES = ("background", "square", "disc", "cross")
COLOURS = np.array([(0, 0, 0), (220, 60, 60), (60, 160, 220), (240, 200, 60)], np.uint8)
SIZE = 64


def draw(generator, photo):
    """(image uint8 [SIZE, SIZE, 3], mask int64 [SIZE, SIZE] of numbers of CLASSES)."""
    top, left = (generator.integers(0, length - SIZE) for length in photo.shape[:2])
    image, mask = photo[top : top + SIZE, left : left + SIZE].copy(), np.zeros((SIZE, SIZE), int)
    for _ in range(generator.integers(1, 4)):
        kind, radius = generator.integers(1, 4), generator.uniform(9, 16)
        place = generator.uniform(8, SIZE - 8, 2)
        y, x = (np.abs(np.arange(SIZE) - middle) for middle in place)
        near, far = np.minimum(y[:, None], x), np.maximum(y[:, None], x)
        if kind == 1:
            inside = far < radius
        elif kind == 2:
            inside = y[:, None] ** 2 + x**2 < radius**2
        else:
            inside = (near < 0.35 * radius) & (far < radius)
        image[inside], mask[inside] = generator.integers(0, 256, 3), kind
    return image, mask


def make(count, train, seed):
    """(images float32 [N, 3, SIZE, SIZE] from -1 to 1, masks [N, SIZE, SIZE])."""
    generator, photos = np.random.default_rng(seed), []
    for photo in load_sample_images().images:
        edge = photo.shape[1] * 2 // 3
        photos.append(photo[:, :edge] if train else photo[:, edge:])
    pairs = [draw(generator, photos[number % 2]) for number in range(count)]
    images, masks = map(np.stack, zip(*pairs, strict=True))
    return torch.tensor(images).permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor(masks)


class Segmenter(nn.Module):
    """Images [B, 3, H, W] -> logits [B, classes, H, W]: each stage's map, the mean over T, through
    a 1x1 convolution, at the first one's resolution; their sum through a 3x3 convolution.
    """

    def __init__(self, backbone, width=32):
        super().__init__()
        self.backbone = backbone
        self.laterals = nn.ModuleList(
            nn.Conv2d(channels, width, 1) for channels in backbone.feature_info.channels()
        )
        self.head = nn.Conv2d(width, len(CLASSES), 3, padding=1)

    def forward(self, images):
        maps = self.backbone(images)
        maps = [layer(x) for layer, x in zip(self.laterals, maps, strict=True)]
        size = maps[0].shape[2:]
        x = self.head(F.gelu(sum(F.interpolate(x, size, mode="bilinear") for x in maps)))
        return F.interpolate(x, images.shape[2:], mode="bilinear")


def mean_iou(predicted, masks):
    """(mean over CLASSES, of each): intersection over union of all pixels, in %."""
    ious = []
    for number in range(len(CLASSES)):
        one, other = predicted == number, masks == number
        ious.append(100 * (one & other).sum().item() / (one | other).sum().item())
    return sum(ious) / len(ious), ious


def picture(path, images, masks, predicted):
    """A png: a row each of images, what was drawn, and what was found."""
    pixels = ((images.permute(0, 2, 3, 1) + 1) * 127.5).byte().numpy()
    rows = [np.concatenate(row, 1) for row in (pixels, COLOURS[masks], COLOURS[predicted])]
    picture = Image.fromarray(np.concatenate(rows))
    picture.resize((picture.width * 2, picture.height * 2), Image.NEAREST).save(path)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=900, help="of 16 images [900]")
    parser.add_argument("--figure", type=Path, default="segment.png")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    models.load("imagenet")  # registers its models with timm
    small = {"embed_dims": 64, "num_heads": 4, "depths": 4, "T": 2}
    backbone = timm.create_model("QKFormer_10_384", features_only=True, **small)
    model = Segmenter(backbone)
    images, masks = make(2000, True, 0)
    test_images, test_masks = make(200, False, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, arguments.steps)
    weight = torch.tensor([0.3, 1.0, 1.0, 1.0])  # most pixels are background
    start = time.perf_counter()
    for step in range(1, arguments.steps + 1):
        batch = torch.randint(len(images), (16,))
        loss = F.cross_entropy(model(images[batch]), masks[batch], weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == arguments.steps:
            seconds = time.perf_counter() - start
            print(
                f"step {step}/{arguments.steps}: loss {loss.item():.3f}, {seconds:.0f} s",
                flush=True,
            )
    model.eval()
    with torch.inference_mode():
        predicted = torch.cat([model(part).argmax(1) for part in test_images.split(50)])
    mean, ious = mean_iou(predicted, test_masks)
    each = ", ".join(f"{name} {iou:.1f}" for name, iou in zip(CLASSES, ious, strict=True))
    print(f"mean IoU {mean:.1f} % ({each}) on {len(predicted)} test images: {arguments.figure}")
    picture(arguments.figure, test_images[:8], test_masks[:8], predicted[:8])
    return 0


if __name__ == "__main__":
    sys.exit(main())
