"Metrics, plots and baselines beyond what the notebooks tell: properties, bad input, big numbers."
import json, resource, time
from functools import partial

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from astropy.table import MaskedColumn, Table

from astromae.baselines import BASELINES, gradient_boosting
from astromae.errors import InputError
from astromae.metrics import METRICS, evaluate, normalised_residual, paired_bootstrap
from astromae.plots import (colour_image, density_scatter, mask_to_pixels, plot_losses,
                            plot_reconstructions, plot_residuals, point_density)
from astromae.schedules import decaying_restarts, rate_curve, warmup_cosine


def made_up(n, seed=0):
    rng = np.random.default_rng(seed)
    z_spec = rng.gamma(3., 0.04, n)
    dz = rng.normal(0., np.where(rng.random(n) < 0.01, 0.15, 0.015))
    return z_spec + dz*(1 + z_spec), z_spec


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


# Schedules

@pytest.mark.parametrize("epochs,steps", [(7, 13), (100, 3), (700, 9), (333, 7)])
def test_every_restart_is_met_in_every_length_of_run(epochs, steps):
    epoch, rate = rate_curve(decaying_restarts(epochs), epochs, steps)
    restarts = np.arange(0, epochs, 10)
    assert np.allclose(rate[restarts*steps], 1e-4*0.995**restarts, rtol=1e-12)
    jumps = np.flatnonzero(np.diff(rate) > 0) + 1
    assert np.array_equal(jumps, restarts[1:]*steps)


@pytest.mark.parametrize("epochs,warmup", [(3, 0), (5, 0.5), (20, 2), (2000, 196), (333, 99)])
def test_warm_up_rises_once_and_falls_once(epochs, warmup):
    epoch, rate = rate_curve(warmup_cosine(epochs, warmup), epochs, 10)
    assert np.all(np.diff(rate[epoch <= warmup]) > 0) and np.all(np.diff(rate[epoch >= warmup]) < 0)
    assert rate.max() <= 1.17e-3*(1 + 1e-6) and rate.min() >= 0


# Metrics

def test_metrics_do_not_depend_on_the_order_and_batch_as_they_do_alone():
    z_phot, z_spec = made_up(501)
    order = np.random.default_rng(1).permutation(501)
    batch = np.stack([z_phot, z_phot[order]]), np.stack([z_spec, z_spec[order]])
    for name, metric in METRICS.items():
        alone = metric(z_phot, z_spec)
        assert np.allclose(metric(*batch), [alone, alone], rtol=1e-10), name


def test_a_perfect_prediction_has_no_error_and_a_scaled_one_scales():
    z_phot, z_spec = made_up(400)
    perfect = evaluate(z_spec, z_spec, n_bootstrap=20)
    assert perfect["r2"] == 1 and all(perfect[name] == 0 for name in METRICS if name != "r2")
    double = z_spec + 2*(z_phot - z_spec)
    for name in ("mae", "bias", "precision", "sigma_mad", "median_bias"):
        assert np.isclose(METRICS[name](double, z_spec), 2*METRICS[name](z_phot, z_spec)), name
    assert np.isclose(METRICS["mse"](double, z_spec), 4*METRICS["mse"](z_phot, z_spec))


def test_evaluate_takes_lists_tensors_and_table_columns():
    z_phot, z_spec = made_up(50)
    expected = evaluate(z_phot, z_spec, n_bootstrap=10)
    table = Table({"z": z_spec})
    assert evaluate(list(z_phot), table["z"], n_bootstrap=10) == expected
    assert evaluate(torch.tensor(z_phot), torch.tensor(z_spec), n_bootstrap=10) == expected
    single = evaluate(torch.tensor(z_phot, dtype=torch.float32), z_spec, n_bootstrap=10)
    assert np.isclose(single["sigma_mad"], expected["sigma_mad"], rtol=1e-4)


def test_evaluate_is_json_even_where_a_number_does_not_exist():
    for n in (1, 2, 3):
        result = evaluate(np.full(n, 0.11), np.full(n, 0.1), n_bootstrap=20)
        assert result["r2"] is None and json.loads(json.dumps(result, allow_nan=False)) == result
    assert evaluate([0.1, 0.2], [0.1, 0.3], n_bootstrap=0)["errors"] == {}


def test_seed_settles_the_errors():
    z_phot, z_spec = made_up(300)
    errors = [evaluate(z_phot, z_spec, 50, seed)["errors"]["mae"] for seed in (1, 1, 2)]
    assert errors[0] == errors[1] != errors[2]


