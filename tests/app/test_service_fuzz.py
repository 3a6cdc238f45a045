"""The service and strangers' bytes: random requests, bodies that lie about their length, mutated pictures, bombs. Never a 500."""
from __future__ import annotations

import gzip
import io
import random
import socket
import time
import zlib
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image

from conftest import picture
from dlpipe_nb.api import make_api, start
from dlpipe_nb.core import picture_array
from dlpipe_nb.inference import Store

LIMIT = 2_000_000
#: How many random requests each endpoint gets: 1,000 to those that take something, and a look at the others.
REQUESTS = {("POST", "/predict"): 450, ("POST", "/feedback"): 350, ("GET", "/predictions"): 200, ("GET", "/model"): 1,
            ("GET", "/healthz"): 1, ("GET", "/readyz"): 1, ("GET", "/metrics"): 1}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


@pytest.fixture(scope="module")
def service(tiny_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    store = Store(folder / "store.db", images=folder / "images")
    with start(make_api(tiny_bundle, store, max_bytes=LIMIT, seconds=1.5)) as s: yield s


@pytest.fixture(scope="module")
def client(service):
    with httpx.Client(base_url=service.url, timeout=30, trust_env=False) as c: yield c


@pytest.fixture(autouse=True)
def still_there(client):
    "After each test the next good request is answered."
    yield
    p, = client.post("/predict", content=picture()).json()["predictions"]
    assert p["label"] == "cat"


def fine(r, *statuses):
    "No crash and no traceback, and an error is a sentence in JSON."
    assert r.status_code < 500 and (not statuses or r.status_code in statuses), (r.status_code, r.text[:500])
    assert "Traceback" not in r.text and 'File "' not in r.text
    if r.status_code >= 400 and r.request.method != "HEAD": assert isinstance(r.json()["error"], str) and r.json()["error"]
    return r


# ---- random requests

def test_the_counts_cover_every_endpoint_and_make_a_thousand(client):
    described = client.get("/openapi.json").json()["paths"]
    assert {(m.upper(), p) for p, methods in described.items() for m in methods} == REQUESTS.keys() and sum(REQUESTS.values()) >= 1000


@pytest.mark.parametrize("method,path", REQUESTS, ids=lambda x: x.strip("/"))
def test_random_requests(client, service, method, path):
    schemathesis = pytest.importorskip("schemathesis")
    import requests
    schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
    asked, session = [], requests.Session()
    session.trust_env = False

    @settings(max_examples=REQUESTS[method, path], derandomize=True, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(case=schema[path][method].as_strategy())
    def ask(case):
        r = case.call(base_url=service.url, session=session)
        asked.append(r.status_code)
        fine(r)

    with session: ask()
    assert len(asked) >= REQUESTS[method, path]


def test_random_bytes_as_anything(client):
    rng = random.Random(7)
    kinds = ["image/png", "application/json", "multipart/form-data; boundary=x", "multipart/form-data", "text/plain; charset=\xff", "", "a/b/c"]
    for i in range(150):
        body = rng.randbytes(rng.choice([0, 1, 30, 3000]))
        if rng.random() < .4: body = b'--x\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\n' + body
        headers = {"content-type": rng.choice(kinds).encode("latin-1")}
        fine(client.request(rng.choice(["GET", "POST", "PUT", "HEAD", "PATCH"]), rng.choice(list(REQUESTS))[1], content=body, headers=headers))


# ---- bodies that lie

def talk(url, *pieces, pause=0.05, wait=10):
    "Send these very bytes piece by piece; gives the status of the answer, or None where the connection just ends."
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=wait) as s:
        try:
            for p in pieces:
                s.sendall(p)
                time.sleep(pause)
            head = s.recv(65536)
        except (TimeoutError, ConnectionError): return None
    assert b"Traceback" not in head
    return int(head.split()[1]) if head.startswith(b"HTTP/") else None


HEAD = b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\n"
PART = b'--x\r\nContent-Disposition: form-data; name="f"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
FORM = PART + picture() + b"\r\n--x--\r\n"
MULTI = b"Content-Type: multipart/form-data; boundary=x\r\n"
LIES = {"shorter than announced": (HEAD + MULTI + b"Content-Length: %d\r\n\r\n" % (len(FORM) + 500), FORM),
        "longer than announced": (HEAD + MULTI + b"Content-Length: %d\r\n\r\n" % (len(FORM) // 2), FORM),
        "a part that announces a length of its own": (
            HEAD + MULTI + b"Content-Length: %d\r\n\r\n" % (len(FORM) + 24), FORM.replace(b"\r\n\r\n", b"\r\nContent-Length: 999999\r\n\r\n", 1)),
        "another boundary": (HEAD + MULTI.replace(b"=x", b"=y") + b"Content-Length: %d\r\n\r\n" % len(FORM), FORM),
        "cut in the picture": (HEAD + MULTI + b"Content-Length: %d\r\n\r\n" % (len(PART) + 40), PART + picture()[:40]),
        "two lengths": (HEAD + b"Content-Length: 5\r\nContent-Length: 50\r\n\r\n", b"12345"),
        "a length and chunks": (HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", b"5\r\n12345\r\n0\r\n\r\n"),
        "chunks that aren't": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"zz\r\nhello\r\n"),
        "a chunk of a terabyte": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"10000000000\r\n" + b"x" * 1000),
        "an unknown coding": (HEAD + b"Transfer-Encoding: banana\r\nContent-Length: 3\r\n\r\n", b"abc")}


@pytest.mark.parametrize("pieces", LIES.values(), ids=LIES.keys())
def test_bodies_that_lie_about_their_length(service, pieces):
    status = talk(service.url, *pieces)
    assert status is None or status == 200 or 400 <= status < 500 or status == 501, status


def test_chunks_without_end_are_cut_off(service):
    "A byte now and then, for ever: after `seconds` the service says so."
    began = time.monotonic()
    status = talk(service.url, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[b"1\r\nx\r\n"] * 12, pause=0.1)
    assert status == 408 and time.monotonic() - began < 8


def test_chunks_that_come_fast_are_counted(service):
    status = talk(service.url, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[b"10000\r\n" + bytes(65536) + b"\r\n"] * 40, b"0\r\n\r\n", pause=0)
    assert status == 413


def test_a_head_without_end_is_cut_off(service):
    many = [b"X-%d: " % i + b"y" * 1000 + b"\r\n" for i in range(400)]
    assert talk(service.url, HEAD, *many, pause=0) in (400, 431, None)
    assert talk(service.url, HEAD + b"X: ", *[b"y" * 65536] * 30, pause=0) in (400, 431, None)


def test_a_squeezed_body_is_not_unpacked(client):
    "A kilobyte of gzip that would be a megabyte of zeros: the service reads pictures, not gzip."
    fine(client.post("/predict", content=gzip.compress(bytes(1_000_000)), headers={"content-encoding": "gzip"}), 422)


# ---- pictures

def example(kind):
    "A picture of this format, with some structure in it."
    im = Image.linear_gradient("L").resize((90, 70))
    out = io.BytesIO()
    Image.merge("RGB", (im, im.rotate(90).resize((90, 70)), im)).save(out, kind)
    return out.getvalue()


def mutated(data, rng):
    "`data` with bytes changed, cut out, doubled or added."
    b = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        i = rng.randrange(min(len(b), 200) if rng.random() < .6 else len(b))
        how = rng.randrange(5)
        if how == 0: b[i] = rng.randrange(256)
        elif how == 1: del b[i:i + rng.randint(1, 40)]
        elif how == 2: b[i:i] = b[i:i + rng.randint(1, 40)]
        elif how == 3: b[i:i + 4] = b"\xff\xff\xff\x7f"
        else: b = b[:max(1, i)] if rng.random() < .2 else b
    return bytes(b) or b"x"


@pytest.mark.parametrize("kind", FORMATS)
def test_a_hundred_mutated_pictures(client, kind):
    rng, data = random.Random(kind), example(kind)
    assert fine(client.post("/predict", content=data), 200)
    statuses = [fine(client.post("/predict", content=mutated(data, rng)), 200, 422).status_code for _ in range(100)]
    assert len(set(statuses)) == 2 or kind in ("BMP", "PPM"), "all were the same: were they mutated at all?"


def test_mutated_pictures_in_one_form_are_answered_one_by_one(client):
    rng = random.Random(1)
    files = [("f", (f"{k}.x", mutated(example(k), rng) if i % 2 else example(k))) for i, k in enumerate(FORMATS)]
    said = fine(client.post("/predict", files=files), 200).json()["predictions"]
    assert [s["name"] for s in said] == [f"{k}.x" for k in FORMATS] and all("label" in s for s in said[::2])


def saved(kind, size, mode="L", **more):
    "An even picture of this size: large in pixels, small in bytes."
    out = io.BytesIO()
    Image.new(mode, size).save(out, kind, **more)
    return out.getvalue()


def bombs():
    yield "png", saved("PNG", (9000, 9000), "1")
    yield "gif", saved("GIF", (8000, 8000))
    yield "tiff", saved("TIFF", (9000, 9000), "1", compression="tiff_deflate")
    yield "webp", saved("WEBP", (8000, 8000), "RGB", lossless=True, method=0)
    yield "ppm", b"P6 99999 99999 255\n" + bytes(100)
    yield "bmp", b"BM" + bytes(12) + b"\x28\0\0\0" + (60000).to_bytes(4, "little") * 2 + b"\x01\0\x18\0" + bytes(24)
    text = zlib.compress(bytes(60_000_000))
    chunk = lambda k, d: len(d).to_bytes(4, "big") + k + d + zlib.crc32(k + d).to_bytes(4, "big")
    png = picture()
    yield "a png with a note of 60 MB", png[:33] + chunk(b"zTXt", b"note\0\0" + text) + png[33:]


BOMBS = dict(bombs())


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS.keys())
def test_bombs(client, data):
    began = time.perf_counter()
    said = fine(client.post("/predict", content=data), 422).json()["error"]
    assert time.perf_counter() - began < 5 and ("million pixels" in said or "can't be" in said)


@pytest.mark.parametrize("data", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\nshowpage\n", saved("ICNS", (64, 64), "RGBA"),
                                  saved("PCX", (40, 40)), saved("SGI", (40, 40)), saved("TGA", (40, 40)), b"<svg xmlns='http://www.w3.org/2000/svg'/>"],
                         ids=["eps", "icns", "pcx", "sgi", "tga", "svg"])
def test_formats_that_are_not_on_the_list(client, data):
    assert "JPEG" in fine(client.post("/predict", content=data), 422).json()["error"]


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_on_the_list_is_read_as_in_training(client, tiny_bundle, kind):
    from dlpipe_nb.api import _read
    read = _read("x", example(kind), 32, 10**7)
    assert read.error is None and (read.pixels == picture_array(example(kind), 32)).all()
