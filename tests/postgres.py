"""A real PostgreSQL server for a test: made in a temporary folder, on a free port of 127.0.0.1, and gone afterwards.

    from postgres import postgres_server # a fixture, for the whole session
    def test(postgres_server): connect(postgres_server.new_database())
"""
from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from glob import glob
from pathlib import Path

import pytest

PASSWORD = "horse battery"


def programs() -> Path | None:
    "The folder with initdb and pg_ctl: the newest in Debian's place, or that on PATH."
    places = sorted(glob("/usr/lib/postgresql/*/bin"), key=lambda p: float(p.split("/")[-2]), reverse=True)
    if on_path := shutil.which("pg_ctl"): places.append(str(Path(on_path).resolve().parent))
    return next((Path(p) for p in places if Path(p, "initdb").exists() and Path(p, "pg_ctl").exists()), None)


def reason_not() -> str:
    "Why no server can be started here; empty where it can."
    if os.name == "nt": return "no PostgreSQL server is started on Windows"
    if programs() is None: return "no PostgreSQL server is installed"
    if os.geteuid() == 0 and not shutil.which("runuser"): return "PostgreSQL refuses to run as root, and there is no runuser"
    if os.geteuid() == 0 and subprocess.run(["id", "postgres"], capture_output=True).returncode: return "no user postgres"
    return ""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    "A PostgreSQL server whose user me has the password `PASSWORD`."
    def __init__(self, folder):
        self.folder, self.bin, self.port, self.databases = Path(folder), programs(), free_port(), 0
        secret = self.folder / "secret"
        secret.write_text(PASSWORD)
        if os.geteuid() == 0: shutil.chown(self.folder, "postgres"), shutil.chown(secret, "postgres")
        self._run("initdb", "-D", self.data, "-U", "me", "--pwfile", str(secret), "-A", "scram-sha-256", "-E", "UTF8", "--no-sync")
        self.start()

    @property
    def data(self): return str(self.folder / "data")

    def _run(self, program, *args):
        as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        with open(self.folder / "out.txt", "w") as out: # not a pipe: the server would hold it open
            done = subprocess.run([*as_user, str(self.bin / program), *args], stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                                  cwd=self.folder, timeout=120)
        assert done.returncode == 0, (self.folder / "out.txt").read_text()

    def start(self):
        options = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c unix_socket_directories={self.folder} -c fsync=off"
        self._run("pg_ctl", "-D", self.data, "-l", str(self.folder / "log.txt"), "-w", "-t", "60", "-o", options, "start")

    def stop(self): self._run("pg_ctl", "-D", self.data, "-m", "immediate", "-w", "stop")

    def url(self, database="postgres", scheme="postgresql", password=PASSWORD):
        return f"{scheme}://me:{password.replace(' ', '%20')}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        "The URL of a fresh, empty database."
        import psycopg
        self.databases += 1
        name = f"fresh_{self.databases}"
        with psycopg.connect(self.url(), autocommit=True) as con: con.execute(f"create database {name}")
        return self.url(name)


@pytest.fixture(scope="session")
def postgres_server():
    if why := reason_not(): pytest.skip(why)
    pytest.importorskip("psycopg", reason="no driver for PostgreSQL is installed")
    folder = tempfile.mkdtemp(prefix="pg-", dir="/tmp") # short, for the socket's name, and with a way in for the user postgres
    server = Server(folder)
    yield server
    try: server.stop()
    except AssertionError: pass # a test stopped it
    time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)