@pytest.mark.parametrize("z_phot,z_spec,sentence", [
    ([0.1, np.nan], [0.1, 0.2], "z_phot is not finite in 1 of 2 rows, the first being row 1"),
    ([0.1, 0.2], [np.inf, 0.2], "z_spec is not finite in 1 of 2 rows, the first being row 0"),
    ([0.1, 0.2], MaskedColumn([0.1, 0.2], mask=[False, True]), "z_spec is not finite in 1 of 2"),
    ([0.1, 0.2, 0.3], [0.1, 0.2], "z_phot has 3 rows and z_spec 2"),
    ([0.1, 0.2], [0.1, -9999.], "z_spec is -9999 in row 1"),
    ([[0.1], [0.2]], [0.1, 0.2], r"z_phot has the shape \(2, 1\)"),
    ([], [], "z_spec is empty"),
    (["a", "b"], [0.1, 0.2], "z_phot does not hold numbers")])
def test_bad_redshifts_get_one_sentence(z_phot, z_spec, sentence):
    draw = [lambda p, s, plot=plot: plot(s, p) for plot in (density_scatter, plot_residuals)]
    for function in (evaluate, *draw):
        with pytest.raises(InputError, match=sentence) as error: function(z_phot, z_spec)
        assert "\n" not in str(error.value)


def test_many_galaxies_are_evaluated_in_little_time_and_memory():
    z_phot, z_spec = made_up(66_000)
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    evaluate(z_phot, z_spec, n_bootstrap=200)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150*1024  # kB
    assert time.process_time() - start < 10
    start = time.process_time()
    evaluate(z_phot[:2000], z_spec[:2000], n_bootstrap=1000)
    assert time.process_time() - start < 3


def test_paired_bootstrap_is_antisymmetric_and_refuses_a_ratio_to_zero():
    z_phot, z_spec = made_up(500)
    other = z_phot + np.random.default_rng(1).normal(0., 0.005, 500)
    for metric in METRICS:
        one, two = (paired_bootstrap(*pair, z_spec, metric, n_bootstrap=50)
                    for pair in ((z_phot, other), (other, z_phot)))
        assert np.isclose(one["difference"], -two["difference"])
        assert np.isclose(one["low"], -two["high"])
        assert json.loads(json.dumps(one, allow_nan=False)) == one
    with pytest.raises(InputError, match="can be zero; compare by difference"):
        paired_bootstrap(z_phot, z_spec, z_spec, "sigma_mad", how="ratio", n_bootstrap=10)
    with pytest.raises(InputError, match="there is no 'quotient'"):
        paired_bootstrap(z_phot, other, z_spec, how="quotient")


# Plots

def test_the_whole_set_is_drawn_in_under_five_seconds(tmp_path):
    z_phot, z_spec = made_up(659_857)
    start = time.process_time()  # of this process: what others do on the machine does not count
    ax = density_scatter(z_spec, z_phot, "all galaxies")
    ax.figure.savefig(tmp_path/"scatter.png")
    elapsed = time.process_time() - start
    assert len(ax.collections[0].get_offsets()) == 659_857
    assert elapsed < 5, f"{elapsed:.1f} s"


def test_vector_figures_stay_small(tmp_path):
    z_phot, z_spec = made_up(20_000)
    density_scatter(z_spec, z_phot).figure.savefig(tmp_path/"scatter.pdf")
    assert (tmp_path/"scatter.pdf").stat().st_size < 300_000


@pytest.mark.parametrize("z_phot,z_spec", [
    ([0.1], [0.1]), ([0.1, 0.1], [0.1, 0.1]), ([9., 9.], [0.1, 0.2]),
    (np.zeros(30), np.linspace(0, 1, 30))])
def test_odd_predictions_can_be_drawn(z_phot, z_spec, tmp_path, recwarn):
    density_scatter(z_spec, z_phot).figure.savefig(tmp_path/"scatter.png")
    plot_residuals(z_spec, z_phot).figure.savefig(tmp_path/"residuals.png")
    assert not [str(w.message) for w in recwarn]


def test_density_counts_every_point():
    rng = np.random.default_rng(0)
    x, y = rng.random((2, 100_000))
    assert np.isclose(np.median(point_density(x, y, 0.02, (-0.2, 1.2))), 100_000, rtol=0.02)


def test_axes_given_are_drawn_into_and_global_style_stays():
    before, (_, ax) = dict(plt.rcParams), plt.subplots()
    z_phot, z_spec = made_up(100)
    assert density_scatter(z_spec, z_phot, ax=ax, colorbar=False) is ax
    assert plot_losses({"epoch": [0, 1], "train_loss": [2, 1]}, ax=ax) is ax
    assert len(plt.get_fignums()) == 1 and dict(plt.rcParams) == before


def test_patch_masks_lie_where_the_autoencoder_puts_them():
    image = torch.arange(64.).reshape(1, 1, 8, 8)
    patches = torch.nn.functional.unfold(image, 2, stride=2).transpose(1, 2)  # (1, 16, 4)
    mask = np.random.default_rng(0).random((1, 16)) < 0.5
    masked = np.sort(patches[0][mask[0]].flatten().numpy())
    assert np.array_equal(np.sort(image[0, 0].numpy()[mask_to_pixels(mask, 8)[0]]), masked)


