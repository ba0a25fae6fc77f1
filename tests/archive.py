"""SDSS's archive and SkyServer on 127.0.0.1, at the paths that astroquery asks, misbehaving on demand."""
import bz2
import email
import io
import json
import re
import sqlite3
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pandas as pd
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import Table

from astromae.survey import BANDS

PAGE = b"<html><head><title>SDSS</title></head><body><h1>Service Unavailable</h1></body></html>"
MOODS = ("closes", "busy", "broken", "slow", "half", "half without length", "truncated", "wrong", "page",
         "empty")


def small_frame(band, run, camcol, field, seed=0) -> bytes:
    "A frame of SDSS's layout with 40 by 30 pixels."
    pixels = np.random.default_rng(seed).normal(0, 0.03, (30, 40)).astype(np.float32)
    place = Table({"FILTER": [band], "RUN": [run], "CAMCOL": [camcol], "FIELD": [field]})
    file = io.BytesIO()
    fits.HDUList([fits.PrimaryHDU(pixels), fits.ImageHDU(np.ones(40, np.float32)),
                  fits.table_to_hdu(place)]).writeto(file)
    return bz2.compress(file.getvalue())


def archive_path(band, run, camcol, field) -> str:
    "Where data release 17 has a frame, written out."
    return (f"/sas/dr17/eboss/photoObj/frames/301/{run}/{camcol}/"
            f"frame-{band}-{run:06d}-{camcol}-{field:04d}.fits.bz2")


