"""What would disturb the story of 21_training: two processes, a power cut, the paper's numbers.

The file is also the program that the tests start: `torchrun ... test_training.py share FOLDER`
trains both phases in several processes, `python test_training.py kill FOLDER` is killed.
"""
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from astropy.table import Table
from fastai.callback.core import Callback
from fastai.torch_core import get_model, rank_distrib
from safetensors.torch import load_file, save_file
from timm.layers import BatchNormAct2d

import astromae.training as training
from astromae.batches import centre_crop
from astromae.catalogue import required_columns
from astromae.dataset import StampSet, write_stamp_set
from astromae.mae import MAEConfig
from astromae.errors import InputError
from astromae.models import load_model
from astromae.predict import predict
from astromae.redshift import ARCHITECTURES, RedshiftNetwork
from astromae.schedules import decaying_restarts, rate_curve, warmup_cosine
from astromae.training import (FINETUNE_PRESETS, PRETRAIN_PRESETS, FinetuneSettings,
                               PretrainSettings, finetune, pretrain)

MAE = MAEConfig(encoder="pcm", width=48, depth=2, decoder_width=48, decoder_depth=1)
SMALL = dict(features=64, magnitude_width=64, join_width=64)
ASTRO = replace(ARCHITECTURES["pcm-AstroMAE"], **SMALL)
PRETRAIN = replace(PRETRAIN_PRESETS["demo"], epochs=5, batch_size=16, warmup_epochs=2,
                   checkpoint_every=2)
FINETUNE = replace(FINETUNE_PRESETS["demo"], epochs=5, batch_size=16, cycle=2, checkpoint_every=2)
TRAIN, WATCH = np.arange(40), np.arange(40, 56)
QUIET = dict(device="cpu", progress=False)


def make(folder, n=56):
    "Noise with a bright spot on the galaxy's pixel; every redshift is another."
    rng = np.random.default_rng(0)
    images = rng.normal(0, 0.1, (n, 5, 52, 52)).astype(np.float32)
    images[:, :, 24:29, 24:29] += rng.uniform(1, 9, (n, 5, 1, 1))
    table = Table({name: rng.uniform(15, 20, n) for name in required_columns()})
    table["objid"], table["z_spec"] = np.arange(n), rng.permutation(n)/100 + 0.01
    return write_stamp_set(folder, [(images, table)], n)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder with stamps and an unbroken run of each phase."
    home = tmp_path_factory.mktemp("home")
    make(home/"stamps")
    both_phases(home, "unbroken")
    return home


def both_phases(home, name, cbs=()):
    stamps, folder = StampSet.open(home/"stamps"), home/name
    pretrained = pretrain(stamps, TRAIN, WATCH, folder/"pretraining", MAE, PRETRAIN, cbs=cbs, **QUIET)
    return pretrained, finetune(stamps, TRAIN, WATCH, folder/"astromae", ASTRO, FINETUNE,
                                pretrained.folder, cbs=cbs, **QUIET)


def start(*command, **environment):
    "Run this file as a program, on one thread, without a GPU."
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run([sys.executable, *map(str, command)], env=environment, text=True,
                          capture_output=True, timeout=300)


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- two processes

SHARED = replace(FINETUNE, epochs=2, cycle=2, noise=0., max_rotation=0., flip=False)
PLAIN = replace(ARCHITECTURES["plain-ViT-magnitude"], **SMALL)


class Witness(Callback):
    "Keep what this process saw in every epoch, and the parameters that it ended with."
    order = 70
    def __init__(self, file): self.file, self.seen = file, []
    def before_batch(self):
        if self.training: self.seen.append(torch.stack([torch.full_like(self.key, self.epoch), self.key]))
    @property
    def key(self): return self.yb[0].flatten(1)[:, 0] if self.yb[0].ndim > 1 else self.yb[0]
    def after_fit(self):
        parameters = {name: p.detach().clone() for name, p in get_model(self.model).named_parameters()}
        save_file({**parameters, "seen": torch.cat(self.seen, 1).contiguous()},
                  f"{self.file}-{rank_distrib()}.safetensors")


