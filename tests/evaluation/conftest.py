"""The model of these tests."""

from __future__ import annotations

from typing import Any

import pytest

from modicum.loading import load


@pytest.fixture(scope="session")
def stories() -> tuple[Any, Any]:
    return load("stories")
