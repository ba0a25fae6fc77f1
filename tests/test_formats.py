"What would disturb the story of 05_sources and 06_formats: bad input, damage, memory, kills, full disks, real stamps."
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import h5py
import numpy as np
import pytest
import torch
from astropy.io import fits
from astropy.table import Table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from astromae import sources
from astromae.dataset import StampSet, write_stamp_set
from astromae.errors import InputError
from astromae.formats import (export_fits, export_hdf5, import_stamps, open_source, read_fits, read_hdf5,
                              read_npz, read_pt)
from astromae.sources import read_catalogue, read_npy
from astromae.survey import BANDS


def some(n, size=8, bands="ugriz", seed=0):
    "Stamps (n, bands, size, size) and a catalogue in the house's words."
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((n, len(bands), size, size)).astype(np.float32)
    columns = ["ra", "dec", *(f"mag_{band}" for band in bands), "z_spec"]
    return images, Table({"objid": seed + np.arange(n)} | {name: rng.uniform(1, 2, n) for name in columns})


def last(images): return np.moveaxis(images, 1, -1)


def npz(path, cube=None, labels=None, compress=False, **others):
    "An npz of six galaxies, or of what is handed in."
    images, table = some(6 if cube is None else len(cube))
    if cube is None: cube = np.ascontiguousarray(last(images))
    if labels is None: labels = table.as_array()
    (np.savez_compressed if compress else np.savez)(path, cube=cube, labels=labels, **others)
    return path


def pixels(source, first=0):
    return np.concatenate([np.array(rows) for rows in source.blocks(first)])


def refused(message, function, *args, **kwargs):
    "The function is refused with one sentence that has the message in it."
    with pytest.raises(InputError) as caught: function(*args, **kwargs)
    sentence = str(caught.value)
    assert message in sentence, sentence
    assert "\n" not in sentence and sentence.endswith(".") and len(sentence) < 500


def read_all(path, **options): return pixels(open_source(path, **options))


# --- what was written comes back, in every format

def to_npz(path, cube, table, order, compress):
    cube = np.asarray(cube, order=order)
    (np.savez_compressed if compress else np.savez)(path, cube=cube, labels=table.as_array())


def to_hdf5(path, cube, table, compress):
    with h5py.File(path, "w") as file:
        chunks = (min(2, len(cube)), *cube.shape[1:]) if compress else None
        file.create_dataset("image", data=cube, chunks=chunks, compression="gzip" if compress else None)
        for name in table.colnames:
            values = np.asarray(table[name])
            file[name] = values.astype("S") if values.dtype.kind == "U" else values


def to_fits(path, cube, table):
    fits.HDUList([fits.PrimaryHDU(cube), fits.table_to_hdu(table)]).writeto(path)


def to_folder(path, cube, table):
    path.mkdir()
    for stamp, name in zip(cube, table["file"]): fits.PrimaryHDU(stamp).writeto(path/name)
    table.write(path.parent/"rows.csv")


def to_npy(path, cube, table, order, ending):
    np.save(path, np.asarray(cube, order=order))
    if ending == ".parquet": table.to_pandas().to_parquet(path.with_suffix(ending))
    else: table.write(path.with_suffix(ending))


FORMATS = {
    **{f"npz-{order}-{compress}": (lambda p, c, t, o=order, z=compress: to_npz(p, c, t, o, z), ".npz")
       for order in "CF" for compress in (False, True)},
    **{f"hdf5-{compress}": (lambda p, c, t, z=compress: to_hdf5(p, c, t, z), ".h5") for compress in (False, True)},
    "fits": (to_fits, ".fits"), "folder": (to_folder, ""),
    **{f"npy{ending}": (lambda p, c, t, o=order, e=ending: to_npy(p, c, t, o, e), ".npy")
       for order, ending in (("C", ".csv"), ("F", ".fits"), ("C", ".parquet"))},
}
KINDS = ["<f4", ">f4", "<f8", ">f8", "<f2", ">f2"]