def share(home, where="shared", **where_to):
    "Both phases, without anything random in the fine-tuning."
    written, folder, settings = [], home/where, dict(QUIET, **where_to)
    def audit(event, arguments):
        if event in ("os.mkdir", "os.rename") or event == "open" and "w" in str(arguments[1]):
            if str(arguments[0]).startswith(str(folder)): written.append(f"{event} {arguments[0]}")
    sys.addaudithook(audit)
    stamps = StampSet.open(home/"stamps")
    mae = replace(MAE, encoder="plain")
    still = replace(PRETRAIN, epochs=2, warmup_epochs=1, max_rotation=0., flip=False, normalisation="none")
    pretrain(stamps, TRAIN, WATCH, folder/"pretraining", mae, still,
             cbs=[Witness(home/f"{where}-pretraining")], **settings)
    pretrain(stamps, TRAIN, WATCH, folder/"pcm", MAE, replace(PRETRAIN, epochs=2, warmup_epochs=1),
             cbs=[Witness(home/f"{where}-pcm")], **settings)
    # fine-tuning without a random number is the same training in one process and in two
    finetune(stamps, TRAIN, WATCH, folder/"plain", PLAIN, SHARED, home/"alone"/"pretraining",
             cbs=[Witness(home/f"{where}-plain")], **settings)
    finetune(stamps, TRAIN, WATCH, folder/"astromae", ASTRO, replace(SHARED, noise=0.1), folder/"pcm",
             cbs=[Witness(home/f"{where}-astromae")], **settings)
    (home/f"{where}-written-{rank_distrib()}.txt").write_text("\n".join(written))


RUNS = ("pretraining", "pcm", "plain", "astromae")


@pytest.fixture(scope="module")
def shared(home):
    "Home with the same runs by one process (`alone`) and by two (`shared`)."
    share(home, "alone")
    done = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2,
                 Path(__file__), "share", home, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-3000:]
    return home


def witnesses(home, run): return [load_file(home/f"shared-{run}-{rank}.safetensors") for rank in (0, 1)]


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_end_with_the_same_weights_which_are_saved(shared, run):
    first, second = witnesses(shared, run)
    saved, _ = load_model(shared/"shared"/run/"model", "cpu")
    for name, parameter in saved.named_parameters():
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], parameter), name
    history = pd.read_csv(shared/"shared"/run/"history.csv")
    assert history["epoch"].tolist() == [0, 1] and np.isfinite(history.to_numpy()).all()


@pytest.mark.parametrize("run", ["pretraining", "plain", "astromae"])
def test_two_processes_share_the_galaxies_between_them(shared, run):
    stamps = StampSet.open(shared/"stamps")
    keys = (centre_crop(stamps.images, 32)[:, 0, 0, 0] if run == "pretraining" else stamps.redshifts())
    shares = [witness["seen"] for witness in witnesses(shared, run)]
    for epoch in (0, 1):
        first, second = (set(seen[1, seen[0] == epoch].tolist()) for seen in shares)
        assert len(first) == len(second) == 20 and not first & second
        assert first | second == set(keys[TRAIN].tolist())


def test_only_the_first_process_writes(shared):
    first, second = ((shared/f"shared-written-{rank}.txt").read_text() for rank in (0, 1))
    assert second == ""
    for run in RUNS:
        for name in ("run.json", "history.csv", "checkpoint.safetensors", "model"):
            assert f"{run}/.{name}-" in first


def test_two_processes_train_as_one_does(shared):
    alone, two = (load_model(shared/name/"plain"/"model", "cpu")[0] for name in ("alone", "shared"))
    torch.manual_seed(SHARED.seed)
    fresh = RedshiftNetwork(alone.config)
    for (name, a), b, start in zip(alone.named_parameters(), two.parameters(), fresh.parameters()):
        if not a.requires_grad: continue
        assert (a - b).norm() <= 1e-3*(a - start).norm(), name
    a, b = (pd.read_csv(shared/name/"plain"/"history.csv") for name in ("alone", "shared"))
    assert b["valid_loss"].to_numpy() == pytest.approx(a["valid_loss"].to_numpy(), rel=1e-3)
    assert b["rate"].tolist() == a["rate"].tolist()


@pytest.mark.parametrize("wrong", [
    {"loss": "mes"}, {"interpolation": "bilinaer"}, {"normalisation": "arcsin"}, {"checkpoint_every": 0},
    {"batch_size": 0}, {"seed": -1}, {"epochs": 0}])
def test_settings_that_cannot_be_meant_claim_no_folder(home, tmp_path, wrong):
    stamps, (name, value), begun = StampSet.open(home/"stamps"), *wrong.items(), tmp_path/"run"
    phases = (pretrain, MAE, PRETRAIN), (finetune, ARCHITECTURES["Henghes et al."], FINETUNE)
    for phase, model, settings in phases:
        if not hasattr(settings, name): continue
        with pytest.raises(InputError, match=f"{value}|batch size"):
            phase(stamps, TRAIN, WATCH, begun, model, replace(settings, **wrong), **QUIET)
        assert not begun.exists()


