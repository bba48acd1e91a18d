"""Processes of the tests' fork server are as those that are started as usual."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support import processes

INHERITED = """
import json, os, resource, signal, sys, tempfile
print(json.dumps({
    "cwd": os.getcwd(), "umask": os.umask(0), "variable": os.environ.get("SOME_VARIABLE"),
    "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0], "words": sys.argv[1:], "tty": sys.stdout.isatty(),
    "session": os.getsid(0) == os.getpid(), "temporary": tempfile.gettempdir(), "parent": os.getppid(),
    "int": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    "hup": signal.getsignal(signal.SIGHUP) is signal.SIG_DFL, "name": __name__,
}))
"""


@pytest.mark.parametrize("kind", [processes, subprocess])
def test_what_is_inherited(kind: object, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = os.umask(0o027)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        environment = {**os.environ, "SOME_VARIABLE": "1", "TMPDIR": str(tmp_path)}
        words = [sys.executable, "-c", INHERITED, "a", "b c"]
        done = kind.run(  # type: ignore[attr-defined]
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, start_new_session=True
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.umask(before)
    assert json.loads(done.stdout) == {
        "cwd": str(tmp_path),
        "umask": 0o027,
        "variable": "1",
        "files": 200,
        "words": ["a", "b c"],
        "tty": False,
        "session": True,
        "temporary": str(tmp_path),
        "parent": os.getpid(),
        "int": True,
        "hup": True,
        "name": "__main__",
    }


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("", 0),
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit('no')", 1),
        ("1 / 0", 1),
        ("import os; os._exit(7)", 7),
    ],
)
def test_exit_status(code: str, status: int) -> None:
    done = processes.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == status
    assert ("ZeroDivisionError" in done.stderr, "no" in done.stderr) == (code == "1 / 0", "no" in code)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_signals_and_children(number: signal.Signals) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(input())'])"
    with processes.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        found: list[psutil.Process] = []
        while not found:
            found = [p for p in psutil.Process(process.pid).children() if "print(input())" in p.cmdline()]
        assert "-c" in psutil.Process(process.pid).cmdline()
        process.send_signal(number)
        assert process.wait(30) == -number
        process.communicate("")
    assert psutil.wait_procs(found, timeout=30)[1] == []


def test_threads_compute_after_the_fork() -> None:
    code = "import torch; torch.set_num_threads(2); x = torch.ones(512, 512); print((x @ x).sum().item())"
    done = processes.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) == 512**3