@st.composite
def small_sets(draw):
    "Stamps in some precision and byte order, their bands, and a catalogue with a text."
    n, height, width = draw(st.integers(1, 7)), draw(st.integers(3, 7)), draw(st.integers(3, 7))
    bands = draw(st.lists(st.sampled_from("ugrizyJHK"), min_size=1, max_size=6, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    images = rng.standard_normal((n, len(bands), height, width)).astype(draw(st.sampled_from(KINDS)))
    names = ["objid", "ra", "dec", *(f"mag_{band}" for band in bands), "z_spec"]
    table = Table({name: rng.uniform(0, 30, n) for name in names})
    table["objid"] = rng.integers(-2**62, 2**62, n)
    table["z_spec"][rng.random(n) < 0.3] = np.nan
    table["file"] = [f"g{k:02}.fits" for k in range(n)]
    return images, tuple(bands), table


@settings(max_examples=40, derandomize=True, deadline=None, database=None,
          suppress_health_check=list(HealthCheck))
@given(small_sets(), st.booleans(), st.integers(0, 6), st.integers(1, 4))
@pytest.mark.parametrize("kind", FORMATS)
def test_any_set_in_any_format_comes_back(kind, given_set, channels_last, first, block):
    images, bands, table = given_set
    write, ending = FORMATS[kind]
    if kind in ("fits", "folder") and images.dtype.itemsize == 2: images = images.astype("f4")
    first %= len(images)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_BLOCK", block*images[0].nbytes)
        patch.setattr(sources, "_SLAB", 2*block*images[0].nbytes)
        path = Path(folder)/f"set{ending}"
        write(path, last(images) if channels_last else images, table)
        options = {"catalogue": Path(folder)/"rows.csv"} if kind == "folder" else {}
        source = open_source(path, bands=bands, unit="Jy", pixel_scale=0.2, channels_last=channels_last,
                             origin="here", **options)
        assert source.shape == images.shape and (source.bands, source.unit) == (bands, "Jy")
        np.testing.assert_array_equal(pixels(source), images)
        np.testing.assert_array_equal(pixels(source, first), images[first:])
        for name in table.colnames:
            np.testing.assert_array_equal(np.asarray(source.catalogue[name]), np.asarray(table[name]))


@settings(max_examples=15, derandomize=True, deadline=None, database=None,
          suppress_health_check=list(HealthCheck))
@given(small_sets(), st.sampled_from(["float16", "float32"]), st.sampled_from([None, "gzip"]))
def test_import_export_import_gives_the_same(given_set, dtype, compression):
    images, bands, table = given_set
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        first = write_stamp_set(folder/"first", [(images, table)], len(images), bands=bands, unit="Jy",
                                pixel_scale=0.21, origin="the sky; seen by eye", dtype=dtype)
        export_hdf5(first, folder/"a.h5", compression=compression)
        export_fits(first, folder/"a.fits")
        for path in (folder/"a.h5", folder/"a.fits"):
            again = import_stamps(path, folder/f"{path.suffix}-again", dtype=dtype, channels_last=False)
            np.testing.assert_array_equal(again.images, first.images)
            for word in ("bands", "unit", "pixel_scale", "origin"): assert getattr(again, word) == getattr(first, word)
            for name in table.colnames: np.testing.assert_array_equal(again.catalogue[name], first.catalogue[name])


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "bfloat16"])
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_the_authors(tmp_path, kind, zipped):
    images, table = some(6)
    images = torch.tensor(images).to(getattr(torch, kind))
    mags = torch.tensor(np.stack([table[f"mag_{band}"] for band in BANDS], 1))
    redshift = torch.tensor(np.asarray(table["z_spec"]))[:, None]
    held = {"set": TensorDataset(images, mags, redshift), "list": [redshift, images, mags],
            "dictionary": {"x": images, "m": mags, "z": redshift}}
    for name, value in held.items():
        torch.save(value, tmp_path/f"{name}.pt", _use_new_zipfile_serialization=zipped)
        source = open_source(tmp_path/f"{name}.pt")
        np.testing.assert_array_equal(pixels(source, 2), images.float().numpy()[2:])
        np.testing.assert_array_equal(source.catalogue["mag_g"], mags[:, 1])
        np.testing.assert_array_equal(source.catalogue["z_spec"], redshift[:, 0])


def test_a_further_tensor_takes_nobodys_place(tmp_path):
    images, (first, second) = torch.zeros(6, 5, 8, 8), torch.arange(12.).reshape(2, 6)
    magnitudes = torch.full((6, 5), 18.)
    torch.save({"images": images, "redshift": first, "ebv": second, "magnitudes": magnitudes}, tmp_path/"a.pt")
    catalogue = open_source(tmp_path/"a.pt").catalogue
    assert catalogue["z_spec"].tolist() == first.tolist() and catalogue["ebv"].tolist() == second.tolist()
    for name in ("Redshift", "zspec", "labels"):
        torch.save({"images": images, name: first}, tmp_path/"named.pt")
        assert open_source(tmp_path/"named.pt").catalogue["z_spec"].tolist() == first.tolist()
    mine = Table({"z_spec": np.full(6, 0.9)})
    refused("several columns called 'z_spec'", open_source, tmp_path/"named.pt", catalogue=mine)
    torch.save([images, first, second], tmp_path/"b.pt")
    refused("several columns called 'z_spec'", open_source, tmp_path/"b.pt")
    torch.save({"images": images, "magnitudes": magnitudes, "errors": magnitudes/100}, tmp_path/"c.pt")
    refused("'errors' of the shape (6, 5), which is neither", open_source, tmp_path/"c.pt")
    torch.save([images, magnitudes, magnitudes/100], tmp_path/"d.pt")
    refused("several columns called 'mag_u'", open_source, tmp_path/"d.pt")


