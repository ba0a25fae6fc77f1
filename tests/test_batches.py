"What would disturb the story of 04_batches: bad input, property checks, fastai's own ways, real stamps."
import json, os, subprocess, sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from astropy.table import Table
import fastai.callback.schedule  # gives Learner its lr_find
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.distributed import DistributedDL
from fastai.learner import Learner
from torch import nn

from astromae.batches import (BatchLoader, Normalisation, augment, centre_crop, edge_noise,
                              fit_normalisation, reach, turn)
from astromae.catalogue import required_columns
from astromae.dataset import write_stamp_set
from astromae.errors import InputError
from astromae.formats import import_stamps

DATA = Path(os.environ.get("ASTROMAE_DATA", Path(__file__).parents[1].parent/"shared"/"data"))


def make(folder, n=40, size=64, dtype="float32", **columns):
    rng = np.random.default_rng(0)
    table = Table({name: rng.uniform(1, 2, n) for name in required_columns()})
    table["objid"] = np.arange(n)
    for name, values in columns.items(): table[name] = values
    images = rng.standard_normal((n, 5, size, size)).astype(np.float32)
    return write_stamp_set(folder, [(images, table)], n, dtype=dtype)


@pytest.fixture(scope="module")
def stamps(tmp_path_factory): return make(tmp_path_factory.mktemp("stamps")/"set")


def loader(stamps, indices=range(40), batch_size=16, *args, **settings):
    return BatchLoader(stamps, indices, batch_size, *args, **({"device": "cpu"} | settings))


def refused(message, function, *args, **kwargs):
    with pytest.raises(InputError) as caught: function(*args, **kwargs)
    sentence = str(caught.value)
    assert message in sentence
    assert "\n" not in sentence and sentence.endswith(".")


# --- turning

