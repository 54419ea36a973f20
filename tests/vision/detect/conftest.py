"""Detection needs the packages of its extra; the whole folder is skipped without them."""

from __future__ import annotations

import pytest

for name in ("PIL", "torch_pruning", "pycocotools", "scipy"):
    pytest.importorskip(name, reason=f"needs {name}, of the extra detect")
