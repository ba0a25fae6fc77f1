"What would disturb the whole story: real SDSS stamps, from the file to reconstructions and redshifts."
from dataclasses import replace

import numpy as np
import pytest
import torch

from astromae.batches import centre_crop
from astromae.cli import main
from astromae.dataset import StampSet, import_arrays
from astromae.errors import InputError
from astromae.formats import import_stamps
from astromae.mae import MAEConfig, reconstruct
from astromae.models import Preprocessing, save_model
from astromae.predict import predict
from astromae.redshift import ARCHITECTURES, RedshiftNetwork
from astromae.survey import BANDS, SKY_NOISE, flux_to_mag
from astromae.training import PRETRAIN_PRESETS, pretrain

MAE = MAEConfig(encoder="pcm", width=48, depth=2, decoder_width=48, decoder_depth=1)
TRAIN, WATCH = np.arange(90), np.arange(90, 114)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def stamps(shared_data, tmp_path_factory):
    "114 galaxies brighter than r = 20, without redshifts."
    folder = tmp_path_factory.mktemp("real")/"stamps"
    return import_stamps(shared_data/"sdss-stamps"/"stamps_r20.npz", folder)


@pytest.fixture(scope="module")
def thirty(shared_data, tmp_path_factory):
    "Thirty galaxies with magnitudes, dereddened; one of them has a redshift."
    with np.load(shared_data/"sdss-stamps"/"sdss30_dereddened.npz") as arrays:
        table = {name: arrays[name] for name in ("ra", "dec", "z_spec")}
        values = dict(zip(arrays["tabular_keys"].tolist(), arrays["tabular"].T))
        table |= {f"mag_{band}": values[f"dered_{band}"] for band in BANDS if f"dered_{band}" in values}
        return import_arrays(arrays["cube"], table, tmp_path_factory.mktemp("thirty")/"stamps")


@pytest.fixture(scope="module")
def pretrained(stamps, tmp_path_factory):
    "A small autoencoder after 360 steps."
    settings = replace(PRETRAIN_PRESETS["demo"], epochs=120, batch_size=30, warmup_epochs=5, peak_rate=3e-3)
    return pretrain(stamps, TRAIN, WATCH, tmp_path_factory.mktemp("run"), MAE, settings, device="cpu",
                    in_memory=True, progress=False)


@pytest.fixture(scope="module")
def restored(stamps, pretrained):
    "Galaxies that were not trained on: true and restored in nanomaggies, and which pixels were hidden."
    model, preprocessing = pretrained.model, pretrained.preprocessing
    true = centre_crop(torch.tensor(stamps.images[WATCH]), 32)
    seen, noise = preprocessing.images(true), torch.rand(24, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): mask = model(seen, noise)[2]
    hidden = mask.view(-1, 1, 4, 4).bool().repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad(): painted = preprocessing.images.inverse(reconstruct(model, seen, noise))
    return true, painted, hidden.expand_as(true)


def test_the_reconstruction_error_falls(pretrained):
    losses = pretrained.history["valid_loss"].to_numpy()
    assert np.isfinite(losses).all()
    assert losses[-5:].mean() < 0.85*losses[:5].mean()


def test_reconstructions_are_nanomaggies(restored):
    true, painted, hidden = restored
    assert torch.isfinite(painted).all()
    torch.testing.assert_close(painted[~hidden], true[~hidden], rtol=1e-3, atol=1e-4)
    assert (painted[hidden] != true[hidden]).float().mean() > 0.99
    assert painted[hidden].abs().max() < 10*true.abs().max()


