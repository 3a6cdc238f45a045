"""The service, over a real socket on 127.0.0.1: what it answers, what it refuses, and that nothing stops it."""
from __future__ import annotations

import io
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image

from conftest import BLUE, GREY, RED, ROOT, picture, sideways
from dlpipe_nb.api import is_loopback, make_api, serve, start
from dlpipe_nb.core import InputError
from dlpipe_nb.inference import Store

LIMIT, FILES = 2_000_000, 5
BROKEN = {"empty": b"", "text": b"milk, eggs", "cut png": picture()[:60], "cut jpeg": picture(kind="JPEG", size=(300, 300))[:-200],
          "html": b"<html><script>alert(1)</script></html>", "zeros": bytes(1000)}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    return Store(folder / "store.db", images=folder / "images")


@pytest.fixture(scope="module")
def url(tiny_bundle, store):
    with start(make_api(tiny_bundle, store, max_bytes=LIMIT, max_files=FILES)) as service: yield service.url


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as c:
        yield c
        assert c.get("/healthz").json() == {"status": "ok"}, "the service is gone after this test"


def error_of(r, status):
    "The error of an answer, which must have this status and be in the one form that all errors have."
    assert r.status_code == status, (r.status_code, r.text)
    said = r.json()
    assert isinstance(said["error"], str) and said["error"] and "Traceback" not in r.text
    return said["error"]


# ---- what it answers

def test_a_raw_body(client, store):
    r = client.post("/predict?name=red.png", content=picture(RED))
    p, = r.json()["predictions"]
    assert r.status_code == 200 and p["label"] == "cat" and p["name"] == "red.png" and not p["unsure"]
    assert abs(sum(p["probabilities"].values()) - 1) < 1e-5 and p["id"] in set(store.predictions()["id"])


def test_curls_default_content_type_is_a_raw_body_too(client):
    r = client.post("/predict", content=picture(BLUE), headers={"content-type": "application/x-www-form-urlencoded"})
    assert r.json()["predictions"][0]["label"] == "dog"


def test_several_files_and_a_broken_one_among_them(client):
    files = [("files", ("red.png", picture(RED))), ("other", ("notes.png", b"milk")), ("files", ("grey.png", picture(GREY)))]
    r = client.post("/predict", files=files)
    assert r.status_code == 200
    red, notes, grey = r.json()["predictions"]
    assert (red["name"], red["label"]) == ("red.png", "cat") and grey["unsure"]
    assert notes["name"] == "notes.png" and "picture" in notes["error"] and "label" not in notes


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "1", "I;16"])
def test_odd_pictures_are_accepted(client, mode):
    out = io.BytesIO()
    Image.new(mode, (50, 40)).save(out, "TIFF")
    assert client.post("/predict", content=out.getvalue()).status_code == 200


def test_a_sideways_picture_is_turned(client):
    "The tiny network sees the average only, so the proof is the crop: of a tall red-over-blue picture the middle is even."
    p, = client.post("/predict", content=sideways((300, 120))).json()["predictions"]
    assert p["unsure"] and abs(p["probability"] - 0.5) < 0.05


def test_the_same_picture_twice_is_one_record(client, store):
    data = picture((190, 30, 50))
    ids = {client.post("/predict", content=data).json()["predictions"][0]["id"] for _ in range(3)}
    assert len(ids) == 1


def test_pictures_are_kept_where_the_store_keeps_pictures(client, store):
    data = picture((180, 20, 60))
    client.post("/predict", content=data)
    sha = store.predictions(limit=1)["sha256"][0]
    assert store.picture(sha).read_bytes() == data


def test_feedback(client, store):
    id = client.post("/predict", content=picture(RED)).json()["predictions"][0]["id"]
    r = client.post("/feedback", json={"id": id, "label": "dog", "by": "Ada"})
    assert r.status_code == 201
    last = store.feedback().iloc[-1]
    assert (last["id"], last["prediction_id"], last["label"], last["given_by"]) == (r.json()["id"], id, "dog", "Ada")


def test_predictions_newest_first(client):
    client.post("/predict?name=newest.png", content=picture((1, 2, 203)))
    rows = client.get("/predictions", params={"limit": 2}).json()["predictions"]
    assert len(rows) == 2 and rows[0]["name"] == "newest.png" and rows[0]["source"] == "api" and rows[0]["id"] > rows[1]["id"]


