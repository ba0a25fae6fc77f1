"""Template fitting and probes: what would disturb the story of their notebooks."""
import numpy as np
import pytest
from astropy import units
from speclite.filters import load_filters

from astromae.errors import InputError
from astromae.probes import PROBES
from astromae.simulate import packaged_catalogue
from astromae.survey import BANDS, asinh_mag_error, flux_to_asinh_mag
from astromae.templates import (REDSHIFTS, SDSS_TO_AB, asinh_mag_to_flux, calibrate, chi_squared, fit_templates,
                                galaxy_templates, redshift_prior, template_fit, template_fluxes)

# templates 1 to 5 of kcorrect 5.1.9 seen by kcorrect with its own curves sdss_g0, sdss_r0, sdss_i0:
# flux in g and in i over that in r, at redshifts 0.1 and 0.3
KCORRECT_G_TO_R = [[0.271, 1.4407, 0.7002, 0.4128, 0.79],
                   [0.1479, 1.0925, 0.3915, 0.2344, 0.5938]]
KCORRECT_I_TO_R = [[1.9547, 1.0882, 1.343, 1.4142, 1.1036],
                   [2.3079, 0.6694, 1.1627, 1.6441, 1.1396]]


@pytest.fixture(scope="module")
def galaxies():
    "Fluxes (600, 5), errors and redshifts of real galaxies, dereddened."
    table = packaged_catalogue()[:600]
    stack = lambda kind: np.stack([np.asarray(table[f"{kind}_{b}"], float) for b in BANDS], axis=1)
    undimmed = 10**(0.4*stack("ext"))
    return (undimmed*stack("modelflux"), undimmed/np.sqrt(stack("modelflux_ivar")),
            np.asarray(table["z_spec"], float))


def test_fluxes_agree_with_those_of_kcorrect():
    fluxes = template_fluxes(np.array([0.1, 0.3]))[:, :, :5]
    np.testing.assert_allclose(fluxes[:, 1]/fluxes[:, 2], KCORRECT_G_TO_R, rtol=6e-3)
    np.testing.assert_allclose(fluxes[:, 3]/fluxes[:, 2], KCORRECT_I_TO_R, rtol=6e-3)


def test_to_redshift_a_galaxy_is_to_blueshift_the_filters():
    wavelength, spectra = galaxy_templates()
    flux = spectra*units.Unit("1e-17 erg / (s cm2 Angstrom)")
    for z in (0.1, 0.4):
        for k, band in enumerate(BANDS):
            blue = load_filters(f"sdss2010-{band}")[0].create_shifted(z)
            at_rest = 1e9*np.asarray(blue.get_ab_maggies(flux, wavelength*units.AA))
            np.testing.assert_allclose(template_fluxes(np.array([0., z]))[1, k], (1 + z)**2*at_rest, rtol=1e-3)


def test_finer_grids_hold_the_coarser_one():
    fine = template_fluxes(np.linspace(0, 0.6, 241))
    np.testing.assert_array_equal(fine[::2], template_fluxes(REDSHIFTS))


@pytest.mark.parametrize("grid", [[0.1, 0.1], [0.2, 0.1], [0.3], [-0.1, 0.2], [0.1, 1.2], [[0.1, 0.2]]])
def test_a_grid_that_cannot_be_gets_one_sentence(grid):
    with pytest.raises(InputError, match="the grid of redshifts must rise from 0"):
        template_fluxes(grid)


def test_brightness_and_order_do_not_matter(galaxies):
    flux, error, _ = galaxies
    whole = fit_templates(flux[:20], error[:20])
    brighter = fit_templates(1000*flux[:20], 1000*error[:20])
    backwards = fit_templates(flux[:20][::-1], error[:20][::-1])
    np.testing.assert_allclose(brighter["z_phot"], whole["z_phot"], atol=1e-6)
    np.testing.assert_array_equal(backwards["z_phot"][::-1], whole["z_phot"])


def test_a_band_without_a_measurement_does_not_count(galaxies):
    flux, error, _ = (values[:20].copy() for values in galaxies)
    error[:, 0] = np.inf
    fits = []
    for u in (0, 1e3):
        flux[:, 0] = u
        fits.append(fit_templates(flux, error))
    np.testing.assert_array_equal(fits[0]["z_phot"], fits[1]["z_phot"])
    one_less = chi_squared(flux[:, 1:], error[:, 1:], template_fluxes()[:, 1:])
    np.testing.assert_allclose(chi_squared(flux, error, template_fluxes()), one_less, atol=1e-8)


def test_noisy_galaxies_made_of_templates_are_found():
    rng = np.random.default_rng(0)
    z = rng.uniform(0.05, 0.5, 100)
    true = 100*np.array([template_fluxes(np.array([0., one]))[1, :, 5] for one in z])
    fit = fit_templates(rng.normal(true, 0.01*true), 0.01*true, np.ones(5), model_error=np.full(5, 1e-3))
    dz = (fit["z_phot"] - z)/(1 + z)
    assert 1.4826*np.median(abs(dz - np.median(dz))) < 0.015
    assert 0.55 < np.mean(abs(fit["z_phot"] - z) < fit["z_error"]) < 0.95
    assert np.median(fit["chi2"]) < 5


def test_flat_fluxes_leave_the_prior(galaxies):
    flux, _, _ = galaxies
    prior = np.exp(-0.5*((REDSHIFTS - 0.25)/0.03)**2) + 1e-9
    fit = fit_templates(flux[:3], 1e6*abs(flux[:3]), prior=prior)
    np.testing.assert_allclose(fit["z_phot"], 0.25, atol=1e-3)
    np.testing.assert_allclose(fit["z_error"], 0.03, atol=2e-3)