def test_reconstructions_take_tensors_and_few_galaxies():
    images, masks = torch.rand(2, 5, 32, 32), torch.ones(2, 64)
    figure = plot_reconstructions(images, masks, images*0.5, n=6, keep_visible=False)
    assert len(figure.axes) == 6


def test_real_galaxies_are_yellow_to_red(shared_data):
    path = shared_data/"sdss-stamps"/"stamps_r20.npz"
    if not path.exists(): pytest.skip(f"needs the SDSS galaxies of {path}")
    cube = np.load(path, allow_pickle=False)["cube"].transpose(0, 3, 1, 2)
    colours = colour_image(cube[:, :, 28:37, 28:37]).mean(axis=(1, 2))
    assert np.all(np.median(colours[:, 0] - colours[:, 2]) > 20)


# Baselines

QUICK = BASELINES | {"gradient boosting": partial(gradient_boosting, models=1)}


def made_up_magnitudes(n, seed=0):
    "Magnitudes (n, 5) whose colours follow the redshift, and the redshifts (n,)."
    rng = np.random.default_rng(seed)
    z = rng.gamma(3., 0.04, n).clip(0.01, 0.5)
    colours = np.stack([2.7 + 0*z, 0.75 + 2.7*z, 0*z, -0.35 - 0.6*z, -0.65 - z], axis=1)
    r = rng.normal(17.2 + 5*np.log10(z/0.1), 0.8)
    return r[:, None] + colours + rng.normal(0., 0.03, (n, 5)), z


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_follow_the_redshift_and_repeat_themselves(name):
    magnitudes, z_spec = made_up_magnitudes(700)
    arguments = magnitudes[:500], z_spec[:500], magnitudes[500:]
    z_phot = QUICK[name](*arguments, seed=3)
    assert z_phot.shape == (200,) and np.array_equal(z_phot, QUICK[name](*arguments, seed=3))
    result = evaluate(z_phot, z_spec[500:], n_bootstrap=0)
    assert result["r2"] > 0.8 and abs(result["median_bias"]) < 0.005
    single, listed = magnitudes[:500].astype(np.float32), list(z_spec[:500])
    one = QUICK[name](single, listed, magnitudes[500:501])
    assert one.shape == (1,) and np.isclose(one[0], z_phot[0], atol=0.02)
    outside = QUICK[name](*arguments[:2], magnitudes[500:510] + np.array([5, -5, 3, 0, 9]))
    assert np.all((outside >= z_spec[:500].min() - 1e-6) & (outside <= z_spec[:500].max() + 1e-6))


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("spoil,sentence", [
    (lambda train, z, test: (np.where(np.arange(60)[:, None] == 7, np.nan, train), z, test),
     "training magnitudes are not finite in 1 of 60 rows, the first being row 7"),
    (lambda train, z, test: (train, z, np.where(np.eye(60)[:, :5] == 1, np.inf, test)),
     "test magnitudes are not finite in 5 of 60 rows, the first being row 0"),
    (lambda train, z, test: (train, z[:-1], test),
     "magnitudes of 60 training galaxies and redshifts of 59"),
    (lambda train, z, test: (train, np.where(z == z[4], np.nan, z), test),
     "z_spec is not finite in 1 of 60 rows, the first being row 4"),
    (lambda train, z, test: (train[:20], z[:20], test), "20 training galaxies are too few"),
    (lambda train, z, test: (train, z, test[:, :4]), r"test magnitudes have the shape \(60, 4\)")])
def test_bad_input_of_the_baselines_gets_one_sentence(name, spoil, sentence):
    magnitudes, z_spec = made_up_magnitudes(60)
    with pytest.raises(InputError, match=sentence):
        BASELINES[name](*spoil(magnitudes, z_spec, magnitudes))


def test_baselines_on_the_main_galaxy_sample(shared_data):
    path = shared_data/"catalogs"/"SDSS_MGS.train"
    if not path.exists(): pytest.skip(f"needs the SDSS galaxies of {path}")
    table = np.loadtxt(path)
    magnitudes, z_spec = table[:, 1:6], table[:, 0]
    for name, baseline in BASELINES.items():
        z_phot = baseline(magnitudes[:4000], z_spec[:4000], magnitudes[4000:])
        assert 0.012 < METRICS["sigma_mad"](z_phot, z_spec[4000:]) < 0.0165, name


def test_no_baseline_looks_at_the_test_galaxies_together():
    magnitudes, z_spec = made_up_magnitudes(300)
    for name, baseline in QUICK.items():
        together = baseline(magnitudes[:200], z_spec[:200], magnitudes[200:])
        half = baseline(magnitudes[:200], z_spec[:200], magnitudes[200:250])
        assert np.allclose(together[:50], half, atol=1e-9), name
