"What would disturb the story of 90_cli: the verbs as a person types them, and every bad input."
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from astropy.table import Table

from astromae.cli import main
from astromae.catalogue import required_columns
from astromae.dataset import StampSet, write_stamp_set
from astromae.mae import MAEConfig, MaskedAutoencoder
from astromae.models import Preprocessing, load_model, save_model
from astromae.redshift import ARCHITECTURES, RedshiftNetwork
from astromae.survey import BANDS

N = 100
TINY = dict(width=48, depth=2)


def some(n=N, bands=BANDS, size=48):
    "Noise with a spot in the middle, and a catalogue in which redder is farther."
    rng = np.random.default_rng(0)
    images = rng.normal(0, 0.1, (n, len(bands), size, size)).astype(np.float32)
    images[:, :, size//2 - 2:size//2 + 3, size//2 - 2:size//2 + 3] += rng.uniform(1, 9, (n, 1, 1, 1))
    table = Table({name: rng.uniform(16, 18, n) for name in required_columns(bands)})
    table["objid"], table["z_spec"] = 1000 + np.arange(n), 0.1 + (table["mag_g"] - table["mag_r"])/50
    return images, table


def write(folder, n=N, bands=BANDS, size=48):
    return write_stamp_set(folder, [some(n, bands, size)], n, bands=bands).folder


@pytest.fixture
def astromae(monkeypatch, capsys):
    "Call the command in this process; gives its exit code and what it printed on both streams."
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["astromae", *map(str, words)])
        capsys.readouterr()
        try: code = main() or 0
        except SystemExit as stop: code = stop.code or 0
        return code, *capsys.readouterr()
    return call


def sentence(err):
    "What stands on the error stream beside progress bars, which end before it begins."
    lines = [line for line in err.splitlines() if line.strip() and not re.search(r"\d%\|.*\]$", line)]
    assert len(lines) == 1 and "Traceback" not in err, err
    assert lines[0].startswith("astromae: ") and lines[0].endswith((".", "?")), err
    return lines[0]


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


