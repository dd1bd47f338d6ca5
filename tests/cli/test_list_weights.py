import json

from senet.weights.known import KNOWN_WEIGHTS


def test_known_weights_as_a_table(senet):
    code, out, err = senet("list", "--weights")
    assert (code, err) == (0, "")
    for name, row in KNOWN_WEIGHTS.items():
        assert f"{name}: {row.source}" in out
        assert f"{row.top1:.2f}" in out
    code, out, _ = senet("list", "se_resnet50*", "--weights")
    assert code == 0
    assert max(map(len, out.split("se_resnet50:")[0].splitlines())) <= 80
    assert "80.26" in out
    assert "resnet101" not in out
    assert "RGB in 0…1: mean 0.485 0.456 0.406, std 0.229 0.224 0.225" in out


def test_known_weights_as_json(senet):
    code, out, _ = senet("list", "senet154", "--weights", "--json")
    [row] = json.loads(out)
    assert code == 0
    assert row["model"] == "senet154"
    assert row["source"].startswith("https://")
    assert {"input_size", "mean", "std", "interpolation", "crop", "top1", "top5", "licence"} <= row.keys()


def test_a_network_without_known_weights(senet):
    code, out, err = senet("list", "shake", "--weights")
    assert (code, out) == (2, "")
    assert err.startswith("error: no weights are known for shake26_2x96d")
    assert err.count("\n") == 1
    assert senet("list", "shake", "--weights", "--json")[1] == "[]\n"
