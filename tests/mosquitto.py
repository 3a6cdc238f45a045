"""A real MQTT broker for a test: Mosquitto in a temporary folder, on a free port of 127.0.0.1, and gone afterwards.

    from mosquitto import broker # a fixture, for a module
    def test(broker): connect("127.0.0.1", broker.port)
"""
from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from postgres import free_port


def program() -> str | None:
    "The broker's program: Debian puts it where only root looks."
    return shutil.which("mosquitto", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


class Broker:
    "A running Mosquitto that lets everybody on this machine in, or only the user me with a password."
    def __init__(self, folder: Path, password: str = ""):
        self.folder, self.port = folder, free_port()
        lines = [f"listener {self.port} 127.0.0.1", f"allow_anonymous {'false' if password else 'true'}"]
        if hasattr(os, "geteuid") and os.geteuid() == 0: lines.append("user root") # else it becomes somebody who can't read here
        if password:
            tool = shutil.which("mosquitto_passwd", path=os.environ.get("PATH", "") + ":/usr/sbin")
            if tool is None: pytest.skip("no mosquitto_passwd is installed")
            subprocess.run([tool, "-b", "-c", str(folder / "users"), "me", password], check=True, capture_output=True)
            lines.append(f"password_file {folder / 'users'}")
        (folder / "broker.conf").write_text("\n".join(lines) + "\n")
        self.log = open(folder / "log.txt", "w")
        self.process = subprocess.Popen([program(), "-c", str(folder / "broker.conf")], stdout=self.log, stderr=self.log)
        self._wait()

    def _wait(self, seconds=20):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None: raise AssertionError((self.folder / "log.txt").read_text())
            try: return socket.create_connection(("127.0.0.1", self.port), 0.5).close()
            except OSError: time.sleep(0.05)
        raise AssertionError("the broker doesn't answer")

    def stop(self):
        self.process.terminate()
        try: self.process.wait(10)
        except subprocess.TimeoutExpired: self.process.kill()
        self.log.close()


def _broker(folder, password=""):
    if program() is None: pytest.skip("no MQTT broker (mosquitto) is installed")
    return Broker(folder, password)


@pytest.fixture
def broker(tmp_path_factory):
    broker = _broker(tmp_path_factory.mktemp("broker"))
    yield broker
    broker.stop()


@pytest.fixture
def closed_broker(tmp_path_factory):
    "One that asks for a password."
    broker = _broker(tmp_path_factory.mktemp("broker"), "horse battery")
    yield broker
    broker.stop()