@pytest.mark.parametrize("size", [31, 32, 33])
@pytest.mark.parametrize("shape", [(64, 64), (63, 63), (64, 63), (60, 70)])
def test_the_galaxy_stays_on_its_pixel(shape, size):
    images = torch.zeros(50, 1, *shape)
    images[..., shape[0]//2, shape[1]//2] = 1
    angles, flips = torch.rand(50)*360, torch.randint(0, 2, (50, 2))*2. - 1
    for how in ("bilinear", "bicubic", "nearest"):
        got = turn(images, angles, flips, size, how)
        assert torch.allclose(got[..., size//2, size//2], torch.ones(50, 1), atol=1e-4)
        assert torch.allclose(got.flatten(1).argmax(1), torch.tensor(size//2*size + size//2))


@pytest.mark.parametrize("max_rotation", [0, 5, 20, 45, 90, 180])
@pytest.mark.parametrize("size", [31, 32])
def test_nothing_beyond_reach_is_seen(size, max_rotation):
    side = reach(size, max_rotation)
    far = torch.full((500, 1, side + 20, side + 20), 1e6)
    middle = centre_crop(far, side)
    middle.zero_()
    assert augment(far, size, max_rotation).abs().max() == 0
    assert augment(middle.contiguous(), size, max_rotation).shape == (500, 1, size, size)


def test_the_cropped_stamp_turns_as_the_whole_one():
    images = torch.randn(64, 5, 64, 64)
    angles, flips = torch.rand(64)*90 - 45, torch.randint(0, 2, (64, 2))*2. - 1
    whole, part = turn(images, angles, flips, 32), turn(centre_crop(images, 48), angles, flips, 32)
    assert torch.allclose(whole, part, atol=1e-4)


def test_every_image_is_turned_by_itself():
    images = torch.randn(1, 5, 64, 64).expand(64, -1, -1, -1)
    got = augment(images)
    assert len(torch.unique(got.flatten(1), dim=0)) == 64
    flipped = augment(images, max_rotation=0)
    assert len(torch.unique(flipped.flatten(1).round(decimals=2), dim=0)) == 4


@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_the_noise_has_its_standard_deviation(noise):
    got = augment(torch.zeros(256, 5, 48, 48), noise=noise)
    assert got.std().item() == pytest.approx(noise, rel=0.01)
    assert got.mean().item() == pytest.approx(0, abs=noise/100)


# --- normalisation

def test_statistics_know_nothing_of_other_rows():
    data = np.random.default_rng(0).standard_normal((100, 5, 40, 40)).astype(np.float32)
    for kind in ("standard", "arcsinh"):
        before = fit_normalisation(data, range(50), kind)
        spoilt = data.copy()
        spoilt[50:] = np.nan
        assert fit_normalisation(spoilt, range(50), kind) == before


def test_a_sample_is_enough():
    data = np.random.default_rng(0).normal(20, 1.5, (30_000, 5))
    got = fit_normalisation(data, range(30_000), "standard", sample=5000)
    assert got.mean == pytest.approx([20]*5, abs=0.1) and got.std == pytest.approx([1.5]*5, abs=0.05)


def test_half_precision_stamps_are_fitted_in_full(tmp_path):
    got = fit_normalisation(make(tmp_path/"half", dtype="float16"), range(40), "arcsinh")
    assert got.softening == pytest.approx([1]*5, abs=0.03)


@pytest.mark.parametrize("kind", ["none", "standard", "arcsinh"])
def test_normalisations_survive_json(kind, stamps):
    fitted = fit_normalisation(stamps, range(40), kind)
    assert Normalisation(**json.loads(json.dumps(asdict(fitted)))) == fitted
    x = torch.randn(4, 5, 8, 8)
    assert torch.allclose(fitted.inverse(fitted(x)), x, atol=1e-5)


def test_normalisations_that_make_no_sense(stamps):
    refused("no normalisation 'log'", Normalisation, "log")
    refused("for 3 bands and not for 5", Normalisation("standard", [0]*3, [1]*3), torch.zeros(2, 5))
    refused("not finite or all the same", fit_normalisation, np.zeros((10, 5)), range(10), "standard")
    refused("10 of 10 galaxies have no finite magnitudes", fit_normalisation, np.full((10, 5), np.nan),
            range(10), "standard")
    refused("not finite or all the same", fit_normalisation, np.zeros((10, 5)), [], "standard")
    refused("needs images", fit_normalisation, np.zeros((10, 5)), range(10), "arcsinh")
    refused("smaller than the 80 x 80", fit_normalisation, stamps, range(10), "standard", size=80)


# --- the loader

@pytest.mark.parametrize("settings, message", [
    ({"targets": "labels"}, "choose images or redshift"),
    ({"indices": [40]}, "row numbers from 0 to 39"),
    ({"indices": [-1]}, "row numbers from 0 to 39"),
    ({"indices": [0.5]}, "row numbers from 0 to 39"),
    ({"indices": [[1, 2]]}, "row numbers from 0 to 39"),
    ({"indices": []}, "one or more row numbers from 0 to 39"),
    ({"indices": [1, 2], "world": 3}, "2 galaxies are fewer than the 3"),
    ({"drop_last": True, "batch_size": 50}, "40 galaxies are fewer than the 50"),
    ({"size": 48}, "64 x 64 pixels are smaller than the 70 x 70"),
    ({"size": 65, "max_rotation": 0}, "smaller than"),
    ({"size": 65, "train": False}, "smaller than the 65 x 65"),
    ({"device": "gpuu"}, "'gpuu' cannot be used"),
])
def test_settings_that_make_no_sense(stamps, settings, message):
    refused(message, loader, stamps, **settings)


def test_a_mask_of_rows_does_as_well(stamps):
    mask = np.arange(40) % 2 == 1
    assert loader(stamps, mask).indices.tolist() == list(range(1, 40, 2))


def test_stamps_as_small_as_the_image(tmp_path):
    small = make(tmp_path/"small", size=32)
    refused("32 x 32 pixels are smaller than the 48 x 48", loader, small)
    assert loader(small, max_rotation=0).one_batch()[0].shape == (16, 5, 32, 32)
    assert loader(small, train=False).one_batch()[0].shape == (16, 5, 32, 32)


@pytest.mark.parametrize("in_memory", [True, False])
def test_pixels_spoilt_since_the_set_was_written_are_named(tmp_path, in_memory):
    stamps = make(tmp_path/"set")
    pixels = np.load(stamps.folder/"images.npy", mmap_mode="r+")
    pixels[[31, 7], 2, 32, 32] = np.nan, np.inf
    pixels.flush()
    refused("galaxies have no finite pixels, first in the rows 7, 31;",
            lambda: list(loader(stamps, batch_size=40, in_memory=in_memory)))


@pytest.mark.parametrize("name, what", [("z_spec", "redshift (z_spec)"), ("mag_g", "magnitudes (mag_*)")])
def test_galaxies_without_labels_are_named(tmp_path, name, what):
    values = np.where(np.isin(np.arange(40), [5, 30]), np.nan, 0.1)
    stamps = make(tmp_path/"set", **{name: values})
    refused(f"2 of 40 galaxies have no finite {what}, first in the rows 5, 30;", loader, stamps,
            targets="redshift")
    assert loader(stamps).one_batch()[0].shape == (16, 5, 32, 32)


@pytest.mark.parametrize("targets", ["images", "redshift"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_memory_and_file_agree_bit_for_bit(tmp_path, dtype, targets):
    stamps = make(tmp_path/"set", dtype=dtype)
    normalisation = fit_normalisation(stamps, range(40), "arcsinh")
    pair = [list(loader(stamps, range(39, 0, -1), targets=targets, noise=0.1, in_memory=in_memory,
                        normalisation=normalisation)) for in_memory in (True, False)]
    for first, second in zip(*pair):
        assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(first, second))


def test_seeds_epochs_and_ranks_are_turned_differently(stamps):
    def first(epoch=0, **settings):
        one = loader(stamps, range(12), 4, **settings).new(get_idxs=lambda: np.arange(4))
        one.set_epoch(epoch)
        return one.one_batch()[0]
    assert torch.equal(first(), first())
    for other in (first(epoch=1), first(seed=7), first(rank=1, world=3)):
        assert not torch.equal(first(), other)


@pytest.mark.parametrize("n", [7, 10, 40])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("train, drop_last", [(True, False), (True, True), (False, False)])
def test_shares_are_disjoint_and_equal(stamps, n, world, train, drop_last):
    ranks = [loader(stamps, range(40 - n, 40), 1 if n < 10 else 2, train=train, drop_last=drop_last,
                    rank=rank, world=world) for rank in range(world)]
    shares = [rank.get_idxs() for rank in ranks]
    assert len({len(rank) for rank in ranks}) == 1
    assert [sum(len(batch[0]) for batch in rank) for rank in ranks] == [
        min(len(share), len(ranks[0])*ranks[0].bs) for share in shares]
    seen = np.concatenate(shares)
    if train: assert len(set(seen)) == len(seen) == n//world*world
    else: assert set(seen) == set(range(n)) and len(seen) < n + world


def test_processes_shuffle_alike_whatever_torch_and_numpy_were_seeded(stamps):
    torch.manual_seed(1), np.random.seed(1)
    first = [batch[0] for batch in loader(stamps, noise=1.)]
    torch.manual_seed(2), np.random.seed(2)
    assert all(torch.equal(a, b[0]) for a, b in zip(first, loader(stamps, noise=1.)))


# --- in a Learner

class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 1)
    def forward(self, images, magnitudes): return self.layer(magnitudes + images.mean((2, 3)))[:, 0]


def learner(stamps, *args, **settings):
    train = loader(stamps, range(30), 8, "redshift", in_memory=True)
    valid = loader(stamps, range(30, 40), 4, "redshift", train=False)
    return Learner(DataLoaders(train, valid, device=torch.device("cpu")), Sum(),
                   nn.functional.mse_loss, *args, **settings)


def test_a_learner_with_its_progress_bar(stamps, capsys):
    learn = learner(stamps)
    assert any(isinstance(callback, ProgressCallback) for callback in learn.cbs)
    learn.fit(3, 0.01)
    assert len(learn.recorder.values) == 3 and learn.dls.train.epoch == 3
    assert len(learn.recorder.lrs) == 3*4


def test_predictions_come_in_the_order_of_the_rows(stamps):
    learn = learner(stamps)
    with learn.no_bar():
        for which, rows in ((1, range(30, 40)), (0, range(30))):
            predicted, redshift = learn.get_preds(ds_idx=which)
            assert np.array_equal(redshift, stamps.redshifts()[list(rows)])
            assert predicted.shape == (len(rows),)
        (images, magnitudes), _, _ = learn.get_preds(with_input=True)
        assert images.shape == (10, 5, 32, 32) and magnitudes.shape == (10, 5)
        loss, = learn.validate()
    predicted, redshift = learn.get_preds()
    assert loss == pytest.approx(float(((predicted - redshift)**2).mean()), rel=1e-4)


def test_what_fastai_asks_a_loader(stamps):
    dls = learner(stamps).dls
    assert (dls.n_inp, dls.bs, dls.train.n_inp, len(dls.train)) == (2, 8, 2, 4)
    assert loader(stamps).n_inp == 1
    assert isinstance(dls.train, DistributedDL)
    assert dls.device == torch.device("cpu") == dls.train.device
    assert not dls.valid.new(shuffle=False, drop_last=False).shuffle
    x, target = loader(stamps).one_batch()
    assert x is target


def test_the_learning_rate_finder_runs(stamps):
    learn = learner(stamps)
    with learn.no_bar(): learn.lr_find(num_it=10, show_plot=False)


# --- real stamps

def test_the_noise_of_real_stamps(tmp_path):
    path = DATA/"sdss-stamps"/"stamps_r20.npz"
    if not path.exists(): pytest.skip(f"{path} is not here: real SDSS stamps are not part of the project")
    stamps = import_stamps(path, tmp_path/"set")
    measured = edge_noise(torch.tensor(stamps.images))
    assert measured.numpy() == pytest.approx([0.039, 0.0145, 0.028, 0.039, 0.148], rel=0.15)
    normalisation = fit_normalisation(stamps, range(100), "arcsinh")
    x, _ = loader(stamps, range(114), 114, normalisation=normalisation, train=False).one_batch()
    assert x.std((0, 2, 3)).numpy() == pytest.approx([1]*5, abs=0.2)
