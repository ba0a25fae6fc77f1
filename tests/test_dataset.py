"What would disturb the story of 03_dataset: bad input, real stamps, memory, full disks."
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy import units as u
from astropy.table import Column, QTable, Table

from astromae.catalogue import (EXPERIMENT_1, check_catalogue, duplicates, house_catalogue, known_names,
                                matching_rows, required_columns, split)
from astromae.dataset import (SelectedImages, StampSet, StampSource, import_arrays, write_source,
                              write_stamp_set)
from astromae.errors import InputError
from astromae.formats import import_stamps
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


# --- parts of a set

def test_a_part_of_a_set_reads_as_the_array_would(stamps):
    rows = np.array([3, 17, 4, 4, 0])
    part, images = stamps.select(rows), np.asarray(stamps.images)[rows]
    assert isinstance(part.images, SelectedImages) and (len(part), part.images.shape) == (5, (5, 5, 8, 8))
    for key in [2, -1, slice(1, 4), [0, 2], np.array([True, False, True, False, False]), Ellipsis,
                (slice(None), 2), (slice(0, 3), slice(1, 3), 4), ([1, 3], slice(None), slice(2, 4), slice(0, 5)),
                (Ellipsis, 3), (0, 1, 2, 3), (slice(None), [0, 1])]:
        np.testing.assert_array_equal(part.images[key], images[key])
    np.testing.assert_array_equal(np.stack(list(part.images)), images)
    np.testing.assert_array_equal(np.asarray(part.images, np.float64), images)
    with pytest.raises(IndexError): part.images[5]
    np.testing.assert_array_equal(part.magnitudes(), stamps.magnitudes()[rows])
    np.testing.assert_array_equal(part.catalogue["objid"], rows)
    assert part.verify().folder == stamps.folder


@pytest.mark.parametrize("which", [[], [20], [-1], [True]*19, [0.5], "mag_r > 9", "nothing == 1", [[1, 2]]])
def test_parts_that_there_are_not(stamps, which):
    with pytest.raises(InputError): stamps.select(which)


def test_conditions_on_columns_of_all_kinds(tmp_path):
    images, table = some(10)
    table["class"] = ["GALAXY", "STAR"]*5
    table["clean"] = np.arange(10) < 5
    table["big"] = np.arange(10, dtype=np.uint64) + 2**63
    table["vector"] = np.ones((10, 3))
    table["dered petro"] = np.arange(10.)
    table["z_spec"][2:4] = np.nan
    got = write_stamp_set(tmp_path/"set", [(images, table)], 10)
    for condition, rows in {"`class` == 'GALAXY'": range(0, 10, 2), "clean and objid > 2": [3, 4],
                            "`dered petro` < 2.5": range(3), "z_spec > 0": [0, 1, *range(4, 10)],
                            "not clean": range(5, 10), f"big >= {2**63 + 8}": [8, 9]}.items():
        assert got.select(condition).catalogue["objid"].tolist() == list(rows)


def test_a_part_goes_through_batches_normalisation_split_and_prediction(tmp_path):
    from astromae.batches import BatchLoader, fit_normalisation
    from astromae.experiments import split_rows
    from astromae.training import describe_data
    stamps = write_stamp_set(tmp_path/"set", [some(400, size=48)], 400)
    part, rows = stamps.select("objid % 2 == 1"), np.arange(1, 400, 2)
    copy = write_stamp_set(tmp_path/"copy", [(stamps.images[rows], stamps.catalogue[rows])], 200)
    for kind in ("standard", "arcsinh"):
        assert fit_normalisation(part, np.arange(150), kind) == fit_normalisation(copy, np.arange(150), kind)
    for in_memory in (False, True):
        made = [BatchLoader(one, range(3, 150), 32, "redshift", device="cpu", in_memory=in_memory)
                for one in (part, copy)]
        for a, b in zip(*made, strict=True):
            for x, y in zip(a, b): np.testing.assert_array_equal(x, y)
    mine, theirs = split_rows(part, "accuracy"), split_rows(copy, "accuracy")
    for name in mine: np.testing.assert_array_equal(mine[name], theirs[name])
    whole = describe_data(stamps, mine["train"], mine["valid"])
    other = describe_data(stamps.select("objid % 2 == 0"), mine["train"], mine["valid"])
    described = describe_data(part, mine["train"], mine["valid"])
    assert len({json.dumps(one) for one in (whole, other, described)}) == 3
    assert described == describe_data(stamps.select(rows), mine["train"], mine["valid"])


