"""The house: imports go one way down, and the front door is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import senet

SOURCE = Path(senet.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
# A folder may import from folders of a lower number only; the loose files at the top are the ground.
FLOORS = {"": 0, "system": 0.5, "ops": 1, "nn": 2, "models": 3, "data": 4, "gates": 4, "measure": 5}
FLOORS |= {"training": 6, "paper": 6, "cli": 7}
HEAVY = ["lightning", "torchvision", "matplotlib", "triton", "torchmetrics", "pydantic", "sklearn", "scipy", "PIL"]


def folder_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (SOURCE / parts[1]).is_dir() else ""


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_down(path):
    own = path.relative_to(SOURCE).parts[0] if path.parent != SOURCE else ""
    if path.name == "__init__.py" and own == "":
        return  # the front door names every floor, lazily; the test below holds it
    for module in imported(path):
        if module.split(".")[0] == "senet":
            other = folder_of(module)
            assert other == own or FLOORS[other] < FLOORS[own], f"{path.name} imports {module}"


def test_every_folder_has_a_floor():
    assert {p.name for p in SOURCE.iterdir() if p.is_dir() and p.name != "__pycache__"} == FLOORS.keys() - {""}


def test_ops_imports_torch_alone():
    for path in (SOURCE / "ops").rglob("*.py"):
        allowed = {"torch", "senet", *sys.stdlib_module_names}
        if path.name in ("triton_kernels.py", "triton_gemm.py"):
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
