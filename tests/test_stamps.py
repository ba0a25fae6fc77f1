"What would disturb the story of 01_stamps: bad frames, bad positions, real fields, processes."
import bz2, io, shutil, time
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table, vstack
from astropy.wcs import WCS
from command import full_disk
from hypothesis import given, settings, strategies as st

from astromae.errors import InputError
from astromae.frames import Field, bend, find_fields, read_field
from astromae.galaxies import detect, detect_fields
from astromae.stamps import _in_order, assign_fields, cut_fields, cut_stamps
from astromae.survey import BANDS, PIXEL_SCALE, frame_name

SHAPE, SIGMA, FLUX = (240, 320), 2.2, 200.


def make_wcs(angle=20., shift=(0., 0.), ra=150., dec=20., parity=-1, scale=PIXEL_SCALE):
    wcs, (sine, cosine) = WCS(naxis=2), (np.sin(np.radians(angle)), np.cos(np.radians(angle)))
    wcs.wcs.ctype, wcs.wcs.crval = ["RA---TAN", "DEC--TAN"], [ra, dec]
    wcs.wcs.crpix = [SHAPE[1]/2 + shift[0], SHAPE[0]/2 + shift[1]]
    wcs.wcs.cd = scale/3600*np.array([[parity*cosine, sine], [-parity*sine, cosine]])
    return wcs


def render(wcs, ra, dec, shape=SHAPE, flux=FLUX, sigma=SIGMA):
    rows, columns = np.indices(shape)
    image = np.zeros(shape)
    for x, y in zip(*wcs.all_world2pix(ra, dec, 0)):
        image += flux*np.exp(-((columns - x)**2 + (rows - y)**2)/2/sigma**2)/2/np.pi/sigma**2
    return image.astype(np.float32)


def write_frame(folder, band, place, wcs, image, **header):
    cards = wcs.to_header()
    cards.update(RUN=place[0], CAMCOL=place[1], FILTER=band, NMGY=0.005)
    cards.update(header)
    buffer, path = io.BytesIO(), folder/frame_name(band, *place)
    fits.PrimaryHDU(image, cards).writeto(buffer)
    path.write_bytes(bz2.compress(buffer.getvalue(), 1))
    return path


def write_field(folder, place=(94, 1, 11), ra=(150.,), dec=(20.,), centre=(150., 20.), noise=0.02,
                bands=BANDS, **header):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for k, band in enumerate(bands):
        wcs = make_wcs(20 + 0.2*k, (1.3*k, -0.7*k), *centre)
        image = render(wcs, ra, dec) + rng.normal(0, noise, SHAPE).astype(np.float32)
        write_frame(folder, band, place, wcs, image, **header)
    return folder


def refused(message, function, *args, **kwargs):
    with pytest.raises(InputError) as caught: function(*args, **kwargs)
    sentence = str(caught.value)
    assert message in sentence
    assert "\n" not in sentence and sentence.endswith(".")


def cut_all(*args, **kwargs):
    images, tables = zip(*cut_fields(*args, **kwargs))
    return np.concatenate(images), vstack(list(tables))


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return write_field(tmp_path_factory.mktemp("frames"))


@pytest.fixture(scope="module")
def field(folder): return read_field(folder, 94, 1, 11)


@pytest.fixture
def copied(folder, tmp_path): return Path(shutil.copytree(folder, tmp_path/"copied"))


# --- geometry, by formula

@settings(max_examples=25, deadline=None)
@given(angle=st.floats(0, 360), turn=st.floats(-2, 2), parity=st.sampled_from([-1, 1]),
       shift=st.tuples(*[st.floats(-3, 3)]*4), dec0=st.floats(-80, 80),
       ra0=st.sampled_from([0., 0.0001, 359.9999, 123.4]), size=st.integers(25, 48),
       scale=st.floats(0.995, 1.005))
