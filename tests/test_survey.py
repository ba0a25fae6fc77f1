"What would disturb the story of frames and catalogues: servers that misbehave, killed processes, bad input."
import bz2
import errno
import os
import signal
import subprocess
import sys
import time
from copy import copy
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import requests
import torch
from archive import MOODS, Archive, SkyServer, archive_path, invented_sky, serving, small_frame
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.table import QTable, Table
from astroquery.exceptions import RemoteServiceError
from astroquery.sdss import SDSS
from hypothesis import HealthCheck, given, settings, strategies as st
from urllib3.util import Retry

from astromae import downloads
from astromae.downloads import LEFTOVER
from astromae.errors import InputError
from astromae.simulate import packaged_catalogue
from astromae.skyserver import SELECTIONS, query_galaxies
from astromae.survey import BANDS, check_frame, fetch_frames, find_frame, frame_name

FIELDS = [(3918, 3, 213), (1035, 6, 17)]
PLACES = [(band, *field) for field in FIELDS for band in BANDS]
FRAMES = {archive_path(*place): small_frame(*place, seed=k) for k, place in enumerate(PLACES)}
CATALOGUE = Table(dict(zip(("run", "camcol", "field"), np.repeat(FIELDS, 3, axis=0).T)))
AT_ONCE = Retry(total=1)  # one repetition, without a wait


def on_fields(run, camcol, field) -> Table: return Table({"run": run, "camcol": camcol, "field": field})


def refused(message, function, *args, **kwargs):
    with pytest.raises(InputError) as caught: function(*args, **kwargs)
    sentence = str(caught.value)
    assert message in sentence, sentence
    assert "\n" not in sentence and sentence.endswith(".")


def frames_in(folder: Path) -> dict:
    "What anybody would take for frames: name -> bytes."
    return {path.name: path.read_bytes() for path in folder.rglob("frame-*") if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)}


def fetch(archive, folder, **options):
    options = dict(catalogue=CATALOGUE, retries=AT_ONCE, timeout=5, progress=False) | options
    return fetch_frames(folder=folder, server=f"{archive.url}/sas", **options)


@pytest.fixture
def archive():
    with serving(Archive(dict(FRAMES))) as archive: yield archive


ORIGINALS = {Path(path).name: body for path, body in FRAMES.items()}


# --- frames

@given(moods=st.lists(st.lists(st.sampled_from(MOODS), max_size=4), min_size=10, max_size=10))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_archive_does_the_set_gets_whole(archive, tmp_path_factory, moods):
    folder = tmp_path_factory.mktemp("frames")
    archive.slowness = 0.4
    archive.moods = dict(zip(FRAMES, map(list, moods)))
    for _ in range(6):
        summary = fetch(archive, folder, timeout=0.2)
        there = frames_in(folder)
        assert all(there[name] == ORIGINALS[name] for name in there)
        assert len(there) == 10 - len(summary.failed) == len(summary.downloaded) + len(summary.already)
        if summary.complete: break
    assert frames_in(folder) == ORIGINALS


@pytest.mark.parametrize("mood, reason", [
    ("closes", "cannot be reached"), ("busy", "503"), ("broken", "500"), ("page", "a web page"),
    ("slow", "did not answer in time"), ("half", "broke off half way"), ("empty", "no FITS file"),
    ("half without length", "cut off or damaged"), ("truncated", "cut off or damaged"),
    ("wrong", "is band u of 1-1-11 and not")])
def test_each_trouble_has_its_reason(archive, tmp_path, mood, reason):
    path = archive_path("r", 3918, 3, 213)
    archive.moods[path] = [mood]*2
    summary = fetch(archive, tmp_path, timeout=0.5)
    assert list(summary.failed) == [Path(path).name] and reason in summary.failed[Path(path).name]
    assert reason in str(summary) and len(frames_in(tmp_path)) == 9
    archive.asked.clear()
    assert fetch(archive, tmp_path).complete and archive.asked == [path]
    assert frames_in(tmp_path) == ORIGINALS


