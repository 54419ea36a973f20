"""Augmentation: images mirrored and moved at random."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def augmented(images: Tensor, generator: torch.Generator, *, flip: bool = True, shift: int = 4) -> Tensor:
    """Mirror half of the images, and move each by up to `shift` pixels; what comes in from outside is 0.

    Args:
        images: [B, 3, S, S], normalised: 0 is the mean colour.
        generator: of what is random.
        flip: whether to mirror left and right.
        shift: pixels at most, in each direction.

    Returns:
        A tensor of the same shape; images with channels last in memory keep that order.
    """
    batch, _, height, width = images.shape
    if flip:
        is_mirrored = torch.rand(batch, generator=generator) < 0.5
        images = torch.where(is_mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    if shift:
        padded = F.pad(images, (shift, shift, shift, shift))
        offsets = torch.randint(0, 2 * shift + 1, (2, batch), generator=generator)
        rows = offsets[0].view(-1, 1) + torch.arange(height)
        columns = offsets[1].view(-1, 1) + torch.arange(width)
        place = torch.arange(batch).view(-1, 1, 1)
        pixels = padded.permute(0, 2, 3, 1)[place, rows.view(batch, -1, 1), columns.view(batch, 1, -1)]
        images = pixels.permute(0, 3, 1, 2)  # channels stay last in memory
    return images