class Handler(BaseHTTPRequestHandler):
    "One request: in which mood, and then what is asked for."
    protocol_version = "HTTP/1.1"

    def do_GET(self): self.reply(urlsplit(self.path), b"")

    def do_POST(self):
        self.reply(urlsplit(self.path), self.rfile.read(int(self.headers["Content-Length"])))

    def reply(self, address, uploaded):
        server = self.server
        with server.counting:
            server.asked.append(address.path)
            server.now += 1
            server.most_at_once = max(server.most_at_once, server.now)
            moods = server.moods.get(address.path, server.moods.get("any", []))
            mood = moods.pop(0) if moods else "well"
        try: self.act(mood, *server.answer(address, uploaded, self.headers))
        except (BrokenPipeError, ConnectionResetError): pass
        finally:
            with server.counting: server.now -= 1

    def act(self, mood, status, body):
        headers, announced = {}, True
        if mood == "closes":
            self.close_connection = True
            return
        if mood == "slow": time.sleep(self.server.slowness)
        if mood == "busy": status, body, headers = 503, PAGE, {"Retry-After": self.server.retry_after}
        if mood == "broken": status, body = 500, PAGE
        if mood == "page": body = PAGE
        if mood == "empty": body = b""
        if mood == "nothing": body = b"No objects have been found\n"
        if mood == "wrong": body = self.server.wrong
        if mood == "truncated": body = body[:len(body)*2//3]
        if mood == "complains": status, body = 500, b'{"error_message": "Invalid column name \'redshift\'."}'
        if mood == "times out": body = b"#Table1\nerror_message\n\"Query timeout exceeded.\"\n"
        if mood == "half without length": announced = False
        self.send_response(status)
        for name, value in headers.items(): self.send_header(name, value)
        if announced: self.send_header("Content-Length", str(len(body)))
        self.close_connection = not announced or mood == "half"
        self.end_headers()
        self.wfile.write(body[:len(body)//2] if mood.startswith("half") else body)

    def log_message(self, *_): pass


class Archive(ThreadingHTTPServer):
    "The server: `files` by path, a database, and for each path (or `any`) the moods of the next requests."
    daemon_threads = True

    def __init__(self, files=None, database=None, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.files, self.database, self.moods = files or {}, database, {}
        self.asked, self.now, self.most_at_once, self.counting = [], 0, 0, threading.Lock()
        self.slowness, self.retry_after, self.wrong = 1., "0", small_frame("u", 1, 1, 11)

    def handle_error(self, request, client_address):
        "A client that has gone is no error of the archive."
        if not isinstance(sys.exc_info()[1], ConnectionError): super().handle_error(request, client_address)

    @property
    def url(self): return f"http://127.0.0.1:{self.server_port}"

    def answer(self, address, uploaded, headers):
        "Status and body."
        if address.path in self.files: return 200, self.files[address.path]
        if not self.database or "/tools/search/" not in address.path.lower(): return 404, PAGE
        if not uploaded: return 200, self.database.ask(parse_qs(address.query))
        head = f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode()
        parts = {part.get_param("name", header="content-disposition"): part.get_payload(decode=True).decode()
                 for part in email.message_from_bytes(head + uploaded).walk() if not part.is_multipart()}
        return 200, self.database.cross_identify(parts)


@contextmanager
def serving(archive):
    "The archive, answering."
    thread = threading.Thread(target=archive.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try: yield archive
    finally:
        archive.shutdown()
        archive.server_close()


def described(table) -> list:
    "SkyServer's own description of a table's columns, as astroquery packages it."
    return json.loads((files("astroquery.sdss")/"data"/f"{table}_dr12.json").read_text())


class SkyServer:
    "PhotoObjAll and SpecObjAll, with every column that SDSS describes, in SQLite."
    def __init__(self, path, photometry: pd.DataFrame, spectra: pd.DataFrame):
        self.path, self.photometry = path, photometry
        with sqlite3.connect(path) as database:
            for name, table in (("PhotoObjAll", photometry), ("SpecObjAll", spectra)):
                columns = [row["name"] for row in described(name)[0]["Rows"]]
                assert set(table) - {"type"} <= set(columns)
                table.reindex(columns=columns).to_sql(name, database, index=False)
        self.queries = []

    def nearby(self, ra, dec, arcmin):
        "objID of primary objects near a position, nearest first."
        primary = self.photometry[self.photometry["mode"] == 1]
        distance = SkyCoord(primary["ra"], primary["dec"], unit="deg").separation(
            SkyCoord(ra, dec, unit="deg")).arcmin
        order = np.argsort(distance)
        return primary["objID"].to_numpy()[order][distance[order] <= arcmin]

    def translate(self, sql):
        "T-SQL as SQLite says it."
        sql = re.sub(r"^\s*SELECT TOP (\d+) (.*)$", r"SELECT \2 LIMIT \1", sql, flags=re.S)
        near = re.search(r"dbo\.fGetNearbyObjEq\(([^,]+),([^,]+),([^)]+)\)", sql)
        if near:
            found = ",".join(f"({number})" for number in self.nearby(*map(float, near.groups())))
            sql = sql.replace(near[0], f"(SELECT column1 AS objID FROM (VALUES {found}))")
        return sql.replace("dbo.", "").replace("#upload", "upload_").replace("#x", "x_")

    def run(self, sql, **tables) -> bytes:
        self.queries.append(sql)
        with sqlite3.connect(self.path) as database:
            database.create_function("fPhotoTypeN", 1, lambda kind: "GALAXY")
            for name, table in tables.items(): table.to_sql(name, database, index=False, if_exists="replace")
            try: rows = pd.read_sql(self.translate(sql), database)
            except pd.errors.DatabaseError as error: return f'{{"error_message": "{error}"}}'.encode()
        return ("#Table1\n" + rows.to_csv(index=False, na_rep="null")).encode()

    def ask(self, query) -> bytes:
        "An answer to the SQL search form."
        sql = query["cmd"][0]
        if "fDocColumns" in sql: return json.dumps(described(re.search(r"'(\w+)'", sql)[1])).encode()
        assert query["format"] == ["csv"] and query["searchtool"] == ["SQL"]
        return self.run(sql)

    def cross_identify(self, form) -> bytes:
        "An answer to the cross-identification form: the nearest primary object of each position."
        lines = [line.split() for line in form["upload"].splitlines() if line.strip()]
        assert lines[0] == ["name", "ra", "dec"] and form["photoScope"] == "nearPrim"
        upload = pd.DataFrame(lines[1:], columns=["up_name", "up_ra", "up_dec"])
        upload["up_id"] = range(len(upload))
        nearest = [self.nearby(float(ra), float(dec), float(form["radius"]))[:1]
                   for ra, dec in zip(upload["up_ra"], upload["up_dec"])]
        x = pd.DataFrame([(k, found[0]) for k, found in enumerate(nearest) if len(found)],
                         columns=["up_id", "objID"], dtype=np.int64)
        return self.run(form["uquery"].strip(), upload_=upload, x_=x)


def invented_sky(n=400, seed=0) -> tuple[pd.DataFrame, pd.DataFrame]:
    "Photometry and spectra of galaxies that each of SDSS's conditions lets pass or not."
    rng = np.random.default_rng(seed)
    some = lambda usual, other: np.where(rng.random(n) < 0.9, usual, other)
    photometry = pd.DataFrame({
        "objID": 1237650000000000001 + rng.permutation(10*n)[:n], "mode": some(1, 2), "type": 3,
        "ra": rng.uniform(0, 360, n), "dec": rng.uniform(-10, 60, n), "clean": some(1, 0),
        "insideMask": some(0, 2), "petroMag_r": rng.uniform(15, 20, n), "petroRad_r": rng.uniform(1, 20, n),
        "run": 3918, "rerun": 301, "camcol": 3, "field": 213, "extinction_r": rng.uniform(0, 0.5, n),
        **{f"dered_{band}": rng.uniform(15, 21, n) for band in BANDS},
        **{f"modelMagErr_{band}": rng.uniform(0, 0.1, n) for band in BANDS}})
    for band, ratio in zip("ugiz", (1.8739, 1.3788, 0.7583, 0.5376)):
        photometry[f"extinction_{band}"] = ratio*photometry["extinction_r"]
    photometry.loc[5, "dered_u"] = -9999.
    with_spectrum = rng.random(n) < 0.8
    spectra = pd.DataFrame({
        "bestObjID": photometry["objID"], "specObjID": np.arange(n), "z": rng.uniform(0.01, 0.6, n),
        "zErr": 1e-5, "zWarning": some(0, 4), "legacy_target1": rng.choice([32, 64, 2**26], n),
        "class": some("GALAXY", "QSO"), "survey": some("sdss", "boss"), "targetType": some("SCIENCE", "SKY"),
        "sciencePrimary": some(1, 0)})[with_spectrum]
    again = spectra.sample(20, random_state=1).assign(sciencePrimary=0, z=9.)
    return photometry, pd.concat([spectra, again], ignore_index=True)