def test_three_bands_of_another_survey_go_all_the_way(tmp_path):
    from dataclasses import replace
    from astromae.comparison import draw_reconstructions
    from astromae.mae import MAEConfig
    from astromae.predict import predict
    from astromae.redshift import ARCHITECTURES
    from astromae.training import FINETUNE_PRESETS, PRETRAIN_PRESETS, finetune, pretrain
    rng, bands = np.random.default_rng(0), tuple("gry")
    table = Table({name: rng.uniform(0.1, 0.4, 60) for name in required_columns(bands)})
    table["objid"] = np.arange(60)
    images = rng.standard_normal((60, 3, 52, 52)).astype(np.float32)
    stamps = write_stamp_set(tmp_path/"set", [(images, table)], 60, bands=bands, pixel_scale=0.168, unit="count")
    part, rows, quiet = stamps.select("objid >= 4"), np.arange(50), dict(device="cpu", progress=False)
    mae = pretrain(part, rows[:40], rows[40:], tmp_path/"mae",
                   MAEConfig(encoder="plain", width=24, depth=1, heads=3, decoder_width=24, decoder_depth=1),
                   replace(PRETRAIN_PRESETS["demo"], epochs=2, batch_size=20, warmup_epochs=1), **quiet)
    network = replace(ARCHITECTURES["plain-AstroMAE"], features=64, magnitude_width=64, join_width=64)
    tuned = finetune(part, rows[:40], rows[40:], tmp_path/"net", network,
                     replace(FINETUNE_PRESETS["demo"], epochs=1, batch_size=20, cycle=1), mae.folder, **quiet)
    assert (tuned.preprocessing.bands, tuned.preprocessing.pixel_scale, tuned.preprocessing.unit) == (bands, 0.168, "count")
    predicted = predict(tuned.folder/"model", part, **quiet)
    assert predicted["objid"].tolist() == list(range(4, 60)) and np.isfinite(predicted["z_phot"]).all()
    np.testing.assert_array_equal(predict(tuned.folder/"model", stamps, rows=np.arange(4, 60), **quiet)["z_phot"],
                                  predicted["z_phot"])
    assert draw_reconstructions(mae, part, rows) is not None
    others = write_stamp_set(tmp_path/"others", [(images, table)], 60, bands=bands, pixel_scale=0.396, unit="count")
    refused("pixel_scale 0.396, but the model was made for 0.168", predict, tuned.folder/"model", others, **quiet)


# --- the same galaxy twice

def test_duplicates_against_all_pairs():
    rng = np.random.default_rng(0)
    ra, dec = 359.99 + 0.02*rng.random(300), 60 + 0.01*rng.random(300)
    table = Table({"objid": rng.integers(0, 280, 300), "ra": ra % 360, "dec": dec})
    x = np.stack([(ra - 360)*np.cos(np.radians(60)), dec - 60])*3600
    near = (np.hypot(*(x[:, :, None] - x[:, None])) < 1) | np.equal.outer(*[np.asarray(table["objid"])]*2)
    for _ in range(9): near = (near.astype(int) @ near) > 0
    galaxy = duplicates(table)
    np.testing.assert_array_equal(np.equal.outer(galaxy, galaxy), near)
    assert 1 < len(np.unique(galaxy)) < 270


