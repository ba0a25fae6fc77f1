"What would disturb the story of 03_dataset: bad input, real stamps, memory, full disks."
import json, os, shutil, subprocess, sys, zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy.table import Table

from astromae.catalogue import EXPERIMENT_1, house_catalogue, required_columns, split
from astromae.dataset import StampSet, import_arrays, import_npz, write_stamp_set
from astromae.errors import InputError
from astromae.survey import BANDS

DATA = Path(os.environ.get("ASTROMAE_DATA", Path(__file__).parents[1].parent/"shared"/"data"))


def some(n, first=0, size=8):
    rng = np.random.default_rng(first)
    images = rng.standard_normal((n, 5, size, size)).astype(np.float32)
    table = Table({name: rng.uniform(1, 2, n) for name in required_columns()})
    table["objid"] = first + np.arange(n)
    return images, table


@pytest.fixture
def stamps(tmp_path): return write_stamp_set(tmp_path/"set", [some(10), some(10, 10)], 20)


def refused(message, function, *args, **kwargs):
    with pytest.raises(InputError) as caught: function(*args, **kwargs)
    sentence = str(caught.value)
    assert message in sentence
    assert "\n" not in sentence and sentence.endswith(".")


def write_npz(path, cube=None, labels=None, **others):
    n = 6 if cube is None else len(cube)
    if cube is None: cube = np.moveaxis(some(n)[0], 1, -1)
    if labels is None: labels = Table({"specObjID": np.arange(n), "z": np.full(n, 0.1)}).as_array()
    np.savez(path, cube=cube, labels=labels, **others)
    return path


# --- writing

@pytest.mark.parametrize("change, message", [
    (lambda i, t: (i[:, :4], t), "shape (4, 8, 8) and not (5, 8, 8)"),
    (lambda i, t: (i[:, 0], t), "shape (8, 8) and not (5, 8, 8)"),
    (lambda i, t: (i, t[:-1]), "9 rows for the 10 stamps"),
    (lambda i, t: (i, t["objid", "ra"]), "chunk 1 of the catalogue has other columns"),
    (lambda i, t: (i[:9], t[:9]), "19 stamps came where 20 were announced"),
])
def test_bad_chunks_are_refused_and_leave_nothing(tmp_path, change, message):
    refused(message, write_stamp_set, tmp_path/"set", [some(10), change(*some(10, 10))], 20)
    assert list(tmp_path.iterdir()) == []


def test_chunks_of_another_size_are_refused(tmp_path):
    refused("shape (5, 6, 6) and not (5, 8, 8)", write_stamp_set, tmp_path/"set",
            [some(10), some(10, 10, size=6)], 20)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_not_finite_are_named(tmp_path, bad):
    images, table = some(10, 500)
    images[[3, 7], 2, 1, 1] = bad
    refused("row 13 (objid 503)", write_stamp_set, tmp_path/"set", [some(10), (images, table)], 20)


def test_pixels_too_bright_for_float16_are_named(tmp_path):
    images, table = some(10)
    images[4, 0, 0, 0] = 7e4
    refused("row 4 (objid 4)", write_stamp_set, tmp_path/"half", [(images, table)], 10, dtype="float16")
    assert len(write_stamp_set(tmp_path/"single", [(images, table)], 10)) == 10


@pytest.mark.parametrize("settings, message", [
    ({"dtype": "int16"}, "float32 or float16"),
    ({"n": 9}, "10 stamps came where 9"),
    ({"bands": "gri"}, "shape (5, 8, 8) and not (3, 8, 8)"),
])
def test_settings_that_do_not_fit(tmp_path, settings, message):
    refused(message, write_stamp_set, tmp_path/"set", [some(10)], **({"n": 10} | settings))


def test_missing_columns_are_noticed_before_anything_is_written(tmp_path):
    images, table = some(10)
    def chunks():
        yield images, table["objid", "ra"]
        raise AssertionError("the second chunk must not be asked for")
    refused("lacks the column(s) dec, mag_u", write_stamp_set, tmp_path/"set", chunks(), 20)


