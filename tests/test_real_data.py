"Real data as a person types the verbs: from the survey to a stamp set and back, kills, and all that may be wrong."
import bz2
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from archive import Archive, SkyServer, archive_path, serving
from astropy.io import fits
from astropy.table import Table
from command import full_disk, on_disk, sentence, some, write
from test_stamps import SHAPE, make_wcs, render

from astromae import downloads
from astromae.dataset import StampSet
from astromae.survey import BANDS, frame_name

FIELD, CENTRE, N = (94, 1, 11), (150., 20.), 40
WIDTHS = np.append(np.linspace(2.2, 4, N), np.full(12, 1.5))  # standard deviations, pixels
WHERE = {"run": 94, "rerun": 301, "camcol": 1, "field": 11}


def sky_positions():
    "Forty positions on the field, on a grid in the r frame."
    columns, rows = np.meshgrid(np.linspace(30, 290, 8), np.linspace(30, 210, 5))
    return make_wcs(20.4, (2.6, -1.4), *CENTRE).all_pix2world(columns.ravel(), rows.ravel(), 0)


def star_positions():
    "Twelve positions between those, where the stars are."
    columns, rows = np.meshgrid(30 + 37.14*np.array([0.5, 2.5, 4.5, 6.5]), [52., 97., 187.])
    return make_wcs(20.4, (2.6, -1.4), *CENTRE).all_pix2world(columns.ravel(), rows.ravel(), 0)


def frame(band, place=FIELD, centre=CENTRE, **header) -> bytes:
    "A small frame with forty round galaxies and twelve stars."
    k = BANDS.index(band)
    wcs = make_wcs(20 + 0.2*k, (1.3*k, -0.7*k), *centre)
    image = np.zeros(SHAPE, np.float32)
    for (ra, dec), sigma in zip(np.c_[sky_positions(), star_positions()].T, WIDTHS):
        if centre == CENTRE: image += render(wcs, [ra], [dec], flux=40*sigma**2, sigma=sigma)
    image += np.random.default_rng(k).normal(0, 0.02, SHAPE).astype(np.float32)
    cards, file = wcs.to_header(), io.BytesIO()
    cards.update(dict(zip(("RUN", "CAMCOL", "FIELD"), place)) | {"FILTER": band, "NMGY": 0.005} | header)
    fits.PrimaryHDU(image, cards).writeto(file)
    return bz2.compress(file.getvalue(), 1)


@pytest.fixture(scope="session")
def originals(): return {frame_name(band, *FIELD): frame(band) for band in BANDS}


@pytest.fixture
def frames(originals, tmp_path):
    "A folder with the frames of one field."
    (tmp_path/"frames").mkdir()
    for name, body in originals.items(): (tmp_path/"frames"/name).write_bytes(body)
    return tmp_path/"frames"


def on_the_sky(ra, dec, **place) -> tuple[pd.DataFrame, pd.DataFrame]:
    "What SkyServer may know of galaxies at these positions."
    n, rng = len(ra), np.random.default_rng(0)
    objid = 1237650000000000001 + np.arange(n)
    photometry = pd.DataFrame({"objID": objid, "mode": 1, "type": 3, "ra": ra, "dec": dec, "clean": 1,
                               "insideMask": 0, "petroMag_r": 17.5, "petroRad_r": 5., **place})
    for band in BANDS:
        photometry[f"dered_{band}"] = rng.uniform(16, 18, n)
        photometry[f"modelMagErr_{band}"], photometry[f"extinction_{band}"] = 0.01, 0.1
    return photometry, pd.DataFrame({
        "bestObjID": objid, "specObjID": np.arange(n), "z": rng.uniform(0.05, 0.3, n), "zErr": 1e-5,
        "zWarning": 0, "legacy_target1": 64, "class": "GALAXY", "survey": "sdss", "targetType": "SCIENCE",
        "sciencePrimary": 1})


@pytest.fixture(scope="session")
def database(tmp_path_factory):
    return SkyServer(tmp_path_factory.mktemp("sky")/"sky.db", *on_the_sky(*sky_positions(), **WHERE))


@pytest.fixture
def archive(originals, database):
    "Frames at the archive's paths, and the galaxies on them in SkyServer's tables."
    frames = {archive_path(band, *FIELD): originals[frame_name(band, *FIELD)] for band in BANDS}
    with serving(Archive(frames, database)) as archive: yield archive


