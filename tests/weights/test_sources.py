"""Every source with its real code: huggingface_hub, torch.hub and torchvision talk to a server in this process.

How often those libraries ask, and for what, is theirs. What a user pays for is weighed: the bytes that were sent.
"""

import functools
import hashlib
import http.server
import threading
import urllib.parse
import urllib.request

import huggingface_hub.constants
import pytest
import torch
import torchvision

import senet
from helpers.messages import one_line
from senet.weights.sources import find_weights

COMMIT = "0" * 39 + "1"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``files``: path → content, with the headers of the Hugging Face hub; counts requests and bytes."""

    def do_GET(self):
        self.server.requests += 1
        content = self.server.files.get(self.path.partition("?")[0])
        self.send_response(404 if content is None else 200)
        if content is None and "/resolve/" in self.path:
            known = any(path.startswith(self.path.partition("/resolve/")[0] + "/") for path in self.server.files)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        self.send_header("ETag", '"' + hashlib.sha256(content or b"").hexdigest() + '"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if self.command == "GET":
            self.server.sent += len(content or b"")
            self.wfile.write(content or b"")

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.requests, server.sent = {}, 0, 0
        thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def web(server, monkeypatch, tmp_path):
    """Python's own https goes to the server, whatever host the address names."""

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, request):
            path = urllib.parse.urlsplit(request.full_url).path
            return direct.open(f"http://127.0.0.1:{server.server_port}{path}")

    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    urllib.request.install_opener(urllib.request.build_opener(urllib.request.ProxyHandler({}), Https))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("SENET_CACHE", str(tmp_path / "cache"))
    yield server
    urllib.request.install_opener(None)


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """huggingface_hub's own client, cache and headers, with this server as the hub."""
    place = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", place)
    form = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{")
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", place + "".join(form[1:]))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return server


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A small network, and its file's content."""
    model = senet.create_model("se_resnet8", 3).eval()
    path = tmp_path_factory.mktemp("network") / "model.safetensors"
    senet.save_weights(path, model)
    return model, path.read_bytes()


def assert_loads(source, model):
    loaded = senet.create_model("se_resnet8", 3, pretrained=source).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())


def test_hub_downloads_once_and_then_works_offline(hub, network, monkeypatch):
    model, content = network
    hub.files["/timm/tiny.a1/resolve/main/model.safetensors"] = content
    assert_loads("timm:tiny.a1", model)
    assert find_weights("timm:tiny.a1").path.read_bytes() == content
    sent = hub.sent
    assert_loads("hf:timm/tiny.a1", model)
    assert hub.sent - sent < len(content)  # asked whether it is still the newest, perhaps, but not sent again
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    requests = hub.requests
    hub.files.clear()
    assert_loads("timm:tiny.a1", model)
    assert_loads("hf:timm/tiny.a1", model)
    with pytest.raises(senet.InputError, match=one_line("timm:other.a1: … not … cache … HF_HUB_OFFLINE")):
        find_weights("timm:other.a1")
    assert hub.requests == requests