def test_the_prior_takes_any_number_of_galaxies_and_magnitudes_far_away():
    rng = np.random.default_rng(0)
    for n in (1, 60, 5000):
        prior = redshift_prior(rng.normal(17, 1, n), rng.uniform(0, 0.5, n), np.array([-40., 17., 60.]))
        assert prior.shape == (3, 121) and (prior > 0).all()
        np.testing.assert_allclose(prior.sum(axis=1), 1)


def test_calibration_leaves_galaxies_made_of_templates_alone():
    rng, zs = np.random.default_rng(1), np.linspace(0.02, 0.4, 200)
    made = np.einsum("zbk,zk->zb", template_fluxes(zs), rng.dirichlet(np.full(6, 0.3), 200))/SDSS_TO_AB
    np.testing.assert_allclose(calibrate(made, 1e-3*made, zs), SDSS_TO_AB, rtol=1e-4)


@pytest.mark.parametrize("spoil,sentence", [
    (lambda f, e, z: (f[:, :4], e[:, :4], z), r"shapes \(600, 4\)"),
    (lambda f, e, z: (f, e[:10], z), r"\(10, 5\)"),
    (lambda f, e, z: (np.where(f == f[3, 2], np.nan, f), e, z), "row 3 has a flux that is not finite"),
    (lambda f, e, z: (f, -e, z), "row 0 has .* an error that is not above 0"),
    (lambda f, e, z: (f, np.where(np.arange(5) == 2, e, np.inf), z), "fewer than two bands"),
    (lambda f, e, z: (f, e, z[:-1]), "fluxes of 600 galaxies and 599 redshifts"),
    (lambda f, e, z: (-f, e, z), "none has fluxes above 0"),
    (lambda f, e, z: (f, e, z + 2), "a redshift below 1.1")])
def test_bad_input_of_the_calibration_gets_one_sentence(galaxies, spoil, sentence):
    with pytest.raises(InputError, match=sentence):
        calibrate(*spoil(*galaxies))


def test_asinh_magnitudes_go_both_ways():
    rng = np.random.default_rng(0)
    flux, error = rng.normal(1, 3, (500, 5))*10**rng.uniform(-1, 3, (500, 1)), rng.uniform(0.01, 1, (500, 5))
    back = asinh_mag_to_flux(flux_to_asinh_mag(flux), asinh_mag_error(flux, error))
    np.testing.assert_allclose(back[0], flux, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(back[1], error, rtol=1e-7)


def test_the_baseline_repeats_itself_and_looks_at_one_galaxy_at_a_time(galaxies):
    flux, error, z = galaxies
    magnitudes, errors = flux_to_asinh_mag(flux), asinh_mag_error(flux, error)
    train = magnitudes[:500], z[:500]
    both = dict(train_errors=errors[:500], test_errors=errors[500:])
    z_phot = template_fit(*train, magnitudes[500:], **both)
    np.testing.assert_array_equal(z_phot, template_fit(*train, magnitudes[500:], **both))
    half = template_fit(*train, magnitudes[500:520], errors[:500], errors[500:520])
    np.testing.assert_array_equal(half, z_phot[:20])
    plain = template_fit(*train, magnitudes[500:], prior=False)
    for one, limit in ((z_phot, 0.035), (plain, 0.05)):
        dz = (one - z[500:])/(1 + z[500:])
        assert 1.4826*np.median(abs(dz - np.median(dz))) < limit


@pytest.mark.parametrize("spoil,sentence", [
    (lambda m, e: (np.where(m == m[5, 1], np.nan, m), e, e), "training magnitudes are not finite in 1 of"),
    (lambda m, e: (m, e[:, :4], e), r"errors of training magnitudes have the shape \(600, 4\)"),
    (lambda m, e: (m, e, e[:-1]), r"errors of test magnitudes have the shape \(599, 5\)"),
    (lambda m, e: (m, np.where(e == e[7, 0], np.nan, e), e), "row 7 has .* an error that is not above 0")])
def test_bad_magnitudes_get_one_sentence(galaxies, spoil, sentence):
    flux, error, z = galaxies
    magnitudes = flux_to_asinh_mag(flux)
    train, errors, test_errors = spoil(magnitudes, asinh_mag_error(flux, error))
    with pytest.raises(InputError, match=sentence):
        template_fit(train, z, magnitudes, errors, test_errors)


@pytest.mark.parametrize("name", PROBES)
def test_probes_repeat_themselves_and_see_no_difference_in_scale(name):
    rng = np.random.default_rng(0)
    z = rng.uniform(0, 0.3, 300)
    x = np.hstack([z[:, None] + rng.normal(0, 0.02, (300, 4)), np.ones((300, 1))]).astype(np.float32)
    given = x[:200], z[:200], x[200:]
    z_phot = PROBES[name](*given)
    np.testing.assert_array_equal(z_phot, PROBES[name](*given))
    assert np.corrcoef(z_phot, z[200:])[0, 1] > 0.95
    rescaled = PROBES[name](8*x[:200], z[:200], 8*x[200:])
    np.testing.assert_allclose(rescaled, z_phot, atol=1e-4)
    np.testing.assert_allclose(PROBES[name](*given[:2], x[200:201]), z_phot[:1], atol=1e-6)
    with pytest.raises(InputError, match="z_spec is not finite"):
        PROBES[name](x[:200], np.full(200, np.nan), x[200:])