@pytest.fixture
def impatient(monkeypatch):
    "No second attempt, no wait."
    for name, value in dict(total=0, backoff_factor=0, backoff_jitter=0).items():
        monkeypatch.setattr(downloads.RETRIES, name, value)


def places(path, ra, dec, **columns):
    "A catalogue of positions as a file."
    Table({"ra": np.atleast_1d(ra), "dec": np.atleast_1d(dec), **columns}).write(path)
    return path


# --- the whole chain

def well(result):
    "What a verb printed, if it went well and warned of nothing."
    code, out, err = result
    assert code == 0 and "Warning" not in err and "Traceback" not in err, err
    return out


def there_and_back(astromae, tmp_path):
    "Export the set to both formats and import it again: every bit and every column stays."
    stamps = StampSet.open(tmp_path/"stamps").verify()
    for name in ("a.h5", "a.fits"):
        well(astromae("export", tmp_path/"stamps", tmp_path/name))
        well(astromae("import", tmp_path/name, tmp_path/f"from-{name}"))
        again = StampSet.open(tmp_path/f"from-{name}").verify()
        assert again.images.dtype == stamps.images.dtype and again.images.tobytes() == stamps.images.tobytes()
        assert set(again.catalogue.colnames) == set(stamps.catalogue.colnames)
        for column in stamps.catalogue.colnames:
            np.testing.assert_array_equal(again.catalogue[column], stamps.catalogue[column], column)
        assert (again.bands, again.unit, again.pixel_scale) == (stamps.bands, stamps.unit, stamps.pixel_scale)
    return stamps


def test_from_the_survey_to_a_trained_network(astromae, archive, tmp_path, refused):
    catalogue, frames = tmp_path/"galaxies.fits", tmp_path/"frames"
    query = ("query", catalogue, "--region", "150,20,0.1", "--server", archive.url)
    assert well(astromae(*query)) == f"40 galaxies are in {catalogue}\n"
    fetch = ("fetch", catalogue, frames, "--server", f"{archive.url}/sas")
    assert "5 frames to fetch, about 0.0 GB" in well(astromae(*fetch))
    archive.asked.clear()
    well(astromae(*fetch))
    assert not archive.asked and len(list(frames.glob("frame-*"))) == 5
    cut = ("cut", frames, tmp_path/"stamps", "--catalogue", catalogue, "--size", 48, "--processes", 1)
    refused("choose astrometry='header'", *cut)  # these frames have no table of SDSS's own astrometry
    assert well(astromae(*cut, "--astrometry", "header")).startswith("40 stamps of 48 x 48 pixels in ugriz, ")
    stamps = there_and_back(astromae, tmp_path)
    assert list(stamps.catalogue["objid"]) == list(Table.read(catalogue)["objid"]) and stamps.labelled.all()
    middle = stamps.images[:, :, 24, 24]
    np.testing.assert_allclose(middle, np.median(middle), rtol=0.03)  # every galaxy is on its pixel
    words = "--preset demo --experiment accuracy --epochs 1 --device cpu".split()
    well(astromae("pretrain", tmp_path/"from-a.fits", tmp_path/"run", "--where", "mag_r < 17.9", *words))
    assert np.isfinite(pd.read_csv(tmp_path/"run"/"history.csv").to_numpy()[:, :2]).all()
    fine = ("finetune", tmp_path/"from-a.h5", tmp_path/"fine", "--pretrained", tmp_path/"run")
    well(astromae(*fine, "--where", "mag_r < 17.9", *words))
    well(astromae("predict", tmp_path/"fine"/"model", tmp_path/"from-a.h5", tmp_path/"z.fits", "--where",
                  "mag_r >= 17 and flag_edge == False"))
    wanted = np.asarray((stamps.catalogue["mag_r"] >= 17) & ~stamps.catalogue["flag_edge"])
    assert list(Table.read(tmp_path/"z.fits")["objid"]) == list(stamps.catalogue["objid"][wanted])


