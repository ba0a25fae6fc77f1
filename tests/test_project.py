"""The notebooks are the source: modules, README and site follow from them, and they keep to the style."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY/"nbs").rglob("*.ipynb"))
NOTEBOOKS = [path for path in NOTEBOOKS if ".ipynb_checkpoints" not in path.parts]
ROOMS = [path for path in NOTEBOOKS if re.match(r"\d\d_", path.name)]
NAMES = [path.stem for path in NOTEBOOKS]
LITTER = r"Warning|it/s\]|0x[0-9a-f]{8,}|/(home|root|Users)/|site-packages"


def cells(path: Path, kind: str = "code") -> list:
    "The cells of one kind that have any text."
    found = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]
    return [cell for cell in found if "".join(cell["source"]).strip()]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    "A copy of the repository in which commands may change files."
    folder = tmp_path_factory.mktemp("copy")/"astromae"
    ignore = shutil.ignore_patterns(".git", ".venv", "_proc", "_docs", "demo", "bench", "__pycache__",
                                    "*.egg-info", ".ipynb_checkpoints")
    shutil.copytree(REPOSITORY, folder, symlinks=True, ignore=ignore)
    return folder


def run(command: list, folder: Path):
    "Run a command of this environment in a folder."
    environment_bin = Path(sys.executable).parent
    subprocess.run([environment_bin/command[0], *command[1:]], cwd=folder, check=True, capture_output=True)


def test_modules_are_exported(copy):
    run(["nbdev_export"], copy)
    written = {path.name: path.read_text() for path in (copy/"astromae").glob("*.py")}
    kept = {path.name: path.read_text() for path in (REPOSITORY/"astromae").glob("*.py")}
    assert written == kept, "run nbdev_export and commit what it writes"


def test_notebooks_are_clean(copy):
    run(["nbdev_clean"], copy)
    for path in NOTEBOOKS:
        cleaned = (copy/path.relative_to(REPOSITORY)).read_text()
        assert cleaned == path.read_text(), f"run nbdev_clean: {path.name} changes"


def test_readme_is_written_from_the_index(copy):
    (copy/".venv").symlink_to(Path(sys.prefix))
    subprocess.run(["make", "-o", ".venv/installed", "readme"], cwd=copy, check=True, capture_output=True)
    assert (copy/"README.md").read_text() == (REPOSITORY/"README.md").read_text(), "run make readme"


def test_the_first_two_commands_of_the_readme():
    code = re.findall(r"```\w*\n(.*?)```", (REPOSITORY/"README.md").read_text(), re.S)
    lines = [line for block in code for line in block.splitlines() if line.strip()]
    assert [line.split("#")[0].strip() for line in lines[:2]] == ["make demo", "make test"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_saved_outputs(path):
    outputs = [output for cell in cells(path) for output in cell["outputs"]]
    assert outputs, "execute the notebook and save its outputs"
    text = json.dumps([{k: v for k, v in o.get("data", o).items() if k != "image/png"} for o in outputs])
    assert not any(output["output_type"] == "error" for output in outputs)
    assert not re.search(LITTER, text), re.search(LITTER, text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_cells_are_short_and_lines_fit(path):
    for cell in cells(path):
        lines = "".join(cell["source"]).split("\n")
        assert len(lines) <= 45, lines[0]
        assert max(map(len, lines)) <= 100, max(lines, key=len)


@pytest.mark.parametrize("path", ROOMS, ids=[path.stem for path in ROOMS])
def test_a_room_uses_only_rooms_that_stand_before_it(path):
    order = [room[3:] for room in re.findall(r"- (\d\d_\w+)\.ipynb", (REPOSITORY/"_quarto.yml").read_text())]
    exported = [c for c in cells(path) if "".join(c["source"]).startswith("#| export")]
    text = "\n".join("".join(cell["source"]) for cell in exported)
    used = set(re.findall(r"^(?:from|import) astromae\.(\w+)", text, re.M))
    assert used <= set(order[:order.index(path.stem[3:])]), used


def test_the_site_shows_the_rooms_in_the_order_of_their_numbers():
    numbers = re.findall(r"- (\d\d)_\w+\.ipynb", (REPOSITORY/"_quarto.yml").read_text())
    assert numbers == sorted(numbers)


def test_the_site_names_every_notebook_and_no_other_file():
    configuration = (REPOSITORY/"_quarto.yml").read_text()
    named = set(re.findall(r"[\w/]+\.ipynb", configuration))
    assert named == {str(path.relative_to(REPOSITORY/"nbs")) for path in NOTEBOOKS}
    styles = yaml.safe_load(configuration)["format"]["html"]["css"]
    assert (REPOSITORY/"nbs"/styles).exists()
    assert (REPOSITORY/"nbs"/"_quarto.yml").resolve() == REPOSITORY/"_quarto.yml"


def test_the_site_has_the_report_of_every_measured_run():
    "Finished, with its data set in the first line, and with its figures."
    shown = re.findall(r"results/[\w-]+/report\.md", (REPOSITORY/"_quarto.yml").read_text())
    reports = sorted((REPOSITORY/"nbs"/"results").glob("*/report.md"))
    assert sorted(shown) == [str(path.relative_to(REPOSITORY/"nbs")) for path in reports] and shown
    for path in reports:
        text = path.read_text()
        assert "pixels simulated (10,000 stamps)" in text.splitlines()[0]
        assert "not finished" not in text
        figures = re.findall(r"\]\((figures/[\w-]+\.png)\)", text)
        assert figures and {path.parent/name for name in figures} == set(path.parent.glob("figures/*"))


def test_no_pickle_is_loaded():
    "Not by numpy, and by torch only what `weights_only` lets through."
    for path in (REPOSITORY/"astromae").glob("*.py"):
        text = path.read_text()
        assert not re.search(r"import pickle|allow_pickle=True|weights_only=False", text), path
        for call in re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", text):
            assert "weights_only=True" in call, (path, call)
        assert text.count("torch.load(") == text.count("weights_only=True"), path


def test_packaged_data_is_small():
    data = list((REPOSITORY/"astromae"/"data").rglob("*"))
    assert sum(path.stat().st_size for path in data if path.is_file()) <= 1_100_000
