"""The house: imports go one way down, and the front door is light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import senet

SOURCE = Path(senet.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
# The house, from the ground up: a package may import from packages of lower floors only. Packages on one floor do not
# know each other; the loose files at the top (errors.py, text.py) are the ground.
HOUSE = (
    ("",),
    ("system",),
    ("data", "ops"),
    ("nn",),
    ("models", "surgery"),
    ("acceleration", "cost", "runs", "weights"),
    ("attachment", "evaluation", "hub"),
    ("inspection", "training"),
    ("comparison", "folding"),
    ("bench",),
    ("cli",),
)
FLOORS = {package: number for number, packages in enumerate(HOUSE) for package in packages}
HEAVY = ["lightning", "torchvision", "matplotlib", "triton", "torchmetrics", "pydantic", "sklearn", "scipy", "PIL"]


def name_of(path):
    return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


def folder_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (SOURCE / parts[1]).is_dir() else ""


def nodes_at_run_time(node):
    """All nodes, those in functions too, but for what stands under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from nodes_at_run_time(child)


def imported(path, nodes=ast.walk):
    """The modules that a file imports: ``from senet.ops import layout`` imports ``senet.ops.layout``."""
    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from {part if part in MODULES else node.module for part in parts}
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_package_has_a_floor():
    assert {p.name for p in SOURCE.iterdir() if p.is_dir() and p.name != "__pycache__"} == FLOORS.keys() - {""}


def test_contributing_draws_the_house():
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    _, *floors = re.search(r"^```mermaid\n(.+?)^```", text, re.DOTALL | re.MULTILINE)[1].split("subgraph ")
    drawn = [set(re.findall(r"^ +(\w+)\[", floor, re.MULTILINE)) for floor in floors]
    assert drawn == [{package or "ground" for package in packages} for packages in reversed(HOUSE)]
    names = [f"f{number}" for number in reversed(range(len(HOUSE)))]
    assert [floor.split()[0] for floor in floors] == names
    assert floors[-1].splitlines()[-1].strip() == " --> ".join(names)


@pytest.mark.parametrize("package", sorted(FLOORS))
def test_imports_go_down(package):
    """The front door names every floor, lazily; `test_import_senet_alone…` holds it."""
    files = (SOURCE / package).rglob("*.py") if package else SOURCE.glob("[!_]*.py")
    up = [
        f"{path.relative_to(SOURCE)} imports {module}"
        for path in sorted(files)
        for module in imported(path)
        if module.split(".")[0] == "senet"
        and folder_of(module) != package
        and FLOORS[folder_of(module)] >= FLOORS[package]
    ]
    assert not up


def test_nobody_imports_the_front_door():
    """``import senet`` within the package would reach every floor unseen; the module that is meant is imported."""
    taken = [
        f"{path.relative_to(SOURCE)} takes {alias.name} of senet"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        for alias in getattr(node, "names", ())
        if (isinstance(node, ast.Import) and alias.name == "senet")
        or (isinstance(node, ast.ImportFrom) and (node.level or (node.module == "senet" and alias.name[:2] != "__")))
    ]
    assert not taken


def test_no_module_imports_itself_in_a_circle():
    """Imports in functions count. A package's ``__init__`` holds no imports of its modules."""
    after = {
        name: sorted({module for module in imported(path, nodes_at_run_time) if module in MODULES} - {"senet"})
        for name, path in MODULES.items()
        if name != "senet"
    }
    circles = []
    done = set()

    def visit(name, way):
        if name in way:
            circles.append(" → ".join([*way[way.index(name) :], name]))
        elif name not in done:
            for module in after[name]:
                visit(module, [*way, name])
            done.add(name)

    for name in after:
        visit(name, [])
    assert not circles


def test_ops_imports_torch_alone():
    for path in (SOURCE / "ops").rglob("*.py"):
        allowed = {"torch", "senet", *sys.stdlib_module_names}
        if path.stem.startswith("triton"):
            allowed.add("triton")
        assert {module.split(".")[0] for module in imported(path)} <= allowed, path.name


def modules_after(code):
    script = f"{code}\nimport sys\nprint(*sys.modules, sep='\\n')"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in run.stdout.split()}


def test_import_senet_and_a_network_load_nothing_heavy():
    loaded = modules_after("import senet; senet.create_model('se_resnet8', 3); senet.SqueezeExcite(16)")
    assert "torch" in loaded
    assert not loaded & set(HEAVY)


def test_a_small_network_neither_loads_triton_nor_starts_a_compiler():
    network = "senet.create_model('se_resnet8', 3)(torch.zeros(2, 3, 8, 8)).sum().backward()"
    loaded = modules_after(f"import subprocess, torch\nsubprocess.Popen = None\nimport senet\n{network}")
    assert "senet" in loaded
    assert "triton" not in loaded


def test_import_senet_alone_and_the_command_line_do_not_even_load_torch():
    assert "torch" not in modules_after("import senet")
    assert not modules_after("import senet.cli.main") & {"torch", *HEAVY}


def test_files_and_functions_stay_short():
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 400, f"{path.name} is too long to read"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):  # the body: the signature of a command is its table of options
                assert node.end_lineno - node.body[0].lineno <= 60, f"{path.name}: {node.name} is too long to read"