def test_from_the_survey_with_real_frames(astromae, shared_data, tmp_path, tmp_path_factory):
    with np.load(shared_data/"sdss-stamps"/"stamps_of_frames_r20.npz") as npz: known = npz["meta"]
    known = known[known["field"] == "003918-3-0213"]
    bodies = {band: (shared_data/"sdss-frames"/frame_name(band, 3918, 3, 213)).read_bytes() for band in "gri"}
    database = SkyServer(tmp_path_factory.mktemp("sky")/"sky.db", *on_the_sky(
        known["ra"], known["dec"], run=3918, rerun=301, camcol=3, field=213))
    paths = {archive_path(band, 3918, 3, 213): body for band, body in bodies.items()}
    catalogue, frames = tmp_path/"galaxies.fits", tmp_path/"frames"
    with serving(Archive(paths, database)) as archive:
        archive.moods = {path: ["half"] for path in list(paths)[:2]}
        region = f"{known['ra'].min() - 1e-6},{known['ra'].max() + 1e-6},-90,90"
        well(astromae("query", catalogue, "--region", region, "--server", archive.url, "--limit", 20))
        well(astromae("fetch", catalogue, frames, "--server", f"{archive.url}/sas", "--bands", "gri"))
    for band, body in bodies.items(): assert (frames/frame_name(band, 3918, 3, 213)).read_bytes() == body
    well(astromae("cut", frames, tmp_path/"stamps", "--catalogue", catalogue, "--astrometry", "header",
                  "--processes", 1, "--bands", "gri"))
    stamps = there_and_back(astromae, tmp_path)
    assert stamps.images.shape == (20, 3, 64, 64) and not stamps.catalogue["flag_band"].any()
    good = ~np.asarray(stamps.catalogue["flag_any"])
    light = np.asarray(stamps.images[good, 1])
    assert good.sum() > 5 and (light[:, 29:36, 29:36].mean((1, 2)) > 5*np.abs(light[:, :7, :7].mean((1, 2)))).mean() > 0.8


def test_a_cut_without_a_catalogue(astromae, refused, frames, tmp_path):
    out = well(astromae("cut", frames, tmp_path/"found", "--processes", 1, "--size", 32, "--bands", "g,r,i"))
    stamps = StampSet.open(tmp_path/"found").verify()
    assert out.startswith(f"{len(stamps)} stamps of 32 x 32 pixels in gri, 0 with redshift, float32")
    assert 38 <= len(stamps) <= 40 and stamps.bands == ("g", "r", "i")
    apart = np.hypot(*(np.subtract.outer(a, b)*c for a, b, c in zip(
        (stamps.catalogue["ra"], stamps.catalogue["dec"]), sky_positions(), (np.cos(np.radians(20)), 1))))
    assert 3600*np.median(apart.min(1)) < 0.1
    cut = ("cut", frames, tmp_path/"found", "--processes", 1)
    refused("there already", *cut)
    assert "u" in well(astromae(*cut, "--overwrite", "--bands", "ur", "--dtype", "float16"))
    assert StampSet.open(tmp_path/"found").verify().images.dtype == np.float16
    refused("no galaxy brighter than 5", "cut", frames, tmp_path/"none", "--faintest", 5, "--processes", 1)


# --- killed, and two at once

def command(*words): return [Path(sys.executable).with_name("astromae"), *map(str, words)]

