"""Rendering against GalSim, the packaged tables against their sources, seeds, real sky, bad input."""
import hashlib
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from astropy.io import fits
from astropy.table import MaskedColumn, Table

from astromae.errors import InputError
from astromae.simulate import (add_noise, bulge_fluxes, draw_profiles, early_type_magnitudes,
                               gaussian_mixture, half_light_radius, measure, packaged_catalogue,
                               psf_gaussians, render, sersic, simulate)
from astromae.survey import BANDS, GAIN, PIXEL_SCALE, PSF_FWHM, SKY_NOISE, flux_to_mag

PACKAGED = files("astromae")/"data"


@pytest.fixture(scope="module")
def catalogue(): return packaged_catalogue()


@pytest.fixture(scope="module")
def profiles(catalogue): return draw_profiles(catalogue, seed=1)


def together(chunks):
    images, tables = zip(*chunks)
    return np.concatenate(images), {name: np.concatenate([table[name] for table in tables])
                                    for name in tables[0].colnames}


# --- the packaged data

def test_packaged_data_is_small_and_says_where_it_is_from():
    assert (PACKAGED/"sdss_galaxies.fits.gz").stat().st_size < 1e6
    assert sum(path.stat().st_size for path in Path(str(PACKAGED)).iterdir()) < 1e6
    assert "kcorrect" in (PACKAGED/"README.md").read_text()
    assert "Redistribution and use" in (PACKAGED/"LICENSE.kcorrect").read_text()


def test_packaged_catalogue_is_whole(catalogue):
    assert len(catalogue) == len(set(catalogue["objid"])) == 10_000
    assert catalogue["objid"].dtype == np.int64 and (catalogue["objid"] >= 0).all()
    for name in catalogue.colnames:
        if name != "z_err": assert np.isfinite(catalogue[name]).all(), name
    assert catalogue["objid"][0] == 1220866612619685  # identifiers are stable


def test_early_type_table_follows_from_spectrum_and_filters():
    filters = pytest.importorskip("speclite.filters")
    spectrum, table = (Table.read(PACKAGED/name) for name in ("early_type_spectrum.fits",
                                                              "early_type_magnitudes.ecsv"))
    from astropy import units
    wavelength = np.asarray(spectrum["wavelength"], float)*units.AA
    flux = np.asarray(spectrum["flux"], float)*1e-17*units.erg/units.s/units.cm**2/units.AA
    bands = filters.load_filters("sdss2010-*")
    magnitudes = np.array([[bands.get_ab_magnitudes(flux, wavelength*(1 + z))[f"sdss2010-{band}"][0]
                            for band in BANDS] for z in table["redshift"][::10]])
    magnitudes += 2.5*np.log10(1 + np.asarray(table["redshift"][::10]))[:, None]
    magnitudes -= magnitudes[0, 2]
    ours = np.stack([table[band][::10] for band in BANDS], axis=1)
    np.testing.assert_allclose(ours, magnitudes, atol=1e-3)


def test_early_type_colours_agree_with_another_template_in_galsim():
    galsim, filters = pytest.importorskip("galsim"), pytest.importorskip("speclite.filters")
    elliptical = galsim.SED("CWW_E_ext.sed", wave_type="Ang", flux_type="flambda")
    for z in (0., 0.1, 0.2, 0.3):
        theirs = []
        for band in filters.load_filters("sdss2010-*"):
            curve = galsim.LookupTable(band.wavelength, band.response, interpolant="linear")
            bandpass = galsim.Bandpass(curve, wave_type="Ang").withZeropoint("AB")
            theirs.append(elliptical.atRedshift(z).calculateMagnitude(bandpass))
        ours = early_type_magnitudes(np.array([z]))[0] - [0.04, 0, 0, 0, -0.02]
        np.testing.assert_allclose(-np.diff(ours), -np.diff(theirs), atol=0.17)


# --- drawing

def test_no_part_of_a_galaxy_is_negative_and_both_make_the_catalogues_flux(catalogue, profiles):
    assert (profiles["bulge_flux"] > 0).all() and (profiles["disc_flux"] > 0).all()
    for k, band in enumerate(BANDS):
        flux = np.asarray(catalogue[f"modelflux_{band}"])
        whole = np.asarray(profiles["bulge_flux"] + profiles["disc_flux"])[:, k]
        np.testing.assert_allclose(whole[flux > 0], flux[flux > 0], rtol=1e-3)