def test_positions_that_are_not_known_make_no_duplicates():
    table = Table({"objid": range(6), "ra": [np.nan, np.nan, 0, -9999, 5, 5], "dec": [np.nan, 3, np.nan, -9999, 91, 91]})
    assert len(np.unique(duplicates(table))) == 6
    assert len(np.unique(duplicates(Table({"objid": [1, 1], "ra": [0., 90], "dec": [0., 0]})))) == 1
    masked = Table({"objid": [1, 2], "ra": np.ma.array([0., 0], mask=[0, 1]), "dec": [0., 0]})
    assert len(np.unique(duplicates(masked))) == 2


def test_many_stamps_of_one_galaxy_are_quick():
    n = 200_000
    table = Table({"objid": range(n), "ra": np.full(n, 10.), "dec": np.zeros(n)})
    begun = time.perf_counter()
    assert not duplicates(table).any()
    assert time.perf_counter() - begun < 5


def test_an_import_tells_of_duplicates(tmp_path):
    images, table = some(10)
    table["ra"], table["dec"] = [0., 0, 0, 1, 2, 3, 4, 5, 6, 7], [0, 0.5/3600, 1/3600, 0, 0, 0, 0, 0, 0, 0]
    got = write_stamp_set(tmp_path/"set", [(images, table)], 10)
    assert got.description["galaxies"] == 8
    assert "10 stamps of 8 galaxies, " in repr(got)


def test_the_packaged_galaxies_are_split_as_ever():
    from astromae.simulate import packaged_catalogue
    table = packaged_catalogue()
    for a, b in zip(split(table).values(), split(table["objid"]).values()): np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("seed", range(3))
def test_no_position_on_two_sides(seed):
    rng = np.random.default_rng(seed)
    which = rng.integers(0, 2000, 5000)
    ra, dec = rng.uniform(150, 160, 2000)[which], rng.uniform(0, 9, 2000)[which]
    table = Table({"objid": rng.permutation(5000), "ra": ra, "dec": dec + rng.uniform(-0.4, 0.4, 5000)/3600})
    sides = [set(which[rows].tolist()) for rows in split(table, seed=seed).values()]
    assert sum(map(len, sides)) == len(set.union(*sides)) == len(set(which))


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


@pytest.mark.parametrize("spell", [str.upper, str.title, str.lower])
def test_columns_however_they_are_spelt(spell):
    table = {"objID": [5, 6], "ra": [1.0, 2], "dec": [3.0, 4], "z": [0.1, -9999], "zErr": [1e-5, 1], "ebv": [0.1, 0]}
    for band in BANDS: table |= {f"modelMag_{band}": [18.0, 17], f"modelMagErr_{band}": [0.1, 0.2]}
    ours, filled = house_catalogue({spell(name): values for name, values in table.items() if name != "ebv"}
                                   | {"EBV": table["ebv"]}, 2)
    assert filled == [] and ours["objid"].tolist() == [5, 6] and ours["ra"].tolist() == [1, 2]
    np.testing.assert_array_equal(ours["z_spec"], [0.1, np.nan])
    np.testing.assert_allclose(ours["mag_r"], [18 - 0.2751, 17])
    assert {"magerr_u", "z_err", "modelMag_z"} <= set(ours.colnames)
    check_catalogue(ours, BANDS)
    magnitudes = {spell(f"mag_{band}"): [17.0, 18] for band in BANDS}
    assert house_catalogue(magnitudes, 2)[1] == ["objid", "ra", "dec", "z_spec"]


def test_a_name_as_it_should_be_goes_before_its_capitals():
    assert known_names(["RA", "ra", "DEC"]) == {"DEC": "dec"}
    assert known_names(["Z", "z"]) == {"z": "z_spec"} and known_names(["Z", "z_spec"]) == {}
    assert known_names(["OBJID", "objid", "specObjID"]) == {}
    assert known_names(list("UGRIZ")) == {} and known_names(["U", "G", "R", "I", "Z", "zErr"]) == {"zErr": "z_err"}
    twice = house_catalogue({"ra": [0.0], "RA": [1.0]}, 1)[0]
    refused("several columns called 'ra'", check_catalogue, twice, BANDS)