def test_a_selection_is_exported(tmp_path):
    images, table = some(20)
    part = write_stamp_set(tmp_path/"set", [(images, table)], 20).select(np.array([2, 3, 11]))
    export_fits(part, tmp_path/"part.fits")
    export_hdf5(part, tmp_path/"part.h5")
    for name in ("part.fits", "part.h5"):
        source = open_source(tmp_path/name)
        np.testing.assert_array_equal(pixels(source), images[[2, 3, 11]])
        assert list(source.catalogue["objid"]) == [2, 3, 11]


def test_scaled_and_compressed_fits(tmp_path):
    images, table = some(6, 16)
    whole = np.round(1000*images).astype("i2")
    hdu = fits.ImageHDU(whole)
    hdu.header["BSCALE"], hdu.header["BANDS"] = 0.001, "u g r i z"
    fits.HDUList([fits.PrimaryHDU(), hdu, fits.table_to_hdu(table)]).writeto(tmp_path/"scaled.fits")
    np.testing.assert_allclose(read_all(tmp_path/"scaled.fits"), whole*np.float32(0.001), rtol=1e-6)
    packed = fits.CompImageHDU(images.reshape(6, 5, 16, 16)[:, 0], quantize_level=0, compression_type="GZIP_1")
    fits.HDUList([fits.PrimaryHDU(), packed]).writeto(tmp_path/"packed.fits")
    source = read_fits(tmp_path/"packed.fits", bands="ugrizy", pixel_scale=1)
    np.testing.assert_array_equal(pixels(source), images[:, 0][None])
    fits.HDUList([fits.PrimaryHDU(images), fits.table_to_hdu(table)]).writeto(tmp_path/"cube.fits.gz")
    np.testing.assert_array_equal(read_all(tmp_path/"cube.fits.gz"), images)


def test_one_image_for_each_band(tmp_path):
    images, _ = some(3)
    (tmp_path/"cutouts").mkdir()
    for k, stamp in enumerate(images):
        units = [fits.PrimaryHDU(header=fits.Header({"Z": 0.1*k, "NAME": f"galaxy {k}"}))]
        for band, plane in zip("grizy", stamp): units.append(fits.ImageHDU(plane, fits.Header({"FILTER": band})))
        fits.HDUList(units).writeto(tmp_path/"cutouts"/f"{k}.fits")
    source = read_fits(tmp_path/"cutouts", pixel_scale=0.168)
    np.testing.assert_array_equal(pixels(source, 1), images[1:])
    assert source.bands == tuple("grizy") and list(source.catalogue["name"]) == ["galaxy 0", "galaxy 1", "galaxy 2"]
    np.testing.assert_allclose(source.catalogue["z"], [0, 0.1, 0.2])


def test_the_catalogue_of_a_folder_goes_by_its_column_file(tmp_path):
    images, table = some(3)
    (tmp_path/"cutouts").mkdir()
    for k in range(3): fits.PrimaryHDU(images[k]).writeto(tmp_path/"cutouts"/f"{k}.fits")
    table["file"] = ["2.fits", "0.fits", "1.fits"]
    np.testing.assert_array_equal(read_all(tmp_path/"cutouts", catalogue=table), images[[2, 0, 1]])
    table["file"][1] = "7.fits"
    refused("7.fits failed: No such file", read_all, tmp_path/"cutouts", catalogue=table)


def test_records_and_groups_in_hdf5(tmp_path):
    images, table = some(6, bands="gri")
    with h5py.File(tmp_path/"a.h5", "w") as file:
        file["data/stamps"], file["data/mask"] = last(images), np.ones((6, 8, 8))
        file["data"].attrs.update(bands="gri", pixel_scale=0.26, unit="nJy")
        file["rows"] = table.as_array()
        file["filters"] = np.array([b"g", b"r", b"i"])
    source = read_hdf5(tmp_path/"a.h5", catalogue="rows")
    np.testing.assert_array_equal(pixels(source), images)
    assert source.catalogue.colnames == table.colnames
    assert (source.bands, source.pixel_scale, source.unit) == (tuple("gri"), 0.26, "nJy")
    assert read_hdf5(tmp_path/"a.h5").catalogue.colnames == ["row"]