def test_a_model_may_be_read_by_those_who_may_read_other_files(home, tmp_path):
    (tmp_path/"any").touch()
    for file in (home/"unbroken"/"astromae"/"model").iterdir(): assert file.stat().st_mode == (tmp_path/"any").stat().st_mode


@pytest.mark.parametrize("size", [32, 33])
def test_stamps_that_cannot_be_turned_about_their_galaxy(home, size):
    trained = load_model(home/"unbroken"/"astromae"/"model", "cpu")
    images, magnitudes = np.random.default_rng(0).normal(size=(2, 5, size, size)), np.full((2, 5), 18.)
    assert len(predict(trained, images, magnitudes, device="cpu")) == 2
    if size == 33: assert len(predict(trained, images, magnitudes, views=8, device="cpu")) == 2
    else:
        with pytest.raises(InputError, match="33 x 33 pixels, and these are 32 x 32"):
            predict(trained, images, magnitudes, views=8, device="cpu")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_synchronised_layers_are_the_same_function(name, monkeypatch):
    "With their ReLUs, which PyTorch's own exchange of BatchNorm layers leaves out."
    monkeypatch.setattr(training, "num_distrib", lambda: 2)
    network = RedshiftNetwork(replace(ARCHITECTURES[name], depth=1)).eval()
    images, magnitudes = torch.randn(4, 5, 32, 32), torch.randn(4, 5)
    before, parameters = network(images, magnitudes), list(network.parameters())
    assert training.synchronised(network) is network and not any(
        isinstance(layer, torch.nn.SyncBatchNorm) for layer in network.modules()) # the CPU has none
    layers = [type(layer) for layer in network.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    exchanged = training.convert_sync_batchnorm(network)
    assert torch.equal(exchanged(images, magnitudes), before)
    assert all(a is b for a, b in zip(exchanged.parameters(), parameters, strict=True))
    on_gpus = training.synchronised(RedshiftNetwork(replace(ARCHITECTURES[name], depth=1)).to("meta"))
    kinds = [layer for layer in on_gpus.modules() if isinstance(layer, torch.nn.SyncBatchNorm)]
    assert len(kinds) == len(layers)
    assert sum(hasattr(layer, "act") for layer in kinds) == sum(kind is BatchNormAct2d for kind in layers)


# --- a power cut

def die(): os.kill(os.getpid(), signal.SIGKILL)


class Cut(Callback):
    "Die in the middle of an epoch, or between its line in the history and its checkpoint."
    order = 63
    def __init__(self, at, in_the_middle): self.at, self.in_the_middle = at, in_the_middle
    def before_batch(self):
        if self.in_the_middle and (self.epoch, self.training, self.iter) == (self.at, True, 1): die()
    def after_epoch(self):
        if not self.in_the_middle and self.epoch == self.at: die()


def die_while_writing():
    "Die when a checkpoint is on disk, but not yet in the place of the one before."
    save = training.save_file
    def save_and_die(*args):
        save(*args)
        die()
    training.save_file = save_and_die
    return ()


CUTS = (lambda: [Cut(1, True)], lambda: [Cut(3, False)], die_while_writing)


def one_phase(home, phase, cbs=()):
    stamps, folder = StampSet.open(home/"stamps"), home/"killed"/phase
    if phase == "pretraining":
        return pretrain(stamps, TRAIN, WATCH, folder, MAE, PRETRAIN, cbs=cbs, **QUIET)
    return finetune(stamps, TRAIN, WATCH, folder, ASTRO, FINETUNE, home/"unbroken"/"pretraining",
                    cbs=cbs, **QUIET)


def kill(home):
    "Start each phase three times, each in a process of its own that is killed; print what is left."
    torch.set_num_threads(1)
    for phase in ("pretraining", "astromae"):
        for cut in CUTS:
            if not (process := os.fork()):
                one_phase(home, phase, cut())
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            folder = home/"killed"/phase
            print(phase, code, len(pd.read_csv(folder/"history.csv")),
                  training.finished_epochs(folder/"checkpoint.safetensors"))


@pytest.fixture(scope="module")
def killed(home):
    done = start(__file__, "kill", home)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("phase", ["pretraining", "astromae"])
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(home, killed, phase):
    assert [line for line in killed if line.startswith(phase)] == [
        f"{phase} -9 {epochs} {finished}" for epochs, finished in ((1, 0), (4, 2), (4, 2))]
    ended, unbroken = one_phase(home, phase), load_model(home/"unbroken"/phase/"model", "cpu")
    assert same_weights(ended.model, unbroken[0]) and ended.preprocessing == unbroken[1]
    history = pd.read_csv(home/"unbroken"/phase/"history.csv")
    assert ended.history["epoch"].tolist() == [0, 1, 2, 3, 4]
    pd.testing.assert_frame_equal(ended.history.drop(columns="seconds"), history.drop(columns="seconds"),
                                  check_exact=True)


# --- AdamW and the rate

class NoGradient(Callback):
    "Leave AdamW nothing to do but decay."
    def before_step(self):
        for parameter in self.model.parameters():
            if parameter.grad is not None: parameter.grad.zero_()
    def after_fit(self):
        self.groups = self.opt.opt.param_groups
        self.rates = self.recorder.lrs


@pytest.mark.parametrize("phase", ["pretraining", "astromae"])
def test_weight_decay_spares_biases_and_norms(home, tmp_path, phase):
    stamps, spy = StampSet.open(home/"stamps"), NoGradient()
    common = dict(cbs=[spy], **QUIET)
    if phase == "pretraining":
        settings = replace(PRETRAIN, epochs=2, peak_rate=0.5, warmup_epochs=1)
        trained = pretrain(stamps, TRAIN, WATCH, tmp_path, MAE, settings, **common)
    else:
        settings = replace(FINETUNE, epochs=2, rate=5.)
        trained = finetune(stamps, TRAIN, WATCH, tmp_path, ASTRO, settings,
                           home/"unbroken"/"pretraining", **common)
    assert [group["weight_decay"] for group in spy.groups] == [settings.weight_decay, 0]
    assert {group["betas"] for group in spy.groups} == {settings.betas}
    torch.manual_seed(settings.seed)
    shrink = np.prod(1 - np.array(spy.rates)*settings.weight_decay)
    assert shrink < 0.99
    before = type(trained.model)(trained.model.config).state_dict()
    for name, parameter in trained.model.named_parameters():
        if not parameter.requires_grad: continue
        spared = name.endswith(("bias", "_token")) or ".norm" in name or parameter.ndim == 1
        torch.testing.assert_close(parameter.detach(), before[name]*(1 if spared else shrink),
                                   rtol=1e-4, atol=0, msg=name)


def test_the_rate_in_the_history_is_that_of_the_schedule(home):
    "Three steps in an epoch: the history tells the rate of the last of them."
    pretrained, finetuned = (pd.read_csv(home/"unbroken"/phase/"history.csv")["rate"]
                             for phase in ("pretraining", "astromae"))
    for rate, schedule in ((pretrained, warmup_cosine(5, 2, PRETRAIN.peak_rate)),
                           (finetuned, decaying_restarts(5, FINETUNE.rate, 2, 0.995))):
        assert rate.to_numpy() == pytest.approx(rate_curve(schedule, 5, 3)[1][2::3], rel=1e-9)
    assert pretrained.argmax() in (1, 2) and finetuned[2] > finetuned[1]


# --- the paper's numbers

def test_the_presets_are_the_papers_table():
    a, b = PRETRAIN_PRESETS["paper"], FINETUNE_PRESETS["paper"]
    assert (a.batch_size, a.epochs, a.seed) == (2048, 2000, 42)
    assert (b.batch_size, b.epochs, b.seed) == (1024, 700, 42)
    assert (a.betas, a.weight_decay) == ((0.9, 0.95), 0.05)
    assert (b.betas, b.weight_decay) == ((0.9, 0.999), 0.005)
    assert (a.warmup_epochs, a.peak_rate) == (196, 1.17e-3)
    assert (b.rate, b.cycle, b.decay) == (1e-4, 10, 0.995)
    assert (b.loss, b.noise, a.max_rotation, b.max_rotation, a.flip, b.flip) == (
        "mse", 0.05, 45, 45, True, True)
    assert {a.normalisation, b.normalisation, b.magnitude_normalisation} == {"none"}
    assert not b.scale_redshift and not b.whole_image_statistics
    assert (a, b) == (PretrainSettings(), FinetuneSettings())


if __name__ == "__main__": {"share": share, "kill": kill}[sys.argv[1]](Path(sys.argv[2]))
