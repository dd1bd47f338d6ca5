"""Numbers that no machine can serve, and texts that are no numbers: one line that names the option."""

import pytest


@pytest.mark.parametrize(
    ("words", "name"),
    [
        *((("--seed", value), "--seed") for value in (2**64, 2**63, -(2**63) - 1, "9" * 5000, "true", "1e3", "")),
        *((("--epochs", value), "--epochs") for value in (10**20, 0, -1, "1.5", "x")),
        *((("--workers", value), "--workers") for value in (100_000, -1)),
        *((("--val-fraction", value), "val") for value in ("nan", "inf", "-1", "0", "1", "1e308", "x")),
        *((("--limit-batches", value), "--limit-batches") for value in (0, 2**63)),
        *((("--devices", value), "--devices") for value in (0, 2**64)),
        (("--num-nodes", 2**64), "--num-nodes"),
        (("--set", "lr=true"), "lr"),
        (("--set", "transform.size=100000"), "transform.size"),
        (("--se", "reduction=1e-320"), "reduction"),
        (("--se", f"hidden={10**20}"), "hidden"),
        (("--se", "stages=1.5"), "stages"),
        (("--se", "bias: no"), "KEY=VALUE"),
        (("--se", f"reduction={'9' * 5000}"), "reduction"),
        (("--recipe", "missing.yaml"), "missing.yaml"),
        (("--allow-changed-data",), "--resume"),
    ],
)
def test_a_value_out_of_range(senet, tmp_path, words, name):
    base = ("train", "--data", "digits", "--model", "se_resnet8", "--limit-batches", 1, "--epochs", 2)
    code, out, err = senet(*base, "-o", tmp_path / "run", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert name in err
    assert len(err) < 500
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    [
        *(("compare", "--data", "digits", "--seeds", value) for value in (0, 10**20)),
        ("compare", "--data", "digits", "--seeds", 2, "--seed", 2**63 - 1),
        *(("eval", "--data", "digits", option, 10**20) for option in ("--size", "--batch-size", "--workers")),
        ("inspect", "--data", "digits", "--top", 10**20),
        ("fold", "--data", "digits", "--max-drop", "nan"),
        ("attach", "resnet8", "--max-milliseconds", "nan"),
        ("attach", "resnet8", "--num-classes", 10**20),
        ("cost", "se_resnet8", "--input-size", 10**20),
        ("bench", "--size", 10**20),
    ],
)
def test_a_value_out_of_range_of_other_commands(senet, tmp_path, trained, words):
    files = ("-c", trained / "best.safetensors") if words[0] in ("eval", "inspect", "fold") else ()
    output = ("-o", tmp_path / "out") if words[0] in ("compare", "inspect", "fold") else ()
    code, out, err = senet(*words, *files, *output)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert not (tmp_path / "out").exists()


def test_numbers_without_a_dot_are_numbers(senet, photos, trained, tmp_path):
    words = ("inspect", "-c", trained / "best.safetensors", "--data", photos, "-o", tmp_path / "report")
    assert senet(*words, "--threshold", "dead=1e-2")[0] == 0
    code, _, err = senet(*words, "--threshold", "dead=true", "--overwrite")
    assert (code, err.count("\n")) == (2, 1)
