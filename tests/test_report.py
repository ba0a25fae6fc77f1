"Reports of runs that are finished, begun, damaged, or odd; all numbers here are made up."
import base64
import re
import shutil
from dataclasses import asdict

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from astropy.table import Table

from astromae.comparison import MAGNITUDE_METHODS, folder_name, score
from astromae.errors import InputError, write_json
from astromae.mae import MAEConfig
from astromae.redshift import ARCHITECTURES
from astromae.report import (CLAIMS, PUBLISHED, compare_seeds, draw_residuals, missing_parts, page_title,
                             read_run, report, score_table, verdict)
from astromae.training import FinetuneSettings, PretrainSettings

PAIR = ("pcm-AstroMAE", "Henghes et al.")


def write_run(folder, networks=PAIR, seeds=(42,), methods=MAGNITUDE_METHODS[:1], widths=(), n=300,
              study="experiment", values=(), **plan):
    "A folder in the layout of an experiment, with made-up predictions; `widths` are the scatters by name."
    write_json(folder/"run.json", {
        "study": study, "values": values, "stamps": {"origin": "made-up <numbers>", "n": 1500},
        "plan": {"experiment": "1", "networks": networks, "seeds": seeds, "views": 1,
                 "autoencoder": asdict(MAEConfig()), "finetuning": asdict(FinetuneSettings(epochs=4)),
                 "pretraining": asdict(PretrainSettings(epochs=9, warmup_epochs=1))} | plan})
    write_json(folder/"environment.json", {"python": "3.11"})
    for seed in seeds if study == "experiment" else ():
        rng = np.random.default_rng(seed)
        table = Table({"objid": np.arange(n), "z_spec": rng.gamma(3., 0.04, n), "mag_r": rng.normal(17, 1, n)})
        for name in (*networks, *methods):
            dz = dict(widths).get(name, 0.02)*rng.standard_normal(n)
            table[name] = table["z_spec"] + dz*(1 + table["z_spec"])
        (folder/f"seed-{seed}").mkdir()
        table.write(folder/f"seed-{seed}"/"predictions.fits")
        write_json(folder/f"seed-{seed}"/"metrics.json", score(table, (*networks, *methods)))
    return folder


@pytest.fixture(autouse=True)
def close_figures():
    yield
    assert not plt.get_fignums(), "a figure stayed open"


def test_a_page_is_one_file_and_the_markdown_has_its_figures_beside_it(tmp_path):
    folder = write_run(tmp_path/"run", tuple(ARCHITECTURES), methods=MAGNITUDE_METHODS, n=200)
    page = report(folder)
    html, markdown = page.read_text(), (folder/"report.md").read_text()
    assert page == folder/"report.html" and not re.search(r"https?:|<script|<link", html)
    assert "<h1>made-up &lt;numbers&gt; (1,500 stamps): experiment 1</h1>" in html
    assert markdown.splitlines()[0] == "# made-up <numbers> (1,500 stamps): experiment 1"
    for name in (*ARCHITECTURES, *MAGNITUDE_METHODS): assert f">{name}" in html and f"| {name} " in markdown
    pictures = [base64.b64decode(text) for text in re.findall(r'base64,([^"]+)"', html)]
    names = re.findall(r"\(figures/(.+)\.png\)", markdown)
    assert names == ["claims", "scatter-trained-from-scratch", "scatter-pretrained-with-magnitudes",
                     "scatter-pretrained-images-alone", "scatter-magnitudes-alone", "residuals",
                     "learning-rates"]
    assert pictures == [(folder/"figures"/f"{name}.png").read_bytes() for name in names]
    assert "another data set" in html and "not finished" not in html
    columns = {line.replace("\\|", "").count("|") for line in markdown.splitlines() if line.startswith("|")}
    assert columns == {9}


def test_published_rows_are_those_of_the_experiment(tmp_path):
    for experiment, mae in (("1", "0.01520"), ("2", "0.01267")):
        run = read_run(write_run(tmp_path/experiment, experiment=experiment))
        heads, rows = score_table(run).content
        assert [row.kind for row in rows] == ["ours", "published"]*2 + ["ours"]
        assert rows[1].cells[heads.index("MAE")].text == mae
    assert len(PUBLISHED["Table IV"]) == 14 and len(PUBLISHED["Table V"]) == 2


def test_the_paper_claims_compare_networks_that_differ_in_one_thing():
    compared = [pair for pairs in CLAIMS.values() for pair in pairs]
    assert len(set(compared)) == len(compared) == 22
    assert ("pcm-AstroMAE", "Henghes et al.") in CLAIMS["AstroMAE beats Henghes et al."]
    assert ("Henghes et al.", "Inception-only") not in compared  # their joins differ, too


@pytest.mark.parametrize("width,word", [(0.01, ": ahead."), (0.04, ": behind."), (0.02, "neither ahead")])
def test_a_difference_is_judged_by_its_interval(tmp_path, width, word):
    folder = write_run(tmp_path/"run", seeds=(42, 43), widths={PAIR[0]: width})
    ratio, low, high = compare_seeds(read_run(folder), *PAIR)
    assert low < ratio < high and abs(ratio - width/0.02) < 0.35
    sentence = verdict("Table IV", *PAIR, ratio, low, high)
    assert word in sentence and sentence.endswith("Published: 0.96.")