def test_records_beside_single_columns_in_hdf5(tmp_path):
    images, table = some(6)
    with h5py.File(tmp_path/"a.h5", "w") as file:
        file["images"], file["dec"], file["ra"] = images, table["dec"], table["ra"]
        file["labels"] = table["objid", "z_spec"].as_array()
    source = read_hdf5(tmp_path/"a.h5")
    for name in ("ra", "dec", "objid", "z_spec"): np.testing.assert_array_equal(source.catalogue[name], table[name])
    with h5py.File(tmp_path/"a.h5", "a") as file: file["z_spec"] = table["z_spec"]
    refused("several columns called 'z_spec'", read_hdf5, tmp_path/"a.h5")


@pytest.mark.parametrize("first, second", [("clean", "noisy"), ("noisy", "clean")])
def test_other_stamps_of_the_same_file_are_another_source(tmp_path, first, second):
    "What was imported of one array of a file is not taken for the beginning of another."
    cubes = {"clean": np.ones((600, 5, 32, 32), np.float32), "noisy": np.full((600, 5, 32, 32), 2, np.float32)}
    np.savez(tmp_path/"two.npz", labels=some(600)[1].as_array(), **cubes)
    with h5py.File(tmp_path/"two.h5", "w") as file: file.update(cubes)
    for name in ("two.npz", "two.h5"):
        with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
            patch.setattr("astromae.sources._BLOCK", 200*5*32*32*4)
            patch.setattr("astromae.dataset._finish", interrupt)
            import_stamps(tmp_path/name, tmp_path/name[-3:], images=first)
        assert (tmp_path/f".{name[-3:]}.unfinished"/"set"/"images.npy").stat().st_size > 10**7
        got = import_stamps(tmp_path/name, tmp_path/name[-3:], images=second)
        assert np.unique(got.images).tolist() == [cubes[second].flat[0]]


def interrupt(*_, **__): raise KeyboardInterrupt


def test_other_files_of_the_same_folder_are_another_source(tmp_path):
    (tmp_path/"stamps").mkdir()
    for k in range(6): fits.writeto(tmp_path/"stamps"/f"{k}.fits", np.full((5, 8, 8), k, np.float32))
    names = np.array([f"{k}.fits" for k in range(6)])
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr("astromae.dataset._finish", interrupt)
        import_stamps(tmp_path/"stamps", tmp_path/"set", catalogue=Table({"file": names}))
    got = import_stamps(tmp_path/"stamps", tmp_path/"set", catalogue=Table({"file": names[::-1]}))
    assert got.images[:, 0, 0, 0].tolist() == [5, 4, 3, 2, 1, 0]


def test_values_that_are_not_known_stay_unknown(tmp_path):
    "Masked whole numbers, booleans and texts come back as unknown, from FITS and from HDF5."
    images, table = some(12_000, size=4)
    unknown = np.arange(12_000) > 11_000 # in the last block that is written, not in the first
    table["plate"] = np.ma.array(np.arange(12_000), mask=unknown)
    table["nothing"] = np.ma.array(np.arange(12_000), mask=True)
    table["large"] = np.ma.array(np.full(12_000, 2**60 + 1), mask=unknown)
    table["clean"] = np.ma.array(np.ones(12_000, bool), mask=unknown)
    table["name"] = np.ma.array(np.full(12_000, "M31"), mask=unknown)
    stamps = write_stamp_set(tmp_path/"set", [(images, table)], 12_000)
    export_hdf5(stamps, tmp_path/"a.h5")
    export_fits(stamps, tmp_path/"a.fits")
    known = {"plate": np.arange(12_000), "large": np.full(12_000, 2**60 + 1), "clean": np.ones(12_000),
             "name": np.full(12_000, "M31")}
    for again in (stamps, import_stamps(tmp_path/"a.h5", tmp_path/"h5"), import_stamps(tmp_path/"a.fits", tmp_path/"fits")):
        nothing = np.ma.asarray(again.catalogue["nothing"])
        assert nothing.dtype.kind in "if" and not np.isfinite(nothing.astype(float).filled(np.nan)).any()
        for name, truth in known.items():
            column = again.catalogue[name]
            lost = np.ma.getmaskarray(np.ma.asarray(column)).copy()
            if column.dtype.kind == "f": lost |= np.isnan(np.ma.filled(np.ma.asarray(column), np.nan))
            if column.dtype.kind == "U": lost |= np.ma.filled(np.ma.asarray(column), "") == ""
            np.testing.assert_array_equal(lost, unknown, err_msg=f"{name} of {again}")
            assert (np.asarray(column)[~unknown].astype(truth.dtype) == truth[~unknown]).all(), name


