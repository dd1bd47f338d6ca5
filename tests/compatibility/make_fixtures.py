"""Write the files that later versions must load, resume and evaluate to the same numbers.

Run it by hand; no test does. It wrote ``written_by_0.1.0.dev0`` at commit e9572e6, with PyTorch 2.14 on an x86-64
processor with AVX-512. Never write those files again: they prove something because they are old. A later version gets a
folder of its own beside them:

    python tests/compatibility/make_fixtures.py tests/compatibility/written_by_VERSION

Everything is made as users make it: with commands, Ctrl-C and public functions. What would name the machine is
replaced: its name, its kernel, and the path of the images, which becomes that of a folder that has moved.
"""

import contextlib
import csv
import io
import json
import os
import platform
import shutil
import signal
import socket
import sys
from pathlib import Path

import torch
from PIL import Image

import conftest
import senet
from senet.cli.main import main

NOWHERE = "/home/somebody/pictures"
# With these the answers are far enough from a draw for errors to be counted alike everywhere: 1e-4 in probability.
QUICK = ("--set", "batch_size=32", "--set", "lr=0.2")
EVERYTHING = ("ema=0.9", "mixup=0.2", "cutmix=1.0", "dropout=0.1", "clip_grad_norm=1")
HERE = ("--workers", 0, "--device", "cpu")
PREDICT = ("predict", "-c", "moved_run_at_its_end.safetensors", "pictures", "--csv", "-", *HERE)
DIGITS = ("--data", "digits", "--epochs", 2, *QUICK, *HERE)
SHORT = ("--limit-batches", 12)  # so that rounding does not grow for long, where gradients are not clipped


class Interrupter:
    """Presses Ctrl-C in the ``at``-th training step from now on."""

    def __init__(self):
        self.steps, self.at = 0, None

    def build(self, **arguments):
        network = conftest.Tiny(**arguments)
        network.register_forward_pre_hook(self.count)
        return network

    def count(self, network, inputs):
        self.steps += network.training and torch.is_grad_enabled()
        if self.steps == self.at:
            self.at = None
            signal.raise_signal(signal.SIGINT)

    def press_at(self, step):
        self.at = self.steps + step


def command(*words, code=0):
    sys.argv = ["senet", *map(str, words)]  # which environment.json keeps
    assert main(sys.argv[1:]) == code, words


def train(output, *words, code=0):
    changes = [word for change in EVERYTHING for word in ("--set", change)]
    command("train", *words, *changes, "-o", output, code=code)


def make_runs(ctrl_c):
    train("run", *DIGITS, "--model", "se_tiny", "--seed", 3)
    ctrl_c.press_at(45 + 3)  # the third step of the second epoch
    train("run_stopped", *DIGITS, "--model", "se_tiny", "--seed", 3, code=130)
    words = ("train", *DIGITS, *SHORT, "--model", "tiny", "--attach", "--seed", 1, "-o")
    command(*words, "attached")
    keep_last("attached", "attached_run_at_its_end.safetensors")
    ctrl_c.press_at(10)
    command(*words, "attached_run_stopped", code=130)


def keep_last(run, path):
    shutil.move(Path(run, "last.safetensors"), path)
    shutil.rmtree(run)