def start(*words):
    return subprocess.Popen(command(*words), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def wait_for(condition, process, seconds=60):
    started = time.time()
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.time() - started < seconds
        time.sleep(0.002)

def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_an_import_that_is_killed_and_two_at_once(refused, tmp_path, tmp_path_factory):
    "The first is held still while the second is refused, then killed; the same command does the rest."
    n, rows, source = 1600, some(100, size=64)[0], tmp_path_factory.mktemp("large")/"large.h5"
    with h5py.File(source, "w") as file:
        file["images"] = np.tile(rows, (n//100, 1, 1, 1))
        file["objid"] = np.arange(n)
        file.attrs["bands"] = list(BANDS)
    out, words = tmp_path/"out"/"set", ("import", source, tmp_path/"out"/"set")
    journal = out.with_name(".set.unfinished")/"journal"
    first = start(*words)
    wait_for(lambda: journal.exists() and len(journal.read_text().splitlines()) > 1, first)
    first.send_signal(signal.SIGSTOP)
    os.waitpid(first.pid, os.WUNTRACED)  # stopped
    refused("another process is writing", *words)
    refused("another process is writing", *words, "--overwrite")
    kill(first)
    assert not out.exists() and journal.exists()
    second = start(*words)
    printed, err = second.communicate()
    assert second.returncode == 0 and "| 0/1600" not in err, err
    assert printed.startswith("1,600 stamps of 64 x 64 pixels")
    stamps = StampSet.open(out).verify()
    np.testing.assert_array_equal(stamps.images[-100:], rows)
    assert [path.name for path in out.parent.iterdir()] == ["set"]


def test_a_fetch_that_is_killed(astromae, archive, originals, tmp_path):
    catalogue = places(tmp_path/"a.csv", *sky_positions(), **{name: [value]*N for name, value in WHERE.items()})
    frames = tmp_path/"frames"
    words = ("fetch", catalogue, frames, "--parallel", 1, "--server", f"{archive.url}/sas")
    archive.slowness, archive.moods["any"] = 0.2, ["slow"]*5
    first = start(*words)
    wait_for(lambda: len(list(frames.glob("frame-*"))) >= 2, first)
    kill(first)
    whole = {path.name: path.read_bytes() for path in frames.glob("frame-*")}
    assert 2 <= len(whole) < 5 and all(originals[name] == body for name, body in whole.items())
    archive.asked.clear()
    archive.moods.clear()
    well(astromae(*words))
    assert {Path(path).name for path in archive.asked} == set(originals) - set(whole)
    assert {path.name: path.read_bytes() for path in frames.glob("frame-*")} == originals


# --- bad frames and positions

RA, DEC = np.array(sky_positions())


@pytest.mark.parametrize("band, body, message", [
    ("g", lambda: frame("g", (94, 1, 12)), "show different skies"),
    ("g", lambda: frame("g", (95, 1, 11)), "is of RUN 95 and not 94"),
    ("r", lambda: frame("r", CDELT1=0.5), "the WCS of"), ("r", lambda: frame("r", CTYPE1="LINEAR"), "is broken"),
    ("u", lambda: frame("u", CRVAL1=np.degrees(1.)), "show different skies"),
    ("i", lambda: frame("i")[:-900], "cannot be read"), ("z", lambda: b"", "cannot be read"),
    ("z", lambda: b"<html>not found</html>", "cannot be read")])
@pytest.mark.parametrize("listed", [True, False])
def test_frames_that_do_not_fit(refused, frames, tmp_path, band, body, message, listed):
    body = frame("g", (94, 1, 12), (150.2, 20.)) if message == "show different skies" and band == "g" else body()
    (frames/frame_name(band, *FIELD)).write_bytes(body)
    words = ("--catalogue", places(tmp_path/"a.csv", RA, DEC)) if listed else ()
    refused(message, "cut", frames, tmp_path/"set", "--processes", 1, *words)


def test_frames_that_are_not_there(refused, frames, tmp_path):
    catalogue = places(tmp_path/"a.csv", RA, DEC, run=[95]*N, camcol=[1]*N, field=[11]*N)
    refused("fetch them first", "cut", frames, tmp_path/"set", "--catalogue", catalogue)
    (tmp_path/"empty").mkdir()
    for folder in ("empty", "nowhere", "a.csv"):
        refused(folder, "cut", tmp_path/folder, tmp_path/"set")
        refused(folder, "cut", tmp_path/folder, tmp_path/"set", "--catalogue", catalogue)
    for bands in ("abc", "grizy", "", "u,,g", "uu"):
        refused("band", "cut", frames, tmp_path/"set", "--bands", bands)


@pytest.mark.parametrize("columns, message", [
    ({"ra": RA + 5, "dec": DEC}, "none of the 40 positions"),
    ({"ra": np.radians(RA), "dec": np.radians(DEC)}, "look like radians"),
    ({"ra": np.where(np.arange(N) == 7, np.nan, RA), "dec": DEC}, "row 7 is no position"),
    ({"ra": RA, "dec": np.where(np.arange(N) == 7, 95., DEC)}, "row 7 is no position"),
    ({"ra": ["10h"]*N, "dec": DEC}, "'ra'"), ({"RAdeg": RA, "DEdeg": DEC}, "has no column"),
    ({"ra": RA[:0], "dec": DEC[:0]}, "no rows")])
@pytest.mark.parametrize("field", [True, False])  # is it said in which field they lie?
def test_positions_that_are_none(refused, frames, tmp_path, columns, message, field):
    more = {name: [value]*len(list(columns.values())[0]) for name, value in WHERE.items()} if field else {}
    Table(columns | more).write(tmp_path/"a.csv")
    refused(message, "cut", frames, tmp_path/"set", "--catalogue", tmp_path/"a.csv", "--processes", 1)


def test_bad_stamps_are_kept_or_refused(astromae, refused, frames, tmp_path):
    (frames/frame_name("u", *FIELD)).unlink()
    catalogue = places(tmp_path/"a.csv", RA, DEC)
    cut = ("cut", frames, tmp_path/"set", "--catalogue", catalogue, "--processes", 1, "--size", 16)
    refused("row 0 gives a bad stamp in the field 94-1-11 (band)", *cut, "--on-bad", "refuse")
    refused("choose flag or refuse", *cut, "--on-bad", "drop")
    refused("choose one", *cut, "--astrometry", "astrology")
    assert "40 flagged" in well(astromae(*cut)) and StampSet.open(tmp_path/"set").catalogue["flag_band"].all()


# --- bad sources of stamps

def fits_cube(path, images, table, *more):
    fits.HDUList([fits.PrimaryHDU(images), fits.table_to_hdu(table), *more]).writeto(path)

def npz(path, cube, labels):
    with open(path, "wb") as file: np.savez(file, cube=np.moveaxis(cube, 1, -1), labels=labels)

def h5(path, images, **columns):
    with h5py.File(path, "w") as file:
        file["images"] = images
        for name, values in columns.items(): file[name] = values

def repeated(path):
    fits_cube(path, IMAGES, TABLE)
    path.write_bytes(path.read_bytes().replace(b"'mag_u   '", b"'mag_g   '"))

def pickled(path):
    with open(path, "wb") as file: pickle.dump({"images": [1, 2]}, file)

IMAGES, TABLE = some(9)
BAD = {
    "empty.npz": (lambda path: path.touch(), "is empty"),
    "page.fits": (lambda path: path.write_text("<html>503</html>"), "fetch the file again"),
    "mislabelled.npz": (lambda path: fits_cube(path, IMAGES, TABLE), None),
    "mislabelled.fits": (lambda path: npz(path, IMAGES, TABLE.as_array()), None),
    "pickle.pt": (pickled, "pickle"), "pickle.npz": (pickled, "pickle"),
    "object.npz": (lambda path: npz(path, IMAGES.astype(object), TABLE.as_array()), "Python objects"),
    "object.npy": (lambda path: np.save(path, IMAGES.astype(object)), "Python objects"),
    "integer.npz": (lambda path: npz(path, IMAGES.astype(np.int16), TABLE.as_array()), "int16"),
    "integer.h5": (lambda path: h5(path, IMAGES.astype(np.int16), objid=np.arange(9)), "int16"),
    "integer.pt": (lambda path: torch.save(torch.zeros(9, 5, 48, 48, dtype=torch.int32), path), "int32"),
    "wrong-endian.npz": (lambda path: npz(path, IMAGES.astype(">f4"), TABLE.as_array()), None),
    "wrong-endian.h5": (lambda path: h5(path, IMAGES.astype(">f4"), objid=np.arange(9)), None),
    "long.npz": (lambda path: npz(path, IMAGES[:8], TABLE.as_array()), "9 rows for 8 stamps"),
    "long.fits": (lambda path: fits_cube(path, IMAGES[:8], TABLE), "9 rows for 8 stamps"),
    "long.h5": (lambda path: h5(path, IMAGES[:8], objid=np.arange(9)), "9 rows for 8 stamps"),
    "repeated.fits": (repeated, "several columns called 'mag_g'"),
    "flat.fits": (lambda path: fits.PrimaryHDU(IMAGES[0, 0]).writeto(path), "no cube"),
    "nan.fits": (lambda path: fits_cube(path, np.where(np.arange(9)[:, None, None, None] == 4, np.nan, IMAGES),
                                        TABLE), "row 4 (objid 1004)")}


@pytest.mark.parametrize("name", BAD)
def test_sources_that_do_not_fit(astromae, refused, tmp_path, name):
    make, message = BAD[name]
    make(tmp_path/name)
    if message is None:  # what is inside is told by the bytes, and read as it is
        well(astromae("import", tmp_path/name, tmp_path/"set"))
        np.testing.assert_array_equal(StampSet.open(tmp_path/"set").verify().images, IMAGES)
        return
    if name != "nan.fits": refused(name, "import", tmp_path/name, tmp_path/"set")
    refused(message, "import", tmp_path/name, tmp_path/"set")


@pytest.mark.parametrize("name, make", [
    ("a.npz", lambda path: npz(path, IMAGES, TABLE.as_array())), ("a.fits", lambda path: fits_cube(path, IMAGES, TABLE)),
    ("a.h5", lambda path: h5(path, IMAGES, objid=np.arange(9))), ("a.pt", lambda path: torch.save(torch.tensor(IMAGES), path))])
def test_sources_that_are_cut_short(refused, tmp_path, name, make):
    make(tmp_path/name)
    size = (tmp_path/name).stat().st_size
    for keep in (100, size//2, size - 3000):
        os.truncate(tmp_path/name, keep)
        refused(name, "import", tmp_path/name, tmp_path/"set")
        make((tmp_path/name).unlink() or tmp_path/name)


def test_catalogues_beside_an_array(astromae, refused, tmp_path):
    np.save(tmp_path/"a.npy", IMAGES)
    words = ("import", tmp_path/"a.npy", tmp_path/"set", "--catalogue")
    (tmp_path/"twice.csv").write_text("objid,z,z\n" + "1,2,3\n"*9)
    TABLE["objid", "ra"].write(tmp_path/"good.csv")
    (tmp_path/"long.csv").write_text((tmp_path/"good.csv").read_text() + "7,1.5\n")
    refused("several columns called 'z'", *words, tmp_path/"twice.csv")
    refused("10 rows for 9 stamps", *words, tmp_path/"long.csv")
    refused("none.csv", *words, tmp_path/"none.csv")
    refused("a.npy", *words, tmp_path/"a.npy")
    well(astromae(*words, tmp_path/"good.csv", "--bands", "u,g,r,i,z"))
    assert list(StampSet.open(tmp_path/"set").catalogue["objid"]) == list(TABLE["objid"])


# --- destinations and disks

@pytest.mark.parametrize("name", ["a.h5", "a.fits"])
def test_an_export_keeps_what_is_there(astromae, refused, tmp_path, name):
    stamps, out = write(tmp_path/"set", n=9), tmp_path/name
    out.write_text("precious")
    refused("there already", "export", stamps, out)
    with full_disk(): code, _, err = astromae("export", stamps, out, "--overwrite")
    assert code == 2 and str(out) in sentence(err)
    assert out.read_text() == "precious" and sorted(path.name for path in tmp_path.iterdir()) == [name, "set"]
    well(astromae("export", stamps, out, "--overwrite", "--where", "objid >= 1004"))
    well(astromae("import", out, tmp_path/"again"))
    np.testing.assert_array_equal(StampSet.open(tmp_path/"again").images, IMAGES[4:])


def test_an_export_to_what_is_no_file_of_stamps(refused, tmp_path):
    stamps = write(tmp_path/"set", n=9)
    for name in ("a.txt", "a.npz", "a"): refused("choose one of these", "export", stamps, tmp_path/name)
    refused("there already", "export", stamps, (tmp_path/"folder.fits").mkdir() or tmp_path/"folder.fits", "--overwrite")
    refused("there is no folder", "export", tmp_path/"nowhere", tmp_path/"a.fits")
    refused("/proc/a.fits", "export", stamps, "/proc/a.fits")


def verb_that_makes_a_set(verb, tmp_path, frames, out):
    fits_cube(tmp_path/"a.fits", IMAGES, TABLE)
    if verb == "import": return ("import", tmp_path/"a.fits", out)
    return ("cut", frames, out, "--processes", 1, "--catalogue", places(tmp_path/"a.csv", RA, DEC))


@pytest.mark.parametrize("verb", ["import", "cut"])
def test_a_destination_that_exists(astromae, refused, frames, tmp_path, verb):
    there = write(tmp_path/"there", n=20)
    (tmp_path/"thesis").mkdir()
    (tmp_path/"thesis"/"thesis.tex").write_text("years of work")
    call = lambda out, *more: (*verb_that_makes_a_set(verb, tmp_path, frames, out), *more)
    words = call(tmp_path/"thesis")
    for more in ((), ("--overwrite",)): refused("is no stamp set", *words, *more)
    words = [tmp_path/"thesis"/"thesis.tex" if word == tmp_path/"thesis" else word for word in words]
    for more in ((), ("--overwrite",)): refused("is no stamp set", *words, *more)
    words = [there if word == tmp_path/"thesis"/"thesis.tex" else word for word in words]
    refused("there already", *words)
    before = on_disk(there)
    with full_disk(): code, _, err = astromae(*words, "--overwrite")
    assert code == 2 and str(there) in sentence(err) and on_disk(there) == before
    well(astromae(*words, "--overwrite"))
    assert len(StampSet.open(there).verify()) == {"import": 9, "cut": 40}[verb]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_catalogue_and_frames_on_a_full_disk(astromae, archive, tmp_path):
    catalogue, frames = tmp_path/"a.fits", tmp_path/"frames"
    query = ("query", catalogue, "--region", "150,20,0.1", "--server", archive.url)
    fetch = ("fetch", catalogue, frames, "--server", f"{archive.url}/sas")
    for words, made in ((query, catalogue), (fetch, frames)):  # in a process of its own: the server writes too
        done = subprocess.run(["bash", "-c", 'ulimit -f 4; exec "$@"', "_", *command(*words)], capture_output=True,
                              text=True)
        assert done.returncode == 2 and str(tmp_path) in sentence(done.stderr), done.stderr
        assert not made.is_file() and not list(frames.glob("frame-*"))
        well(astromae(*words))
    assert len(list(frames.glob("frame-*"))) == 5


# --- the survey

def test_questions_that_make_no_sense(astromae, refused, archive, tmp_path):
    words = ("query", tmp_path/"a.fits", "--server", archive.url)
    for region in ("1,2", "north", "1,2,3,4,5", "", "150,20,-1", "1,2,5,4", "nan,1,2"):
        refused("region", *words, "--region", region)
    refused("there is no selection 'all'", *words, "--selection", "all")
    refused("one thing", *words, "--sql", "SELECT objID FROM PhotoObjAll", "--region", "1,2,3")
    refused("one SELECT", *words, "--sql", "DROP TABLE PhotoObjAll")
    refused("cannot be read", *words, "--positions", tmp_path/"none.csv")
    refused("has no column 'dec'", *words, "--positions", places(tmp_path/"b.csv", 150, 20) and ra_only(tmp_path))
    refused("whole numbers", *words, "--objid", numbers(tmp_path, [0.5, 1]))
    refused("name it a.fits", "query", tmp_path/"a.csv", "--server", archive.url)
    assert not archive.asked
    refused("no galaxy like that", *words, "--region", "10,11,20,21")
    (tmp_path/"a.fits").write_text("precious")
    refused("exists", *words)


def ra_only(tmp_path):
    Table({"ra": [150.]}).write(tmp_path/"ra.csv")
    return tmp_path/"ra.csv"


def numbers(tmp_path, objid):
    Table({"objid": objid}).write(tmp_path/"objid.csv")
    return tmp_path/"objid.csv"


def test_positions_without_a_galaxy_are_told(astromae, archive, tmp_path):
    table = places(tmp_path/"a.csv", [*RA[:3], 10.], [*DEC[:3], 80.])
    code, out, err = astromae("query", tmp_path/"a.fits", "--positions", table, "--server", archive.url)
    assert code == 0 and out == f"3 galaxies are in {tmp_path/'a.fits'}\n"
    assert "no object for 1 of the 4 rows asked for (3)" in sentence(err)


def test_no_network(refused, impatient, tmp_path):
    catalogue = places(tmp_path/"a.csv", RA, DEC, **{name: [value]*N for name, value in WHERE.items()})
    nowhere = "http://127.0.0.1:9"
    (tmp_path/"frames").mkdir()
    refused("cannot be reached; check the network", "query", tmp_path/"a.fits", "--server", nowhere)
    refused("5 frames", "fetch", catalogue, tmp_path/"frames", "--server", nowhere)
    refused("must begin with http", "fetch", catalogue, tmp_path/"frames", "--server", "data.sdss.org")


def test_catalogues_that_name_no_frames(refused, archive, tmp_path):
    fetch = lambda name: ("fetch", tmp_path/name, tmp_path/"frames", "--server", f"{archive.url}/sas")
    place = {name: [value]*N for name, value in WHERE.items()}
    refused("no column 'run'", *fetch(places(tmp_path/"a.csv", RA, DEC).name))
    refused("row 0 of the catalogue", *fetch(places(tmp_path/"b.csv", RA, DEC, **place | {"camcol": [7]*N}).name))
    (tmp_path/"page.csv").write_text("<html>503</html>")
    for name in ("page.csv", "none.fits", "none.txt"): refused(name if "none" in name else "column", *fetch(name))
    good = fetch(places(tmp_path/"c.csv", RA, DEC, **place).name)
    for bands in ("abc", "grizy", "", "u,,g"): refused("band", *good, "--bands", bands)
    (tmp_path/"file").write_text("a file")
    refused("file", *good[:2], tmp_path/"file", *good[3:])
    assert not archive.asked


# --- what a new user mistypes

@pytest.mark.parametrize("condition, message", [
    ("mag_q < 17", "names 'mag_q', which is no column"), ("mag_r <", "cannot be understood"),
    ("mag_r << 17 and", "cannot be understood"), ("mag_r < 17.8)", "cannot be understood"),
    ("mag_r", "not true or false"), ("mag_r < -5", "no galaxy of"), ("z_spec <= 'a'", "cannot be understood"),
    ("mag_r = 17", "use =="), ("17", "not true or false"),
    ("__import__('os').system('touch owned')", "cannot be understood"), ("@x > 1", "names 'x', which is no column"), ("", "cannot be understood")])
def test_conditions(refused, models, tmp_path, condition, message):
    stamps, where = write(tmp_path/"set"), ("--where", condition)
    refused(message, "pretrain", stamps, tmp_path/"run", "--experiment", "accuracy", *where)
    refused(message, "finetune", stamps, tmp_path/"run", "--network", "Henghes et al.", *where)
    refused(message, "predict", models/"network", stamps, tmp_path/"z.fits", *where)
    refused(message, "export", stamps, tmp_path/"a.h5", *where)
    refused(message, "import", stamps, tmp_path/"part", *where)


def test_a_condition_that_leaves_too_few(refused, tmp_path):
    stamps = write(tmp_path/"set")
    for verb in ("pretrain", "finetune"):
        refused("too few", verb, stamps, tmp_path/"run", "--experiment", "accuracy", "--where", "objid < 1003")


def test_options_of_an_import_that_do_not_fit(astromae, refused, tmp_path):
    words = ("import", write(tmp_path/"set", n=9), tmp_path/"new")
    for option in (("--bands", "grizy"), ("--unit", "DN"), ("--pixel-scale", 1)):
        refused(f"knows no option {option[0][2:].replace('-', '_')!r}", *words, *option)
    refused("smaller than the 99 x 99 pixels", *words, "--crop", 99)
    refused("float17", *words, "--dtype", "float17")
    h5(tmp_path/"a.h5", IMAGES, objid=np.arange(9))
    words = ("import", tmp_path/"a.h5", tmp_path/"new")
    for bands in ("abc", "u,g", "ugrizy", "", "u,,g,r,i", "uuuuu"): refused("band", *words, "--bands", bands)
    refused("wanted", *words, "--channels-last", "--bands", "ugriz")
    refused("called 'pixels'", *words, "--images", "pixels")
    refused("catalogue", *words, "--catalogue", "columns")
    refused("knows no option 'images'", "import", write(tmp_path/"pt", n=9) and tensors(tmp_path), tmp_path/"new",
            "--images", "pixels")
    for scale in (0, -1, "nan"): refused("pixel", *words, "--pixel-scale", scale)
    well(astromae(*words, "--bands", "b, v, r,i,z", "--pixel-scale", 0.2, "--unit", "electron", "--crop", 48))
    stamps = StampSet.open(tmp_path/"new")
    assert (stamps.bands, stamps.pixel_scale, stamps.unit) == (tuple("bvriz"), 0.2, "electron")


def tensors(tmp_path):
    torch.save(torch.tensor(IMAGES), tmp_path/"a.pt")
    return tmp_path/"a.pt"


def test_predictions_that_cannot_be(refused, models, tmp_path):
    grizy, out = write(tmp_path/"grizy", n=9, bands=tuple("grizy")), tmp_path/"z.fits"
    predict = ("predict", models/"blind")
    refused("has bands ('g', 'r', 'i', 'z', 'y')", *predict, grizy, out)
    fits_cube(tmp_path/"a.fits", IMAGES, TABLE)
    refused("needs a stamp set", *predict, tmp_path/"a.fits", out, "--where", "mag_r < 17")
    out.write_text("precious")
    refused("none.fits", *predict, tmp_path/"none.fits", out)
    refused("holds the stamps", *predict, tmp_path/"a.fits", tmp_path/"a.fits")


@pytest.mark.parametrize("words", [
    "querry a.fits", "cut", "fetch a.fits", "import a.npz b --crop 0", "import a.npz b --crop x",
    "cut a b --size 0", "cut a b --sise 32", "query a.fits --limit 0", "fetch a b --parallel 0",
    "export a", "cut a b --processes -1"])
def test_words_that_are_none(astromae, words):
    "The shell's user knows these: usage, then what is wrong."
    code, out, err = astromae(*words.split())
    assert code == 2 and out == "" and "Traceback" not in err
    assert err.startswith("Usage: ") and err.splitlines()[-1].startswith("Error: ")