def test_galaxies_ml_becomes_a_labelled_set(tmp_path):
    images, table = some(6, bands="grizy")
    with h5py.File(tmp_path/"5x64x64_training.hdf5", "w") as file:
        file["image"], file["object_id"], file["specz_redshift"] = images, table["objid"] + 2**60, table["z_spec"]
        for band in "grizy": file[f"{band}_cmodel_mag"] = table[f"mag_{band}"]
    got = import_stamps(tmp_path/"5x64x64_training.hdf5", tmp_path/"set", where="specz_redshift > 1 and z_spec < 3")
    assert got.bands == tuple("grizy") and got.pixel_scale == 0.168 and got.labelled.all()
    np.testing.assert_array_equal(got.catalogue["objid"], np.arange(6) + 2**60)
    np.testing.assert_allclose(got.magnitudes(), np.stack([table[f"mag_{band}"] for band in "grizy"], 1), rtol=1e-6)
    assert got.description["filled"] == ["ra", "dec"]


def test_columns_without_a_record_array(tmp_path):
    images, table = some(6)
    np.savez(tmp_path/"a.npz", cube=last(images), ra=table["ra"], z=table["z_spec"], keys=np.array(["a", "b"]))
    assert read_npz(tmp_path/"a.npz").catalogue.colnames == ["ra", "z"]


def test_a_catalogue_from_skyserver(tmp_path):
    (tmp_path/"a.csv").write_text("#Table1\nobjID,ra,z\n1237648720693755918,10.5,0.1\n1237648720693755919,11,\n")
    table = read_catalogue(tmp_path/"a.csv")
    assert table.colnames == ["objID", "ra", "z"] and table["objID"][0] == 1237648720693755918


# --- each wrong thing gets its sentence

@pytest.mark.parametrize("cube, message", [
    (np.zeros((6, 8, 8), np.float32), "no cube of stamps"),
    (np.zeros((6, 8, 8, 5), int), "int64"),
    (np.zeros((6, 8, 8, 5), np.uint8), "uint8"),
    (np.zeros((6, 8, 8, 5), complex), "complex128"),
    (np.full((6, 8, 8, 5), None), "Python objects"),
    (np.zeros((0, 8, 8, 5), np.float32), "is empty"),
    (np.zeros((6, 8, 8, 3), np.float32), "name them with `bands`"),
    (np.zeros((6, 5, 5, 5), np.float32), "with `channels_last`"),
])
def test_cubes_that_are_none(tmp_path, cube, message):
    refused(message, import_stamps, npz(tmp_path/"a.npz", cube), tmp_path/"set")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_options_that_do_not_fit(tmp_path):
    path = npz(tmp_path/"a.npz")
    refused("3 bands", open_source, path, bands="gri")
    refused("knows no option 'scale'", open_source, path, scale=0.2)
    refused("`pixel_scale`", open_source, path, bands="grizy")
    refused("pixels of -1 arcsec", open_source, path, pixel_scale=-1)
    refused("does not say which", open_source, path, bands="ggriz")
    refused("no cube of stamps", open_source, path, images="flux")
    refused("no catalogue called 'rows' but labels", open_source, path, catalogue="rows")
    refused("check the path", open_source, tmp_path/"none.npz")


def test_parts_that_do_not_belong_together(tmp_path):
    labels = some(7)[1].as_array()
    refused("7 rows for 6 stamps", open_source, npz(tmp_path/"long.npz", labels=labels))
    refused("no named columns", open_source, npz(tmp_path/"plain.npz", labels=np.zeros(6)), catalogue="labels")
    np.savez(tmp_path/"two.npz", a=np.zeros((6, 8, 8, 5)), b=np.zeros((6, 8, 8, 5)))
    refused("more than one cube of stamps", open_source, tmp_path/"two.npz")
    np.savez(tmp_path/"bare.npz", cube=np.zeros((6, 8, 8, 5)))
    refused("has no catalogue", open_source, tmp_path/"bare.npz")
    with h5py.File(tmp_path/"a.h5", "w") as file:
        file["images"], file["ra"] = some(6)[0], np.zeros(700)
    refused("'ra' in", open_source, tmp_path/"a.h5")
    (tmp_path/"empty").mkdir()
    refused("holds no file", open_source, tmp_path/"empty")


