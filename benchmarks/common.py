"""What every benchmark shares: the machine in words, and CSV rows keyed by commit, hardware and versions."""

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
    """The processor (and accelerator), and how many cores PyTorch uses."""
    gpu = f" + {here['gpu']}" if here["gpu"] else ""
    return f"{here['processor']}, {here['threads']} threads{gpu}"


def commit() -> str:
    """The checkout's commit; ``+`` marks one with uncommitted changes in the code that was measured."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()

    changed = git("status", "--porcelain", "--", "../src", "*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def append_row(file: str, at_commit: str | None = None, **values: object) -> None:
    """Add one measurement to ``results/<file>``, with when, where and by which command it was taken.

    ``at_commit`` names the commit that was measured, when it is older than this checkout.
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
    """The command's words, without where the rows went: that is a path of one machine."""
    words = sys.argv[1:]
    at = words.index("--output") if "--output" in words else len(words)
    return words[:at] + words[at + 2 :]