def test_a_gaussian_galaxy_is_where_the_formula_says(angle, turn, parity, shift, dec0, ra0, size,
                                                     scale):
    wcs = [make_wcs(angle, shift[:2], ra0, dec0, parity),
           make_wcs(angle + turn, shift[2:], ra0, dec0, parity, scale*PIXEL_SCALE)]
    ra, dec = wcs[0].all_pix2world([160.3], [120.8], 0)
    field = Field(np.stack([render(w, ra, dec) for w in wcs]), wcs, ("r", "g"))
    images, flags = cut_stamps(field, ra, dec, size)
    assert not flags["flag_any"].any()
    rows, columns = np.indices((size, size))
    for image, factor in zip(images[0], (1., 1/scale)):
        assert abs(image.sum()/FLUX - 1) < 2e-3
        x, y = ((image*a).sum()/image.sum() for a in (columns, rows))
        assert np.hypot(x - size//2, y - size//2) < 0.02
        sigma, = np.sqrt((image*(rows - y)**2).sum()/image.sum())*np.ones(1)
        assert abs(sigma/(SIGMA/factor) - 1) < 0.02


@pytest.mark.parametrize("order, tolerance", [(1, 0.3), (3, 0.01), (5, 0.001)])
def test_higher_orders_come_closer(field, order, tolerance):
    pure = Field(np.stack([render(w, [150.], [20.]) for w in field.wcs]), field.wcs)
    images, _ = cut_stamps(pure, [150.], [20.], order=order)
    rows, columns = np.indices((64, 64)) - 32
    expected = FLUX*np.exp(-(rows**2 + columns**2)/2/SIGMA**2)/2/np.pi/SIGMA**2
    assert np.abs(images[0, 2] - expected).max() < tolerance*expected.max()


def test_bands_and_sizes(field):
    images, _ = cut_stamps(field, [150., 150.004], [20., 20.001], 16)
    for which in ([2], [1, 2], [4, 2]):
        part = Field(field.images[which], [field.wcs[k] for k in which], tuple("ugriz"[k] for k in which))
        np.testing.assert_array_equal(cut_stamps(part, [150., 150.004], [20., 20.001], 16)[0],
                                      images[:, which])
    assert cut_stamps(field, [], [])[0].shape == (0, 5, 64, 64)


def test_bending_is_undone_by_bending_back(field):
    rng = np.random.default_rng(0)
    dx, dy = rng.normal(0, 1, (2, 4, 4))*[[[1e-3**(i + j) for j in range(4)] for i in range(4)]]
    wcs = bend(bend(field.wcs[2], dx, dy), -dx, -dy)
    pixels = rng.uniform(0, 200, (2, 50))
    np.testing.assert_allclose(wcs.all_pix2world(*pixels, 0),
                               field.wcs[2].all_pix2world(*pixels, 0), atol=1e-10)


# --- flags, and the order of rows

def test_edges_and_missing_bands_are_flagged(copied):
    (copied/frame_name("u", 94, 1, 11)).unlink()
    field = read_field(copied, 94, 1, 11)
    corner = field.wcs[2].all_pix2world(3., 3., 0)
    images, flags = cut_stamps(field, [150., corner[0]], [20., corner[1]])
    assert list(flags["flag_band"]) == [True, True] and list(flags["flag_edge"]) == [False, True]
    assert (images[:, 0] == 0).all() and np.isfinite(images).all() and images[0, 2, 32, 32] > 1
    refused("row 0 gives a bad stamp in the field 94-1-11 (band)", cut_stamps, field,
            [150.], [20.], on_bad="refuse")


def test_a_nan_is_one_flag_and_does_not_spread(tmp_path):
    wcs = make_wcs()
    image = render(wcs, [150.], [20.])
    whole, holed = image.copy(), image.copy()
    x, y = (int(v) for v in wcs.all_world2pix(150., 20., 0))
    holed[y + 15, x - 20] = np.nan
    fields = []
    for name, pixels in (("a", whole), ("b", holed)):
        (tmp_path/name).mkdir()
        write_frame(tmp_path/name, "r", (94, 1, 11), wcs, pixels)
        fields.append(read_field(tmp_path/name, 94, 1, 11, bands="r"))
    (a, _), (b, flags) = (cut_stamps(f, [150.], [20.]) for f in fields)
    assert flags["flag_missing"][0] and not flags["flag_saturated"][0]
    np.testing.assert_allclose(a[0, 0, :40, 20:], b[0, 0, :40, 20:], atol=1e-4)


def test_saturated_pixels_are_flagged(tmp_path):
    wcs = make_wcs()
    image = np.minimum(render(wcs, [150.], [20.], flux=2e5), 300.)
    write_frame(tmp_path, "r", (94, 1, 11), wcs, image)
    field = read_field(tmp_path, 94, 1, 11, bands="r")
    _, flags = cut_stamps(field, [150.], [20.])
    assert flags["flag_saturated"][0]


@pytest.mark.parametrize("brightness, flagged", [(0.5, False), (2., True)])
def test_a_neighbour_counts_from_the_galaxys_own_brightness(field, brightness, flagged):
    sky = field.wcs[2].all_pix2world(*(np.array(field.wcs[2].all_world2pix(150., 20., 0)) + 15), 0)
    two = Field(np.stack([render(w, [150.], [20.]) + render(w, [sky[0]], [sky[1]], flux=brightness*FLUX)
                          for w in field.wcs]) + np.float32(np.random.default_rng(0).normal(
                              0, 0.02, field.images.shape)), field.wcs)
    assert cut_stamps(two, [150.], [20.])[1]["flag_neighbour"][0] == flagged


@pytest.mark.parametrize("processes", [1, 2])
def test_rows_keep_their_order_over_fields_and_processes(tmp_path, processes):
    write_field(tmp_path, (94, 1, 11), centre=(150., 20.), ra=[150., 150.003], dec=[20., 20.003])
    write_field(tmp_path, (94, 1, 12), centre=(150.1, 20.), ra=[150.1], dec=[20.])
    catalogue = Table(dict(ra=[150., 150.1, 150.003, 150.1], dec=[20., 20., 20.003, 20.],
                           name=list("abcd"), run=[94]*4, camcol=[1]*4, field=[11, 12, 11, 12]))
    images, table = cut_all(catalogue, tmp_path, size=24, processes=processes)
    assert list(table["name"]) == list("abcd") and images.shape == (4, 5, 24, 24)
    peak = FLUX/2/np.pi/SIGMA**2
    np.testing.assert_allclose(images[:, 2, 12, 12], peak, rtol=0.05)
    catalogue.remove_columns(["run", "camcol", "field"])
    again, table = cut_all(catalogue, tmp_path, size=24, processes=processes)
    np.testing.assert_array_equal(images, again)
    assert list(table["field"]) == [11, 12, 11, 12]


def test_thousands_of_fields_in_any_order(tmp_path):
    "Rows that wait for others come back with their own pixels and columns, in time and memory for a survey."
    n, rng = 6_000, np.random.default_rng(1)
    order = rng.permutation(n)
    catalogue = Table({f"column_{k}": rng.normal(size=n) for k in range(33)} | {"row": np.arange(n)})
    catalogue["name"] = [f"galaxy {row}" for row in range(n)]
    catalogue["known"] = np.ma.array(np.arange(n), mask=np.arange(n) % 3 == 0)
    pixels = rng.normal(size=(n, 2, 3)).astype(np.float32)
    chunks = [(rows, pixels[rows], catalogue[rows]) for rows in map(np.sort, np.array_split(order, n//2))]
    begun = time.process_time()
    images, tables = zip(*_in_order(chunks, n, tmp_path))
    assert time.process_time() - begun < 3  # a table for every row took 24 times as long
    np.testing.assert_array_equal(np.concatenate(images), pixels)
    together = vstack(list(tables))
    for name in catalogue.colnames: assert (together[name] == catalogue[name]).all(), name
    assert together["known"].mask.tolist() == catalogue["known"].mask.tolist()


def test_stamps_that_wait_on_a_full_disk_are_an_error_and_not_the_end_of_the_process(tmp_path):
    rows, pixels = np.array([1, 2]), np.ones((2, 5, 32, 32), np.float32)
    with full_disk(), pytest.raises(OSError): list(_in_order([(rows, pixels, Table({"row": rows}))], 3, tmp_path))


def test_nothing_is_dropped_where_frames_or_skies_are_missing(folder):
    catalogue = Table(dict(ra=[150., 150., 200.], dec=[20., 20., 20.], run=[94]*3, camcol=[1]*3,
                           field=[11, 99, 11]))
    images, table = cut_all(catalogue, folder, size=24, processes=1)
    assert len(images) == 3 and list(table["flag_any"]) == [False, True, True]
    assert list(table["flag_missing"]) == [False, True, True] and (images[1:] == 0).all()
    refused("row 1 gives a bad stamp in the field 94-1-99, which has no frames", cut_all,
            catalogue[:2], folder, processes=1, on_bad="refuse")
    refused("row 1 gives a bad stamp in the field 94-1-11 (edge, missing)", cut_all,
            catalogue[[0, 2]], folder, processes=1, on_bad="refuse")


# --- bad frames

@pytest.mark.parametrize("header, message", [
    (dict(RUN=95), "is of RUN 95 and not 94"), (dict(CAMCOL=2), "is of CAMCOL 2 and not 1"),
    (dict(FILTER="g"), "is of FILTER g and not r"),
    (dict(CDELT1=0.5), "the WCS of"), (dict(CTYPE1="LINEAR", CTYPE2="LINEAR"), "is broken"),
    (dict(PC1_1=0., PC1_2=0.), "is broken"), (dict(CRVAL1=10.), "show different skies"),
])
def test_wrong_frames_are_refused(copied, header, message):
    path = copied/frame_name("r", 94, 1, 11)
    with fits.open(path) as hdus: image = hdus[0].data.copy()
    path.unlink()
    write_frame(copied, "r", (94, 1, 11), make_wcs(20.4, (2.6, -1.4)), image, **header)
    refused(message, read_field, copied, 94, 1, 11)


@pytest.mark.parametrize("spoil", [lambda data: data[:len(data)//2], lambda data: b"",
                                   lambda data: b"<html>not found</html>",
                                   lambda data: bz2.compress(b"no FITS at all"),
                                   lambda data: bz2.compress(bz2.decompress(data)[:100_000])])
def test_damaged_frames_are_refused(copied, spoil):
    path = copied/frame_name("i", 94, 1, 11)
    path.write_bytes(spoil(path.read_bytes()))
    refused("cannot be read", read_field, copied, 94, 1, 11)


def test_frames_of_another_field_under_a_wrong_name(copied):
    path = write_frame(copied, "r", (94, 1, 12), make_wcs(ra=150.2),
                       np.zeros(SHAPE, np.float32))
    path.rename(copied/frame_name("r", 94, 1, 11))
    refused("show different skies", read_field, copied, 94, 1, 11)


def test_frames_of_different_sizes(copied):
    (copied/frame_name("g", 94, 1, 11)).unlink()
    write_frame(copied, "g", (94, 1, 11), make_wcs(), np.zeros((100, 100), np.float32))
    refused("have different sizes", read_field, copied, 94, 1, 11)


def test_frames_without_compression_and_in_the_archives_tree(folder, tmp_path):
    tree = tmp_path/"301"/"94"/"1"
    tree.mkdir(parents=True)
    for path in folder.iterdir(): (tree/path.stem).write_bytes(bz2.decompress(path.read_bytes()))
    assert list(find_fields(tmp_path)) == [(94, 1, 11)]
    np.testing.assert_array_equal(read_field(tmp_path, 94, 1, 11).images,
                                  read_field(folder, 94, 1, 11).images)


# --- bad positions and catalogues

@pytest.mark.parametrize("ra, dec, message", [
    ([np.radians(150.)], [np.radians(20.)], "look like radians"), ([10.], [-20.], "check the positions"),
    ([330.], [-20.], "none of the 1 positions lies in the field 94-1-11"),
    ([150., np.nan], [20., 20.], "row 1 is no position"), ([150.], [np.inf], "row 0 is no position"),
    ([150.], [95.], "row 0 is no position"), ([150., 150.], [20.], "2 right ascensions for 1"),
    (["10h"], ["20d"], "must be numbers"),
])
def test_bad_positions_are_refused(field, folder, ra, dec, message):
    refused(message, cut_stamps, field, ra, dec)


def test_bad_catalogues_are_refused(folder, tmp_path):
    refused("no column ra", cut_fields, Table(dict(RA=[1.], dec=[1.])), folder)
    refused("no rows", cut_fields, Table(dict(ra=[], dec=[])), folder)
    refused("there is no folder", cut_fields, Table(dict(ra=[1.], dec=[1.])), tmp_path/"none")
    refused("no frame in the bands", cut_fields, Table(dict(ra=[1.], dec=[1.])), tmp_path)
    refused("look like radians", cut_fields,
            Table(dict(ra=np.radians([150.]), dec=np.radians([20.]))), folder)
    refused("none of the frames of the catalogue's 1 fields", cut_fields,
            Table(dict(ra=[150.], dec=[20.], run=[1], camcol=[1], field=[1])), folder)
    masked = Table(dict(ra=np.ma.masked_array([150., 150.], [False, True]), dec=[20., 20.]))
    refused("row 1 is no position", cut_fields, masked, folder)


@pytest.mark.parametrize("order", [0, 6, 2.5])
def test_impossible_orders_are_refused(field, order):
    refused("there is no spline of order", cut_stamps, field, [150.], [20.], order=order)


@pytest.mark.parametrize("size", [0, -3, 2.5])
def test_impossible_sizes_are_refused(field, size):
    refused("a stamp cannot have", cut_stamps, field, [150.], [20.], size)


# --- detection

def test_detection_measures_what_was_rendered(tmp_path):
    folder = write_field(tmp_path/"f", ra=[150., 150.008, 149.99], dec=[20., 20.004, 20.003])
    table = detect_fields(folder, processes=1, stars=True)
    assert len(table) == 3 and len(set(table["objid"])) == 3
    np.testing.assert_allclose(table["mag_r"], 22.5 - 2.5*np.log10(FLUX), atol=0.03)
    np.testing.assert_allclose(table["mag_u"], table["mag_r"], atol=0.03)
    np.testing.assert_allclose(table["half_light_radius"], 1.1774*SIGMA*PIXEL_SCALE, rtol=0.05)
    refused("no galaxy brighter than 10", detect_fields, folder, faintest=10, processes=1)


def test_an_empty_frame_has_no_sources():
    empty = Field(np.zeros((1, *SHAPE), np.float32), [make_wcs()], ("r",))
    assert len(detect(empty)) == 0


# --- real frames

@pytest.fixture(scope="module")
def real(shared_data): return read_field(shared_data/"sdss-frames", 3918, 3, 213)


def test_real_positions_find_their_field(shared_data):
    with np.load(shared_data/"sdss-stamps/stamps_of_frames_r20.npz") as npz: meta = npz["meta"]
    fields = find_fields(shared_data/"sdss-frames")
    places, which = assign_fields(meta["ra"], meta["dec"], fields)
    names = [f"{places[k][0]:06d}-{places[k][1]}-{places[k][2]:04d}" for k in which]
    assert names == list(meta["field"])


def test_known_galaxies_and_stars(real, shared_data):
    table = detect(real)
    places = np.stack([table["x"], table["y"]], 1)
    counts = {}
    for kind in ("gals", "stars"):
        known = np.loadtxt(shared_data/f"catalogs/003918-3-0213_{kind}.csv", delimiter=",")
        distance = np.hypot(*(known[:, None] - places[None]).transpose(2, 0, 1))
        rows = distance.argmin(1)[distance.min(1) < 3]
        rows = rows[table["mag_r"][rows] < 21]
        counts[kind] = np.mean(table["is_star"][rows]), len(rows)
    assert counts["gals"][0] < 0.05 and counts["gals"][1] > 100
    assert counts["stars"][0] > 0.85


def test_both_astrometric_solutions_keep_the_galaxy_in_the_middle(shared_data):
    survey = read_field(shared_data/"sdss-frames", 1035, 6, 17, astrometry="survey")
    header = read_field(shared_data/"sdss-frames", 1035, 6, 17)
    table = detect(survey)
    table = table[(table["mag_r"] < 18) & ~table["flag_saturated"]]
    same = detect(header)
    k = [np.hypot(same["x"] - x, same["y"] - y).argmin() for x, y in zip(table["x"], table["y"])]
    a, _ = cut_stamps(survey, table["ra"], table["dec"], 32)
    b, _ = cut_stamps(header, same["ra"][k], same["dec"][k], 32)
    np.testing.assert_allclose(a[:, 2], b[:, 2], atol=0.05*np.abs(b[:, 2]).max())
    apart = np.hypot((table["ra"] - same["ra"][k])*np.cos(np.radians(table["dec"])),
                     table["dec"] - same["dec"][k])*3600/PIXEL_SCALE
    assert 0.1 < apart.max() < 0.6


def test_five_hundred_galaxies_in_one_field(shared_data):
    field = read_field(shared_data/"sdss-frames", 3918, 3, 213, threads=2)
    table = detect(field)[:500]
    started = time.perf_counter()
    images, flags = cut_stamps(field, table["ra"], table["dec"])
    assert images.shape == (500, 5, 64, 64) and np.isfinite(images).all()
    assert time.perf_counter() - started < 60   # two busy cores; 2 s on two free ones