def test_objects_are_never_unpickled(tmp_path):
    labels = np.array([(1, {"z": 0.1})]*6, dtype=[("objid", int), ("z", object)])
    refused("not a whole npz file of plain arrays", open_source, npz(tmp_path/"a.npz", labels=labels))
    np.save(tmp_path/"b.npy", np.full((6, 8, 8, 5), None))
    refused("Python objects", read_npy, tmp_path/"b.npy", some(6)[1])
    class Program:
        def __reduce__(self): return (tmp_path/"ran").touch, ()
    for zipped in (True, False):
        torch.save([torch.zeros(6, 5, 8, 8), Program()], tmp_path/"c.pt", _use_new_zipfile_serialization=zipped)
        refused("holds more than tensors", open_source, tmp_path/"c.pt")
    torch.save([torch.zeros(6, 5, 8, 8), "text"], tmp_path/"d.pt")
    refused("holds more than tensors", open_source, tmp_path/"d.pt")
    assert not (tmp_path/"ran").exists()


@pytest.mark.parametrize("tensors, message", [
    ([torch.zeros(6, 8, 8)], "0 tensors with four axes"),
    ([torch.zeros(6, 5, 8, 8), torch.zeros(6, 5, 8, 8)], "2 tensors with four axes"),
    ([torch.zeros(6, 5, 8, 8), torch.zeros(6, 3)], "(6, 3), which is neither"),
    ([torch.zeros(6, 5, 8, 8), torch.zeros(7)], "(7,), which is neither"),
    ([torch.zeros(6, 5, 8, 8, dtype=torch.int32)], "type int32"),
])
def test_tensors_that_do_not_fit(tmp_path, tensors, message):
    torch.save(TensorDataset(*tensors) if len({len(one) for one in tensors}) == 1 else tensors, tmp_path/"a.pt")
    refused(message, open_source, tmp_path/"a.pt")


def test_repeated_columns(tmp_path):
    import pyarrow
    from pyarrow import parquet
    images, _ = some(2)
    np.save(tmp_path/"a.npy", images)
    (tmp_path/"a.csv").write_text("ra,z,z\n1,2,3\n1,2,3\n")
    refused("several columns called 'z'", open_source, tmp_path/"a.npy")
    (tmp_path/"a.csv").unlink()
    twice = pyarrow.table([[1.0, 2.0], [1.0, 2.0]], names=["z", "z"])
    parquet.write_table(twice, tmp_path/"a.parquet")
    refused("several columns called 'z'", open_source, tmp_path/"a.npy")
    columns = [fits.Column("ra", "D", array=[1.0, 2.0]), fits.Column("dec", "D", array=[1.0, 2.0])]
    table = fits.BinTableHDU.from_columns(columns)
    fits.HDUList([fits.PrimaryHDU(images), table]).writeto(tmp_path/"b.fits")
    raw = (tmp_path/"b.fits").read_bytes()
    (tmp_path/"b.fits").write_bytes(raw.replace(b"TTYPE2  = 'dec     '", b"TTYPE2  = 'ra      '"))
    refused("several columns called 'ra'", open_source, tmp_path/"b.fits")
    with h5py.File(tmp_path/"c.h5", "w") as file:
        file["images"], file["Z"], file["z"] = images, [1.0, 2.0], [3.0, 4.0]
    refused("which differ", open_source, tmp_path/"c.h5")


def test_catalogues_that_are_none(tmp_path):
    np.save(tmp_path/"a.npy", some(2)[0])
    refused("no catalogue of the same name", open_source, tmp_path/"a.npy")
    (tmp_path/"a.csv").write_text("ra\n1\n2\n")
    (tmp_path/"a.vot").write_text("")
    refused("several catalogues of the same name", open_source, tmp_path/"a.npy")
    for name, content in {"empty.csv": "", "page.parquet": "<html>", "page.fits": "<html>", "a.xlsx": "x"}.items():
        (tmp_path/name).write_text(content)
        refused(name, read_catalogue, tmp_path/name)
    refused("check the path", open_source, tmp_path/"a.npy", catalogue=tmp_path/"none.csv")


