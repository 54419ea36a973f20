"""How much benchmarks/donna.py trains and measures."""

from __future__ import annotations

from dataclasses import dataclass, field

from modicum.vision.conv import ConvSpaceSettings


@dataclass(frozen=True)
class Sizes:
    """How much is trained and tested."""

    most_images: int = 700
    validation: float = 3 / 7
    channels: tuple[int, ...] = (24, 32, 64)
    strides: tuple[int, ...] = (1, 2, 2)
    space: ConvSpaceSettings = field(
        default_factory=lambda: ConvSpaceSettings((3, 5), (2, 4), (1, 2), widths=(1.0, 0.5))
    )
    variants: int | None = 24
    """Of each block that are trained; the errors of the others are predicted."""
    epochs: int = 20
    samples: int = 24
    sample_epochs: int = 2
    shares: tuple[float, ...] = (0.1, 0.3, 0.5, 0.75)
    """Of the way from the cheapest network's time to the reference's: limits at which networks are sought."""
    winner_epochs: int = 10
    baseline_epochs: int = 20
    mobilenets: tuple[tuple[float, int], ...] = ((0.5, 1), (0.5, 2), (1.0, 1), (1.0, 2), (1.5, 2))
    """Factor of the reference's channels, and depth."""
    residuals: tuple[tuple[float, int], ...] = ((0.5, 1), (0.5, 2), (1.0, 1))
    scratch_epochs: tuple[int, ...] = (2, 5, 10, 20, 40)
    library_epochs: tuple[int, ...] = (1, 2, 5, 10)
    has_peers: bool = True
    peer_share: float = 1.0
    """Of the cost of library and samples that a peer may spend."""
    seeds: tuple[int, ...] = (0, 1, 2)


QUICK = Sizes(
    most_images=300,
    validation=0.5,
    space=ConvSpaceSettings((3,), (2, 4), (1, 2), ("relu",), ("depthwise", "grouped"), (1.0, 0.5)),
    variants=10,
    epochs=12,
    samples=16,
    sample_epochs=2,
    shares=(0.4,),
    winner_epochs=4,
    baseline_epochs=8,
    mobilenets=((0.5, 1), (1.0, 2)),
    residuals=((0.5, 1),),
    scratch_epochs=(4,),
    library_epochs=(1,),
    peer_share=0.1,
    seeds=(0,),
)
