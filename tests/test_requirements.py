"""The pinned releases in requirements/ belong to what pyproject.toml asks for (`make lock` makes them anew)."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {
    "dev": PROJECT["optional-dependencies"],
    "train": ("train", "report"),
    "oldest": PROJECT["optional-dependencies"],
}


def wanted(lock):
    """Name → specifiers, of the library itself and of the extras that a lock is for."""
    lines = [*PROJECT["dependencies"], *(x for name in EXTRAS[lock] for x in PROJECT["optional-dependencies"][name])]
    found = {}
    for requirement in map(Requirement, lines):
        if requirement.name != PROJECT["name"]:
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement.specifier)
    return found


def pinned(lock):
    """Name → versions; there may be several, for different Pythons."""
    found = {}
    for line in (ROOT / "requirements" / f"{lock}.lock").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            (only,) = Requirement(line).specifier
            assert only.operator == "=="
            found.setdefault(canonicalize_name(Requirement(line).name), set()).add(Version(only.version))
    return found


def lower_bound(specifiers):
    return max(Version(one.version) for specifier in specifiers for one in specifier if one.operator in (">=", "=="))


@pytest.mark.parametrize("lock", EXTRAS)
def test_every_requirement_is_pinned_to_a_release_that_it_allows(lock):
    versions = pinned(lock)
    for name, specifiers in wanted(lock).items():
        for version in versions[name]:
            assert all(specifier.contains(version) for specifier in specifiers), f"{lock}.lock: {name}=={version}"


def test_what_is_tested_as_oldest_are_the_lower_bounds():
    versions = pinned("oldest")
    for name, specifiers in wanted("oldest").items():
        assert min(versions[name]) == lower_bound(specifiers), name


def test_the_demo_runs_what_is_tested():
    tested = pinned("dev")
    assert all(versions <= tested[name] for name, versions in pinned("train").items())


@pytest.mark.parametrize("lock", [*EXTRAS, "build"])
def test_locks_name_releases_and_no_places(lock):
    text = (ROOT / "requirements" / f"{lock}.lock").read_text(encoding="utf-8")
    assert not any(word in text for word in ("://", "@", "--", "/"))
