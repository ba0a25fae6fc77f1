"""What all tests share: the repository, and the real SDSS data that may lie beside it."""
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from command import on_disk, sentence

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


@pytest.fixture
def astromae(monkeypatch, capsys):
    "Call the command in this process; gives its exit code and what it printed on both streams."
    from astromae.cli import main
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["astromae", *map(str, words)])
        capsys.readouterr()
        try: code = main() or 0
        except SystemExit as stop: code = stop.code or 0
        return code, *capsys.readouterr()
    return call


@pytest.fixture
def refused(astromae, tmp_path):
    "Check that a call is refused in one sentence and changes nothing on disk, but for a begun run."
    def check(message, *words, begun=None):
        before = on_disk(tmp_path)
        code, out, err = astromae(*words)
        assert code == 2 and message in sentence(err), err
        if begun: shutil.rmtree(begun, ignore_errors=True)
        after = on_disk(tmp_path)
        assert not {path for path in before | after if before.get(path) != after.get(path)}, err
    return check


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Small untrained models of three kinds."
    from astromae.mae import MAEConfig, MaskedAutoencoder
    from astromae.models import Preprocessing, save_model
    from astromae.redshift import ARCHITECTURES, RedshiftNetwork
    folder, told, tiny = tmp_path_factory.mktemp("models"), Preprocessing(), dict(width=48, depth=2)
    small = replace(ARCHITECTURES["pcm-AstroMAE"], features=64, magnitude_width=64, join_width=64, **tiny)
    torch.manual_seed(0)
    save_model(folder/"network", RedshiftNetwork(small), told)
    save_model(folder/"blind", RedshiftNetwork(replace(small, magnitude=False)), told)
    save_model(folder/"autoencoder", MaskedAutoencoder(MAEConfig(encoder="plain", **tiny)), told)
    for name in ("autoencoder", "network"):  # as runs, for --pretrained
        shutil.copytree(folder/name, folder/f"{name}-run"/"model")
        pd.DataFrame({"epoch": [0]}).to_csv(folder/f"{name}-run"/"history.csv", index=False)
    return folder