def test_a_cache_laid_out_by_others_is_used_offline(network, monkeypatch, tmp_path):
    model, content = network
    folder = tmp_path / "hf" / "models--me--mine"
    blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
    link = folder / "snapshots" / COMMIT / "model.safetensors"
    for path in (blob, link, folder / "refs" / "main"):
        path.parent.mkdir(parents=True)
    blob.write_bytes(content)
    link.symlink_to(blob)
    (folder / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_loads("hf:me/mine", model)
    assert_loads(f"hf:me/mine@{COMMIT}", model)


def test_hub_revision_file_and_pickle_of_tensors(hub, network, tmp_path):
    model, content = network
    torch.save(model.state_dict(), tmp_path / "w.bin")
    hub.files["/me/old/resolve/main/pytorch_model.bin"] = (tmp_path / "w.bin").read_bytes()
    assert_loads("hf:me/old", model)
    hub.files["/me/many/resolve/v2/deep/w.safetensors"] = content
    assert_loads("hf:me/many/deep/w.safetensors@v2", model)


def test_hub_errors_are_one_line(hub):
    hub.files["/me/empty/resolve/main/README.md"] = b""
    for source, message in {
        "hf:me/empty": "cannot be downloaded from the Hub",
        "hf:me/none": "no such repository, or it is private$",
        "timm:seresnet50": "no such repository.*have a tag",
        "hf:mine": "'mine' is not OWNER/REPO",
        "timm:": "name the weights after the colon",
        "hf:me/mi..ne": "cannot be downloaded",
    }.items():
        with pytest.raises(senet.InputError, match=message) as caught:
            find_weights(source)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(source)


def test_https_is_verified_cached_and_fetched_again_when_the_cache_is_damaged(web, network):
    model, content = network
    web.files["/a/w.safetensors"] = content
    digest = hashlib.sha256(content).hexdigest()
    source = f"https://example.org/a/w.safetensors#sha256={digest}"
    assert_loads(source, model)
    assert_loads(source, model)
    assert web.sent == len(content)
    path = find_weights(source).path
    path.write_bytes(content[:-1])
    assert_loads(source, model)
    assert path.read_bytes() == content
    assert web.sent == 2 * len(content)
    assert_loads(f"https://example.org/a/w.safetensors#SHA256={digest[:8].upper()}", model)


def test_https_refuses_another_file_and_leaves_nothing_behind(web, network, tmp_path):
    web.files["/w.safetensors"] = network[1]
    with pytest.raises(senet.InputError, match=one_line("w.safetensors: … not the expected file")):
        find_weights("https://example.org/w.safetensors#sha256=" + "0" * 64)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
    with pytest.raises(senet.InputError, match=r"cannot be downloaded .*404"):
        find_weights("https://example.org/none.safetensors#sha256=" + "0" * 64)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.org/w.safetensors", "append #sha256="),
        ("https://example.org/w.safetensors#sha256=1234567", "8 to 64 digits"),
        ("https://example.org/w.safetensors#md5=0123456789abcdef", "append #sha256="),
        ("https://example.org/#sha256=0123456789abcdef", "not the address"),
        ("https://example.org/a/..#sha256=0123456789abcdef", "not the address"),
        (True, "pretrained=True … default"),
        (False, "pretrained=False … default"),
        ("", "pretrained='' … default"),
        ("http://example.org/w.safetensors#sha256=0123456789abcdef", "only https"),
        ("ftp://example.org/w.safetensors", "only https"),
        ("torchvision:ResNet50_Weights.IMAGENET1K_V9", "torchvision:… no such weights"),
        ("torchvision:resnet51", "torchvision:… no such weights"),
        ("nowhere.safetensors", "nowhere.safetensors … no such"),
    ],
)
def test_bad_sources_are_one_line(source, message):
    with pytest.raises(senet.InputError, match=one_line(message)):
        senet.create_model("resnet18", pretrained=source)


def test_torchvision_weights_come_to_torchvisions_own_cache(web, monkeypatch, tmp_path):
    theirs = torchvision.models.resnet18(num_classes=5)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    name = f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    web.files[f"/models/{name}"] = content
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    monkeypatch.setattr(weights.value, "url", f"https://download.example.org/models/{name}")
    for source in ("torchvision:ResNet18_Weights.IMAGENET1K_V1", "torchvision:resnet18", "default"):
        ours = senet.create_model("resnet18", 5, pretrained=source).state_dict()
        assert all(torch.equal(value, ours[key]) for key, value in theirs.state_dict().items())
    twin = senet.create_model("se_resnet18", 5, se=senet.SEConfig(identity_init=True), pretrained="default")
    assert torch.equal(twin.conv1.weight, theirs.conv1.weight)
    with pytest.raises(senet.InputError, match=one_line("torchvision:resnet18: … ceil_pool=False")):
        senet.create_model("resnet18", 5, pretrained="torchvision:resnet18", ceil_pool=True)
    kept = tmp_path / "torch" / "hub" / "checkpoints" / name
    assert kept.read_bytes() == content
    assert web.sent == len(content)
    web.files[f"/models/{name}"] = content + b"more"
    kept.unlink()
    with pytest.raises(senet.InputError, match=one_line("not the expected file")):
        senet.create_model("resnet18", 5, pretrained="torchvision:resnet18")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(senet.InputError, match=one_line("hf:a/b: … pip install huggingface_hub")):
        find_weights("hf:a/b")


def test_a_file_may_be_named_like_a_source(tmp_path, network):
    path = tmp_path / "timm:x.safetensors"
    path.write_bytes(network[1])
    assert_loads(path, network[0])
