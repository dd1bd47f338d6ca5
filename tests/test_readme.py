"""The README and the pages of `docs/` do what they say: their commands run, their tables are those of the code."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import senet

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A process a page, as starting one takes longer than most of the commands.
COMMANDS = """
import json, sys
from senet.cli.main import main
for words in json.loads(sys.argv[1]):
    code = main(words[1:])
    if code != 0:
        sys.exit(f"{' '.join(words)} ended with {code}")
"""
EXAMPLES = """
import json, sys
for number, code in enumerate(json.loads(sys.argv[1]), 1):
    exec(compile(code, f"example {number}", "exec"), {"__name__": "__main__"})
"""


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(page):
    return [line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]


def quick(command):
    """The command as printed, with one epoch of one step: what is tested is that it works, not what it learns."""
    words = shlex.split(command, comments=True)
    for option, value in (("--epochs", "1"), ("--seeds", "1"), ("--rounds", "2")):
        if option in words:
            words[words.index(option) + 1] = value
    if words[1] in ("train", "compare") and "--resume" not in words:
        words += ["--limit-batches", "1", "--set", "batch_size=8"]
    return words


@pytest.fixture
def photos(tmp_path):
    """Some of the folders that the pages speak of."""
    rng = np.random.default_rng(0)

    def draw(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(path)

    for part, count in (("train", 8), ("val", 3)):
        for kind in ("cat", "dog"):
            for index in range(count):
                draw(tmp_path / "photos" / part / kind / f"{index}.jpg")
    draw(tmp_path / "holiday" / "beach.jpg")
    draw(tmp_path / "photo.jpg")
    (tmp_path / "cifar10-jpeg").symlink_to(tmp_path / "photos")
    return tmp_path


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(c.startswith("senet") for c in commands(p))], ids=lambda p: p.name
)
def test_commands_run_in_order(page, photos):
    words = [quick(command) for command in commands(page) if not command.startswith("make")]
    assert {command[0] for command in words} == {"senet"}
    run = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(words)],
        cwd=photos,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        word for page in PAGES for word in re.findall(r"(?:^|`)make ([\w-]+)", page.read_text(), flags=re.MULTILINE)
    }
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_examples_run(page, tmp_path):
    examples = json.dumps(blocks(page, "python"))
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", EXAMPLES, examples], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_links_and_pictures_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} points at {target}, which is not there"


def prose(page):
    """(number, line) of what is neither code, nor a table, nor a picture."""
    text = re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), page.read_text(), flags=re.DOTALL | re.M)
    return [(n, line) for n, line in enumerate(text.splitlines(), 1) if not line.startswith(("|", "![", "    "))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_prose_is_at_most_120_characters_wide(page):
    assert [f"{page.name}:{number}" for number, line in prose(page) if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_only_public_names_are_documented(page):
    words = set(re.findall(r"\bsenet\.(\w+)", page.read_text()))
    files = {"lock", "pytorch"}  # .senet.lock, moskomule/senet.pytorch
    assert words - files <= {*senet.__all__}, f"{page.name} names what is not public"


def test_the_api_reference_has_every_public_name():
    documented = re.findall(r"^::: senet\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    assert sorted(documented) == sorted(set(senet.__all__) - {"__version__"})


def test_generated_tables_are_fresh():
    run = subprocess.run([sys.executable, "benchmarks/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
