"""Training images: decoded and cropped by the workers, erased on the device.

The distribution is that of timm's transforms on Pillow's images; the pixels differ by rounding.
"""

from itertools import cycle

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.functional import pil_to_tensor

from harness.batches import seeded
from images import read_image, to_rgb


def decode(image, data):
    """uint8 [3, H, W] of an opened PIL image and its file's bytes.

    torchvision's decoder has Pillow's pixels, and no copies between libjpeg and the tensor.
    """
    if image.format == "JPEG" and image.mode == "RGB":
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    return pil_to_tensor(to_rgb(image))


def read_pixels(path):
    """images.read_image as uint8 [3, H, W]."""
    return read_image(path, decode)


class Crop:
    """The random crop of timm's RandomResizedCropAndInterpolation, bicubic.

    uint8 [3, H, W] -> PIL image. PyTorch resizes as Pillow 9 does, the release's, to 2 of 255
    levels, in a fourth of the time. (Pillow 13 resizes some crops by height first, which rounds in
    another place.)
    """

    def __init__(self, crop):
        self.crop = crop

    def __call__(self, image):
        top, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        image = image[None, :, top : top + height, left : left + width]
        image = image.contiguous(memory_format=torch.channels_last)  # for the fast path
        image = F.interpolate(image, self.crop.size, mode="bicubic", antialias=True)
        return Image.fromarray(image[0].permute(1, 2, 0).numpy())


class Erasing(RandomErasing):
    """timm's random erasing of normalised batches; each draws from a seed of its own.

    So what a batch gets does not depend on what came before, on this device as in the workers.
    """

    def __init__(self, cfg, seeds, device):
        super().__init__(cfg.reprob, mode=cfg.remode, max_count=cfg.recount, device=device)
        self.seeds = cycle(seeds)  # the same again for who begins again

    def __call__(self, images):
        seed = next(self.seeds)
        with seeded(seed), torch.random.fork_rng([images.device] if images.is_cuda else []):
            if images.is_cuda:
                torch.cuda.manual_seed(seed)
            return super().__call__(images)
