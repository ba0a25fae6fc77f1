"What would disturb the story of 90_cli: the verbs as a person types them, and every bad input."
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy.table import Table
from command import N, full_disk, sentence, some, write

from astromae.catalogue import split
from astromae.dataset import StampSet, write_stamp_set
from astromae.experiments import experiment_named
from astromae.survey import BANDS
from astromae.training import FINETUNE_PRESETS


# --- what works

def test_a_training_that_diverges_says_so(astromae, tmp_path, monkeypatch):
    images, table = some()
    write_stamp_set(tmp_path/"stamps", [(images, table)], len(table))
    monkeypatch.setitem(FINETUNE_PRESETS, "demo", replace(FINETUNE_PRESETS["demo"], rate=1e30))
    code, out, err = astromae("finetune", tmp_path/"stamps", tmp_path/"run", "--network", "Henghes et al.",
                              *"--epochs 2 --preset demo --experiment accuracy --device cpu".split())
    assert code == 0 and "diverged" in out, err
    assert json.loads((tmp_path/"run"/"metrics.json").read_text())[0]["sigma_mad"] is None
    there = {path.name for path in (tmp_path/"run").iterdir()}
    assert {"predictions.fits", "model"} <= there and "scatter.png" not in there


def test_the_part_to_test_on_is_looked_at_before_training(refused, tmp_path):
    images, table = some()
    row = split(table, experiment_named("accuracy").fractions, 42)["test"][3]
    table["z_spec"][row] = np.nan
    write_stamp_set(tmp_path/"stamps", [(images, table)], len(table))
    refused(f"test rows (the first is row {row})", "finetune", tmp_path/"stamps", tmp_path/"run", "--network",
            "Henghes et al.", *"--preset demo --experiment accuracy --device cpu".split())


def test_from_a_cube_to_redshifts(astromae, tmp_path):
    "import, pretrain, finetune, predict; then the last three again, which train nothing."
    images, table = some()
    labels = Table({"objID": table["objid"], "ra": table["ra"], "dec": table["dec"], "z": table["z_spec"],
                    **{f"dered_{band}": table[f"mag_{band}"] for band in BANDS}}).as_array()
    np.savez(tmp_path/"sdss.npz", cube=np.moveaxis(images, 1, -1), labels=labels)
    words = ("import", tmp_path/"sdss.npz", tmp_path/"stamps", "--dtype", "float16", "--origin", "SDSS, a cube")
    assert astromae(*words)[:2] == (
        0, f"100 stamps of 48 x 48 pixels in ugriz, 100 with redshift, float16: {tmp_path/'stamps'}\n")
    assert json.loads((tmp_path/"stamps"/"description.json").read_text())["origin"] == "SDSS, a cube"
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
    for verb in "simulate query fetch cut import export pretrain finetune predict demo bench".split(): assert verb in done.stdout
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
    refused("catalogue.fits has no z_spec in 70 of the 70 train rows", "finetune", stamps, tmp_path/"run",
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
    refused("no folder of a finished run", *words, "--pretrained", tmp_path/"none")
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
