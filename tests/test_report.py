"Reports of runs that are finished, begun, damaged, or odd; all numbers here are made up."
import base64
import json
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
from astromae.metrics import METRICS
from astromae.plots import value_label
from astromae.report import (CLAIMS, PUBLISHED, best_name, claim_blocks, compare_seeds, compared_pairs,
                             curve_blocks, departures, draw_residuals, missing_parts, page_title,
                             pair_sentence, parts_sentence, read_run, report, score_table)
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
    assert "not finished" not in html
    columns = {line.replace("\\|", "").count("|") for line in markdown.splitlines() if line.startswith("|")}
    assert columns == {9}


def test_published_rows_are_those_of_the_experiment(tmp_path):
    for experiment, mae in (("1", "0.01520"), ("2", "0.01267")):
        run = read_run(write_run(tmp_path/experiment, experiment=experiment))
        heads, rows = score_table(run).content
        assert [row.kind for row in rows] == ["ours", "published"]*2 + ["ours"]
        assert rows[1].cells[heads.index("MAE")].text == mae
    assert len(PUBLISHED["Table IV"]) == 14 and len(PUBLISHED["Table V"]) == 2


def test_the_paper_claims_compare_networks_that_differ_in_one_field():
    compared = [pair for pairs in CLAIMS.values() for pair in pairs]
    assert len(set(compared)) == len(compared) == 22
    assert ("pcm-AstroMAE", "Henghes et al.") in CLAIMS["AstroMAE beats Henghes et al."]
    assert ("Henghes et al.", "Inception-only") not in compared  # their joins differ, too
    assert "A frozen pretrained encoder beats one trained from scratch" in CLAIMS


@pytest.mark.parametrize("width,word", [(0.01, ": ahead."), (0.04, ": behind."), (0.02, "neither ahead")])
def test_a_difference_is_judged_by_its_interval(tmp_path, width, word):
    folder = write_run(tmp_path/"run", seeds=(42, 43, 44), widths={PAIR[0]: width})
    ratio, low, high = compare_seeds(read_run(folder), *PAIR)
    assert low < ratio < high and abs(ratio - width/0.02) < 0.35
    sentence = pair_sentence("Table IV", *PAIR, ratio, low, high)
    assert word in sentence and sentence.endswith("Published: 0.96.")


def change_predictions(folder, seed, change):
    "Let `change` alter the table of predictions of one seed, and score it again."
    part = folder/f"seed-{seed}"
    table = Table.read(part/"predictions.fits")
    change(table)
    table.write(part/"predictions.fits", overwrite=True)
    if not np.isfinite(np.ma.filled(table[PAIR[0]], np.nan)).all(): return
    names = [row["name"] for row in json.loads((part/"metrics.json").read_text())]
    write_json(part/"metrics.json", score(table, names))


def set_ratio(factor):
    "A change that gives every residual of the first network the same ratio to that of the second."
    def change(table): table[PAIR[0]] = table["z_spec"] + factor*(table[PAIR[1]] - table["z_spec"])
    return change


def test_the_interval_over_seeds_is_student_s(tmp_path):
    folder = write_run(tmp_path/"run", seeds=(42, 43, 44))
    for seed, factor in ((42, 0.8), (43, 1.), (44, 1.25)): change_predictions(folder, seed, set_ratio(factor))
    ratio, low, high = compare_seeds(read_run(folder), *PAIR)
    half = 4.303*np.log(1.25)/3**0.5  # the logarithms are -a, 0, a, whose standard deviation is a
    np.testing.assert_allclose([ratio, low, high], [1, np.exp(-half), np.exp(half)], rtol=1e-3)


def test_seeds_that_agree_keep_the_interval_of_the_test_galaxies(tmp_path):
    folder = write_run(tmp_path/"run", seeds=(42, 43, 44))
    first = Table.read(folder/"seed-42"/"predictions.fits")
    for seed in (43, 44): first.write(folder/f"seed-{seed}"/"predictions.fits", overwrite=True)
    one = write_run(tmp_path/"one")
    np.testing.assert_allclose(compare_seeds(read_run(folder), *PAIR), compare_seeds(read_run(one), *PAIR))


def test_the_claims_say_what_their_intervals_cover(tmp_path):
    one, *_ = claim_blocks(read_run(write_run(tmp_path/"one", tuple(ARCHITECTURES))))
    assert one.content.startswith("One training of each network: the intervals say what other test galaxies "
                                  "would change, not what another training would. Of 24 comparisons at 95%, "
                                  "about 1.2 come out wrongly by chance.")
    two, *_ = claim_blocks(read_run(write_run(tmp_path/"two", seeds=(1, 2), methods=())))
    assert two.content.startswith("2 seeds: ") and "another split and another training. Of 1 comp" in two.content
    plt.close("all")


