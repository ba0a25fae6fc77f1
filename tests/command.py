"Small stamp sets, and what a command may print and leave behind: shared by the tests of the verbs."
import re
import resource
from contextlib import contextmanager

import numpy as np
from astropy.table import Table

from astromae.catalogue import required_columns
from astromae.dataset import write_stamp_set
from astromae.survey import BANDS

N = 100


def some(n=N, bands=BANDS, size=48):
    "Noise with a spot in the middle, and a catalogue in which redder is farther."
    rng = np.random.default_rng(0)
    images = rng.normal(0, 0.1, (n, len(bands), size, size)).astype(np.float32)
    images[:, :, size//2 - 2:size//2 + 3, size//2 - 2:size//2 + 3] += rng.uniform(1, 9, (n, 1, 1, 1))
    table = Table({name: rng.uniform(16, 18, n) for name in required_columns(bands)})
    table["objid"], table["z_spec"] = 1000 + np.arange(n), 0.1 + (table["mag_g"] - table["mag_r"])/50
    return images, table


def write(folder, n=N, bands=BANDS, size=48):
    return write_stamp_set(folder, [some(n, bands, size)], n, bands=bands).folder


def sentence(err):
    "What stands on the error stream beside progress bars, which end before it begins."
    lines = [line for line in err.splitlines() if line.strip() and not re.search(r"(\d%\||: \d).*\]$", line)]
    assert len(lines) == 1 and "Traceback" not in err, err
    assert lines[0].startswith("astromae: ") and lines[0].endswith((".", "?")), err
    return lines[0]


def on_disk(folder):
    return {path: path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


@contextmanager
def full_disk():
    "No file may grow beyond 4000 bytes, as on a disk that is nearly full."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)) # pytest's own log may be longer