def test_maps_of_the_sky_that_disagree(tmp_path):
    images, _ = some(2)
    for k, (bands, scale) in enumerate([(b"griz", 0.2), (b"griy", 0.2), (b"griz", 0.3)]):
        with h5py.File(tmp_path/f"{k}.h5", "w") as file:
            file["image_array"] = images[:, :4]
            file["image_band"] = np.array([[b"des-" + bytes([band]) for band in bands]]*2)
            file["image_scale"], file["ra"] = np.full((2, 4), scale), [1.0, 2.0]
    assert open_source(tmp_path/"0.h5").bands == tuple("griz")
    refused("1.h5 has other stamps", open_source, tmp_path)
    with h5py.File(tmp_path/"2.h5", "a") as file: file["image_band"][1] = [b"des-g", b"des-r", b"des-z", b"des-i"]
    refused("not the same for all stamps", open_source, tmp_path/"2.h5")


# --- damage

def whole_files(folder):
    "A file of every format, of twenty galaxies."
    images, table = some(20, 16)
    npz(folder/"stored.npz", last(images), table.as_array())
    npz(folder/"deflated.npz", last(images), table.as_array(), compress=True)
    npz(folder/"fortran.npz", np.asfortranarray(last(images)), table.as_array())
    npz(folder/"both.npz", np.asfortranarray(last(images)), table.as_array(), compress=True)
    to_hdf5(folder/"a.h5", images, table, False)
    to_hdf5(folder/"packed.h5", images, table, True)
    to_fits(folder/"a.fits", images, table)
    np.save(folder/"a.npy", images)
    torch.save(TensorDataset(torch.tensor(images)), folder/"a.pt")
    return sorted(folder.iterdir()), table


def test_files_that_were_cut_short(tmp_path):
    files, table = whole_files(tmp_path)
    (tmp_path/"set").mkdir()
    for path in files:
        whole, options = path.read_bytes(), {"catalogue": table} if path.suffix == ".npy" else {}
        assert read_all(path, **options).shape == (20, 5, 16, 16)
        for keep in (0, 1, 7, 100, 2880, len(whole)//3, len(whole)//2, int(0.9*len(whole)), len(whole) - 3000):
            path.write_bytes(whole[:keep])
            refused(path.name, read_all, path, **options)
        path.write_text("<html>503 Service Unavailable</html>")
        refused("fetch the file again", read_all, path, **options)
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["stored.npz", "deflated.npz", "fortran.npz", "both.npz"])
def test_a_bit_that_flipped_is_noticed(tmp_path, name):
    whole_files(tmp_path)
    flipped = bytearray((tmp_path/name).read_bytes())
    flipped[9000] ^= 1
    (tmp_path/name).write_bytes(flipped)
    refused(name, import_stamps, tmp_path/name, tmp_path/"set")
    refused(name, lambda: pixels(open_source(tmp_path/name), 15))
    assert not (tmp_path/"set").exists()


def test_a_member_shorter_than_its_header_says(tmp_path):
    path = npz(tmp_path/"a.npz")
    with zipfile.ZipFile(tmp_path/"short.npz", "w") as new, zipfile.ZipFile(path) as old:
        new.writestr("cube.npy", old.read("cube.npy")[:-999])
        new.writestr("labels.npy", old.read("labels.npy"))
    refused("where its header promises", open_source, tmp_path/"short.npz")


def test_pixels_that_are_not_finite_are_named(tmp_path):
    images, table = some(6)
    images[4, 2, 3, 3] = np.nan
    refused("row 4", import_stamps, npz(tmp_path/"a.npz", last(images), table.as_array()), tmp_path/"set")


# --- memory, kills, disks