def test_an_npz_in_capitals_is_imported(tmp_path):
    images, table = some(20)
    columns = {name.upper(): np.asarray(table[name]) for name in table.colnames}
    np.savez(tmp_path/"a.npz", cube=images.transpose(0, 2, 3, 1), **columns)
    got = import_stamps(tmp_path/"a.npz", tmp_path/"set")
    for name in required_columns(): np.testing.assert_array_equal(got.catalogue[name], table[name])


def test_extinction_from_the_catalogue_before_reddening():
    mags = {f"modelMag_{band}": [17.0, -9999] for band in BANDS}
    both = {"EBV": [0.1, 0.1], "extinction_r": [0.2, 0.2]}
    ours, _ = house_catalogue(mags | both, 2)
    np.testing.assert_allclose(ours["mag_r"], [16.8, np.nan])
    np.testing.assert_allclose(ours["mag_u"], [17 - 0.5155, np.nan])
    np.testing.assert_allclose(ours["ext_u"], 0.5155)
    ours, _ = house_catalogue(mags | {"ebv": [-9999, 0.1]}, 2)
    assert np.isnan(ours["mag_r"]).all()
    dered = {f"dered_{band}": [17.0, 18.0] for band in BANDS}
    assert house_catalogue(mags | dered, 2)[0]["mag_r"].tolist() == [17, 18]


def test_magnitudes_that_cannot_be_dereddened():
    mags = {f"modelMag_{band}": [17.0, 18.0] for band in BANDS}
    refused("add a column ebv", house_catalogue, mags, 2)
    refused("no coefficient for the band 'y'", house_catalogue, {"modelMag_y": [1., 2], "ebv": [0, 0]}, 2, "y")
    assert house_catalogue({"modelMag_y": [1., 2], "extinction_y": [0.5, 0.5]}, 2, "y")[0]["mag_y"][0] == 0.5


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


# --- from a source

def source(n=100, first=0, block=10, **settings):
    "A source with a fingerprint, and its images."
    images, table = some(n, first)
    def blocks(first): return (images[k:k + block] for k in range(first, n, block))
    made = StampSource(table, images.shape, blocks, origin="a.npz", fingerprint={"path": "a.npz"})
    for name, value in settings.items(): setattr(made, name, value)
    return made, images


@pytest.mark.parametrize("dtype", [">f4", "<f8", "f2", "f4"])
def test_any_kind_of_floats_in_a_buffer_that_is_used_again(tmp_path, dtype):
    made, images = source()
    def blocks(first):
        buffer = np.empty((7, 5, 8, 8), dtype)
        for k in range(first, 100, 7):
            part = buffer[:min(7, 100 - k)]
            part[:] = images[k:k + 7]
            yield part
        buffer[:] = np.nan
    made.blocks = blocks
    got = write_source(made, tmp_path/"set").verify()
    np.testing.assert_array_equal(got.images, images.astype(dtype).astype(np.float32))


def test_a_selection_and_a_crop_while_importing(tmp_path):
    made, images = source(pixel_scale=0.2, unit="count")
    made.catalogue["petro"] = np.arange(100.)
    got = write_source(made, tmp_path/"set", crop=5, where="petro < 35 and petro % 2 == 1", dtype="float16")
    np.testing.assert_array_equal(got.images, images[1:35:2, :, 2:7, 2:7].astype(np.float16))
    assert got.images[0, 0, 2, 2] == images[1, 0, 4, 4].astype(np.float16)
    assert (got.pixel_scale, got.unit, got.description["n"]) == (0.2, "count", 17)
    np.testing.assert_array_equal(got.catalogue["petro"], np.arange(1, 35, 2))