def test_unseen_galaxies_come_out_better_than_without_a_network(stamps, pretrained, restored):
    "Closer than an empty sky, the mean training galaxy, and each stamp's own mean, in what the network sees."
    true, painted, hidden = restored
    see = pretrained.preprocessing.images
    mean = see(centre_crop(torch.tensor(stamps.images[TRAIN]), 32)).mean(0, keepdim=True)
    target = see(true)
    def error(guess): return float((guess.expand_as(target) - target)[hidden].square().mean())
    visible = (~hidden).float()
    own = (target*visible).sum((2, 3), keepdim=True)/visible.sum((2, 3), keepdim=True)
    ours = error(see(painted))
    assert ours < min(error(see(torch.zeros_like(true))), error(mean), error(own))


def test_restored_galaxies_are_where_galaxies_are(restored):
    "Hidden patches in the middle are painted brighter than hidden patches in the corners."
    true, painted, hidden = restored
    middle = torch.zeros_like(hidden)
    middle[:, :, 8:24, 8:24] = True
    corner = torch.zeros_like(hidden)
    for rows in (slice(0, 8), slice(24, 32)):
        for columns in (slice(0, 8), slice(24, 32)): corner[:, :, rows, columns] = True
    for band in (1, 2, 3):
        inside, outside = (painted[:, band][(hidden & part)[:, band]].median() for part in (middle, corner))
        assert inside > outside + SKY_NOISE[band]/2


def blind(folder):
    "A small untrained network that sees no magnitudes, saved."
    torch.manual_seed(0)
    config = replace(ARCHITECTURES["pcm-ViT-inception"], width=48, depth=2, features=64, join_width=64)
    save_model(folder, RedshiftNetwork(config), Preprocessing())
    return folder


def test_redshifts_of_real_stamps(stamps, thirty, tmp_path):
    for real, n in ((stamps, 114), (thirty, 30)):
        for views in (1, 8):
            table = predict(blind(tmp_path/"model"), real.folder, views=views, device="cpu")
            assert len(table) == n and np.isfinite(table["z_phot"]).all()
        assert table["objid"].tolist() == list(range(n))
        np.testing.assert_array_equal(table["ra"], real.catalogue["ra"])
        assert np.std(table["z_phot"]) > 0
    assert np.isfinite(table["z_spec"]).sum() == 1


def test_a_network_that_needs_magnitudes(stamps, thirty, tmp_path):
    "The 114 galaxies have none, which is said; the thirty have."
    config = replace(ARCHITECTURES["pcm-AstroMAE"], width=48, depth=2, features=64, magnitude_width=64,
                     join_width=64)
    model = (RedshiftNetwork(config), Preprocessing())
    with pytest.raises(InputError, match="magnitudes of rows .* are not finite"):
        predict(model, stamps, device="cpu")
    magnitudes = thirty.magnitudes()
    assert np.isfinite(magnitudes).all()
    assert np.isfinite(predict(model, thirty, device="cpu")["z_phot"]).all()
    y, x = np.mgrid[:64, :64] - 32
    aperture = flux_to_mag(thirty.images[..., np.hypot(x, y) < 12].sum(-1))
    assert np.abs(np.median((aperture - magnitudes)[:, 1:4], axis=0)).max() < 0.5


def test_the_command_line_on_real_stamps(shared_data, tmp_path, monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr("sys.argv", ["astromae", *map(str, words)])
        try: return main() or 0
        except SystemExit as stop: return stop.code or 0
    with np.load(shared_data/"sdss-stamps"/"stamps_of_frames_r20.npz") as arrays:
        np.savez(tmp_path/"real.npz", cube=arrays["cube"], labels=arrays["meta"])
    assert call("import", tmp_path/"real.npz", tmp_path/"stamps", "--dtype", "float16") == 0
    assert call("predict", blind(tmp_path/"model"), tmp_path/"stamps", tmp_path/"z.fits",
                "--device", "cpu") == 0
    assert len(StampSet.open(tmp_path/"stamps").verify()) > 20
    assert call("finetune", tmp_path/"stamps", tmp_path/"run", "--network", "Henghes et al.",
                "--experiment", "accuracy") == 2
    assert "has no z_spec" in capsys.readouterr().err