def test_bulge_colours_scatter_as_the_red_sequence():
    z, rng = np.full(20_000, 0.1), np.random.default_rng(0)
    flux = 10**(-0.4*early_type_magnitudes(z))
    bulge = bulge_fluxes(flux, z, rng.standard_normal((20_000, 5)))
    away = -np.diff(flux_to_mag(bulge)) + np.diff(early_type_magnitudes(z))
    np.testing.assert_allclose(away.std(axis=0), [0.04, 0.03, 0.02, 0.02], rtol=0.03)


def test_draws_depend_on_the_galaxy_and_not_on_its_row(catalogue):
    rows = [500, 3, 77]
    alone, among = draw_profiles(catalogue[rows], 5), draw_profiles(catalogue[:600], 5)[rows]
    for name in alone.colnames: np.testing.assert_allclose(alone[name], among[name], rtol=1e-12)


def test_half_light_radius_of_one_part_is_its_own():
    one = Table({"bulge_flux": np.ones((2, 5))*[[1], [1e-9]],
                 "disc_flux": np.ones((2, 5))*[[1e-9], [1]],
                 "bulge_radius": [1.5, 1.5], "disc_radius": [4., 4.]})
    np.testing.assert_allclose(half_light_radius(one), [1.5, 4.], rtol=1e-4)


# --- rendering

@pytest.mark.parametrize("n, reach", [(4, (0.02, 15)), (1, (0.02, 4))])
def test_mixture_of_gaussians_follows_the_profile(n, reach):
    amplitudes, variances = gaussian_mixture(n)
    r = np.geomspace(*reach, 200)
    mixture = (amplitudes*np.exp(-r[:, None]**2/2/variances)/(2*np.pi*variances)).sum(axis=1)
    np.testing.assert_allclose(mixture, sersic(r, n), rtol=0.012)
    assert (amplitudes >= 0).all() and abs(amplitudes.sum() - 1) < 1e-6


def test_rendering_agrees_with_galsim(profiles, catalogue):
    galsim = pytest.importorskip("galsim")
    brightness = flux_to_mag(np.asarray(catalogue["modelflux_r"]))
    usual = np.flatnonzero(brightness > 14.5)  # all but the brightest hundredth
    sharpest = usual[np.argsort(np.asarray(profiles["psf_fwhm"]).min(axis=1)[usual])[:8]]
    largest = usual[np.argsort(-np.asarray(profiles["bulge_radius"])[usual])[:4]]
    some = profiles[np.concatenate([usual[:28], sharpest, largest])]
    ours = render(some, device="cpu").numpy()
    for one, stamp in zip(some, ours):
        weights, sigmas = psf_gaussians(one["psf_fwhm"][None])
        for k in range(5):
            psf = galsim.Add([galsim.Gaussian(sigma=s*PIXEL_SCALE, flux=w)
                              for w, s in zip(weights[k], sigmas[0, k])])
            parts = [galsim.Sersic(n, half_light_radius=one[f"{part}_radius"])
                     .shear(q=one[f"{part}_axis_ratio"], beta=one["angle"]*galsim.degrees)
                     .withFlux(one[f"{part}_flux"][k]) for part, n in (("bulge", 4), ("disc", 1))]
            theirs = galsim.Convolve(galsim.Add(parts), psf).drawImage(
                nx=64, ny=64, scale=PIXEL_SCALE, method="no_pixel",
                offset=(one["x_offset"] + 0.5, one["y_offset"] + 0.5)).array
            noise = np.sqrt(one["sky_noise"][k]**2 + theirs/GAIN[k])
            assert abs(stamp[k].sum()/theirs.sum() - 1) < 5e-3
            assert (abs(stamp[k] - theirs) < 0.1*noise).all()


def test_stamps_of_any_size_are_centred_alike(profiles):
    small, large, odd = (render(profiles[:5], size, "cpu").numpy() for size in (32, 64, 41))
    tolerance = 0.02*SKY_NOISE.min()
    np.testing.assert_allclose(small[:, :, 8:24, 8:24], large[:, :, 24:40, 24:40], atol=tolerance)
    np.testing.assert_allclose(odd[:, :, 20, 20], large[:, :, 32, 32], atol=tolerance)


def test_batch_size_does_not_change_a_stamp(profiles):
    one_by_one, at_once = (render(profiles[:9], device="cpu", block=block) for block in (1, 9))
    torch.testing.assert_close(one_by_one, at_once, rtol=1e-5, atol=1e-5)