def test_no_stamps_at_all(tmp_path): refused("0 stamps", write_stamp_set, tmp_path/"set", [], 0)


def test_columns_that_fits_cannot_hold(tmp_path):
    images, table = some(10)
    for name, values in {"OBJID": np.arange(10), "thing": np.array([{}]*10)}.items():
        refused(name if name == "thing" else "objid", write_stamp_set, tmp_path/"set",
                [(images, _with(table, name, values))], 10)
    refused("whole numbers", write_stamp_set, tmp_path/"set",
            [(images, _with(table, "objid", np.linspace(0, 1, 10)))], 10)
    refused("FITS table", write_stamp_set, tmp_path/"set",
            [(images, _with(table, "name", np.array(["Ö"]*10)))], 10)


def _with(table, name, values):
    table = table.copy()
    table[name] = values
    return table


def test_every_column_comes_back(tmp_path):
    images, table = some(10)
    extra = {"flag": np.arange(10) % 2 == 0, "count": np.arange(10, dtype=np.uint16),
             "big": np.arange(10, dtype=np.uint64) + 2**63, "half": np.arange(10, dtype=np.float16),
             "name": np.array([f"galaxy {k}" for k in range(10)]), "vector": np.ones((10, 3))}
    for name, values in extra.items(): table[name] = values
    back = write_stamp_set(tmp_path/"set", [(images, table)], 10).catalogue
    for name in table.colnames: np.testing.assert_array_equal(np.asarray(back[name]), np.asarray(table[name]))


def test_nothing_but_a_stamp_set_is_overwritten(tmp_path, stamps):
    precious = tmp_path/"precious"
    precious.mkdir()
    (precious/"thesis.tex").write_text("years of work")
    refused("no stamp set", write_stamp_set, precious, [some(10)], 10, overwrite=True)
    refused("there already", write_stamp_set, stamps.folder, [some(10)], 10)
    assert (precious/"thesis.tex").exists()
    assert len(write_stamp_set(stamps.folder, [some(10)], 10, overwrite=True)) == 10
    assert len(StampSet.open(stamps.folder)) == 10
    (tmp_path/"empty").mkdir()
    assert len(write_stamp_set(tmp_path/"empty", [some(10)], 10)) == 10


