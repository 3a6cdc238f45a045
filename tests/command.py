"""The real `dlpipe` command in a process of its own, for the tests."""
from __future__ import annotations

import os
import subprocess
import sys

from conftest import ROOT


def dlpipe(*args, cwd=None):
    "Run the real command in a process of its own."
    command = [sys.executable, "-c", "from dlpipe_nb.pipeline import main; main()", *map(str, args)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=cwd, env=env, timeout=300)


def refused(done):
    "The one readable line of a command that refused; fails if there is a traceback, or more, or a status of 0."
    said = done.stdout + done.stderr
    assert done.returncode not in (0, 139, -11), said
    assert "Traceback" not in said, said
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("dlpipe: Expected ") and " Next: " in lines[0], said
    return lines[0]