def test_the_best_is_that_of_all_seeds(tmp_path):
    folder = write_run(tmp_path/"run", seeds=(42, 43), methods=MAGNITUDE_METHODS[:2])
    for seed, biases in ((42, (0.03, -0.01)), (43, (-0.03, -0.01))):
        rows = json.loads((folder/f"seed-{seed}"/"metrics.json").read_text())
        for row, bias in zip(rows, biases): row["bias"] = bias
        for row, precision in zip(rows[2:], (0.03, 0.04) if seed == 42 else (0.03, 0.01)):
            row["precision"] = precision
        write_json(folder/f"seed-{seed}"/"metrics.json", rows)
    run = read_run(folder)
    assert best_name(run, PAIR, "bias") == PAIR[1]  # the mean of the first is 0
    claim = compared_pairs(run)["AstroMAE beats the best method on magnitudes alone"]
    assert list(claim) == [(PAIR[0], MAGNITUDE_METHODS[1])]  # the first is ahead with the first seed
    figure = draw_residuals(run)
    assert MAGNITUDE_METHODS[1] in {ax.get_title() for ax in figure.axes}
    plt.close(figure)


def test_an_error_that_is_missing_is_left_out(tmp_path):
    folder = write_run(tmp_path/"run")
    file = folder/"seed-42"/"metrics.json"
    rows = json.loads(file.read_text())
    rows[0]["errors"]["mae"], rows[0]["r2"] = None, None
    del rows[0]["errors"]["mse"]
    write_json(file, rows)
    heads, table = score_table(read_run(folder)).content
    cells = dict(zip(heads, table[0].cells))
    assert cells["MAE"].note == cells["MSE"].note == "" and cells["R²"].text == "–"
    assert cells["bias"].note.startswith("±")


# Networks that diverged

def diverge(folder, seed, name=PAIR[0]):
    "Leave what a network leaves whose training diverged."
    def change(table): table[name][::7] = np.nan
    change_predictions(folder, seed, change)
    file, nothing = folder/f"seed-{seed}"/"metrics.json", dict.fromkeys(METRICS)
    write_json(file, [{"name": name, "n": row["n"], **nothing, "errors": nothing} if row["name"] == name else row
                      for row in json.loads(file.read_text())])


def test_a_network_that_diverged_says_so(tmp_path):
    folder = write_run(tmp_path/"run", widths={PAIR[0]: 0.001})
    diverge(folder, 42)
    run = read_run(folder)
    cells = score_table(run).content[1][0].cells
    assert [cell.text for cell in cells[1:]] == ["diverged"] + 6*["–"] and not any(cell.best for cell in cells)
    assert compare_seeds(run, *PAIR) is None and best_name(run, PAIR) == PAIR[1]
    html = report(folder).read_text()
    assert html.count("diverged") == 1 and "times the scatter" not in html and "residuals" in html.lower()


def test_a_network_that_diverged_with_one_seed_is_compared_with_the_others(tmp_path):
    folder = write_run(tmp_path/"run", seeds=(42, 43))
    whole = write_run(tmp_path/"whole", seeds=(43,))
    diverge(folder, 42)
    run = read_run(folder)
    assert compare_seeds(run, *PAIR) == compare_seeds(read_run(whole), *PAIR)
    cells = score_table(run).content[1][0].cells
    assert cells[0].note == "diverged with seed 42" and re.fullmatch(r"0\.\d{5}", cells[1].text)
    assert not any(cell.best for cell in cells)
    report(folder)


def test_a_run_of_which_everything_diverged_has_a_report(tmp_path):
    folder = write_run(tmp_path/"run", PAIR[:1], methods=())
    diverge(folder, 42)
    html = report(folder).read_text()
    assert html.count("diverged") == 1 and "Predictions</h2>" not in html and html.count("<img") == 1


# What was run

def test_the_title_has_the_condition(tmp_path):
    folder = write_run(tmp_path/"run", experiment="2")
    for condition, title in (("z_spec <= 0.4", "sdss.npz, z_spec <= 0.4 (516,525 stamps): experiment 2"),
                             (None, "sdss.npz (516,525 stamps): experiment 2")):
        description = json.loads((folder/"run.json").read_text())
        description["stamps"] = {"origin": "sdss.npz", "n": 516_525, "selection": None, "condition": condition}
        write_json(folder/"run.json", description)
        assert page_title(read_run(folder)) == title