def test_a_full_disk_is_a_sentence_and_the_old_set_stays(tmp_path, stamps):
    code = f"""
import resource, signal
from test_dataset import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
refused("writing", write_stamp_set, {str(stamps.folder)!r}, [some(10)], 10, overwrite=True)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
    assert len(StampSet.open(stamps.folder).verify()) == 20
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


# --- opening

def spoil_json(folder, **changes):
    file = folder/"description.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("spoil, message", [
    (lambda f: shutil.rmtree(f), "there is no folder"),
    (lambda f: (f/"images.npy").unlink(), "lacks images.npy"),
    (lambda f: (f/"catalogue.fits").unlink(), "lacks catalogue.fits"),
    (lambda f: (f/"description.json").unlink(), "lacks description.json"),
    (lambda f: (f/"description.json").write_text("{"), "description.json is not what"),
    (lambda f: (f/"description.json").write_text("{}"), "description.json is not what"),
    (lambda f: (f/"description.json").write_bytes(b"\xff\xfe"), "description.json is not what"),
    (lambda f: (f/"images.npy").write_bytes(b""), "images.npy is not what"),
    (lambda f: os.truncate(f/"catalogue.fits", 6000), "catalogue.fits is not what"),
    (lambda f: (f/"catalogue.fits").write_bytes(b"nothing"), "catalogue.fits is not what"),
    (lambda f: os.truncate(f/"catalogue.fits", 3000), "catalogue.fits is not what"),
    (lambda f: os.truncate(f/"images.npy", 20_000), "images.npy is not what"),
    (lambda f: os.truncate(f/"images.npy", 30_000), "images.npy is not what"),
    (lambda f: np.save(f/"images.npy", np.zeros((20, 5, 8, 8))), "float64"),
    (lambda f: np.save(f/"images.npy", np.array([{}])), "images.npy is not what"),
    (lambda f: spoil_json(f, bands=["g", "r"]), "2 bands"),
    (lambda f: spoil_json(f, shape=[19, 5, 8, 8]), "(19, 5, 8, 8)"),
    (lambda f: spoil_json(f, dtype="float17"), "description.json is not what"),
    (lambda f: some(19)[1].write(f/"catalogue.fits", overwrite=True), "19 rows for 20 stamps"),
    (lambda f: some(20)[1]["objid", "ra"].write(f/"catalogue.fits", overwrite=True), "lacks the column"),
])
def test_a_folder_that_is_no_whole_set_is_refused(stamps, spoil, message):
    spoil(stamps.folder)
    refused(message, StampSet.open, stamps.folder)


def test_bytes_beyond_the_end_are_noticed(stamps):
    with open(stamps.folder/"images.npy", "ab") as file: file.write(b"more")
    refused("bytes follow", StampSet.open, stamps.folder)


def test_other_bands(tmp_path):
    images, table = some(10)
    mags = {f"mag_{band}": table["mag_r"] for band in "gri"}
    table = Table({name: table[name] for name in ("objid", "ra", "dec", "z_spec")} | mags)
    other = write_stamp_set(tmp_path/"gri", [(images[:, :3], table)], 10, bands="gri", pixel_scale=0.2)
    assert other.bands == ("g", "r", "i") and other.pixel_scale == 0.2
    assert other.magnitudes().shape == (10, 3)


# --- splitting

def test_the_split_is_the_same_everywhere():
    parts = split(np.arange(10_000)*7 + 3)
    assert [len(rows) for rows in parts.values()] == [8000, 1000, 700, 100, 200]
    assert parts["test"][:5].tolist() == PINNED


PINNED = [42, 96, 119, 136, 214]


@pytest.mark.parametrize("seed", range(5))
def test_no_galaxy_on_two_sides(seed):
    rng = np.random.default_rng(seed)
    objid = rng.integers(-2**62, 2**62, 1000)[rng.integers(0, 1000, 3000)]
    parts = split(objid, seed=seed)
    sides = [set(objid[rows].tolist()) for rows in parts.values()]
    n = len(np.unique(objid))
    assert sum(map(len, sides)) == n == len(set.union(*sides))
    for name, side in zip(EXPERIMENT_1, sides): assert abs(len(side) - EXPERIMENT_1[name]*n) <= 1


@pytest.mark.parametrize("fractions", [{"a": 0.7, "b": 0.4}, {"a": 0.0, "b": 1.0}, {"a": -0.1}])
def test_fractions_that_make_no_sense(fractions):
    refused("above zero", split, range(100), fractions)


def test_part_of_the_galaxies():
    assert {k: len(v) for k, v in split(range(100), {"a": 0.1, "b": 0.2}).items()} == {"a": 10, "b": 20}


# --- importing

def test_known_and_unknown_columns():
    n = 3
    table = {"specObjID": np.arange(n, dtype=np.uint64) + 2**61, "zErr": np.ones(n), "z": [0.1, -9999, 0.2],
             "EBV": np.ones(n), "dered_petro_r": np.full(n, 17.0), "petroR50_r": np.ones(n)}
    for band in BANDS:
        table |= {f"modelMag_{band}": [17, -9999, 18.0], f"extinction_{band}": np.full(n, 0.25),
                  f"modelMagErr_{band}": np.full(n, 0.01), f"cModelMag_{band}": np.ones(n)}
    ours, filled = house_catalogue(pd.DataFrame(table), n)
    assert filled == ["ra", "dec"]
    assert ours["objid"].dtype == np.int64 and ours["objid"][1] == 2**61 + 1
    np.testing.assert_array_equal(ours["mag_g"], [16.75, np.nan, 17.75])
    np.testing.assert_array_equal(ours["z_spec"], [0.1, np.nan, 0.2])
    kept = {"magerr_g", "ext_g", "modelMag_g", "cModelMag_g", "EBV", "z_err", "petroR50_r"}
    assert kept <= set(ours.colnames)


def test_the_photometric_name_goes_before_the_spectroscopic_one():
    both = {"objID": [1, 2], "specObjID": [3, 4]}
    ours, _ = house_catalogue(both, 2)
    assert ours["objid"].tolist() == [1, 2] and ours["specObjID"].tolist() == [3, 4]


def test_a_z_beside_the_other_bands_is_no_redshift():
    ours, filled = house_catalogue({band: [17.0, 18.0] for band in BANDS}, 2)
    assert "z_spec" in filled and ours["z"].tolist() == [17.0, 18.0]


def test_the_catalogue_handed_in_stays_as_it_was():
    mine = Table({"objID": [1.0, 2.0], "z": [0.1, 0.2], "dered_r": [17.0, -9999]})
    house_catalogue(mine, 2)
    assert mine.colnames == ["objID", "z", "dered_r"] and mine["dered_r"][1] == -9999


@pytest.mark.parametrize("objid", [[0.5, 1], ["one", "two"], [np.nan, 1]])
def test_names_of_galaxies_that_are_no_numbers(objid):
    refused("whole numbers", house_catalogue, {"objid": objid}, 2)


def test_arrays_in_either_channel_order(tmp_path):
    images, table = some(10)
    first = import_arrays(images, table, tmp_path/"first", channels_last=False, block=3)
    last = import_arrays(np.moveaxis(images, 1, -1), table, tmp_path/"last", dtype="float16", block=3)
    np.testing.assert_array_equal(first.images, images)
    np.testing.assert_allclose(last.images, images, rtol=1e-3, atol=1e-6)
    refused("four axes", import_arrays, images[0], table, tmp_path/"flat")
    refused("9 rows for 10", import_arrays, images, table[:9], tmp_path/"short", channels_last=False)
    refused("the shape (10, 8, 5, 8) where (N, 5,", import_arrays, images, table, tmp_path/"wrong")


@pytest.mark.parametrize("compress, big_endian", [(False, False), (True, False), (False, True)])
def test_npz_stored_deflated_and_of_another_machine(tmp_path, compress, big_endian):
    images, table = some(50)
    cube = np.moveaxis(images, 1, -1).astype(">f4" if big_endian else "<f4", order="C")
    labels = table.as_array()
    (np.savez_compressed if compress else np.savez)(tmp_path/"a.npz", cube=cube, labels=labels)
    got = import_npz(tmp_path/"a.npz", tmp_path/"set", block=7)
    np.testing.assert_array_equal(got.images, images)
    np.testing.assert_array_equal(got.catalogue["objid"], table["objid"])
    assert got.origin == "a.npz"


def test_npz_with_objects_is_not_unpickled(tmp_path):
    labels = np.array([(1, {"z": 0.1})]*6, dtype=[("objid", int), ("z", object)])
    refused("not a whole npz file of plain arrays", import_npz,
            write_npz(tmp_path/"a.npz", labels=labels), tmp_path/"set")
    refused("type object", import_npz, write_npz(
        tmp_path/"b.npz", cube=np.full((6, 8, 8, 5), None)), tmp_path/"set")


@pytest.mark.parametrize("cube, message", [
    (np.zeros((6, 5, 8, 8), np.float32), "(6, 5, 8, 8)"),
    (np.zeros((6, 8, 8), np.float32), "(6, 8, 8)"),
    (np.zeros((6, 8, 8, 5), int), "int64"),
    (np.asfortranarray(np.zeros((6, 8, 8, 5), np.float32)), "Fortran order"),
])
def test_npz_with_another_cube(tmp_path, cube, message):
    refused(message, import_npz, write_npz(tmp_path/"a.npz", cube=cube), tmp_path/"set")


def test_npz_whose_parts_do_not_belong_together(tmp_path):
    labels = Table({"z": np.full(7, 0.1)}).as_array()
    refused("7 rows for 6 stamps", import_npz, write_npz(tmp_path/"a.npz", labels=labels), tmp_path/"set")
    refused("no named columns", import_npz, write_npz(tmp_path/"b.npz", labels=np.zeros(6)), tmp_path/"set")
    refused("no array 'labels'", import_npz, _save(tmp_path/"c.npz", cube=np.zeros(3)), tmp_path/"set")
    refused("check the path", import_npz, tmp_path/"none.npz", tmp_path/"set")


def _save(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_npz_that_was_damaged(tmp_path):
    path = write_npz(tmp_path/"a.npz", cube=np.random.default_rng(0).random((50, 8, 8, 5), np.float32))
    whole = path.read_bytes()
    (tmp_path/"cut.npz").write_bytes(whole[:-100])
    (tmp_path/"text.npz").write_text("<html>not found</html>")
    flipped = bytearray(whole)
    flipped[5000] ^= 1
    (tmp_path/"flipped.npz").write_bytes(flipped)
    with zipfile.ZipFile(tmp_path/"short.npz", "w") as new, zipfile.ZipFile(path) as old:
        new.writestr("cube.npy", old.read("cube.npy")[:-999])
        new.writestr("labels.npy", old.read("labels.npy"))
    for name in ("cut", "text", "flipped", "short"):
        refused(f"{name}.npz is not a whole npz file", import_npz, tmp_path/f"{name}.npz", tmp_path/"set")
    assert not (tmp_path/"set").exists()


def test_a_cube_larger_than_the_memory_allowed_passes_through(tmp_path):
    n, rows = 5000, np.random.default_rng(0).standard_normal((100, 64, 64, 5)).astype(np.float32)
    with zipfile.ZipFile(tmp_path/"large.npz", "w") as archive:
        with archive.open("cube.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, {
                "descr": "<f4", "fortran_order": False, "shape": (n, 64, 64, 5)})
            for _ in range(n//100): member.write(rows.tobytes())
        with archive.open("labels.npy", "w") as member:
            np.save(member, Table({"specObjID": np.arange(n), "z": np.full(n, 0.1)}).as_array())
    code = f"""