def test_seeds_that_disagree_decide_nothing(tmp_path):
    folder = write_run(tmp_path/"run", seeds=(42, 43), n=2000)
    for seed, factor in ((42, 0.5), (43, 1.5)):
        file = folder/f"seed-{seed}"/"predictions.fits"
        table = Table.read(file)
        table[PAIR[0]] = table["z_spec"] + factor*(table[PAIR[1]] - table["z_spec"])
        table.write(file, overwrite=True)
    ratio, low, high = compare_seeds(read_run(folder), *PAIR)
    assert low <= 0.5 + 1e-6 and high >= 1.5 - 1e-6 and abs(ratio - 0.75**0.5) < 1e-6


def test_one_network_has_a_report_and_always_the_same(tmp_path):
    folder = write_run(tmp_path/"run", ("Henghes et al.",), methods=())
    first = report(folder).read_bytes()
    assert b"The paper" not in first and report(folder).read_bytes() == first


def test_a_set_of_three_bands_without_r_has_a_report(tmp_path):
    folder = write_run(tmp_path/"run")
    file = folder/"seed-42"/"predictions.fits"
    table = Table.read(file)
    table.remove_column("mag_r")
    table.write(file, overwrite=True)
    figure = draw_residuals(read_run(folder))
    assert {ax.get_xlabel() for ax in figure.axes} == {"spectroscopic redshift"}
    plt.close(figure)


# Runs that are not finished

def begin(folder, *path, epochs=0, finished=False):
    "What a training leaves in its folder on the way."
    home = folder.joinpath(*path)
    home.mkdir(parents=True)
    epoch = np.arange(epochs)
    if epochs: pd.DataFrame({"epoch": epoch, "train_loss": 1/(1 + epoch), "valid_loss": 1/(1 + epoch)}).to_csv(
        home/"history.csv", index=False)
    if finished: (home/"model").mkdir()


def test_a_run_that_is_not_finished_says_what_is_missing(tmp_path):
    folder = write_run(tmp_path/"run", seeds=(42, 43, 44))
    shutil.rmtree(folder/"seed-44")
    for name in ("predictions.fits", "metrics.json"): (folder/"seed-43"/name).unlink()
    begin(folder, "seed-43", "pretraining-pcm", epochs=7)
    missing = ["Seed 43 still needs pretraining-pcm (7 of 9 epochs), pcm-AstroMAE (not begun), "
               "Henghes-et-al (not begun).", "Seed 44 has not been begun."]
    assert missing_parts(read_run(folder)) == missing
    html = report(folder).read_text()
    assert "This run is not finished." in html and all(sentence in html for sentence in missing)
    assert "1 of 3 seeds" in html and "Losses of every training, seed 43" in html


def test_a_run_that_has_only_begun_has_a_report(tmp_path):
    folder = write_run(tmp_path/"run")
    shutil.rmtree(folder/"seed-42")
    html = report(folder).read_text()
    assert "Seed 42 has not been begun." in html and "<table>" not in html and html.count("<img") == 1


def test_a_run_that_is_trained_but_not_predicted_says_so(tmp_path):
    folder = write_run(tmp_path/"run")
    (folder/"seed-42"/"metrics.json").unlink()
    for path in (["pretraining-pcm"], *(["networks", folder_name(name)] for name in PAIR)):
        begin(folder, "seed-42", *path, epochs=4, finished=True)
    assert missing_parts(read_run(folder)) == ["Seed 42 is trained, but not yet predicted."]


# Studies

@pytest.mark.parametrize("study,values", [("mask-ratio", [0.25, 0.75, 0.9]),
                                          ("label-efficiency", [0.01, 0.1, 1.])])
def test_a_study_is_a_curve(tmp_path, study, values):
    folder = write_run(tmp_path/"run", study=study, values=values, networks=("pcm-ViT",))
    names = ("pcm-ViT", "pcm linear probe")
    curve = [{"variant": f"{x:g}", "x": x, "name": name, "sigma_mad": 0.02 + 0.01*x,
              "errors": {"sigma_mad": 0.001}} for x in values[:2] for name in names]
    write_json(folder/"seed-42"/"curve.json", curve)
    run = read_run(folder)
    assert missing_parts(run) == [f"Seed 42 still needs {values[2]:g} (pcm-ViT)."]
    assert page_title(run).endswith(study)
    html = report(folder).read_text()
    assert (folder/"figures"/f"{study}.png").exists() and "Curves</h2>" in html


# Bad input

def test_a_folder_that_is_none_is_refused(tmp_path):
    write_json(tmp_path/"pretraining"/"run.json", {"phase": "pretrain"})
    for folder in (tmp_path, tmp_path/"nowhere", tmp_path/"pretraining"):
        with pytest.raises(InputError, match="is no folder of an experiment"): report(folder)
    assert not (tmp_path/"nowhere").exists()


@pytest.mark.parametrize("name", ["run.json", "environment.json", "seed-42/metrics.json"])
def test_a_damaged_file_is_named(tmp_path, name):
    folder = write_run(tmp_path/"run")
    (folder/name).write_text('{"plan":')
    with pytest.raises(InputError, match=f"{name} is damaged"): report(folder)
    assert not (folder/"report.html").exists()


@pytest.mark.filterwarnings("ignore:Error validating header")
def test_predictions_that_are_cut_off_are_named(tmp_path):
    folder = write_run(tmp_path/"run")
    file = folder/"seed-42"/"predictions.fits"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="predictions.fits is damaged"): report(folder)
