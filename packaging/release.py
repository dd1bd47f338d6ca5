"""Builds and checks a release; `make wheel`, `make sbom`, and `make release-check` run it.

    python packaging/release.py wheels     empty dist/, then build and check a wheel for each architecture
    python packaging/release.py sdist      build the source distribution in dist/
    python packaging/release.py sbom       write the bill of materials (CycloneDX) to dist/
    python packaging/release.py version    check that version, tag, and changelog agree

Each problem is printed on one line; exit code 0 means no problems. Requires the dependency group `release`.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from auditwheel.elfutils import elf_read_dt_needed

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"
PLATFORMS = {  # tag → prebuilt forms
    "manylinux_2_28_x86_64": ("x86-64-v3.so", "x86-64-v4.so"),
    "manylinux_2_28_aarch64": ("armv8-a.so",),
}
LARGEST = 10_000_000  # bytes per wheel
# The libraries that forms may link to. An OpenMP runtime is not among them, because it must be PyTorch's.
LIBRARIES = ("libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux")
LOCK = ROOT / "requirements" / "train.lock"


def run(*command: str, **environment: str) -> tuple[bool, str]:
    """Run a command; returns whether it succeeded, and its output."""
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode == 0, done.stdout


def tool(name: str, *arguments: str) -> tuple[bool, str]:
    """Run a Python module of this environment, as ``run`` does."""
    return run(sys.executable, "-m", name, *arguments)


def version() -> str:
    """The version of this checkout."""
    text = (ROOT / "src" / "senet" / "_version.py").read_text(encoding="utf-8")
    found = re.search(r'"(.+)"', text)
    assert found is not None
    return found[1]


def built(kind: str, tag: str = "") -> list[str]:
    """Build a wheel or the source distribution; returns the problems."""
    done, said = run(sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(DIST), SENET_WHEEL=tag)
    last = (said.strip().splitlines() or [""])[-1]
    return [] if done else [f"{kind} {tag}: the build failed: {last}"]


def wheels() -> list[str]:
    """Build and check the wheels."""
    shutil.rmtree(DIST, ignore_errors=True)
    problems = [problem for tag in PLATFORMS for problem in built("wheel", tag)]
    for wheel in sorted(DIST.glob("*.whl")):
        problems += check_wheel(wheel)
        print(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 1e6:.2f} MB")
    return problems


def check_wheel(wheel: Path) -> list[str]:
    """Check a wheel's size, license, description, prebuilt forms, and platform; returns the problems."""
    tag = wheel.stem.rpartition("-")[2]
    problems = [] if wheel.stat().st_size < LARGEST else [f"is larger than {LARGEST / 1e6:.0f} MB"]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        problems += [] if any(n.endswith("/licenses/LICENSE") for n in names) else ["has no license file"]
        forms = {name for name in names if name.endswith(".so")}
        if {Path(name).name for name in forms} != set(PLATFORMS.get(tag, ())):
            problems.append(f"has the prebuilt forms {sorted(forms)} under the tag {tag}")
        for name in forms:
            path = Path(archive.extract(name, DIST / "unpacked"))
            strange = [lib for lib in elf_read_dt_needed(path) if not lib.startswith(LIBRARIES)]
            problems += [f"{name} is linked to {', '.join(strange)}"] if strange else []
    shutil.rmtree(DIST / "unpacked", ignore_errors=True)
    good, said = tool("twine", "check", "--strict", str(wheel))
    problems += [] if good else [f"twine: {said.strip().splitlines()[-1]}"]
    good, said = tool("auditwheel", "show", "--json", str(wheel))
    needs = json.loads(said[said.index("{") :])["overall_tag"] if good else said.strip().splitlines()[-1]
    glibc = re.match(r"manylinux_2_(\d+)_", needs)
    problems += [] if glibc and int(glibc[1]) <= 28 else [f"auditwheel: {needs}"]
    return [f"{wheel.name}: {problem}" for problem in problems]


def sdist() -> list[str]:
    """Build and check the source distribution."""
    problems = built("sdist")
    good, said = tool("twine", "check", "--strict", *map(str, DIST.glob("*.tar.gz")))
    return problems + ([] if good else [f"the source distribution: twine: {said.strip().splitlines()[-1]}"])


def sbom() -> list[str]:
    """Write the bill of materials: this version, its wheels, and the dependency releases that it is tested with."""
    if not LOCK.exists():
        return [f"{LOCK.relative_to(ROOT)} is missing; it lists the releases for the bill of materials: make lock"]
    good, said = tool(
        "cyclonedx_py", "requirements", "--pyproject", "pyproject.toml", "--output-reproducible", str(LOCK)
    )
    if not good:
        return [f"cyclonedx: {said.strip().splitlines()[-1]}"]
    bill = json.loads(said[said.index("{") :])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["train"]
    direct = {re.split(r"[^\w.-]", text)[0].lower().replace("_", "-") for text in asked}
    root = bill["metadata"]["component"]
    root |= {"version": version(), "purl": f"pkg:pypi/senet@{version()}"}
    files = [(wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest()) for wheel in sorted(DIST.glob("*.whl"))]
    root["externalReferences"] = [
        {"type": "distribution", "url": name, "hashes": [{"alg": "SHA-256", "content": digest}]}
        for name, digest in files
    ]
    needed = {part["bom-ref"]: part["name"].lower().replace("_", "-") for part in bill["components"]}
    needed = {
        ref: name for ref, name in needed.items() if name in direct
    }  # one name can have several platform-specific entries
    others = [entry for entry in bill.get("dependencies", []) if entry["ref"] != root["bom-ref"]]
    bill["dependencies"] = [{"ref": root["bom-ref"], "dependsOn": sorted(needed)}, *others]
    DIST.mkdir(exist_ok=True)
    path = DIST / f"senet-{version()}.cdx.json"
    path.write_text(json.dumps(bill, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {len(bill['components'])} components")
    missing = sorted(direct - set(needed.values()))
    return (
        [f"the bill of materials lacks {', '.join(missing)}, which {LOCK.name} does not pin: make lock"]
        if missing
        else []
    )


def check_version() -> list[str]:
    """Check that commit, tag, version, and changelog belong to the same release; returns the problems."""
    tags = run("git", "tag", "--points-at", "HEAD")[1].split()
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (\S+)(.*)$", changes, re.MULTILINE)
    problems = []
    if f"v{version()}" not in tags:
        problems.append(f"this commit has no tag v{version()}, the version of src/senet/_version.py")
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version()):
        problems.append(f"{version()} is not a release version")
    if not headings or headings[0][0] != version() or "unreleased" in headings[0][1]:
        problems.append(f"CHANGELOG.md does not start with a section '## {version()}' and a date")
    if run("git", "status", "--porcelain")[1].strip():
        problems.append("the checkout has uncommitted changes")
    return problems


def main() -> None:
    """Run the steps named on the command line."""
    steps = {"wheels": wheels, "sdist": sdist, "sbom": sbom, "version": check_version}
    if not sys.argv[1:] or not set(sys.argv[1:]) <= steps.keys():
        raise SystemExit(f"usage: python packaging/release.py {' | '.join(steps)} …")
    problems = [problem for step in sys.argv[1:] for problem in steps[step]()]
    raise SystemExit("\n".join(problems) or None)


if __name__ == "__main__":
    main()
