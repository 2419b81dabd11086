# Copied from dvs128-gesture/augment.py
"""Augmentation of event frames: a flip, then one of six operations, the same for all frames of a sample."""

import math

import torch
from torchvision.transforms.v2 import functional as TF

STEPS = 31  # magnitudes are uniform over this many equally spaced values, from -max to max
SHEAR = 0.3  # radians
TRANSLATE = 5.0  # pixels
ROTATE = 30.0  # degrees
CUTOUT = (0.001, 0.11)  # of the frame's area


def augment(frames):
    """One sample [T, 2, H, W], float, its random numbers from PyTorch's CPU generator. The shape stays."""
    if torch.rand(()) < 0.5:
        frames = TF.horizontal_flip(frames)
    return OPERATIONS[draw(len(OPERATIONS))](frames)


def draw(n):
    """A whole number, uniform over 0 .. n - 1."""
    return int(torch.randint(n, ()))


def magnitude(largest):
    return largest * (2 * draw(STEPS) - (STEPS - 1)) / (STEPS - 1)  # one division: whole numbers come out whole


def identity(frames):
    return frames


def shear_x(frames):
    """Along x, about the centre."""
    return affine(frames, shear=[math.degrees(magnitude(SHEAR)), 0.0])


def translate_x(frames):
    """By whole pixels: the drawn value is truncated towards 0, so that 0 is drawn most."""
    return affine(frames, translate=[int(magnitude(TRANSLATE)), 0])


def translate_y(frames):
    return affine(frames, translate=[0, int(magnitude(TRANSLATE))])


def rotate(frames):
    """About the centre."""
    return TF.rotate(frames, magnitude(ROTATE))


def cutout(frames):
    """One square inside the frame set to 0, its area uniform over CUTOUT."""
    height, width = frames.shape[-2:]
    area = CUTOUT[0] + (CUTOUT[1] - CUTOUT[0]) * torch.rand(()).item()
    side = min(round(math.sqrt(area * height * width)), height, width)
    top, left = draw(height - side + 1), draw(width - side + 1)
    return TF.erase(frames, top, left, side, side, torch.zeros(()))


def affine(frames, translate=(0, 0), shear=(0.0, 0.0)):
    return TF.affine(frames, angle=0.0, translate=list(translate), scale=1.0, shear=list(shear))


OPERATIONS = (identity, shear_x, translate_x, translate_y, rotate, cutout)