def test_point_spread_function_is_that_of_the_survey(shared_data):
    fields = fits.getdata(shared_data/"sdss-instrument"/"photoField-003900-6.fits.gz")
    _, sigmas = psf_gaussians(PSF_FWHM[None])
    for k, name in enumerate(("PSF_SIGMA1_2G", "PSF_SIGMA2_2G")):
        np.testing.assert_allclose(sigmas[0, :, k], np.median(fields[name], axis=0), rtol=0.08)


# --- noise and photometry

def test_noise_has_the_variance_of_sky_and_photons():
    images = np.full((40, 5, 32, 32), 3., np.float32)
    noise = np.random.default_rng(0).standard_normal(images.shape, dtype=np.float32)
    noisy = add_noise(images, noise, np.tile(SKY_NOISE, (40, 1)))
    np.testing.assert_allclose(noisy.std((0, 2, 3)), np.sqrt(SKY_NOISE**2 + 3/GAIN), rtol=0.01)
    assert noisy.dtype == np.float32


def test_magnitudes_come_from_the_pixels_alone(catalogue):
    other = catalogue[:20].copy()
    for band in BANDS: other[f"petroflux_{band}"] = 1.
    table, again = (next(simulate(one, device="cpu"))[1] for one in (catalogue[:20], other))
    np.testing.assert_array_equal(table["mag_r"], again["mag_r"])
    images = render(draw_profiles(catalogue[:20]), device="cpu").numpy()
    clean = measure(images, np.tile(SKY_NOISE, (20, 1)), np.zeros((20, 5)))[0]
    own = np.stack([flux_to_mag(catalogue[f"modelflux_{band}"][:20]) for band in BANDS], axis=1)
    lost = (clean - own)[:, 2]
    assert (lost > 0).all() and np.median(lost) < 0.3  # a circle misses some light, never gains any
    np.testing.assert_allclose(np.diff(clean)[:, 1:], np.diff(own)[:, 1:], atol=0.1)


# --- simulate

def test_same_seed_same_bytes_whatever_the_chunks(catalogue):
    images, table = together(simulate(catalogue[:150], seed=2, device="cpu"))
    for chunk in (1, 64, 100):
        again, table_again = together(simulate(catalogue[:150], seed=2, device="cpu", chunk=chunk))
        assert images.tobytes() == again.tobytes()
        for name in table: np.testing.assert_array_equal(table[name], table_again[name], name)
    assert images.dtype == np.float32 and images.shape == (150, 5, 64, 64)
    assert np.isfinite(images).all()


def test_number_of_threads_changes_no_byte_and_is_left_as_it_was(catalogue):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(next(simulate(catalogue[:20], device="cpu"))[0].tobytes())
            assert torch.get_num_threads() == threads
    finally: torch.set_num_threads(before)
    assert results[0] == results[1]


def test_same_seed_same_bytes_in_another_process(catalogue):
    code = ("import hashlib; from astromae.simulate import *; "
            "images, table = next(simulate(packaged_catalogue()[:40], seed=9, device='cpu')); "
            "print(hashlib.sha256(images.tobytes() + table['mag_g'].tobytes()).hexdigest())")
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                           check=True).stdout
    images, table = next(simulate(catalogue[:40], seed=9, device="cpu"))
    assert other.strip() == hashlib.sha256(images.tobytes() + table["mag_g"].tobytes()).hexdigest()


def test_another_rendering_is_the_same_galaxy_seen_again(catalogue):
    (images, table), (again, table_again) = (
        next(simulate(catalogue[:30], rendering=k, device="cpu")) for k in (0, 1))
    np.testing.assert_array_equal(table["objid"], table_again["objid"])
    np.testing.assert_array_equal(table["z_spec"], table_again["z_spec"])
    assert (table_again["sim_rendering"] == 1).all()
    for inborn in ("bulge_fraction", "bulge_radius", "disc_radius", "bulge_axis_ratio", "axis_ratio"):
        np.testing.assert_array_equal(table[f"sim_{inborn}"], table_again[f"sim_{inborn}"])
    for night in ("angle", "x_offset", "psf_fwhm", "sky_noise"):
        assert (table[f"sim_{night}"] != table_again[f"sim_{night}"]).all()
    assert (images != again).any()
    assert np.median(abs(table["mag_r"] - table_again["mag_r"])) < 0.2


def test_table_keeps_truth_and_catalogue_apart(catalogue):
    table = next(simulate(catalogue[:5], device="cpu"))[1]
    ours = [name for name in table.colnames if not name.startswith(("sim_", "cat_"))]
    assert ours == ["objid", "ra", "dec", *(f"{kind}_{band}" for kind in ("mag", "magerr", "ext")
                                           for band in BANDS), "z_spec", "z_err", "z_warning"]
    np.testing.assert_array_equal(table["cat_modelflux_g"], catalogue["modelflux_g"][:5])