def test_real_frames_come_byte_for_byte(shared_data, tmp_path):
    read = lambda *place: (shared_data/"sdss-frames"/frame_name(*place)).read_bytes()
    real = {archive_path(*place): read(*place) for place in PLACES[:3]}
    moods = ("half", "truncated", "wrong")
    with serving(Archive(real)) as archive:
        archive.wrong = read("u", *FIELDS[1])
        archive.moods = {path: [mood] for path, mood in zip(real, moods)}
        summary = fetch(archive, tmp_path, catalogue=CATALOGUE[:1], bands="ugr")
    assert summary.complete and summary.size == sum(map(len, real.values()))
    assert frames_in(tmp_path) == {Path(path).name: body for path, body in real.items()}


def test_the_archive_is_treated_politely(archive, tmp_path):
    archive.moods = {path: ["slow"] for path in FRAMES}
    archive.slowness = 0.1
    fetch(archive, tmp_path, parallel=3)
    assert archive.most_at_once <= 3 and sorted(archive.asked) == sorted(FRAMES)


def test_retry_after_is_heeded(archive, tmp_path):
    archive.retry_after = "1"
    archive.moods[archive_path("r", 3918, 3, 213)] = ["busy"]
    started = time.time()
    assert fetch(archive, tmp_path).complete and time.time() - started >= 1
    archive.retry_after = "7200"
    archive.moods[archive_path("r", 3918, 3, 213)] = ["busy"]
    reason, = fetch(archive, tmp_path/"other").failed.values()
    assert reason == "the server answered 503 Service Unavailable and asks to wait 7,200 s"


def test_without_a_server_it_stops_early_and_says_so(archive, tmp_path):
    assert fetch(archive, tmp_path, bands="r").complete
    archive.shutdown()
    archive.server_close()
    many = on_fields([3918]*300, [3]*300, 213 + np.arange(300))
    summary = fetch(archive, tmp_path, catalogue=many)
    assert len(summary.failed) == 1499 and set(summary.failed.values()) == {
        "the server cannot be reached", "not tried: the server cannot be reached"}
    assert [path.name for path in summary.already] == [frame_name("r", 3918, 3, 213)]


KILLED = """
from astropy.table import QTable, Table
import sys
from astromae.{module} import {function}
{call}
"""

def start(module, function, call):
    script = KILLED.format(module=module, function=function, call=call)
    return subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)

def wait_for(condition, process, seconds=60):
    started = time.time()
    while not condition():
        assert process.poll() is None and time.time() - started < seconds
        time.sleep(0.01)


