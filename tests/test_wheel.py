"""What is published: wheels with prebuilt code, run where there is no compiler, and on an emulated ARM processor.

``SENET_DIST`` names a folder with wheels that are there (`make wheel`); else they are built, which takes half a minute.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from senet.ops.csrc import forms

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the wheels are for Linux"),
]
DRIVER = Path(__file__).parent / "ops" / "csrc" / "native_driver.cpp"


def checked(command, **options):
    run = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert run.returncode == 0, f"{command}\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
    return run.stdout


def built(kind, target, root=ROOT, **environment):
    """The file that Hatchling makes of a checkout."""
    pytest.importorskip("hatchling", reason="Hatchling is not installed, and SENET_DIST is not set")
    full = {key: value for key, value in os.environ.items() if not key.startswith("SENET_")} | environment
    checked([sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(target)], cwd=root, env=full)
    (path,) = Path(target).iterdir()
    return path


@pytest.fixture(scope="module")
def wheel_for(tmp_path_factory):
    """The wheel for an architecture."""
    made = {}

    def wheel(machine):
        if machine not in made and "SENET_DIST" in os.environ:
            (made[machine],) = Path(os.environ["SENET_DIST"]).glob(f"*_{machine}.whl")
        elif machine not in made:
            compiler = f"{machine}-linux-gnu-g++"
            if shutil.which(compiler) is None:
                pytest.skip(f"no {compiler} (Debian: g++-{machine.replace('_', '-')}-linux-gnu)")
            made[machine] = built("wheel", tmp_path_factory.mktemp(machine), SENET_WHEEL=f"manylinux_2_28_{machine}")
        return made[machine]

    return wheel


@pytest.fixture(scope="module")
def installed(wheel_for, tmp_path_factory):
    """The folder of an environment that has the wheel, the packages that run this test, and no compiler on its PATH."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "--quiet"]
    checked([*pip, "install", "--no-deps", "--no-index", str(wheel_for(platform.machine()))])
    return folder


def run_in(folder, *command, **environment):
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "CXX", "SENET_NATIVE")}
    environment = {**kept, "PATH": str(folder / "nothing"), "SENET_CACHE": str(folder / "cache"), **environment}
    return checked([str(folder / "bin" / command[0]), *command[1:]], env=environment, cwd=folder)


STEPS = """
import warnings
warnings.simplefilter("error")
import torch, senet
from senet.ops.csrc import build
torch.manual_seed(0)
torch.set_num_threads(2)
assert build.compiler() is None
network = senet.create_model("se_resnet8", 10)
x, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
losses = []
for backend in ("native", "reference", "native"):
    with senet.use_backend(backend):
        loss = torch.nn.functional.cross_entropy(network(x), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
    if backend != "native":
        optimizer.step()
assert abs(losses[0] - losses[1]) < 1e-5 and losses[2] < losses[1], losses
network.eval()
fast = senet.accelerate(network)
with torch.no_grad():
    torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-5)
with open("/proc/self/maps") as maps:
    runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line}
print(senet.__file__, build.loaded_from(), len(runtimes), sep="\\n")
"""


OF_THIS_PROCESSOR = [f for f in forms.FORMS if f.machine == platform.machine() and f.features <= forms.features()]


@pytest.mark.parametrize("form", OF_THIS_PROCESSOR, ids=lambda form: form.name)
def test_an_installed_wheel_runs_its_prebuilt_code_without_a_compiler(installed, form):
    better = OF_THIS_PROCESSOR[: OF_THIS_PROCESSOR.index(form)]  # which an older processor does not run
    older = f"from senet.ops.csrc import forms\nforms.FORMS = forms.FORMS[{len(better)} :]\n"
    package, library, runtimes = run_in(installed, "python", "-c", older + STEPS).splitlines()
    assert Path(package).is_relative_to(installed)
    assert Path(library).name == f"{form.name}.so"
    assert Path(library).parent == Path(package).parent / "ops" / "csrc" / "prebuilt"
    assert runtimes == "1"  # PyTorch's
    assert not (installed / "cache").exists()


def test_the_command_line_of_an_installed_wheel_compares(installed):
    command = ["senet", "compare", "--seeds", "1", "--epochs", "1", "--output", "compared"]
    command += ["--set", "schedule.warmup_epochs=0"]
    # By name: where the prebuilt code could not run, this would be an error.
    run_in(installed, *command, SENET_BACKEND="native", SENET_NATIVE="prebuilt")
    assert (installed / "compared" / "results.json").is_file()


@pytest.mark.parametrize("form", forms.FORMS, ids=lambda form: form.name)
def test_each_form_computes_what_plain_loops_do(wheel_for, form, tmp_path):
    emulated = form.machine != platform.machine()
    if not emulated and not form.features <= forms.features():
        pytest.skip(f"this processor does not run {form.name}")
    if emulated and (form.machine != "aarch64" or shutil.which("qemu-aarch64") is None):
        pytest.skip(f"no qemu-{form.machine} (Debian: qemu-user)")
    compiler = f"{form.machine}-linux-gnu-g++"
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    member = f"senet/ops/csrc/prebuilt/{form.name}.so"
    library = zipfile.ZipFile(wheel_for(form.machine)).extract(member, tmp_path)
    options = ["-O1", "-std=c++17", "-fopenmp", "-w", f"-I{forms.HERE}"]
    checked([compiler, *options, str(DRIVER), library, "-o", str(tmp_path / "driver")])
    emulator = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"] if emulated else []
    assert "backward" in checked([*emulator, str(tmp_path / "driver")])


@pytest.mark.parametrize("compiles", [True, False])
def test_the_source_distribution_is_built_where_a_compiler_is(tmp_path, compiles):
    if compiles and forms.compiler() is None:
        pytest.skip("no C++ compiler")
    archive = built("sdist", tmp_path / "sdist")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    wheel = built("wheel", tmp_path / "wheel", source, **({} if compiles else {"PATH": "", "CXX": ""}))
    names = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if "/prebuilt/" in name}
    here = {f"{form.name}.so" for form in forms.FORMS if form.machine == platform.machine()}
    assert names == (here if compiles else set())
    assert wheel.name.endswith(f"-linux_{platform.machine()}.whl" if compiles and here else "-none-any.whl")
    assert {"library.cpp", "forms.py"} <= {Path(name).name for name in zipfile.ZipFile(wheel).namelist()}
