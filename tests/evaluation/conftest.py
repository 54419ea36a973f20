"""The model of these tests."""

from __future__ import annotations

from typing import Any

import pytest

from modicum.loading import load
from tests.tiny_model import TINY_MODEL


@pytest.fixture(scope="session")
def tiny() -> tuple[Any, Any]:
    return load(TINY_MODEL)