def large_npz(path, n, order="C", deflated=False):
    "An npz of n stamps of 64 x 64 that is written in parts; return the first stamps."
    some_rows = np.random.default_rng(0).standard_normal((100, 64, 64, 5)).astype(np.float32)
    method = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method, compresslevel=1) as archive:
        with archive.open("cube.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, {
                "descr": "<f4", "fortran_order": order == "F", "shape": (n, 64, 64, 5)})
            if order == "C":
                for _ in range(n//100): member.write(some_rows.tobytes())
            else:
                for pixel in some_rows.reshape(100, -1, order="F").T: member.write(np.tile(pixel, n//100).tobytes())
        with archive.open("labels.npy", "w") as member:
            np.save(member, Table({"specObjID": np.arange(n), "z": np.full(n, 0.1)}).as_array())
    return np.moveaxis(some_rows, -1, 1)


@pytest.mark.parametrize("order, deflated", [("C", False), ("F", True)])
def test_a_cube_larger_than_the_memory_passes_through(tmp_path, order, deflated):
    n = 5000 if order == "C" else 2000
    rows = large_npz(tmp_path/"large.npz", n, order, deflated)
    code = f"""
import resource
from astromae import sources
from astromae.formats import import_stamps
sources._SLAB = 2**24
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import_stamps("large.npz", "set", dtype="float16")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert int(done.stdout)/2**10 < 150 < n*4*64*64*5/2**20  # MiB
    got = StampSet.open(tmp_path/"set").verify()
    np.testing.assert_array_equal(got.images[-100:], rows.astype(np.float16))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.npz", "set"]


@pytest.mark.parametrize("order, deflated", [("C", False), ("C", True), ("F", True)])
def test_an_import_that_was_killed_goes_on(tmp_path, order, deflated):
    rows = large_npz(tmp_path/"a.npz", 400, order, deflated)
    code = """
import os, signal
from astromae import dataset, sources
from astromae.formats import import_stamps, open_source
sources._BLOCK = 2**22
source = open_source("a.npz")
whole = source.blocks
def dying(first):
    for k, block in enumerate(whole(first)):
        if k == 5: os.kill(os.getpid(), signal.SIGKILL)
        yield block
source.blocks = dying
dataset.write_source(source, "set")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL and not (tmp_path/"set").exists()
    got = import_stamps(tmp_path/"a.npz", tmp_path/"set")
    np.testing.assert_array_equal(got.verify().images, np.tile(rows, (4, 1, 1, 1)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "set"]


def test_scratch_space_that_does_not_suffice(tmp_path, monkeypatch):
    path = npz(tmp_path/"a.npz", np.asfortranarray(last(some(20)[0])), compress=True)
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    refused("scratch space", import_stamps, path, tmp_path/"set")


@pytest.mark.parametrize("export, name", [("export_fits", "a.fits"), ("export_hdf5", "a.h5")])
def test_a_full_disk_under_an_export(tmp_path, export, name):
    write_stamp_set(tmp_path/"set", [some(200)], 200)
    (tmp_path/name).write_text("precious")
    code = f"""
import resource, signal
from astromae.dataset import StampSet
from astromae.errors import InputError
from astromae import formats
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try: formats.{export}(StampSet.open("set"), "{name}", overwrite=True)
except InputError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert f"writing {name} failed" in done.stdout and done.stdout.count("\n") == 1, done.stdout
    assert (tmp_path/name).read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, "set"]


def test_nothing_is_replaced_without_being_asked(tmp_path):
    stamps = write_stamp_set(tmp_path/"set", [some(6)], 6)
    for export in (export_fits, export_hdf5):
        (tmp_path/"mine").write_text("precious")
        refused("there already", export, stamps, tmp_path/"mine")
        refused("there already", export, stamps, tmp_path/"set", overwrite=True)
        export(stamps, tmp_path/"mine", overwrite=True)
        assert len(open_source(tmp_path/"mine").catalogue) == 6


def test_a_folder_that_may_not_be_written(tmp_path):
    if os.geteuid() == 0: pytest.skip("the superuser may write everywhere")
    stamps = write_stamp_set(tmp_path/"set", [some(6)], 6)
    (tmp_path/"locked").mkdir(mode=0o500)
    refused("may write to", export_fits, stamps, tmp_path/"locked"/"a.fits")


def test_no_heavy_library_is_loaded_before_it_is_needed():
    code = "import sys, astromae.formats; print([name for name in ('torch', 'h5py') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


# --- real stamps

def test_real_stamps(shared_data, tmp_path):
    got = import_stamps(shared_data/"sdss-stamps"/"stamps_r20.npz", tmp_path/"set")
    assert got.images.shape == (114, 5, 64, 64) and not got.labelled.any()
    assert {"objid", "z_spec", "mag_r"} <= set(got.description["filled"])
    assert {"field", "rmag_auto", "r50_arcsec"} <= set(got.catalogue.colnames)
    centre = got.images[:, 2, 30:35, 30:35].mean((1, 2))
    assert (centre > np.median(got.images[:, 2, :8], (1, 2))).all()


def test_real_stamps_with_loose_columns(shared_data, tmp_path):
    got = import_stamps(shared_data/"sdss-stamps"/"sdss30_dereddened.npz", tmp_path/"set")
    assert len(got) == 30 and got.labelled.sum() == 1
    assert got.redshifts()[got.labelled][0] == pytest.approx(0.1812, abs=1e-3)
    assert "name" in got.catalogue.colnames


def test_a_real_frame_is_no_stamp(shared_data):
    refused("no cube of stamps", open_source, shared_data/"sdss-frames"/"frame-r-003918-3-0213.fits.bz2")
