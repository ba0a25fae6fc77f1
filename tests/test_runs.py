"""What would disturb the story of 51_runs: the cube from end to end, power cuts, bad input.

The file is also the program that a test starts in two processes: `torchrun ... test_runs.py STAMPS RUN`.
"""
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from astropy.table import Table

import astromae
from astromae import comparison, runs
from astromae.comparison import MAGNITUDE_METHODS, Comparison, compare, verdict
from astromae.dataset import StampSet, write_stamp_set
from astromae.errors import InputError
from astromae.experiments import split_rows
from astromae.formats import import_stamps
from astromae.mae import MAEConfig
from astromae.metrics import METRICS
from astromae.predict import embed
from astromae.probes import PROBES
from astromae.redshift import ARCHITECTURES
from astromae.runs import (NETWORKS, PLANS, Plan, plan_named, run_encoder, run_experiment,
                           run_label_efficiency, run_mask_ratio, run_pretraining_epochs)
from astromae.training import FINETUNE_PRESETS, PRETRAIN_PRESETS, load_trained

pytestmark = pytest.mark.usefixtures("one_thread")

GALAXIES = 750                     # of which experiment 1 trains on 7%
QUIET = dict(device="cpu", progress=False)
TINY = Plan(networks=("plain-ViT", "Henghes et al."), seeds=(42,),
            autoencoder=MAEConfig(width=24, depth=1, decoder_width=24, decoder_depth=1),
            pretraining=replace(PRETRAIN_PRESETS["demo"], epochs=1, warmup_epochs=0.5, max_rotation=0.),
            finetuning=replace(FINETUNE_PRESETS["demo"], epochs=1, cycle=1, max_rotation=0.))