def test_about_itself(client):
    model = client.get("/model").json()
    assert model["labels"] == ["cat", "dog"] and model["size"] == 32 and len(model["version"]) == 12
    described = client.get("/openapi.json").json()
    assert {"/predict", "/feedback", "/predictions", "/model", "/healthz"} <= set(described["paths"])
    assert {"application/octet-stream", "image/jpeg", "image/png", "multipart/form-data"} == set(described["paths"]["/predict"]["post"]["requestBody"]["content"])


def test_the_page_for_people_names_every_endpoint_and_loads_nothing_from_elsewhere(client):
    page, paths = client.get("/docs"), client.get("/openapi.json").json()["paths"]
    assert page.headers["content-type"].startswith("text/html") and "default-src 'none'" in page.headers["content-security-policy"]
    assert all(path in page.text for path in paths) and "//" not in page.text.replace("http://127.0.0.1", "")
    error_of(client.get("/redoc"), 404)


def test_many_clients_at_once(url, store):
    pictures = [picture((100 + i, 40, 40)) for i in range(20)]
    def ask(data): return httpx.post(f"{url}/predict", content=data, timeout=60, trust_env=False)
    with ThreadPoolExecutor(8) as pool: answers = list(pool.map(ask, pictures * 3))
    assert {a.status_code for a in answers} == {200}
    assert len({a.json()["predictions"][0]["id"] for a in answers}) == 20


def test_the_same_picture_from_many_clients_at_the_same_moment(url):
    "A client that hears nothing asks again, and both requests may be under way at once."
    def ask(data): return httpx.post(f"{url}/predict", content=data, timeout=60, trust_env=False)
    with ThreadPoolExecutor(8) as pool:
        for i in range(10):
            answers = list(pool.map(ask, [picture((40, 100 + i, 40))] * 8))
            assert {a.status_code for a in answers} == {200}
            assert len({a.json()["predictions"][0]["id"] for a in answers}) == 1


# ---- what it refuses

@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_picture_alone(client, data): error_of(client.post("/predict", content=data), 422)


def test_all_broken(client):
    r = client.post("/predict", files=[("files", (f"{n}.png", d)) for n, d in list(BROKEN.items())[:3]])
    assert "none of the 3" in error_of(r, 422) and all(p["error"] for p in r.json()["predictions"])


def bomb(width=20_000, height=20_000):
    "A PNG of a few dozen bytes that claims to be enormous."
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(20_000, 20_000), (60_000, 60_000)])
def test_a_picture_that_claims_to_be_enormous(client, size):
    start = time.perf_counter()
    assert "million pixels" in error_of(client.post("/predict", content=bomb(*size)), 422)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("size", [LIMIT + 1, 20 * LIMIT], ids=["a byte too long", "far too long"])
def test_a_body_that_is_too_long(client, size): assert "bytes" in error_of(client.post("/predict", content=bytes(size)), 413)


def test_a_body_of_unknown_length_is_counted(client):
    pieces = (bytes(100_000) for _ in range(40))
    assert "bytes" in error_of(client.post("/predict", content=pieces), 413)


@pytest.mark.parametrize("length", ["99999999999999999999", "-1", "many", "²"])
def test_a_length_that_makes_no_sense(url, length):
    "Whoever answers, the server or the gate, it is an error and no crash; the client doesn't send what it announced."
    status = raw(url, b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: " + length.encode() + b"\r\n"
                 b"Expect: 100-continue\r\n\r\n")
    assert status in (400, 413)
    assert httpx.get(f"{url}/healthz", trust_env=False).status_code == 200


def raw(url, data, timeout=10):
    "The status of the answer to these very bytes; None where the connection is closed without one."
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=timeout) as s:
        s.sendall(data)
        try: head = s.recv(65536)
        except (TimeoutError, ConnectionError): return None
    return int(head.split()[1]) if head.startswith(b"HTTP/") else None