def make_run_on_moved_pictures(ctrl_c):
    """Two runs on a folder: stopped in its first epoch; and unbroken, of which the last weights are kept."""
    colors = {"disc": (200, 40, 40), "square": (40, 160, 60), "bar": (40, 60, 220)}
    for place, (name, color) in enumerate(colors.items()):
        for number in range(12):
            path = Path("pictures", name, f"{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.new("RGB", (8, 8), (17 * number % 90,) * 3)
            image.paste(color, (place, number % 5, place + 3, number % 5 + 3))
            image.save(path)
    words = ("--data", "pictures", "--epochs", 2, "--set", "batch_size=8", *HERE, "--model", "se_tiny")
    train("whole", *words)
    keep_last("whole", "moved_run_at_its_end.safetensors")
    ctrl_c.press_at(2)
    train("moved_run_stopped", *words, code=130)
    for path in (Path("moved_run_stopped", name) for name in ("run.json", "log.txt")):
        path.write_text(path.read_text().replace(str(Path("pictures").resolve()), NOWHERE))


def make_comparisons(ctrl_c):
    words = ("compare", *DIGITS, *SHORT, "--model", "se_tiny", "--seeds", 1)
    command(*words, "-o", "comparison")
    ctrl_c.press_at(24 + 12)  # the plain network has its 24 steps, its twin is before its first validation
    command(*words, "-o", "comparison_stopped", code=130)


def make_weights():
    """Networks of ``senet.save``, ``senet.save_weights`` and ``senet fold``, and excitations."""
    torch.manual_seed(1)
    network = noisy(senet.create_model("se_resnet8", 2))
    senet.save(network.half(), "se_resnet8_half.safetensors", {"classes": ["cat", "dog"]})
    attached = senet.create_model("tiny", 10, 1)
    senet.attach(attached, senet.SEConfig(reduction=2, gate="hard_sigmoid"), example_input=conftest.ramp(1, 8))
    senet.save(noisy(attached), "attached.safetensors")
    network, metadata = senet.build_from_checkpoint("run/best.safetensors")
    senet.save(network, "shared", {name: metadata[name] for name in ("classes", "transform", "metrics")})
    senet.save_weights("weights_alone.safetensors", network)
    found = senet.record_excitations(network, [conftest.ramp(1, 8, 60)], top=2)
    for name in ("excitations.npz", "excitations.parquet"):
        found.save(name)
    words = ("--checkpoint", "run/best.safetensors", "--excitations", "excitations.npz", "--data", "digits", *HERE)
    command("fold", *words, "--sites", "layer2.*", "--rounds", 0, "-o", "fold")
    shutil.move("fold/folded.safetensors", "folded.safetensors")  # no command reads the rest
    shutil.rmtree("fold")


def noisy(network):
    """Every tensor differs from that of a new network."""
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor).abs() * 0.1)
    return network


def shrink_pictures():
    """The curves are drawn anew, never read."""
    for path in Path().rglob("curves.png"):
        with Image.open(path) as image:
            image.resize((60, 40)).save(path)


def expected():
    files = [path for path in sorted(Path().rglob("*.safetensors")) if path.name != "weights_alone.safetensors"]
    sources = [path.parent if path.parent.name == "shared" else path for path in files]
    found = senet.Excitations.load("excitations.npz")
    return {
        "commit": "e9572e6",
        "torch": torch.__version__,
        "networks": {str(path): described(senet.from_pretrained(path)) for path in sources},
        "eval": {name: errors(name) for name in ("run/best.safetensors", "folded.safetensors")},
        "verdict": json.loads(Path("comparison/results.json").read_text())["verdict"],
        "predict": list(csv.reader(printed(*PREDICT))),
        "excitations": {site.name: site.overall()[0].tolist() for site in found},
        "keys": {name: keys(name) for name in senet.list_models() if not name.endswith("tiny")},
    }


def described(network):
    return {"sha256": conftest.digest(network.state_dict()), "logits": conftest.logits(network).tolist()}


def keys(name):
    with torch.device("meta"):
        return conftest.digest(senet.create_model(name).state_dict())


def errors(path):
    found = json.loads("".join(printed("eval", "-c", path, "--data", "digits", *HERE, "--json")))
    return {name: found[name] for name in ("images", "top1_error", "top5_error")}


def printed(*words):
    """The lines that a command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        command(*words)
    return output.getvalue().splitlines()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir()
    os.chdir(folder)
    socket.gethostname = lambda: "localhost"
    platform.platform = lambda *_: "Linux"
    conductor = Interrupter()
    conftest.register(conductor.build)
    make_runs(conductor)
    make_run_on_moved_pictures(conductor)
    make_comparisons(conductor)
    make_weights()
    shrink_pictures()
    Path("expected.json").write_text(json.dumps(expected(), indent=1) + "\n")