@pytest.mark.parametrize("n,said", [(516_525, "516,525 stamps, a part of those galaxies, or others: the numbers"),
                                    (659_857, "a set of as many galaxies as this one.")])
def test_other_galaxies_than_the_published_are_marked(tmp_path, n, said):
    folder = write_run(tmp_path/"run")
    description = json.loads((folder/"run.json").read_text())
    write_json(folder/"run.json", description | {"stamps": {"origin": "sdss.npz", "n": n}})
    html = report(folder).read_text()
    assert said in html and ('<p class="warning">' in html) == (n != 659_857)
    assert "Bold is the best value of a column, with no regard to its error" in html


def test_every_experiment_says_its_parts(tmp_path):
    assert parts_sentence("demo") == ("Parts: unlabelled 38%, watch 2%, train 38%, valid 2%, test 20%; "
                                      "pretraining sees unlabelled and train.")
    assert parts_sentence("2").endswith("pretraining sees train, valid and test.")
    folder = write_run(tmp_path/"run", experiment="accuracy")
    assert parts_sentence("accuracy") in report(folder).read_text()


def test_the_noise_of_an_experiment_is_no_departure():
    plan = {"autoencoder": asdict(MAEConfig()), "pretraining": asdict(PretrainSettings())}
    for experiment, noise, other in (("1", 0.05, 0.2), ("2", 0.2, 0.05)):
        plan |= {"experiment": experiment, "finetuning": asdict(FinetuneSettings(noise=noise))}
        assert departures(json.loads(json.dumps(plan))) == []
        plan["finetuning"]["noise"] = other
        assert departures(json.loads(json.dumps(plan))) == [f"finetuning: noise {other} instead of {noise}."]


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


def test_three_seeds_finished_half_trained_and_not_begun(tmp_path):
    folder = write_run(tmp_path/"run", (*PAIR, "pcm-ViT"), seeds=(42, 43, 44))
    for seed in (43, 44):
        for name in ("predictions.fits", "metrics.json"): (folder/f"seed-{seed}"/name).unlink()
        (folder/f"seed-{seed}"/"split.fits").touch()  # a run writes those of all seeds at once
    begin(folder, "seed-43", "pretraining-pcm", epochs=9, finished=True)
    begin(folder, "seed-43", "networks", "pcm-AstroMAE", epochs=4, finished=True)
    begin(folder, "seed-43", "networks", "Henghes-et-al", epochs=2)
    missing = ["Seed 43 still needs Henghes-et-al (2 of 4 epochs), pcm-ViT (not begun).",
               "Seed 44 has not been begun."]
    assert missing_parts(read_run(folder)) == missing
    html = report(folder).read_text()
    assert "This run is not finished." in html and all(sentence in html for sentence in missing)
    assert html.count("1 of 3 seeds") == 4 and "One training of each network" in html


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
                                          ("pretraining-epochs", [10, 30, 90]),
                                          ("encoder", ["as planned", "normalisation none", "longer"]),
                                          ("label-efficiency", [0.01, 0.1, 1.])])
def test_a_study_is_a_curve(tmp_path, study, values):
    folder = write_run(tmp_path/"run", study=study, values=values, networks=("pcm-ViT",))
    names = ("pcm-ViT", "pcm linear probe")
    curve = [{"variant": str(x), "x": x, "name": name, "n": 500, "sigma_mad": 0.02 + 0.01*place,
              "errors": {"sigma_mad": 0.001}} for place, x in enumerate(values[:2]) for name in names]
    write_json(folder/"seed-42"/"curve.json", curve)
    run = read_run(folder)
    assert missing_parts(run) == [f"Seed 42 still needs {value_label(values[2])} (pcm-ViT)."]
    assert page_title(run).endswith(study)
    html = report(folder).read_text()
    assert (folder/"figures"/f"{study}.png").exists() and "Curves</h2>" in html
    figure, table, *_ = curve_blocks(run)
    plt.close(figure.content[1])
    heads, rows = table.content
    assert heads[1:] == [value_label(x) for x in values]
    assert [cell.text for cell in rows[0].cells[1:]] == ["0.02000", "0.03000", "–"]
    assert "the errors are bootstrap errors of one seed&#39;s test galaxies" in html
    assert ("Really masked, of the 16 patches of an image: 4 (25.0%) at 0.25, 12 (75.0%) at 0.75, "
            "15 (93.8%) at 0.9." in html) == (study == "mask-ratio")