def test_a_client_that_hangs_up_in_the_middle(client, url):
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=10) as s:
        s.sendall(b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n\r\nabc")
    time.sleep(0.2)


def test_garbage_on_the_socket(client, url): assert raw(url, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n") in (400, None)


def test_too_many_files(client):
    files = [("files", (f"{i}.png", picture())) for i in range(FILES)]
    assert client.post("/predict", files=files).status_code == 200
    assert "files" in error_of(client.post("/predict", files=[*files, *files]), 413)


FORMS = {"no boundary": ("multipart/form-data", b"--x"),
         "no end": ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\nabc'),
         "no parts": ("multipart/form-data; boundary=x", b"--x--\r\n"),
         "garbage": ("multipart/form-data; boundary=x", b"\x00\xff garbage"),
         "no name": ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\nabc\r\n--x--\r\n"),
         "a field and no file": ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="f"\r\n\r\nabc\r\n--x--\r\n'),
         "a foreign charset": ("multipart/form-data; boundary=x; charset=klingon",
                               b'--x\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\nabc\r\n--x--\r\n'),
         "a boundary of nonsense": ("multipart/form-data; boundary=\"\xe4\"".encode("latin-1"), b"--x")}


@pytest.mark.parametrize("kind,body", FORMS.values(), ids=FORMS.keys())
def test_broken_forms(client, kind, body):
    r = client.post("/predict", content=body, headers={"content-type": kind})
    assert r.status_code in (400, 422)
    error_of(r, r.status_code)


FEEDBACK = {"no JSON": b"{", "a list": b"[]", "nothing": b"", "no label": b'{"id": 1}', "a text": b'{"id": "one", "label": "cat"}',
            "unknown id": b'{"id": 123456789, "label": "cat"}', "no such label": b'{"id": 1, "label": "unicorn"}',
            "huge id": b'{"id": 1' + b"0" * 40 + b', "label": "cat"}', "negative": b'{"id": -1, "label": "cat"}', "infinite": b'{"id": 1e400, "label": "cat"}',
            "not UTF-8": b'{"id": 1, "label": "\xff"}', "deep": b"[" * 5000 + b"]" * 5000, "lone surrogate": b'{"id": 1, "label": "\\ud800"}',
            "long": b'{"id": 1, "label": "' + b"c" * 10_000 + b'"}'}


@pytest.mark.parametrize("body", FEEDBACK.values(), ids=FEEDBACK.keys())
def test_broken_feedback(client, store, body):
    client.post("/predict", content=picture())
    before = len(store.feedback())
    r = client.post("/feedback", content=body, headers={"content-type": "application/json"})
    assert r.status_code in (400, 422)
    error_of(r, r.status_code)
    assert len(store.feedback()) == before


@pytest.mark.parametrize("limit", ["0", "-1", "many", "1e9", "99999999999999999999999", ""])
def test_a_broken_limit(client, limit): error_of(client.get("/predictions", params={"limit": limit}), 422)


@pytest.mark.parametrize("method,path,status", [("GET", "/nothing", 404), ("GET", "/predict", 405), ("DELETE", "/predictions", 405), ("GET", "/../../etc/passwd", 404)])
def test_paths_and_methods(client, method, path, status): error_of(client.request(method, path), status)


NAMES = ["../../etc/passwd", "/etc/passwd", "C:\\Windows\\win.ini", "a\x00b.png", "..", "", "x" * 5000, "<b>猫</b>.png", "con", "a\nb"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_never_paths(client, store, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    p, = client.post("/predict", content=picture(RED), params={"name": name}).json()["predictions"]
    assert "/" not in p["name"] and "\\" not in p["name"] and 0 < len(p["name"]) <= 200 and p["name"].isprintable()
    q = client.post("/predict", files=[("files", (name or "x", picture(BLUE)))])
    if len(name) > 4000: error_of(q, 400) # longer than the header of a part may be
    else: assert q.status_code == 200 and "/" not in q.json()["predictions"][0]["name"]
    assert list(tmp_path.iterdir()) == []


# ---- whom it lets in

@pytest.mark.parametrize("headers", [{"host": "evil.example"}, {"host": "127.0.0.1.evil.example"}, {"origin": "https://evil.example"},
                                     {"origin": "null"}, {"host": "[::1"}, {"host": ""}])
def test_without_a_token_only_this_computer_is_answered(client, headers):
    for method, path in [("GET", "/model"), ("GET", "/predictions"), ("POST", "/predict")]:
        r = client.request(method, path, headers=headers)
        assert r.status_code in (400, 403), (path, r.text)


@pytest.mark.parametrize("headers", [{"host": "localhost:8000"}, {"origin": "http://localhost:8888"}, {"host": "[::1]:80"}])
def test_pages_and_programs_on_this_computer_are_answered(client, headers):
    assert client.get("/model", headers=headers).status_code == 200


def test_with_a_token(tiny_bundle):
    with start(make_api(tiny_bundle, token="sesame, öffne")) as service, httpx.Client(base_url=service.url, trust_env=False) as c:
        right = "Bearer sesame, öffne".encode()
        for given in [None, b"", b"Bearer", b"Bearer sesame", b"Basic c2VzYW1l", right + b"x", b"\xff\xfe"]:
            for path in ("/model", "/predictions", "/openapi.json", "/nothing"):
                r = c.get(path, headers={} if given is None else {"authorization": given})
                assert "token" in error_of(r, 401) and r.headers["www-authenticate"] == "Bearer"
        assert c.post("/predict", content=bytes(5_000_000)).status_code == 401
        assert c.get("/model", headers={"authorization": right}).status_code == 200
        assert c.get("/healthz").json() == {"status": "ok"}


def test_without_a_store(tiny_bundle):
    with start(make_api(tiny_bundle)) as service, httpx.Client(base_url=service.url, trust_env=False) as c:
        assert c.post("/predict", content=picture()).json()["predictions"][0]["id"] is None
        assert "store" in error_of(c.get("/predictions"), 404)
        assert "store" in error_of(c.post("/feedback", json={"id": 1, "label": "cat"}), 404)


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "192.168.1.7", "example.com"])
@pytest.mark.parametrize("token", [None, ""])
def test_an_open_address_needs_a_token(tiny_bundle, monkeypatch, host, token):
    monkeypatch.setattr("dlpipe_nb.api.uvicorn.Server", lambda config: pytest.fail("it would have listened"))
    with pytest.raises(InputError, match="token"): serve(tiny_bundle, host=host, port=0, token=token)


def test_loopback():
    assert all(map(is_loopback, ["127.0.0.1", "127.1.2.3", "localhost", "LOCALHOST", "::1", "[::1]"]))
    assert not any(map(is_loopback, ["", "0.0.0.0", "::", "10.0.0.1", "localhost.evil.example", "127.0.0.1.evil.example"]))


def test_bad_settings(tiny_bundle, tmp_path):
    with pytest.raises(InputError): make_api(tmp_path / "none")
    with pytest.raises(InputError, match="token"): make_api(tiny_bundle, token=" ")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        with pytest.raises(InputError, match="port"): serve(tiny_bundle, port=s.getsockname()[1])
    with pytest.raises(InputError, match="port"): serve(tiny_bundle, port=10**6)


# ---- when something breaks inside

def test_a_surprise_is_an_error_and_not_an_end(tiny_bundle):
    api = make_api(tiny_bundle)
    def broken(*a): raise RuntimeError("secret: /home/ada")
    good, api.state.predictor.look = api.state.predictor.look, broken
    with start(api) as service:
        ask = lambda: httpx.post(f"{service.url}/predict", content=picture(), trust_env=False)
        assert "secret" not in error_of(ask(), 500)
        api.state.predictor.look = good
        assert ask().status_code == 200


def test_a_service_of_its_own_stops_when_told(tiny_bundle, tmp_path):
    "`serve` in a process: it answers, loads neither torch nor fastai, and ends well on SIGTERM."
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom dlpipe_nb.api import serve\n"
            "assert 'torch' not in sys.modules and 'fastai' not in sys.modules\n"
            "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]; s.close(); print(port, flush=True)\n"
            f"serve({str(tiny_bundle)!r}, port=port)")
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        url, end = f"http://127.0.0.1:{int(server.stdout.readline())}", time.monotonic() + 30
        while time.monotonic() < end:
            try: r = httpx.post(f"{url}/predict", content=picture(), trust_env=False)
            except httpx.TransportError: time.sleep(0.1)
            else: break
        assert r.json()["predictions"][0]["label"] == "cat"
        server.send_signal(signal.SIGTERM)
        server.wait(15)
    finally: server.kill()
    assert server.returncode in (0, -signal.SIGTERM) and "Traceback" not in server.stderr.read()
