"""Shared by all benchmarks: a description of the machine, and CSV rows keyed by commit, hardware, and versions."""

import datetime
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from senet.system.csv_file import write_rows
from senet.system.machine import machine

RESULTS = Path(__file__).parent / "results"


def hardware(here: dict[str, Any]) -> str:
    """The processor (and accelerator), and the number of threads that PyTorch uses."""
    gpu = f" + {here['gpu']}" if here["gpu"] else ""
    return f"{here['processor']}, {here['threads']} threads{gpu}"


def commit() -> str:
    """The commit of the checkout, with a ``+`` if the measured code has uncommitted changes."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()

    changed = git("status", "--porcelain", "--", "../src", "*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def append_row(file: str, at_commit: str | None = None, **values: object) -> None:
    """Append one measurement to ``results/<file>``, with its date, commit, machine, and command.

    ``at_commit`` is the measured commit, if it is older than this checkout.
    """
    here = machine()
    row = {
        "date": datetime.date.today().isoformat(),
        "commit": at_commit or commit(),
        "hardware": hardware(here),
        "python": here["python"],
        "torch": here["torch"],
        **values,
        "command": shlex.join(["python", "benchmarks/" + Path(sys.argv[0]).name, *_words()]),
    }
    path = RESULTS / file
    new = not path.exists()
    with path.open("a", newline="") as handle:
        write_rows(handle, list(row), [row], header=new)


def _words() -> list[str]:
    """The arguments of the command without ``--output``, which is specific to the machine."""
    words = sys.argv[1:]
    at = words.index("--output") if "--output" in words else len(words)
    return words[:at] + words[at + 2 :]
