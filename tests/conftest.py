"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("REFUSION_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real image pairs and reference outputs; tests that need it are skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no image data at {DATA} (set REFUSION_DATA)")
    return DATA
