"""RxRx1-WILDS's own way to a batch, written plainly on torch and Pillow, to be timed beside ours. Not for use.

After p-lambda/wilds: `wilds/datasets/rxrx1_dataset.py` (one RGB PNG a site, opened with Pillow),
`examples/transforms.py` (rotation by a quarter turn and mirroring on the Pillow image, `ToTensor`, each channel of each
image to mean 0 and unbiased standard deviation 1) and `wilds/common/data_loaders.py` (a plain DataLoader). PyPI's
`wilds` itself needs torchvision. Where a site has a file for each channel, each goes through the same steps.
"""

import random

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset


class Sites(Dataset):
    """`paths[i]` are the files of site i."""

    def __init__(self, paths, labels):
        self.paths, self.labels = paths, labels

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        angle, mirror = random.choice((0, 90, 180, 270)), random.random() < 0.5
        planes = [to_tensor(turn(Image.open(path), angle, mirror)) for path in self.paths[index]]
        return standardize(torch.cat(planes)), self.labels[index]


def turn(image, angle, mirror):
    image = image.rotate(angle) if angle else image
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else image


def to_tensor(image):
    """torchvision's ToTensor: `(channels, height, width)`, float32, 0 to 1."""
    pixels = torch.from_numpy(np.array(image))
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div(255)


def standardize(image):
    mean, std = image.mean(dim=(1, 2)), image.std(dim=(1, 2))
    std[std == 0.0] = 1.0
    return (image - mean[:, None, None]) / std[:, None, None]


def make_loader(paths, labels, batch_size, workers):
    """Workers stay alive from pass to pass, so that their start is not counted against them."""
    return DataLoader(
        Sites(paths, labels),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )
