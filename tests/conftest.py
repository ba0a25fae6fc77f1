"""What all tests share: the repository, and the real SDSS data that may lie beside it."""
import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    "The folder that holds settings.ini."
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    "The folder of real SDSS pixels and catalogues; the test is skipped where there is none."
    folder = Path(os.environ.get("ASTROMAE_DATA", REPOSITORY.parent/"shared"/"data"))
    if not folder.exists():
        pytest.skip(f"no real SDSS data in {folder}; name its folder in ASTROMAE_DATA")
    return folder