def on_disk(folder):
    return {path: path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Small untrained models of three kinds."
    folder, told = tmp_path_factory.mktemp("models"), Preprocessing()
    small = replace(ARCHITECTURES["pcm-AstroMAE"], features=64, magnitude_width=64, join_width=64, **TINY)
    torch.manual_seed(0)
    save_model(folder/"network", RedshiftNetwork(small), told)
    save_model(folder/"blind", RedshiftNetwork(replace(small, magnitude=False)), told)
    save_model(folder/"autoencoder", MaskedAutoencoder(MAEConfig(encoder="plain", **TINY)), told)
    for name in ("autoencoder", "network"):  # as runs, for --pretrained
        shutil.copytree(folder/name, folder/f"{name}-run"/"model")
        pd.DataFrame({"epoch": [0]}).to_csv(folder/f"{name}-run"/"history.csv", index=False)
    return folder


# --- what works

def test_from_a_cube_to_redshifts(astromae, tmp_path):
    "import, pretrain, finetune, predict; then the last three again, which train nothing."
    images, table = some()
    labels = Table({"objID": table["objid"], "ra": table["ra"], "dec": table["dec"], "z": table["z_spec"],
                    **{f"dered_{band}": table[f"mag_{band}"] for band in BANDS}}).as_array()
    np.savez(tmp_path/"sdss.npz", cube=np.moveaxis(images, 1, -1), labels=labels)
    assert astromae("import", tmp_path/"sdss.npz", tmp_path/"stamps", "--dtype", "float16")[:2] == (
        0, f"100 stamps are in {tmp_path/'stamps'}\n")
    common = "--preset demo --experiment accuracy --device cpu --in-memory".split()
    pretrain = ["pretrain", tmp_path/"stamps", tmp_path/"pre", "--epochs", 3, "--batch-size", 32, *common]
    code, out, err = astromae(*pretrain)
    assert code == 0 and "image/s" in err and "history.csv" in out
    finetune = ["finetune", tmp_path/"stamps", tmp_path/"fine", "--pretrained", tmp_path/"pre", "--epochs", 1,
                *common]
    code, out, err = astromae(*finetune)
    assert code == 0 and "sigma_mad" in out and "image/s" in err
    scores = json.loads((tmp_path/"fine"/"metrics.json").read_text())
    assert [row["n"] for row in scores] == [20] and np.isfinite(scores[0]["sigma_mad"])
    assert (tmp_path/"fine"/"scatter.png").stat().st_size > 5000
    predict = ["predict", tmp_path/"fine"/"model", tmp_path/"stamps"]
    assert astromae(*predict, tmp_path/"z.fits", "--device", "cpu")[0] == 0
    assert astromae(*predict, tmp_path/"z.csv", "--device", "cpu", "--views", 8)[0] == 0
    z, eight = Table.read(tmp_path/"z.fits"), pd.read_csv(tmp_path/"z.csv")
    assert z["objid"].tolist() == eight["objid"].tolist() == table["objid"].tolist()
    assert np.isfinite(z["z_phot"]).all() and (z["z_phot"] != eight["z_phot"]).any()
    tested = Table.read(tmp_path/"fine"/"predictions.fits")
    rows = np.isin(z["objid"], tested["objid"])
    assert tested["z_phot"].tolist() == pytest.approx(z["z_phot"][rows].tolist(), rel=1e-4)
    weights = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert astromae(*pretrain)[0] == astromae(*finetune)[0] == 0
    assert weights == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


def test_simulated_stamps(astromae, tmp_path, refused):
    code, out, err = astromae("simulate", tmp_path/"a", "--galaxies", 12, "--seed", 3)
    assert code == 0 and "12 stamps" in out and "stamp/s" in err
    assert astromae("simulate", tmp_path/"b", "--galaxies", 12, "--seed", 3)[0] == 0
    first, second = (StampSet.open(tmp_path/name).verify() for name in "ab")
    assert first.description == second.description and first.labelled.all()
    assert "simulated" in first.origin
    refused("exists", "simulate", tmp_path/"a", "--galaxies", 12)


def test_the_installed_command(tmp_path):
    command = Path(sys.executable).with_name("astromae")
    def call(*words): return subprocess.run([command, *words], capture_output=True, text=True)
    done = call("--help")
    assert done.returncode == 0 and done.stderr == ""
    for verb in "simulate import pretrain finetune predict demo bench".split(): assert verb in done.stdout
    done = call("predict", str(tmp_path/"none"), str(tmp_path/"stamps"), str(tmp_path/"z.fits"))
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "preprocessing.json is missing" in done.stderr


# --- stamp sets that do not fit

def spoil(folder, value):
    "Put a value into one pixel of a set that is already written."
    images = np.lib.format.open_memmap(folder/"images.npy", mode="r+")
    images[37, 2, 24, 24] = value
    images.flush()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_not_finite(refused, tmp_path, models, value):
    spoil(stamps := write(tmp_path/"stamps"), value)
    refused("37", "predict", models/"network", stamps, tmp_path/"z.fits")
    pretrain = ("pretrain", stamps, tmp_path/"run", "--experiment", "accuracy")
    refused("37", *pretrain, "--preset", "demo")
    refused("37", *pretrain, "--in-memory")
    refused("37", *pretrain, begun=tmp_path/"run")  # met when its batch is read
    refused("37", "finetune", stamps, tmp_path/"run", "--network", "Henghes et al.", "--preset", "demo",
            "--experiment", "accuracy")
    cube = np.moveaxis(StampSet.open(stamps).images, 1, -1)
    np.savez(tmp_path/"a.npz", cube=np.ascontiguousarray(cube), labels=some()[1].as_array())
    refused("row 37 (objid 1037)", "import", tmp_path/"a.npz", tmp_path/"imported")


def test_another_number_of_bands(refused, tmp_path, models):
    three = write(tmp_path/"three", bands=tuple("gri"))
    refused("has bands ('g', 'r', 'i'), but the model was made for ('u', 'g', 'r', 'i', 'z')", "predict",
            models/"network", three, tmp_path/"z.fits")
    np.savez(tmp_path/"a.npz", cube=np.zeros((9, 48, 48, 4), np.float32), labels=some(9)[1].as_array())
    refused("4 bands and does not say which", "import", tmp_path/"a.npz", tmp_path/"imported")
    refused("bands", "finetune", three, tmp_path/"run", "--pretrained", models/"autoencoder-run",
            "--network", "plain-AstroMAE", "--experiment", "accuracy", begun=tmp_path/"run")


def test_another_shape(refused, tmp_path, models):
    np.savez(tmp_path/"a.npz", cube=np.zeros((9, 48, 48), np.float32), labels=some(9)[1].as_array())
    refused("no cube of stamps", "import", tmp_path/"a.npz", tmp_path/"imported")
    stamps = write(tmp_path/"stamps")
    np.save(stamps/"images.npy", np.zeros((N, 5, 40, 40), np.float32))
    for words in (("pretrain", stamps, tmp_path/"run"), ("finetune", stamps, tmp_path/"run"),
                  ("predict", models/"network", stamps, tmp_path/"z.fits")):
        refused("images.npy is not what a stamp set needs (shape (100, 5, 40, 40)", *words)


def test_stamps_smaller_than_the_crop(refused, tmp_path, models):
    small, tight = write(tmp_path/"small", size=24), write(tmp_path/"tight", size=40)
    refused("crop of 32", "predict", models/"network", small, tmp_path/"z.fits")
    refused("40 x 40", "pretrain", tight, tmp_path/"run", "--experiment", "accuracy")
    for preset in ("paper", "demo"):
        refused("24 x 24", "pretrain", small, tmp_path/"run", "--experiment", "accuracy", "--preset", preset)
        refused("24 x 24", "finetune", small, tmp_path/"run", "--experiment", "accuracy", "--preset", preset,
                "--network", "Henghes et al.")


def test_a_catalogue_that_does_not_fit(refused, tmp_path, models):
    stamps, (_, table) = write(tmp_path/"stamps"), some()
    verbs = (("pretrain", stamps, tmp_path/"run"), ("finetune", stamps, tmp_path/"run"),
             ("predict", models/"network", stamps, tmp_path/"z.fits"))
    table[:99].write(stamps/"catalogue.fits", overwrite=True)
    for words in verbs: refused("catalogue.fits is not what a stamp set needs (99 rows for 100", *words)
    table["objid", "ra", "dec", "mag_u", "z_spec"].write(stamps/"catalogue.fits", overwrite=True)
    for words in verbs: refused("catalogue.fits lacks the column(s) mag_g, mag_r, mag_i, mag_z", *words)


def test_magnitudes_that_are_not_known(refused, tmp_path, models):
    images, table = some()
    table["mag_u"][[5, 6]] = np.nan
    stamps = write_stamp_set(tmp_path/"stamps", [(images, table)], N).folder
    refused("rows [5, 6]", "predict", models/"network", stamps, tmp_path/"z.fits")
    refused("magnitudes", "finetune", stamps, tmp_path/"run", "--network", "Henghes et al.",
            "--experiment", "accuracy")


def test_galaxies_without_redshift(refused, astromae, tmp_path, models):
    images, table = some()
    table["z_spec"] = np.nan
    stamps = write_stamp_set(tmp_path/"stamps", [(images, table)], N).folder
    refused("catalogue.fits has no z_spec in 70 of the 70 training rows", "finetune", stamps, tmp_path/"run",
            "--network", "Henghes et al.", "--experiment", "accuracy")
    assert astromae("predict", models/"network", stamps, tmp_path/"z.fits")[0] == 0


# --- files that are broken

def test_an_npz_that_is_broken(refused, tmp_path):
    images, table = some(9)
    cube = np.moveaxis(images, 1, -1)
    np.savez(tmp_path/"whole.npz", cube=cube, labels=table.as_array())
    (tmp_path/"cut.npz").write_bytes((tmp_path/"whole.npz").read_bytes()[:-500])
    objects = np.array([(k, {}) for k in range(9)], dtype=[("objid", int), ("z", object)])
    np.savez(tmp_path/"pickled.npz", cube=cube, labels=objects)
    np.savez(tmp_path/"pickled-cube.npz", cube=cube.astype(object), labels=table.as_array())
    np.savez(tmp_path/"short.npz", cube=cube, labels=table[:8].as_array())
    (tmp_path/"text.npz").write_text("<html>")
    for name, message in {"cut": "not a whole npz", "pickled": "not a whole npz file",
                          "pickled-cube": "holds Python objects", "short": "8 rows for 9 stamps",
                          "text": "is no npz", "none": "check the path"}.items():
        refused(f"{name}.npz", "import", tmp_path/f"{name}.npz", tmp_path/"stamps")
        refused(message, "import", tmp_path/f"{name}.npz", tmp_path/"stamps")
    refused("float17", "import", tmp_path/"whole.npz", tmp_path/"stamps", "--dtype", "float17")


def test_a_model_of_another_architecture(refused, tmp_path, models):
    stamps, out = write(tmp_path/"stamps"), tmp_path/"z.fits"
    refused("holds a MaskedAutoencoder, but a RedshiftNetwork is needed", "predict", models/"autoencoder",
            stamps, out)
    mixed = shutil.copytree(models/"network", tmp_path/"mixed")
    shutil.copy(models/"blind"/"model.safetensors", mixed)
    refused("mixed/model.safetensors does not fit the architecture", "predict", mixed, stamps, out)
    (mixed/"model.safetensors").write_bytes(b"no safetensors")
    refused("mixed/model.safetensors does not fit", "predict", mixed, stamps, out)
    (mixed/"config.json").write_text("{")
    refused("mixed/config.json is not JSON", "predict", mixed, stamps, out)
    (mixed/"config.json").write_text('{"colour": "blue"}')
    refused("colour", "predict", mixed, stamps, out)


def test_an_encoder_of_another_architecture(refused, tmp_path, models):
    words = ("finetune", write(tmp_path/"stamps"), tmp_path/"run", "--experiment", "accuracy")
    refused("no pretrained one was given", *words)
    refused("encoder='plain'", *words, "--pretrained", models/"autoencoder-run")
    refused("holds a RedshiftNetwork", *words, "--pretrained", models/"network-run")
    refused("preprocessing.json is missing", *words, "--pretrained", tmp_path/"none")
    refused("no encoder", *words, "--pretrained", models/"autoencoder-run", "--network", "Henghes et al.")


def test_fits_stamps_that_do_not_fit(refused, astromae, tmp_path, models):
    from astropy.io import fits
    images, _ = some(3)
    fits.PrimaryHDU(images).writeto(tmp_path/"good.fits")
    assert astromae("predict", models/"blind", tmp_path/"good.fits", tmp_path/"z.ecsv")[0] == 0
    assert len(Table.read(tmp_path/"z.ecsv")) == 3
    refused("the catalogue has no mag_u", "predict", models/"network", tmp_path/"good.fits", tmp_path/"z.fits")
    (tmp_path/"text.fits").write_text("SIMPLE")
    fits.PrimaryHDU(images[0, 0]).writeto(tmp_path/"flat.fits")
    os.truncate(shutil.copy(tmp_path/"good.fits", tmp_path/"cut.fits"), 20_000)
    for name in ("text", "flat", "cut", "none"):
        refused(f"{name}.fits", "predict", models/"blind", tmp_path/f"{name}.fits", tmp_path/"z.fits")


# --- disks and devices

def verbs_that_write(tmp_path, models, where):
    stamps = write(tmp_path/"stamps", n=20)
    images, table = some(20)
    np.savez(tmp_path/"a.npz", cube=np.moveaxis(images, 1, -1), labels=table.as_array())
    return (("simulate", where, "--galaxies", 4), ("import", tmp_path/"a.npz", where),
            ("pretrain", stamps, where, "--experiment", "accuracy", "--preset", "demo", "--epochs", 3),
            ("finetune", stamps, where, "--network", "Henghes et al.", "--experiment", "accuracy",
             "--epochs", 1),
            ("predict", models/"blind", stamps, where.with_suffix(".fits")))


@pytest.mark.parametrize("place", ["file/below/it", "/proc/astromae/it"])
def test_a_place_that_cannot_be_written(refused, tmp_path, models, place):
    (tmp_path/"file").write_text("a file")
    for words in verbs_that_write(tmp_path, models, tmp_path/place): refused(str(tmp_path/place), *words)


@contextmanager
def full_disk():
    "No file may grow beyond 4000 bytes, as on a disk that is nearly full."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)) # pytest's own log may be longer


