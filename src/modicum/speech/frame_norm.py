"""Frame norm: batch normalisation over the frames of a padded batch that are not padding."""

from __future__ import annotations

from torch import Tensor, nn


class FrameNorm(nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` over valid frames (Ioffe and Szegedy 2015, arXiv 1502.03167).

    In training the mean and variance are of valid frames only. In evaluation each channel is scaled and
    shifted by constants, which a following or preceding linear layer can absorb.
    """

    def forward(self, input: Tensor, is_inside: Tensor | None = None) -> Tensor:
        """Normalise [N, T, C]; frames where is_inside [N, T] bool is False become 0."""
        if is_inside is None:
            return super().forward(input.flatten(0, -2)).view_as(input)
        out = input.new_zeros(input.shape)
        out[is_inside] = super().forward(input[is_inside])
        return out
