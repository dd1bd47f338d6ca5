"""Tests use public names, so that the code is free to change: the exceptions are listed here, and become only fewer."""

import ast
from pathlib import Path

TESTS = Path(__file__).parents[1]
# Of this project, where nothing public can tell.
OURS = {
    "_said": "helpers/compilation.py: what the process has said already, so that a test hears it",
    "_SPECS": "helpers/networks.py: what a test registers is to be forgotten; there is no public way back",
    "_specs": "helpers/networks.py: as above",
}
# Of ours too: the proofs of kernels take kernels, plans and the state of a process apart.
OURS_IN_OPS = {
    *("_AllGather", "_attempt", "_broken", "_compiled", "_gathered", "_panel", "_plan"),
    *("_affine_kernel", "_combine_kernel", "_gated_kernel", "_moments_kernel", "_small_moments_kernel"),
    *("_gate_backward_kernel", "_gate_kernel", "_gated_norm_backward_kernel", "_norm_backward_kernel", "_norm_kernel"),
}
# Of ctypes, PyTorch, and matplotlib, which have no public way to ask.
THEIRS = {
    "_fields_",
    *("_BatchNorm", "_buffers", "_forward_hooks", "_forward_pre_hooks", "_modules", "_parameters", "_version"),
    *("_C", "_dispatch_get_all_op_names", "_dynamo", "_foreach_mul_", "_replace"),
    *("_new_shared", "_replicate_for_data_parallel", "_SIGCHLD_handler_set", "_unscaled_dash_pattern"),
}


def private(name):
    last = name.rpartition(".")[2]  # of "senet.package.name"
    return last if last.isidentifier() and last.startswith("_") and last.strip("_") and last[1] != "_" else None


def private_names(path):
    """The attributes of others, the imports, and what is given to ``setattr``, ``getattr`` and the like in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")).endswith("attr"):
            names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        yield from ((f"{path.relative_to(TESTS)}:{node.lineno}", name) for name in map(private, names) if name)


def test_tests_use_public_names_alone():
    found = [place for path in sorted(TESTS.rglob("*.py")) for place in private_names(path)]
    new = [f"{place}: {name}" for place, name in found if name not in OURS.keys() | OURS_IN_OPS | THEIRS]
    assert not new, "take a public name, or make one public"
    assert {name for _, name in found} >= OURS.keys(), "no longer used: take it from the list"


def test_every_way_to_reach_a_private_name_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.TESTS", tmp_path)
    path = tmp_path / "test_some.py"
    path.write_text(
        'x._a\nfrom y import _b\nmonkeypatch.setattr(x, "_c", 1)\nmonkeypatch.setattr("y.z._d", 1)\ngetattr(x, "_e")\n'
        'self._f\nx.__dict__\nfrom y import __version__\nx["_g"]\n_h = 1\n'
    )
    assert {name for _, name in private_names(path)} == {"_a", "_b", "_c", "_d", "_e"}