@pytest.mark.parametrize("verb", range(5))
def test_a_full_disk(astromae, tmp_path, models, verb):
    words = verbs_that_write(tmp_path, models, tmp_path/"new"/"it")[verb]
    (tmp_path/"new").mkdir()
    with full_disk(): code, out, err = astromae(*words)
    assert code == 2 and str(tmp_path/"new"/"it") in sentence(err), err


def test_a_device_that_is_not_there(refused, tmp_path, models):
    stamps = write(tmp_path/"stamps")
    for words in (("pretrain", stamps, tmp_path/"run", "--experiment", "accuracy"),
                  ("finetune", stamps, tmp_path/"run", "--network", "Henghes et al."),
                  ("predict", models/"network", stamps, tmp_path/"z.fits")):
        for device in ("abacus", "cuda:99"): refused(f"the device '{device}'", *words, "--device", device)


# --- names that do not exist

def test_names_that_do_not_exist(refused, tmp_path, models):
    stamps = write(tmp_path/"stamps")
    for verb in ("pretrain", "finetune"):
        words = (verb, stamps, tmp_path/"run")
        refused("choose one of paper, demo", *words, "--preset", "quick")
        refused("choose one of 1, 2, demo, accuracy", *words, "--experiment", "3")
    refused("did you mean 'pcm-AstroMAE'?", "finetune", stamps, tmp_path/"run", "--network", "pcm-astromae")
    words = ("pretrain", stamps, tmp_path/"run", "--experiment", "accuracy")
    refused("plain or pcm", *words, "--encoder", "round")
    refused("grid or kernel1", *words, "--pcm-masking", "kernel3")
    refused("patches of 5 pixels", *words, "--patch-size", 5)
    refused("choose none, standard or arcsinh", *words, "--normalisation", "log")
    refused("z.txt ends with none of .fits, .csv, .ecsv", "predict", models/"blind", stamps, tmp_path/"z.txt")
    refused(f"there is no folder {tmp_path/'nowhere'}", "pretrain", tmp_path/"nowhere", tmp_path/"run")


def test_numbers_that_make_no_sense(refused, tmp_path):
    stamps = write(tmp_path/"stamps")
    for verb in (("pretrain",), ("finetune", "--network", "Henghes et al.")):
        words = (*verb, stamps, tmp_path/"run", "--experiment", "accuracy")
        for option in ("--batch-size", "--epochs"): refused("above zero", *words, option, 0)
    for galaxies in (0, 10_001):
        refused("from 1 to 10,000", "simulate", tmp_path/"none", "--galaxies", galaxies)


def test_another_run_is_not_overwritten(astromae, refused, tmp_path):
    "The same words go on with a run; other words are refused, and the run stays as it was."
    stamps = write(tmp_path/"stamps")
    words = ("finetune", stamps, tmp_path/"run", "--network", "Henghes et al.", "--experiment", "accuracy")
    assert astromae(*words, "--epochs", 1)[0] == 0
    refused("settings.epochs is 1 there and 2 here", *words, "--epochs", 2)
    np.savez(tmp_path/"a.npz", cube=np.moveaxis(some(9)[0], 1, -1), labels=some(9)[1].as_array())
    refused("there already", "import", tmp_path/"a.npz", stamps)
    refused("is no stamp set", "import", tmp_path/"a.npz", tmp_path/"run")