def test_a_killed_fetch_loses_nothing(archive, tmp_path):
    archive.slowness = 0.15
    archive.moods = {path: ["slow"] for path in FRAMES}
    catalogue, folder = tmp_path/"catalogue.ecsv", tmp_path/"frames"
    CATALOGUE.write(catalogue)
    call = (f"fetch_frames(Table.read({str(catalogue)!r}), {str(folder)!r}, parallel=1, "
            f"server='{archive.url}/sas')")
    process = start("survey", "fetch_frames", call)
    wait_for(lambda: folder.exists() and len(frames_in(folder)) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = frames_in(folder)
    assert 3 <= len(whole) < 10 and all(body == ORIGINALS[name] for name, body in whole.items())
    archive.asked.clear()
    archive.moods.clear()
    assert fetch(archive, folder).complete
    assert {Path(path).name for path in archive.asked} == set(ORIGINALS) - set(whole)
    assert frames_in(folder) == ORIGINALS


def test_a_body_left_by_a_killed_process_is_cleared_away(archive, tmp_path):
    left = tmp_path/f".{frame_name('r', 3918, 3, 213)}-abc_1234"
    left.mkdir()
    (left/frame_name("r", 3918, 3, 213)).write_bytes(b"BZh91AY")
    assert fetch(archive, tmp_path).complete and left.exists()
    os.utime(left, (time.time() - LEFTOVER - 1,)*2)
    fetch(archive, tmp_path)
    assert not left.exists()


def test_frames_that_lie_there_are_used(archive, tmp_path):
    tree = tmp_path/"301"/"3918"/"3"
    tree.mkdir(parents=True)
    (tree/frame_name("g", 3918, 3, 213)).write_bytes(ORIGINALS[frame_name("g", 3918, 3, 213)])
    plain = tmp_path/frame_name("u", 1035, 6, 17).removesuffix(".bz2")
    plain.write_bytes(bz2.decompress(ORIGINALS[frame_name("u", 1035, 6, 17)]))
    broken = tmp_path/frame_name("r", 3918, 3, 213)
    broken.write_bytes(ORIGINALS[broken.name][:-1])
    summary = fetch(archive, tmp_path)
    assert len(archive.asked) == len(summary.downloaded) == 8
    assert broken.read_bytes() == ORIGINALS[broken.name]
    assert {path for path in summary.already} == {plain, tree/frame_name("g", 3918, 3, 213)}
    assert find_frame(tmp_path, "u", 1035, 6, 17) == plain and find_frame(tmp_path, "u", 1035, 6, 18) is None


def test_a_frame_is_read_once_and_again_when_it_changes(archive, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("astromae.survey.check_frame", lambda path: (read.append(path), check_frame(path)))
    fetch(archive, tmp_path)
    read.clear()
    (tmp_path/".checked").write_text((tmp_path/".checked").read_text()[:-7])  # a note that was cut off
    fetch(archive, tmp_path)
    assert len(read) == 1
    damaged = tmp_path/frame_name("i", 3918, 3, 213)
    damaged.write_bytes(damaged.read_bytes()[:-3])
    assert [path.name for path in fetch(archive, tmp_path).downloaded] == [damaged.name]
    assert frames_in(tmp_path) == ORIGINALS


def test_a_full_disk_is_one_sentence(archive, tmp_path, monkeypatch):
    def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fetch(archive, tmp_path, bands="ugr")
    monkeypatch.setattr(downloads, "_receive", full)
    refused("No space left on device", fetch, archive, tmp_path)
    assert len(frames_in(tmp_path)) == 6
    monkeypatch.undo()
    assert fetch(archive, tmp_path).complete


@pytest.mark.parametrize("change, message", [
    (dict(catalogue=CATALOGUE["run", "field"]), "no column 'camcol'"),
    (dict(catalogue=CATALOGUE["run", "field"]), "astromae query"),
    (dict(catalogue=on_fields([3918, 0], [3, 1], [213, 12])), "row 1 of the catalogue"),
    (dict(catalogue=on_fields([3918], [7], [213])), "row 0 of the catalogue"),
    (dict(catalogue=on_fields([np.nan], [3], [213])), "are nan, 3, 213"),
    (dict(catalogue=on_fields(["x"], [3], [213])), "must be whole numbers"),
    (dict(bands="gry"), "no band 'y'"), (dict(parallel=0), "fetch nothing"),
    (dict(server="data.sdss.org"), "must begin with http")])
def test_bad_requests_for_frames_are_refused(tmp_path, change, message):
    arguments = dict(catalogue=CATALOGUE, folder=tmp_path/"frames", progress=False) | change
    refused(message, lambda: fetch_frames(**arguments))
    assert not (tmp_path/"frames").exists()


# --- catalogues

PHOTOMETRY, SPECTRA = invented_sky()
BEST = SPECTRA[SPECTRA["sciencePrimary"] == 1].set_index("bestObjID")
BOTH = PHOTOMETRY.merge(SPECTRA[SPECTRA["sciencePrimary"] == 1], left_on="objID", right_on="bestObjID")
PAPER = BOTH[(BOTH["class"] == "GALAXY") & (BOTH["survey"] == "sdss") & (BOTH["targetType"] == "SCIENCE")
             & (BOTH["zWarning"] == 0) & (BOTH["clean"] == 1) & (BOTH["insideMask"] == 0)]
PAPER = PAPER.sort_values("objID")
MAIN = PAPER[(PAPER["z"] <= 0.4) & (PAPER["petroMag_r"] - PAPER["extinction_r"] <= 17.8)
             & (PAPER["legacy_target1"] >= 64)]


@pytest.fixture(scope="module")
def database(tmp_path_factory): return SkyServer(tmp_path_factory.mktemp("sky")/"sky.db", PHOTOMETRY, SPECTRA)


@pytest.fixture
def sky(database):
    own = copy(database)
    own.queries = []
    with serving(Archive(database=own)) as archive: yield archive


def query(sky, out, *args, **options):
    options = dict(server=sky.url, retries=AT_ONCE, pause=0, progress=False) | options
    return query_galaxies(out, *args, **options)


def test_selections_find_what_numpy_finds(sky, tmp_path):
    paper = query(sky, tmp_path/"paper.fits", chunk=37)
    assert list(paper["objid"]) == list(PAPER["objID"]) and 60 < len(paper) < 300
    main = query(sky, tmp_path/"main.fits", "main")
    assert list(main["objid"]) == list(MAIN["objID"]) and set(SELECTIONS) == {"paper", "main"}
    assert set(sky.asked) == {"/dr17/en/tools/search/x_results.aspx"}


def test_columns_are_the_house_s(sky, tmp_path):
    returned = query(sky, tmp_path/"paper.fits")
    assert all(returned[name].dtype.isnative for name in returned.colnames)
    table = Table.read(tmp_path/"paper.fits", mask_invalid=False)
    for ours, theirs in (("ra", "ra"), ("mag_r", "dered_r"), ("magerr_z", "modelMagErr_z"),
                         ("ext_u", "extinction_u"), ("petromag_r", "petroMag_r"),
                         ("petrorad_r", "petroRad_r"), ("z_spec", "z"), ("z_err", "zErr"),
                         ("z_warning", "zWarning"), ("primtarget", "legacy_target1")):
        np.testing.assert_allclose(table[ours], PAPER[theirs], rtol=1e-12)
    np.testing.assert_allclose(table["ebv"], PAPER["extinction_r"]/2.285)
    np.testing.assert_allclose(table["dered_petro_r"], PAPER["petroMag_r"] - PAPER["extinction_r"])
    assert {"rerun", "run", "camcol", "field"} <= set(table.colnames) and table["objid"].dtype.str == ">i8"
    assert table["mag_u"].unit == "mag" and table.meta["RELEASE"] == 17


# Stoughton et al. (2002); Schlafly & Finkbeiner (2011): ugriz, magnitudes per E(B-V)
LAWS = {12: (5.155, 3.793, 2.751, 2.086, 1.479), 13: (4.239, 3.303, 2.285, 1.698, 1.263)}


@pytest.mark.parametrize("release, law", [(12, 12), (13, 13), (None, 13)])
@pytest.mark.parametrize("how", ["selection", "objid", "positions"])
def test_reddening_is_found_again_whatever_the_release(sky, tmp_path, release, law, how):
    reddening = np.random.default_rng(4).uniform(0, 0.3, len(PHOTOMETRY))
    photometry = PHOTOMETRY.assign(**{f"extinction_{band}": k*reddening for band, k in zip(BANDS, LAWS[law])})
    sky.database = SkyServer(tmp_path/"sky.db", photometry, SPECTRA)
    some = photometry[photometry["mode"] == 1][:20]
    asked = {"selection": {}, "objid": {"objid": list(some["objID"])},
             "positions": {"positions": some[["ra", "dec"]].to_numpy()}}[how]
    found = query(sky, tmp_path/"found.fits", release=release, **asked)
    truth = dict(zip(photometry["objID"], reddening))
    np.testing.assert_allclose(found["ebv"], [truth[objid] for objid in found["objid"]], rtol=1e-6)
    assert found.meta["RELEASE"] == (release or 17) and len(found) > 10


def test_the_packaged_catalogue_follows_the_older_law():
    packaged = packaged_catalogue()
    reddening = np.median(packaged["ext_r"])/LAWS[12][2]
    assert round(reddening, 3) == 0.026
    for band, coefficient, newer, brighter in zip("ur", (5.155, 2.751), (4.239, 2.285), (0.024, 0.012)):
        np.testing.assert_allclose(np.median(packaged[f"ext_{band}"]), coefficient*reddening, rtol=1e-3)
        assert round(np.median(packaged[f"ext_{band}"]) - newer*reddening, 3) == brighter


def test_regions(sky, tmp_path):
    box = query(sky, tmp_path/"box.fits", region=(300, 60, 0, 40))
    inside = ((PAPER["ra"] >= 300) | (PAPER["ra"] < 60)) & PAPER["dec"].between(0, 40)
    assert list(box["objid"]) == list(PAPER["objID"][inside]) and len(box) > 10
    for k, same in enumerate([(-60, 60), (300, 420), (-60, 420), (660, 60)]):
        again = query(sky, tmp_path/f"same-{k}.fits", region=(*same, 0, 40))
        everywhere = PAPER["dec"].between(0, 40) if k == 2 else inside
        assert list(again["objid"]) == list(PAPER["objID"][everywhere])
    circle = query(sky, tmp_path/"circle.fits", region=(180, 20, 40))
    places, centre = SkyCoord(PAPER["ra"], PAPER["dec"], unit="deg"), SkyCoord(180, 20, unit="deg")
    near = (places.separation(centre).deg <= 40) & (PAPER["mode"] == 1)
    assert list(circle["objid"]) == list(PAPER["objID"][near]) and len(circle) > 10


@pytest.mark.parametrize("chunk, limit", [(1, 9), (50, None), (len(PAPER), None), (500_000, 11), (10, 25)])
def test_chunks_change_nothing(sky, tmp_path, chunk, limit):
    found = query(sky, tmp_path/"paper.fits", chunk=chunk, limit=limit)
    assert list(found["objid"]) == list(PAPER["objID"][:limit])


def test_lists_of_positions_of_any_kind(sky, tmp_path):
    primary = PHOTOMETRY[PHOTOMETRY["mode"] == 1][:20]
    frame = primary[["dec", "ra"]].reset_index(drop=True)
    hours = QTable({"ra": (frame["ra"].to_numpy()*u.deg).to(u.hourangle), "dec": frame["dec"].to_numpy()*u.deg})
    kinds = (frame, frame.to_dict("list"), frame.to_records(index=False), hours,
             torch.tensor(frame[["ra", "dec"]].to_numpy()))
    for k, positions in enumerate(kinds):
        found = query(sky, tmp_path/f"{k}.fits", positions=positions)
        assert list(found["objid"]) == list(primary["objID"])


def test_positions_keep_their_order(sky, tmp_path):
    primary = PHOTOMETRY[PHOTOMETRY["mode"] == 1].sample(60, random_state=2)
    places = primary[["ra", "dec"]].to_numpy() + [0, 1/3600]
    places[[7, 20]] = (0.001, -80), (10, 85)
    with pytest.warns(UserWarning, match=r"no object for 2 of the 60 rows asked for \(7, 20\)"):
        found = query(sky, tmp_path/"found.fits", positions=places)
    expected = primary["objID"].to_numpy()[np.delete(np.arange(60), [7, 20])]
    assert list(found["objid"]) == list(expected)
    assert list(found["asked"]) == list(np.delete(np.arange(60), [7, 20]))
    known = np.isin(expected, BEST.index)
    np.testing.assert_array_equal(np.isnan(found["z_spec"]), ~known)
    np.testing.assert_allclose(found["z_spec"][known], BEST.loc[expected[known], "z"])
    assert set(found["z_warning"][~known]) == {-1}


def test_positions_come_from_tables_and_files(sky, tmp_path):
    primary = PHOTOMETRY[PHOTOMETRY["mode"] == 1][:5]
    table = Table({"RA": primary["ra"].to_numpy(), "Dec": primary["dec"].to_numpy()})
    table.write(tmp_path/"list.csv")
    for k, handed in enumerate((table, tmp_path/"list.csv", SkyCoord(table["RA"], table["Dec"], unit="deg"))):
        assert list(query(sky, tmp_path/f"{k}.fits", positions=handed)["objid"]) == list(primary["objID"])


def test_objid_lists_keep_their_order(sky, tmp_path):
    wanted = list(PHOTOMETRY["objID"].sample(120, random_state=3))
    wanted[3:3] = [wanted[0], 99]
    with pytest.warns(UserWarning, match=r"1 of the 122 rows asked for \(4\)"):
        found = query(sky, tmp_path/"found.fits", objid=wanted)
    assert list(found["objid"]) == wanted[:4] + wanted[5:]
    known = np.isin(found["objid"], BEST.index)
    np.testing.assert_allclose(found["z_spec"][known], BEST.loc[np.asarray(found["objid"][known]), "z"])
    assert np.isnan(found["z_spec"][~known]).all()


def test_sql_of_one_s_own(sky, tmp_path):
    sql = """SELECT p.objID, p.dered_r, s.z, s.class, NULLIF(s.class, 'QSO') AS kind -- a comment
             FROM PhotoObjAll AS p JOIN SpecObjAll AS s ON s.bestObjID = p.objID
             WHERE s.sciencePrimary = 1 AND p.dered_u < 0 OR s.z > 0.5 AND s.z < 1;"""
    found = query(sky, tmp_path/"found.fits", sql=sql, chunk=7)
    assert {"objid", "mag_r", "z_spec", "class", "kind"} == set(found.colnames)
    assert len(found) == len(np.unique(found["objid"])) > 20
    assert set(Table.read(tmp_path/"found.fits")["class"]) <= {"GALAXY", "QSO"}
    for reason, sql in (("does not accept the query", "SELECT objID, redshift FROM SpecObjAll"),
                        ("no galaxy like that", "SELECT objID FROM PhotoObjAll WHERE ra<0")):
        refused(reason, query, sky, tmp_path/"no.fits", sql=sql)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.fits"]


@pytest.mark.parametrize("mood, reason", [
    ("closes", "cannot be reached"), ("busy", "503"), ("broken", "500"), ("slow", "did not answer in time"),
    ("half", "broke off half way"), ("half without length", "may be cut off"), ("page", "a web page and not a table (SDSS Service Unavailable)"),
    ("empty", "no readable table"), ("complains", "Invalid column name 'redshift'."),
    ("times out", "Query timeout exceeded")])
def test_a_query_that_breaks_keeps_what_came(sky, tmp_path, mood, reason, monkeypatch):
    monkeypatch.setattr("astromae.skyserver.SKYSERVER_SECONDS", 0.5)
    sky.moods["any"] = ["well"]*2 + [mood]*9
    refused(reason, query, sky, tmp_path/"paper.fits", chunk=20)
    assert not (tmp_path/"paper.fits").exists()
    sky.moods.clear()
    sky.asked.clear()
    found = query(sky, tmp_path/"paper.fits", chunk=20)
    assert list(found["objid"]) == list(PAPER["objID"]) and len(sky.asked) == 1 + -(-(len(PAPER) - 40)//20)
    assert [path.name for path in tmp_path.iterdir()] == ["paper.fits"]


@pytest.mark.parametrize("options", [{}, dict(objid=[7, 8]), dict(positions=[(10, 10), (20, 20)])])
@pytest.mark.parametrize("mood", ["well", "nothing"])
def test_no_galaxy_is_one_sentence(sky, tmp_path, mood, options):
    sky.database.photometry = PHOTOMETRY[:0]
    sky.database.ask = lambda query: sky.database.run("SELECT objID FROM PhotoObjAll WHERE objID < 0")
    sky.moods["any"] = [mood]*4
    refused("no galaxy like that", query, sky, tmp_path/"a.fits", **options)
    assert list(tmp_path.iterdir()) == []


def test_no_server_is_one_sentence(sky, tmp_path):
    sky.shutdown()
    sky.server_close()
    refused("the server cannot be reached; check the network or try later.", query, sky, tmp_path/"a.fits")
    refused("cannot be reached", query, sky, tmp_path/"a.fits", positions=[(180, 0)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error, reason", [
    (requests.ConnectionError("no route"), "the server cannot be reached"), (URLError("no host"), "cannot be reached"),
    (requests.ReadTimeout("60 s"), "did not answer in time"), (RemoteServiceError("in repair"), "in repair")])
def test_what_astroquery_raises_is_one_sentence(tmp_path, monkeypatch, error, reason):
    def fail(*_, **__): raise error
    monkeypatch.setattr(SDSS, "query_sql_async", fail)
    refused(reason, query_galaxies, tmp_path/"a.fits", server="http://nowhere", retries=AT_ONCE, pause=0,
            progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_cuts_every_answer_short_loses_nothing(sky, tmp_path):
    whole = sky.database.ask
    sky.database.ask = lambda query: b"".join(whole(query).splitlines(keepends=True)[:2 + 30])
    assert list(query(sky, tmp_path/"paper.fits")["objid"]) == list(PAPER["objID"])


def test_a_query_that_is_too_slow_is_asked_in_smaller_chunks(sky, tmp_path):
    sky.moods["any"] = ["times out"]*2
    found = query(sky, tmp_path/"paper.fits", chunk=1600)
    assert list(found["objid"]) == list(PAPER["objID"])
    assert [int(sql.split()[2]) for sql in sky.database.queries][-1] == 100


def test_an_answer_that_never_moves_on_is_refused(sky, tmp_path):
    sky.database.ask = lambda query: b"#Table1\nobjid,ra\n5,1\n6,2\n"
    refused("another order", query, sky, tmp_path/"paper.fits", chunk=2)


def test_a_killed_query_loses_nothing(sky, tmp_path):
    sky.slowness = 0.1
    sky.moods["any"] = ["slow"]*1000
    folder = tmp_path/"catalogues"
    call = f"query_galaxies({str(folder/'paper.fits')!r}, chunk=10, server='{sky.url}', pause=0)"
    process = start("skyserver", "query_galaxies", call)
    wait_for(lambda: len(list(folder.glob(".paper.fits-*/chunk-*.fits"))) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(list(folder.glob(".paper.fits-*/chunk-*.fits")))
    sky.moods.clear()
    sky.asked.clear()
    found = query(sky, folder/"paper.fits", chunk=10)
    assert list(found["objid"]) == list(PAPER["objID"])
    assert len(sky.asked) == 1 + -(-(len(PAPER) - 10*kept)//10)
    assert [path.name for path in folder.iterdir()] == ["paper.fits"]


@pytest.mark.parametrize("options, message", [
    (dict(selection="all"), "no selection 'all'"), (dict(region=(1, 2)), "must be ra, dec, radius"),
    (dict(region=()), "must be ra, dec, radius"), (dict(radius=200), "up to 180"),
    (dict(region=(1, 2, 5, 4)), "is empty"), (dict(region=(350, -10, 0, 1)), "is empty"), (dict(region="north"), "must be ra, dec, radius"),
    (dict(chunk=0), "from 1 to 500,000"), (dict(chunk=10**6), "from 1 to 500,000"),
    (dict(limit=0), "leaves nothing"), (dict(sql="DROP TABLE x"), "one SELECT"),
    (dict(sql="SELECT TOP 5 objid FROM x"), "without 'TOP'"),
    (dict(sql="SELECT objid INTO x FROM y"), "without 'INTO'"),
    (dict(sql="SELECT 1", objid=[3]), "one thing"), (dict(objid=[3], selection="main"), "objid alone"),
    (dict(objid=[-3]), "above zero"), (dict(objid=[1.5]), "whole"), (dict(objid=["x"]), "whole"),
    (dict(positions=[(np.nan, 1)]), "row 0 of the positions"),
    (dict(positions=[(10, 20), (370, 1)]), "row 1 of the positions"),
    (dict(positions=[(10, 91)]), "not on the sky"), (dict(positions=[("a", "b")]), "must be numbers"),
    (dict(positions=Table({"ra": [1.]})), "no column 'dec'"),
    (dict(positions="missing.csv"), "cannot be read"),
    (dict(positions=[1, 2, 3]), "no rows of ra and dec"), (dict(objid=[]), "is empty")])
def test_bad_questions_are_refused_unasked(sky, tmp_path, options, message):
    refused(message, query, sky, tmp_path/"no.fits", **options)
    assert not sky.asked and list(tmp_path.iterdir()) == []


def test_nothing_that_is_there_is_overwritten(sky, tmp_path):
    (tmp_path/"a.fits").write_text("precious")
    refused("exists", query, sky, tmp_path/"a.fits")
    refused("name it a.fits", query, sky, tmp_path/"a.csv")
    assert (tmp_path/"a.fits").read_text() == "precious" and not sky.asked
    query(sky, tmp_path/"a.fits", overwrite=True)
    assert len(Table.read(tmp_path/"a.fits")) == len(PAPER)
