"""What all tests share: the repository, and the real SDSS data that may lie beside it."""
import os
from pathlib import Path

import pytest
import torch

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


@pytest.fixture(scope="module")
def one_thread():
    "One thread, so that sums come out the same bit for bit."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