def test_several_seeds_of_a_study_show_their_scatter(tmp_path):
    folder = write_run(tmp_path/"run", seeds=(1, 2), study="mask-ratio", values=[0.25, 0.5, 0.75],
                       networks=("pcm-ViT",))
    points = {1: {0.25: 0.02, 0.5: 0.02, 0.75: None}, 2: {0.25: 0.03, 0.5: 0.02, 0.75: None}}
    for seed, curve in points.items(): write_json(folder/f"seed-{seed}"/"curve.json", [
        {"name": "pcm-ViT", "x": x, "n": 500, "sigma_mad": y, "errors": {"sigma_mad": y and 0.001}}
        for x, y in curve.items()])
    figure, table, _ = curve_blocks(read_run(folder))
    plt.close(figure.content[1])
    assert "larger of the mean bootstrap error and the standard deviation over the seeds" in figure.caption
    cells = table.content[1][0].cells[1:]
    assert [(cell.text, cell.note) for cell in cells] == [
        ("0.02500", "±0.00707"), ("0.02000", "±0.00100"), ("diverged", "")]
    assert missing_parts(read_run(folder)) == []


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


def without(key, *keys):
    "A change of a description that takes out what is found under these keys."
    def change(description):
        *path, last = key, *keys
        for step in path: description = description[step]
        del description[last]
    return change


def with_value(value, *keys):
    "A change of a description that puts a value under these keys."
    def change(description):
        *path, last = keys
        for step in path: description = description[step]
        description[last] = value
    return change


@pytest.mark.parametrize("change", [
    without("plan", "seeds"), without("stamps", "origin"), without("plan", "pretraining", "epochs"),
    without("plan", "finetuning", "cycle"), without("plan", "experiment"), with_value({}, "stamps"),
    with_value(1, "plan", "finetuning", "of_later"), with_value(1, "plan", "autoencoder", "of_later"),
    with_value([], "plan", "seeds"), with_value(5, "plan", "seeds"), with_value("many", "stamps", "n"),
    with_value("later", "study"), with_value("later", "plan", "experiment"), with_value(["later"], "plan", "networks"),
    with_value(5, "plan"), with_value(["a"], "values")])
def test_a_run_of_another_version_is_refused(tmp_path, change):
    folder = write_run(tmp_path/"run")
    description = json.loads((folder/"run.json").read_text())
    change(description)
    write_json(folder/"run.json", description)
    with pytest.raises(InputError, match="run.json is damaged or was written by another version; "): report(folder)


def test_a_run_that_is_older_than_a_setting_had_its_default(tmp_path):
    folder = write_run(tmp_path/"run")
    description = json.loads((folder/"run.json").read_text())
    del description["plan"]["pretraining"]["softening"], description["plan"]["finetuning"]["softening"]
    write_json(folder/"run.json", description)
    assert read_run(folder).plan["pretraining"]["softening"] == 1
    report(folder)
    assert "softening" not in (folder/"report.md").read_text()


@pytest.mark.parametrize("name,text", [
    ("run.json", "5"), ("environment.json", "5"), ("seed-42/metrics.json", "{}"), ("seed-42/metrics.json", "[5]"),
    ("seed-42/metrics.json", '[{"name": "pcm-AstroMAE", "n": 3, "errors": {}, "mae": 1}]'),
    ("seed-42/curve.json", '[{"name": "pcm-AstroMAE"}]'), ("seed-42/networks/pcm-AstroMAE/history.csv", ""),
    ("seed-42/networks/pcm-AstroMAE/history.csv", "epoch,rate\n0,1\n")])
def test_a_file_of_another_version_is_named(tmp_path, name, text):
    folder = write_run(tmp_path/"run")
    (folder/name).parent.mkdir(parents=True, exist_ok=True)
    (folder/name).write_text(text)
    sentence = f"{name} is damaged or was written by another version; "
    with pytest.raises(InputError, match=re.escape(sentence)): report(folder)


def test_a_log_that_is_being_written_is_passed_over(tmp_path):
    folder = write_run(tmp_path/"run")
    training = folder/"seed-42"/"pretraining-pcm"
    (training/".history.csv-a1b2").mkdir(parents=True)
    (training/".history.csv-a1b2"/"history.csv").write_text("epoch,tr")
    (training/"history.csv").write_text("epoch,train_loss,valid_loss\n0,1.0,2.0\n")
    assert list(read_run(folder).logs[42]) == ["pretraining-pcm"]


def test_an_empty_log_of_a_training_on_its_way_is_named(tmp_path):
    folder = write_run(tmp_path/"run")
    (folder/"seed-42"/"metrics.json").unlink()
    (folder/"seed-42"/"pretraining-pcm").mkdir()
    (folder/"seed-42"/"pretraining-pcm"/"history.csv").touch()
    with pytest.raises(InputError, match="history.csv is damaged or was written by another version"): report(folder)