@pytest.mark.parametrize("change, message", [
    ({"shape": (100, 4, 8, 8)}, "(N, 5, height, width)"), ({"bands": tuple("gri")}, "(N, 3, height, width)"),
    ({"shape": (99, 5, 8, 8)}, "100 rows for 99 stamps"), ({"shape": (101, 5, 8, 8)}, "100 rows for 101 stamps"),
    ({"blocks": lambda first: [np.zeros((60, 5, 8, 8))]}, "ends after 60 of its 100"),
    ({"blocks": lambda first: [np.zeros((60, 5, 8, 8))]*2}, "is longer than it says"),
    ({"blocks": lambda first: [np.zeros((100, 5, 8, 9))]}, "shape (5, 8, 9) from row 0"),
    ({"blocks": lambda first: [np.zeros((100, 5, 8, 8), int)]}, "type int64"),
    ({"blocks": lambda first: [np.full((100, 5, 8, 8), None)]}, "type object"),
    ({"blocks": lambda first: [np.full((100, 5, 8, 8), np.nan)]}, "not finite"),
    ({"catalogue": {"objid": [1], "z": [1, 2]}}, "a.npz is no table"),
    ({"catalogue": np.zeros(100)}, "no named columns"),
    ({"catalogue": {"ra": np.zeros(100), "RA": np.zeros(100)}}, "several columns called 'ra'"),
    ({"catalogue": {"z": ["far"]*100}}, "the column 'z_spec' of a.npz must be numbers"),
    ({"catalogue": {"z": np.zeros((100, 2))}}, "the column 'z_spec' of a.npz must be numbers"),
])
def test_sources_that_do_not_fit_leave_nothing(tmp_path, stamps, change, message):
    refused(message, write_source, source(**change)[0], stamps.folder, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert len(StampSet.open(stamps.folder).verify()) == 20


@pytest.mark.parametrize("condition, rows", [
    ("z <= 0.4", [0]), ("z_spec <= 0.4", [0]), ("z > 0.4", [2]), ("not (z_spec <= 0.4)", [1, 2]),
    ("~(z <= 0.4)", [1, 2]), ("not (z_spec <= 0.4) and z == z", [2]), ("z_spec != z_spec", [1]),
    ("kind == 'a=b'", [0, 1]), ('kind != "a=b"', [2]), ("`E(B=V)` >= 0.2", [1, 2]), ("z>=0.1 and z<=0.3", [0])])
def test_conditions(condition, rows):
    table = Table({"z_spec": [0.2, np.nan, 0.5], "kind": ["a=b", "a=b", "c"], "E(B=V)": [0.1, 0.2, 0.3]})
    assert matching_rows(table, condition).tolist() == rows


def test_a_column_z_is_that_column():
    table = Table({"z_spec": [0.2, 0.3], "z": [17.0, 18.0]})
    assert matching_rows(table, "z > 17.5").tolist() == [1]
    refused("names 'z', which", matching_rows, Table({"mag_z": [1.0]}), "z < 3")
    assert matching_rows(Table({"z_spec": [0.2, 0.3], "zz": [5, 6]}), "z > 5", {"z": "zz"}).tolist() == [1]


def test_advice_on_conditions():
    few, many = (Table({f"column_{k}": [k] for k in range(n)}) for n in (24, 25))
    for condition in ("column_0 = 0", "column_0=0", "column_0 =< 3", "column_1 == 1 and column_2 = 2"):
        refused("use == to compare", matching_rows, few, condition)
    refused(f"there are {', '.join(few.colnames)}.", matching_rows, few, "colum_7 > 1")
    refused("there are column_7, column_", matching_rows, many, "colum_7 > 1")
    refused("column_7 and others.", matching_rows, many, "xyz > 1")
    for condition in ("column_0 <", "column_0*2"): refused("z_spec <= 0.4", matching_rows, few, condition)


@pytest.mark.parametrize("objid, message", [
    (np.array([1237648720693756218, 1237648720693756290]).astype(float), "loses their last digits"),
    (np.array([10000*2**50 + 5, 1], np.uint64), "more than an int64 holds"),
    (np.array([str(10000*2**50 + 5), "1"]), "more than an int64 holds"),
    (np.array([1237648720693756218, 1237648720693756290]).astype("f4"), "numbers above 16,777,216 as float32"),
    (np.ma.array([5, 6], mask=[0, 1]), "whole numbers, one for every row"),
    (np.array([1.5, 2]), "whole numbers, one for every row"), (np.array([np.inf, 2]), "whole numbers"),
])
def test_an_identifier_is_kept_or_refused(objid, message):
    refused(message, house_catalogue, {"objid": objid}, 2)


@pytest.mark.parametrize("objid", [
    np.array([3, 4], np.uint64), np.array([300*2**50 + 1024., 2.]), np.array([b"1237648720693755918", b"7"])])
def test_identifiers_of_any_type(objid):
    got = house_catalogue({"object_id": objid}, 2)[0]["objid"]
    assert got.dtype == np.int64 and got.tolist() == [int(one) for one in objid]


@pytest.mark.parametrize("spelling", ["object_id", "OBJECT_ID"])
def test_a_text_is_a_name_and_no_identifier(tmp_path, spelling):
    catalogue = {spelling: ["J0012+01", "J0013"], "z": [0.1, 0.2]}
    stamps = import_arrays(np.ones((2, 8, 8, 5), np.float32), catalogue, tmp_path/"set")
    assert stamps.catalogue["object_name"].tolist() == ["J0012+01", "J0013"]
    assert stamps.catalogue["objid"].tolist() == [0, 1] and stamps.labelled.all()


@pytest.mark.parametrize("masked", [False, True])
def test_small_numbers_stay_numbers(tmp_path, masked):
    "Which FITS would keep as true and false."
    images, table = some(6)
    table["small"] = np.ma.array(np.arange(6, dtype=np.int8), mask=[False, False, masked, False, False, False])
    kept = write_stamp_set(tmp_path/"set", [(images, table)], 6).catalogue["small"]
    assert np.ma.asarray(kept).tolist() == [0, 1, None if masked else 2, 3, 4, 5]


def test_positions_are_brought_into_degrees(tmp_path):
    hours = QTable({"ra": [10., 12.]*u.hourangle, "dec": [600., 60.]*u.arcmin})
    got = house_catalogue(hours, 2)[0]
    assert got["ra"].tolist() == pytest.approx([150, 180]) and got["dec"].tolist() == pytest.approx([10, 1])
    for unit in ("deg", "degrees", "Degree", ""):
        assert house_catalogue(Table([Column([10., 12.], "ra", unit=unit)]), 2)[0]["ra"].tolist() == [10, 12]
    refused("which is no angle", house_catalogue, QTable({"ra": [1., 2.]*u.mag}), 2)


@pytest.mark.parametrize("settings, message", [
    ({"crop": 9}, "8 x 8 pixels are smaller"), ({"crop": 0}, "8 x 8 pixels are smaller"),
    ({"where": "mag_r <"}, "cannot be understood"), ({"where": "mag_rr < 3"}, "'mag_rr', which is no column"),
    ({"where": "mag_r > 99"}, "no galaxy of a.npz"), ({"where": "mag_r"}, "true or false"),
    ({"where": "@pd.read_csv('x')"}, "'pd', which is no column"), ({"where": ""}, "understood"), ({"dtype": "int8"}, "int8"),
])
def test_settings_of_an_import_that_make_no_sense(tmp_path, settings, message):
    refused(message, write_source, source()[0], tmp_path/"set", **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_table_with_one_name_twice(tmp_path):
    frame = pd.DataFrame([[1, 0.1, 0.2]]*100, columns=["objid", "z", "z"])
    refused("is no table", write_source, source(catalogue=frame)[0], tmp_path/"set")


SLOW = """
import sys, time
from test_dataset import *
folder, asked = Path(sys.argv[1]), []
made, images = source(1000)
quick = made.blocks
def blocks(first):
    print(first, flush=True)
    for rows in quick(first):
        time.sleep({pause})
        yield rows
made.blocks = blocks
try: write_source(made, folder, where="objid >= 100")
except InputError as error: sys.exit(str(error))
"""


def importing(folder, pause):
    return subprocess.Popen([sys.executable, "-c", SLOW.format(pause=pause), folder], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parent)


def wait_for_lines(journal, n):
    while not journal.exists() or len(journal.read_text().splitlines()) < n: time.sleep(0.02)


def test_it_goes_on_after_kills_and_two_at_once_are_refused(tmp_path):
    journal, firsts = tmp_path/".set.unfinished"/"journal", []
    for goal in (10, 30):
        running = importing(tmp_path/"set", 0.05)
        wait_for_lines(journal, goal)
        if goal == 30:
            refused("another process is writing", write_source, source()[0], tmp_path/"set")
            refused("another process is writing", write_source, source()[0], tmp_path/"set", overwrite=True)
        running.send_signal(signal.SIGKILL)
        firsts.append(int(running.communicate()[0]))
    with open(tmp_path/".set.unfinished"/"set"/"images.npy", "ab") as file: file.write(b"half a bl")
    last = importing(tmp_path/"set", 0)
    out, complaint = last.communicate()
    assert last.returncode == 0, complaint
    firsts.append(int(out))
    assert firsts[0] == 100 and 180 <= firsts[1] < firsts[2] and firsts[2] >= 380
    assert all(first % 10 == 0 for first in firsts)
    np.testing.assert_array_equal(StampSet.open(tmp_path/"set").verify().images, source(1000)[1][100:])
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_kill_after_the_last_step_does_not_stop_the_next_import(tmp_path):
    stamps = write_source(source()[0], tmp_path/"set")
    made = source()[0]
    with pytest.raises(KeyboardInterrupt): write_source(interrupt(source()[0], 3), tmp_path/"other")
    (tmp_path/".other.unfinished").rename(tmp_path/".set.unfinished")
    shutil.rmtree(tmp_path/".set.unfinished"/"set") # as if it had just been put in place
    again = write_source(made, tmp_path/"set", overwrite=True)
    np.testing.assert_array_equal(again.images, stamps.images)


def test_the_folder_one_stands_in_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("is the folder you are in", write_stamp_set, ".", [some(3)], 3)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from test_dataset import *
def chunks():
    yield some(10)
    os.kill(os.getpid(), signal.SIGKILL)
write_stamp_set(Path(sys.argv[1]), chunks(), 20)
"""


def test_what_a_killed_process_left_is_cleared(tmp_path):
    for _ in range(2):
        killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path/"set"], cwd=Path(__file__).parent)
        assert killed.returncode == -signal.SIGKILL
        assert [path.name for path in tmp_path.iterdir()] == [".set.unfinished"]
    assert len(write_stamp_set(tmp_path/"set", [some(20)], 20).verify()) == 20
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def interrupt(made, after, error=KeyboardInterrupt):
    whole = made.blocks
    def blocks(first):
        for k, rows in enumerate(whole(first)):
            if k == after: raise error
            yield rows
    made.blocks = blocks
    return made


def spy(made):
    asked, whole = [], made.blocks
    def blocks(first):
        asked.append(first)
        return whole(first)
    made.blocks = blocks
    return made, asked


@pytest.mark.parametrize("spoil, expected", [
    (lambda part: None, 50),
    (lambda part: os.truncate(part/"set"/"images.npy", 50_000), 30),
    (lambda part: (part/"set"/"catalogue.fits").write_text("half a catalogue"), 50),
    (lambda part: (part/"set"/"images.npy").write_bytes(b"\0"*20_000), 0),
    (lambda part: (part/"set"/"images.npy").unlink(), 0),
    (lambda part: (part/"journal").write_bytes(b"\0"*300), 0),
    (lambda part: (part/"journal").write_text((part/"journal").read_text()[:-30]), 40),
    (lambda part: (part/"journal").write_text("999999999999999 abc"), 0),
    (lambda part: (part/"plan.json").write_text("{"), 0),
])
def test_only_what_is_whole_is_gone_on_from(tmp_path, spoil, expected):
    with pytest.raises(KeyboardInterrupt): write_source(interrupt(source()[0], 5), tmp_path/"set")
    spoil(tmp_path/".set.unfinished")
    (made, asked), images = spy(source()[0]), source()[1]
    np.testing.assert_array_equal(write_source(made, tmp_path/"set").verify().images, images)
    assert asked == [expected]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("settings", [{"dtype": "float16"}, {"crop": 6}, {"where": "objid > 3"}])
def test_another_import_starts_anew(tmp_path, settings):
    with pytest.raises(KeyboardInterrupt): write_source(interrupt(source()[0], 5), tmp_path/"set")
    made, asked = spy(source()[0])
    write_source(made, tmp_path/"set", **settings).verify()
    assert asked[0] < 5


def test_a_source_that_cannot_be_told_from_others_starts_anew(tmp_path):
    made, _ = source(fingerprint={})
    with pytest.raises(KeyboardInterrupt): write_source(interrupt(made, 5), tmp_path/"set")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_half_way(tmp_path, stamps):
    code = f"""
import resource, signal
from test_dataset import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
refused("it goes on from what is whole in", write_source, source()[0], {str(stamps.folder)!r}, overwrite=True)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
    assert len(StampSet.open(stamps.folder).verify()) == 20
    (made, asked), images = spy(source()[0]), source()[1]
    np.testing.assert_array_equal(write_source(made, stamps.folder, overwrite=True).images, images)
    assert asked == [30]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_destination_that_holds_something_else(tmp_path, stamps):
    (tmp_path/"thesis.tex").write_text("years of work")
    refused("is no stamp set", write_source, source()[0], tmp_path, overwrite=True)
    refused("is no stamp set", write_source, source()[0], tmp_path/"thesis.tex", overwrite=True)
    refused("there already", write_source, source()[0], stamps.folder)
    assert (tmp_path/"thesis.tex").read_text() == "years of work"


def test_what_came_meanwhile_is_not_replaced(tmp_path):
    made, _ = source()
    made.blocks = interrupt(made, 99).blocks
    whole = made.blocks
    def blocks(first):
        write_stamp_set(tmp_path/"other", [some(10)], 10).folder.rename(tmp_path/"set")
        return whole(first)
    made.blocks = blocks
    refused("there already", write_source, made, tmp_path/"set")
    assert len(StampSet.open(tmp_path/"set")) == 10


def test_memory_does_not_grow_with_the_set(tmp_path):
    code = f"""
import resource
from test_dataset import *
n, images = 120_000, np.random.default_rng(0).standard_normal((100, 5, 16, 16)).astype(np.float32)
names = [f"column_{{k}}" for k in range(60)]
table = np.zeros(n, [("specObjID", np.int64), ("z", float)] + [(name, float) for name in names])
table["specObjID"] = np.arange(n)
made = StampSource(table, (n, 5, 16, 16), lambda first: (images[:n - k] for k in range(first, n, 100)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_source(made, {str(tmp_path/"set")!r}, where="z < 1 and specObjID > 5")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                          cwd=Path(__file__).parent)
    assert (tmp_path/"set"/"images.npy").stat().st_size > 600e6
    assert int(done.stdout)/2**10 < 130  # MiB


def test_no_torch_is_needed_up_to_here():
    code = "import sys, astromae.dataset; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# --- real stamps

def real(name):
    path = DATA/"sdss-stamps"/name
    if not path.exists(): pytest.skip(f"{path} is not here: real SDSS stamps are not part of the project")
    return path


def test_real_stamps_from_arrays(tmp_path):
    with np.load(real("sdss30_dereddened.npz")) as arrays:
        got = import_arrays(arrays["cube"], {name: arrays[name] for name in ("ra", "dec", "z_spec")},
                            tmp_path/"set")
    assert len(got) == 30 and got.labelled.sum() == 1
    assert got.redshifts()[got.labelled][0] == pytest.approx(0.1812, abs=1e-3)