import resource
from pathlib import Path
from astromae.dataset import import_npz
folder = Path({str(tmp_path)!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import_npz(folder/"large.npz", folder/"set", dtype="float16", block=256)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    size = (tmp_path/"large.npz").stat().st_size/2**20
    assert size > 380 and int(done.stdout)/2**10 < 150  # MiB
    got = StampSet.open(tmp_path/"set")
    np.testing.assert_allclose(got.images[-100:], np.moveaxis(rows, -1, 1), rtol=1e-3, atol=1e-6)


# --- real stamps

def real(name):
    path = DATA/"sdss-stamps"/name
    if not path.exists(): pytest.skip(f"{path} is not here: real SDSS stamps are not part of the project")
    return path


def test_real_stamps_from_an_npz(tmp_path):
    got = import_npz(real("stamps_r20.npz"), tmp_path/"set", labels="meta")
    assert got.images.shape == (114, 5, 64, 64) and not got.labelled.any()
    assert {"objid", "z_spec", "mag_r"} <= set(got.description["filled"])
    assert {"field", "rmag_auto", "r50_arcsec"} <= set(got.catalogue.colnames)
    centre = got.images[:, 2, 30:35, 30:35].mean((1, 2))
    assert (centre > np.median(got.images[:, 2, :8], (1, 2))).all()


def test_real_stamps_from_arrays(tmp_path):
    with np.load(real("sdss30_dereddened.npz")) as arrays:
        got = import_arrays(arrays["cube"], {name: arrays[name] for name in ("ra", "dec", "z_spec")},
                            tmp_path/"set")
    assert len(got) == 30 and got.labelled.sum() == 1
    assert got.redshifts()[got.labelled][0] == pytest.approx(0.1812, abs=1e-3)