def cube(file, n=GALAXIES, size=34):
    "A file of the shape of sdss.npz: made-up galaxies, brighter where they are nearer."
    rng = np.random.default_rng(0)
    z = rng.uniform(0.02, 0.3, n)
    magnitudes = 17 + 8*z[:, None] + np.array([2, 1, 0, -0.3, -0.5])*(1 + z[:, None]) \
        + rng.normal(0, 0.1, (n, 5))
    images = rng.normal(0, 0.05, (n, size, size, 5)).astype(np.float32)
    images[:, size//2 - 2:size//2 + 3, size//2 - 2:size//2 + 3] += \
        10**(0.4*(22.5 - magnitudes[:, None, None]))/25
    labels = Table({"specObjID": np.arange(n), "ra": rng.uniform(0, 360, n),
                    "dec": rng.uniform(-10, 60, n), "z": z.astype(np.float32)})
    for band, values in zip("ugriz", magnitudes.T):
        labels[f"modelMag_{band}"] = (values + 0.1).astype(np.float32)
        labels[f"extinction_{band}"] = np.full(n, 0.1, np.float32)
    np.savez(file, cube=images, labels=labels.as_array())
    return file


@pytest.fixture(scope="module")
def stamps(tmp_path_factory):
    home = tmp_path_factory.mktemp("cube")
    return import_stamps(cube(home/"sdss.npz"), home/"stamps", dtype="float16")


@pytest.fixture(scope="module")
def first(stamps, tmp_path_factory):
    "Experiment 1 on the small cube."
    return run_experiment(stamps, tmp_path_factory.mktemp("runs")/"first", TINY, **QUIET)


def read(file): return json.loads(file.read_text())


def on_disk(folder): return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# --- the paper's two experiments on a set of the cube's shape

def test_experiment_1_on_a_small_cube(stamps, first):
    rows, home = split_rows(stamps, "1", 42), first/"seed-42"
    parts, table = Table.read(home/"split.fits"), Table.read(home/"predictions.fits")
    assert list(parts["objid"]) == list(stamps.catalogue["objid"])
    assert {part: int((parts["part"] == part).sum()) for part in set(parts["part"])} == {
        "unlabelled": 600, "watch": 75, "train": 53, "valid": 7, "test": 15}
    assert np.array_equal(np.flatnonzero(parts["part"] == "unlabelled"), rows["pretrain"])
    assert table.colnames == ["objid", "ra", "dec", "z_spec", "mag_r", *TINY.networks,
                              *MAGNITUDE_METHODS]
    assert list(table["objid"]) == list(stamps.catalogue["objid"][rows["test"]])
    metrics = read(home/"metrics.json")
    assert [row["name"] for row in metrics] == [*TINY.networks, *MAGNITUDE_METHODS]
    assert all(row["n"] == 15 and set(METRICS) == set(row["errors"]) for row in metrics)
    assert (home/"pretraining-plain"/"model").is_dir() and not (home/"pretraining-pcm").exists()
    described = read(first/"run.json")
    assert described["stamps"]["n"] == GALAXIES and described["version"] == astromae.__version__
    assert described["plan"]["finetuning"]["noise"] == 0.05
    assert {"python", "torch", "machine", "commit", "astromae"} <= set(read(first/"environment.json"))


def test_experiment_2_on_a_small_cube_has_its_networks_and_noise(stamps, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "MAGNITUDE_METHODS", ("k nearest neighbours",)) # the others take time
    plan = replace(TINY, experiment="2", networks=NETWORKS["2"])
    home = run_experiment(stamps, tmp_path/"second", plan, **QUIET)/"seed-42"
    assert Table.read(home/"predictions.fits").colnames[5:] == [
        "pcm-AstroMAE", "Henghes et al.", "k nearest neighbours"]
    for name in ("pcm-AstroMAE", "Henghes-et-al"):
        assert read(home/"networks"/name/"run.json")["settings"]["noise"] == 0.2
    assert read(home/"pretraining-pcm"/"run.json")["data"]["train_rows"][0] == GALAXIES
    assert sum(Table.read(home/"split.fits")["part"] == "test") == 150


# --- never twice, and the same again

def test_a_finished_run_changes_nothing(stamps, first, monkeypatch):
    before = on_disk(first)
    monkeypatch.setattr(runs, "pretrain_encoders", lambda *_: {})
    monkeypatch.setattr(runs, "finetune_networks", lambda *_, **__: pytest.fail("trained again"))
    assert run_experiment(stamps, first, TINY, **QUIET) == first
    assert on_disk(first) == before


def test_the_same_seed_gives_the_same_figures_also_after_a_power_cut(stamps, first, tmp_path,
                                                                     monkeypatch):
    done, predict = [], comparison.predict_from_magnitudes
    def cut(name, *args):
        if len(done) == 1: raise KeyboardInterrupt
        done.append(name)
        return predict(name, *args)
    monkeypatch.setattr(comparison, "predict_from_magnitudes", cut)
    with pytest.raises(KeyboardInterrupt): run_experiment(stamps, tmp_path/"again", TINY, **QUIET)
    home = tmp_path/"again"/"seed-42"
    assert Table.read(home/"predictions.fits").colnames[-1] == done[0]
    trained = on_disk(home/"networks") | on_disk(home/"pretraining-plain")
    monkeypatch.undo()
    run_experiment(stamps, tmp_path/"again", TINY, **QUIET)
    assert on_disk(home/"networks") | on_disk(home/"pretraining-plain") == trained
    assert read(home/"metrics.json") == read(first/"seed-42"/"metrics.json")


# --- the studies

def test_every_mask_ratio_has_its_own_encoder(stamps, tmp_path):
    plan = replace(TINY, networks=("plain-ViT",))
    home = run_mask_ratio(stamps, tmp_path/"masks", plan, ratios=(0.25, 0.9), **QUIET)/"seed-42"
    curve = read(home/"curve.json")
    names = [f"plain {probe}" for probe in PROBES] + ["plain-ViT"]
    assert [(point["x"], point["variant"], point["name"]) for point in curve] == [
        (x, f"mask-{x}", name) for x in (0.25, 0.9) for name in names]
    assert read(home/"mask-0.9"/"pretraining-plain"/"run.json")["model"]["mask_ratio"] == 0.9
    assert curve[2]["sigma_mad"] == read(home/"mask-0.25"/"metrics.json")[2]["sigma_mad"]
    assert len({point["sigma_mad"] for point in curve}) == len(curve)


def test_probes_ask_the_encoder_that_a_network_has_frozen(stamps, tmp_path):
    "And not the autoencoder's, whose BatchNorm layers know masked images only."
    plan = replace(TINY, networks=("pcm-ViT",))
    run = run_mask_ratio(stamps, tmp_path/"masks", plan, ratios=(0.75,), **QUIET)
    home, rows = run/"seed-42"/"mask-0.75", split_rows(stamps, "1", 42)
    found, agree = Table.read(home/"predictions.fits")["pcm linear probe"], {}
    for folder in ("networks/pcm-ViT", "pretraining-pcm"):
        known, asked = (embed(load_trained(home/folder)[:2], stamps, rows=rows[part], device="cpu")
                        for part in ("train", "test"))
        z_phot = PROBES["linear probe"](known, stamps.redshifts()[rows["train"]], asked, seed=42)
        agree[folder] = np.allclose(z_phot, found, rtol=0, atol=1e-6)
    assert agree == {"networks/pcm-ViT": True, "pretraining-pcm": False}


def test_every_length_of_pretraining_warms_up_for_a_tenth(stamps, tmp_path):
    plan = replace(TINY, networks=("plain-ViT",))
    home = run_pretraining_epochs(stamps, tmp_path/"run", plan, lengths=(1, 2), **QUIET)/"seed-42"
    assert [point["x"] for point in read(home/"curve.json") if point["name"] == "plain-ViT"] == [1, 2]
    for epochs in (1, 2):
        trained = home/f"pretraining-{epochs}"/"pretraining-plain"
        settings = read(trained/"run.json")["settings"]
        assert (settings["epochs"], settings["warmup_epochs"]) == (epochs, epochs/10)
        assert len(pd.read_csv(trained/"history.csv")) == epochs


def test_ways_of_pretraining_differ_in_one_thing_and_share_what_is_alike(stamps, tmp_path):
    plan = replace(TINY, networks=("pcm-ViT",),
                   pretraining=replace(TINY.pretraining, epochs=3, warmup_epochs=1.5))
    home = run_encoder(stamps, tmp_path/"run", plan, **QUIET)/"seed-42"
    curve = read(home/"curve.json")
    names = ["as planned", "pcm masking kernel1", "normalisation none", "softening of 5 sigma",
             "softening of 20 sigma", "BatchNorm of masked images",
             "a third of the epochs", "a third of the rate", "three times the rate"]
    assert [point["x"] for point in curve if point["name"] == "pcm-ViT"] == names
    folders = {name: home/f"encoder-{name.replace(' ', '-')}" for name in names}
    trained = {name: read(folder/"pretraining-pcm"/"run.json") for name, folder in folders.items()
               if (folder/"pretraining-pcm").exists()}
    assert set(names) - set(trained) == {"BatchNorm of masked images"}  # takes that of the plan
    assert [trained[name]["model"]["pcm_masking"] for name in trained] == [
        "grid", "kernel1", "grid", "grid", "grid", "grid", "grid", "grid"]
    assert [trained[name]["settings"]["softening"] for name in trained] == [1, 1, 1, 5, 20, 1, 1, 1]
    assert [trained[name]["settings"]["normalisation"] for name in trained] == [
        "arcsinh", "arcsinh", "none", *5*["arcsinh"]]
    assert [trained[name]["settings"]["epochs"] for name in trained] == [3, 3, 3, 3, 3, 1, 3, 3]
    rates = [trained[name]["settings"]["peak_rate"] for name in trained]
    assert rates == pytest.approx([rates[0]*times for times in (1, 1, 1, 1, 1, 1, 1/3, 3)])
    statistics = [read(folder/"networks"/"pcm-ViT"/"run.json")["settings"]["whole_image_statistics"]
                  for folder in folders.values()]
    assert statistics == [True, True, True, True, True, False, True, True, True]


def test_fewer_labels_are_shown_more_often(stamps, tmp_path):
    plan = replace(TINY, networks=("plain-ViT", "from-scratch plain-ViT"))
    run = run_label_efficiency(stamps, tmp_path/"labels", plan, fractions=(0.1, 1.), **QUIET)
    curve = read(run/"seed-42"/"curve.json")
    assert {(point["variant"], point["labels"]) for point in curve} == {
        (f"labels-{x}-{group}", n) for x, n in (("0.1", 5), ("1", 53))
        for group in ("pretrained", "scratch")}
    rows = {x: read(run/"seed-42"/f"labels-{x}-scratch"/"networks"/"from-scratch-plain-ViT"/"run.json")
            ["data"]["train_rows"] for x in ("0.1", "1")}
    assert rows["0.1"][0] == rows["1"][0] == 53 and rows["0.1"] != rows["1"]
    before = on_disk(run)
    run_label_efficiency(stamps, run, plan, fractions=(0.1, 1.), **QUIET)
    changed = {path.name for path, at in on_disk(run).items() if before[path] != at}
    assert changed <= {"curve.json", "seed-42"} # the same, written again


# --- bad input

@pytest.mark.parametrize("message, wrong", [
    ("did you mean 'pcm-AstroMAE'", dict(networks=("pcm-AstroMEA",))),
    ("the seeds are 42, 42; name", dict(seeds=(42, 42))),
    ("the seeds are none", dict(seeds=())),
    ("the networks are plain-ViT, plain-ViT", dict(networks=("plain-ViT", "plain-ViT"))),
    ("there is no experiment '3'", dict(experiment="3"))])
def test_a_plan_that_cannot_be_meant_is_refused(message, wrong):
    with pytest.raises(InputError, match=message): Plan(**wrong)


@pytest.mark.parametrize("words, message", [
    (dict(name="4"), "no experiment '4'; choose one of 1, 2, demo"), (dict(preset="big"), "no preset"),
    (dict(name="2", parts="1"), "experiment 2 has its own parts")])
def test_a_mistyped_option_is_refused(words, message):
    with pytest.raises(InputError, match=message): plan_named(**words)


def refused(message, stamps, folder, plan=TINY, run=run_experiment, **more):
    before = on_disk(folder.parent)
    with pytest.raises(InputError) as caught: run(stamps, folder, plan, **QUIET, **more)
    assert message in str(caught.value) and str(caught.value).endswith("."), caught.value
    assert on_disk(folder.parent) == before


def test_a_folder_of_another_run_is_refused(stamps, first, monkeypatch):
    refused("plan.seeds is [42] there and [43] here", stamps, first, replace(TINY, seeds=(43,)))
    refused("study is experiment there and mask-ratio here", stamps, first, run=run_mask_ratio)
    with monkeypatch.context() as other:
        other.setattr(runs, "git_commit", lambda folder: 40*"a")
        refused(f"and {40*'a'} here", stamps, first)
    monkeypatch.setattr(astromae, "__version__", "9.9")
    refused("version is 0", stamps, first)
    refused("there and 9.9 here", stamps, first)


def test_a_set_that_is_too_small_is_refused(stamps, tmp_path):
    few = stamps.select(f"objid < {stamps.catalogue['objid'][200]}")
    refused("leaves 14 to train on in experiment 1; take", few, tmp_path/"run")
    refused("too few: the part 'test'", stamps.select("objid < 20"), tmp_path/"run")


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_missing_labels_are_named_before_anything_is_trained(stamps, tmp_path, part):
    row = split_rows(stamps, "1", 42)[part][0]
    z = stamps.catalogue["z_spec"][row]
    stamps.catalogue["z_spec"][row] = np.nan
    try: refused(f"{part} rows (the first is row {row})", stamps, tmp_path/"run")
    finally: stamps.catalogue["z_spec"][row] = z


def test_missing_magnitudes_are_named_before_anything_is_trained(stamps, tmp_path):
    row = split_rows(stamps, "1", 42)["test"][3]
    stamps = StampSet(stamps.folder, stamps.images, stamps.catalogue.copy(), stamps.description)
    stamps.catalogue["mag_u"][row] = np.nan
    with pytest.raises(InputError, match=f"no mag_\\* in 1 of the 15 test rows .*row {row}"):
        run_experiment(stamps, tmp_path/"run", TINY, **QUIET)
    assert not (tmp_path/"run").exists()


def test_methods_on_magnitudes_know_the_bands_of_sdss_only(stamps, tmp_path):
    assert comparison.magnitude_methods(stamps) == MAGNITUDE_METHODS
    other = StampSet(stamps.folder, stamps.images, stamps.catalogue,
                     {**stamps.description, "bands": list("grizy")})
    assert comparison.magnitude_methods(other) == ()


def test_unlabelled_galaxies_need_no_labels(stamps, tmp_path):
    rows = split_rows(stamps, "1", 42)["pretrain"]
    z = stamps.catalogue["z_spec"][rows].copy()
    stamps.catalogue["z_spec"][rows] = np.nan
    try: assert set(runs.rows_of_seeds(stamps, TINY)) == {42}
    finally: stamps.catalogue["z_spec"][rows] = z


def test_the_studies_refuse_what_they_cannot_do(stamps, tmp_path):
    refused("hides at least one", stamps, tmp_path/"run", run=run_mask_ratio, ratios=(0.5, 1.))
    refused("none of the networks has a pretrained", stamps, tmp_path/"run",
            replace(TINY, networks=("Henghes et al.",)), run=run_mask_ratio)
    refused("would be empty", stamps, tmp_path/"run", run=run_label_efficiency, fractions=(1., 0.001))
    one = 1.2/len(split_rows(stamps, "1", 42)["train"])
    refused("are those of 1 of", stamps, tmp_path/"run", run=run_label_efficiency, fractions=(1., one))


def test_a_comparison_looks_at_the_labels_first(stamps, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "train_networks", lambda *_: pytest.fail("trained"))
    settings = Comparison(networks=TINY.networks)
    bad = write_stamp_set(tmp_path/"bad", [(np.asarray(stamps.images[:]), stamps.catalogue.copy())], len(stamps))
    row = split_rows(stamps, settings.experiment, settings.seed)["test"][2]
    bad.catalogue["z_spec"][row] = np.nan
    bad = write_stamp_set(tmp_path/"worse", [(np.asarray(bad.images[:]), bad.catalogue)], len(bad))
    with pytest.raises(InputError, match=f"test rows .the first is row {row}"):
        compare(tmp_path/"walk", settings, bad.folder, device="cpu", progress=False)


def test_a_network_that_diverged_stops_nobody_else(stamps, tmp_path, monkeypatch):
    whole = comparison.prediction_columns
    def diverged(*args):
        columns = whole(*args)
        return {name: (lambda: np.full(150, np.nan)) if name == "plain-ViT" else column
                for name, column in columns.items()}
    monkeypatch.setattr(comparison, "prediction_columns", diverged)
    settings = Comparison(networks=TINY.networks, autoencoder=replace(TINY.autoencoder, encoder="plain"),
                          pretraining=TINY.pretraining, finetuning=TINY.finetuning)
    scores = {row["name"]: row["sigma_mad"] for row in compare(
        tmp_path/"walk", settings, stamps.folder, device="cpu", progress=False)}
    assert scores.pop("plain-ViT") is None and None not in scores.values()
    there = {path.name for path in (tmp_path/"walk").iterdir()}
    assert {"scatter-Henghes-et-al.png", "residuals.png", "losses.png", "model"} <= there
    assert "scatter-plain-ViT.png" not in there
    assert read(tmp_path/"walk"/"model"/"config.json")["encoder"] == "none" # that of Henghes et al.
    table = Table.read(tmp_path/"walk"/"predictions.fits")
    assert verdict(table, TINY.networks) == "plain-ViT diverged; no verdict."
    assert "plain-ViT" not in verdict(table, TINY.networks[::-1])


# --- two processes

def test_two_processes_make_one_run(stamps, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node", "2", __file__, stamps.folder, tmp_path/"run"],
                          env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    scored = [line for line in done.stdout.splitlines() if line.startswith("[{")]
    assert len(scored) == 2 and scored[0] == scored[1] # both waited for the same metrics
    assert json.loads(scored[0]) == read(tmp_path/"run"/"seed-42"/"metrics.json")
    for phase in ("pretraining-plain", "networks/plain-ViT"):
        history = (tmp_path/"run"/"seed-42"/phase/"history.csv").read_text()
        assert len(history.splitlines()) == 2


# --- the presets

def test_the_paper_is_the_default():
    assert PLANS["paper"] == Plan() and Plan().networks == tuple(ARCHITECTURES)
    assert (Plan().pretraining.epochs, Plan().finetuning.epochs, Plan().seeds) == (2000, 700, (42,))
    assert plan_named("2").networks == ("pcm-AstroMAE", "Henghes et al.")
    assert plan_named("label-efficiency", "two-cores", parts="demo", seeds=(1, 2)).seeds == (1, 2)


if __name__ == "__main__":
    folder = run_experiment(StampSet.open(sys.argv[1]), sys.argv[2], TINY, **QUIET)
    print(json.dumps(read(folder/"seed-42"/"metrics.json")), flush=True)