def test_table_survives_fits(catalogue, tmp_path):
    table = next(simulate(catalogue[:5], device="cpu"))[1]
    table.write(tmp_path/"catalogue.fits")
    back = Table.read(tmp_path/"catalogue.fits")
    assert back.colnames == table.colnames and back["sim_bulge_flux"].shape == (5, 5)


def test_injection_adds_the_sky_and_only_photons(catalogue):
    sky = np.zeros((1, 5, 64, 64), np.float32)
    sky[:, :, 2:5, 2:5] = 50.
    into, table = next(simulate(catalogue[:4], sky=sky, device="cpu"))
    clean = render(draw_profiles(catalogue[:4]), device="cpu").numpy()
    scatter = (into - clean - sky)/np.sqrt(np.maximum(clean, 1e-9)/GAIN[:, None, None])
    assert abs(scatter.std() - 1) < 0.02
    assert (np.asarray(table["sim_sky_noise"]) == 0).all()


def test_injection_into_real_sky(catalogue, shared_data):
    frames = [fits.getdata(shared_data/"sdss-frames"/f"frame-{band}-001035-6-0017.fits.bz2")
              for band in BANDS]
    corners = [(y, x) for y in range(100, 1300, 100) for x in range(100, 1900, 100)]
    brightest_pixel = lambda yx: frames[2][yx[0]:yx[0] + 64, yx[1]:yx[1] + 64].max()
    emptiest = sorted(corners, key=brightest_pixel)[:8]
    sky = np.stack([[frame[y:y + 64, x:x + 64] for frame in frames] for y, x in emptiest])
    images, table = together(simulate(catalogue[:32], sky=sky, device="cpu"))
    assert np.isfinite(images).all()
    noise = np.median(table["sim_sky_noise"], axis=0)
    assert (noise > 0.5*SKY_NOISE).all() and (noise < 2*SKY_NOISE).all()


# --- bad input

def changed(catalogue, name, value, row=1):
    other = catalogue[:3].copy()
    other[name][row] = value
    return other


def masked(catalogue):
    other = catalogue[:3].copy()
    other["ext_u"] = MaskedColumn(other["ext_u"], mask=[False, False, True])
    return other


def text(catalogue):
    other = catalogue[:3].copy()
    other["modelflux_g"] = ["bright", "faint", "faint"]
    return other


@pytest.mark.parametrize("spoil, sentence", [
    (lambda c: c["objid", "ra", "dec"], "no column z_spec, ext_u"),
    (lambda c: c[:0], "no rows"),
    (lambda c: changed(c, "z_spec", np.nan), "row 1 of the catalogue has z_spec = nan"),
    (lambda c: changed(c, "z_spec", -0.1, row=2), "row 2 of the catalogue has z_spec = -0.1"),
    (lambda c: changed(c, "z_spec", 1.5), "above 0 and at most 1"),
    (lambda c: changed(c, "modelflux_r", 0.), "row 1 of the catalogue has modelflux_r = 0.0"),
    (lambda c: changed(c, "modelflux_u", np.inf), "row 1 of the catalogue has modelflux_u = inf"),
    (lambda c: changed(c, "objid", -5), "objid = -5.0, but it must be an integer of 0 or more"),
    (masked, "row 2 of the catalogue has ext_u = nan"),
    (text, "column modelflux_g of the catalogue is of type"),
])
def test_a_bad_catalogue_is_named(catalogue, spoil, sentence):
    with pytest.raises(InputError, match=sentence): simulate(spoil(catalogue), device="cpu")


@pytest.mark.parametrize("options, sentence", [
    ({"sky": np.zeros((5, 64, 64))}, r"the sky has shape \(5, 64, 64\)"),
    ({"sky": np.zeros((2, 5, 32, 32))}, r"must be \(M, 5, 64, 64\)"),
    ({"sky": np.zeros((0, 5, 64, 64))}, "one or more"),
    ({"chunk": 0}, "chunk is 0, but must be 1 or more"),
    ({"seed": -1}, "seed is -1"),
    ({"size": 8}, "size is 8 pixels"),
    ({"device": "abacus"}, "'abacus' cannot be used"),
])
def test_a_bad_option_is_named(catalogue, options, sentence):
    with pytest.raises(InputError, match=sentence):
        simulate(catalogue[:2], **({"device": "cpu"} | options))
