# Copied from dvs128-gesture/augment.py
"""Augmentation of event frames: a flip, then one of six operations, alike for all frames."""

import math

import torch
from torchvision.transforms.v2 import functional as TF

STEPS = 31  # magnitudes are uniform over this many equally spaced values, from -max to max
SHEAR = 0.3  # radians
# Pixels of a translation: one of 31 values from -5 to 5, truncated towards 0. The release truncates
# a float32 linspace in which 1 and 2 come out as 0.9999999 and 1.9999999. So 0 is here seven times
# instead of five, and 2 twice instead of three times. Written out, since what linspace rounds to
# depends on the processor.
TIMES = (1, 3, 3, 2, 3, 7, 3, 2, 3, 3, 1)  # of -5, -4, ..., 5
SHIFTS = [shift for shift, times in enumerate(TIMES, -5) for _ in range(times)]
ROTATE = 30.0  # degrees
CUTOUT = (0.001, 0.11)  # of the frame's area


def augment(frames):
    """Augment one sample, float [T, 2, H, W], with numbers from PyTorch's CPU generator."""
    if torch.rand(()) < 0.5:
        frames = TF.horizontal_flip(frames)
    return OPERATIONS[draw(len(OPERATIONS))](frames)


def draw(n):
    """A whole number, uniform over 0 .. n - 1."""
    return int(torch.randint(n, ()))


def magnitude(largest):
    return largest * (2 * draw(STEPS) - (STEPS - 1)) / (STEPS - 1)


def identity(frames):
    return frames


def shear_x(frames):
    """Along x, about the centre."""
    return affine(frames, shear=[math.degrees(magnitude(SHEAR)), 0.0])


def translate_x(frames):
    return affine(frames, translate=[SHIFTS[draw(STEPS)], 0])


def translate_y(frames):
    return affine(frames, translate=[0, SHIFTS[draw(STEPS)]])


def rotate(frames):
    """About the centre."""
    return TF.rotate(frames, magnitude(ROTATE))


def cutout(frames):
    """Set one square to 0. It lies inside the frame; its area is uniform over CUTOUT."""
    height, width = frames.shape[-2:]
    area = CUTOUT[0] + (CUTOUT[1] - CUTOUT[0]) * torch.rand(()).item()
    side = min(round(math.sqrt(area * height * width)), height, width)
    top, left = draw(height - side + 1), draw(width - side + 1)
    return TF.erase(frames, top, left, side, side, torch.zeros(()))


def affine(frames, translate=(0, 0), shear=(0.0, 0.0)):
    return TF.affine(frames, angle=0.0, translate=list(translate), scale=1.0, shear=list(shear))


OPERATIONS = (identity, shear_x, translate_x, translate_y, rotate, cutout)
