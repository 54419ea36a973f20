"""Images of a search: to learn from, to compare networks with, and to test on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from modicum.vision.images import ImageSet, load_images
from modicum.vision.settings import VisionSearchSettings, digest_of

Progress = Callable[[str, int, int], object]


@dataclass(frozen=True)
class SearchImages:
    """Images to learn from, to compare networks with, and to test on.

    Attributes:
        train: to learn from.
        validation: what the predictor learns and the report compares.
        test: looked at once, at the end.
        unreadable: names of files that were left out, with the reason.
    """

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    unreadable: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        images: str | Path,
        settings: VisionSearchSettings,
        test: str | Path | None = None,
        progress: Progress | None = None,
    ) -> SearchImages:
        """Read and split a folder or zip file of class folders.

        Raises:
            InputError: see `load_images`; or the classes of the test images are others.
        """
        size = settings.reference.size
        loaded = load_images(images, size, most=settings.most_images, progress=progress)
        unreadable = dict(loaded.unreadable)
        if test is None:
            rest, tested = loaded.images.split(settings.test_share, settings.seed)
        else:
            more = load_images(test, size, progress=progress)
            unreadable |= {f"{test}: {name}": reason for name, reason in more.unreadable.items()}
            rest, tested = loaded.images, more.images
        learnt, validation = rest.split(settings.validation, settings.seed + 1)
        learnt = learnt.with_own_statistics()
        validation, tested = validation.with_statistics_of(learnt), tested.with_statistics_of(learnt)
        return cls(learnt, validation, tested, unreadable)

    @property
    def digest(self) -> str:
        """Of what networks learn from and are compared with."""
        return digest_of(self.train.digest, self.validation.digest)
