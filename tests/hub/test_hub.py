"""Sharing over the wire: a Hub of a few lines answers in place of the network, and keeps what is uploaded."""

import base64
import hashlib
import importlib
import json

import huggingface_hub
import pytest
import safetensors.torch
import torch
from huggingface_hub.utils import get_session

import senet
from helpers.messages import one_line

NAME = "somebody/insects"
COMMIT = "c0ffee" + 34 * "0"
http = importlib.import_module(type(get_session()).__module__.partition(".")[0])  # the library that the Hub's uses


class Hub:
    """What the Hub's HTTP interface does for one repository.

    Attributes:
        files: name → content.
        asked: (method, path) of each request, in order.
        sent: the bodies of creations and commits.
    """

    def __init__(self):
        self.files, self.asked, self.sent = {}, [], []
        self.refuses = False

    def answer(self, request):
        path = request.url.path
        self.asked.append((request.method, path))
        if self.refuses:
            return http.Response(401, headers={"X-Error-Message": "Invalid username or password."}, request=request)
        if path == "/api/repos/create":
            self.sent.append(json.loads(request.content))
            return http.Response(200, json={"url": f"https://huggingface.co/{NAME}"})
        if path == "/api/validate-yaml":
            return http.Response(200, json={"errors": [], "warnings": []})
        if "/preupload/" in path:
            files = [
                {**f, "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(request.content)["files"]
            ]
            return http.Response(200, json={"files": files})
        if "/commit/" in path:
            return self.take(request)
        if path.startswith(f"/{NAME}/resolve/"):
            return self.give(request, path.rpartition("/")[2])
        return http.Response(200, json={"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": n} for n in self.files]})

    def take(self, request):
        header, *entries = map(json.loads, request.content.splitlines())
        self.sent.append(header["value"])
        for entry in entries:
            self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        url = f"https://huggingface.co/{NAME}/commit/{COMMIT}"
        return http.Response(200, json={"commitUrl": url, "commitOid": COMMIT, "success": True})

    def give(self, request, name):
        if name not in self.files:
            return http.Response(404, headers={"X-Error-Code": "EntryNotFound"}, request=request)
        content = self.files[name]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return http.Response(200, headers=headers | {"Accept-Ranges": "bytes"}, content=content)


@pytest.fixture
def hub():
    hub = Hub()
    hooks = get_session().event_hooks  # one of them keeps the offline mode
    transport = http.MockTransport(hub.answer)
    huggingface_hub.set_client_factory(lambda: http.Client(transport=transport, event_hooks=hooks))
    yield hub
    huggingface_hub.set_client_factory(lambda: http.Client(event_hooks=hooks, follow_redirects=True))


@pytest.fixture
def model():
    return senet.create_model("se_resnet8", 3, se=senet.SEConfig(4)).eval()


def test_push_uploads_weights_configuration_and_card_in_one_commit(hub, model, tmp_path):
    metadata = {"classes": ["ant", "bee", "wasp"], "license": "mit"}
    url = senet.push_to_hub(model, NAME, metadata, token="hf_test", private=True, commit_message="First")
    assert url == f"https://huggingface.co/{NAME}/commit/{COMMIT}"
    assert hub.files.keys() == {"README.md", "config.json", "model.safetensors"}
    assert sum("/commit/" in path for _, path in hub.asked) == 1
    created, committed = hub.sent
    assert "insects" in str(created)
    assert "private" in str(created)  # each version of the library says it in its own way
    assert committed["summary"] == "First"
    state = safetensors.torch.load(hub.files["model.safetensors"])
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert json.loads(hub.files["config.json"])["senet"]["se"]["reduction"] == 4
    card = hub.files["README.md"].decode()
    assert f'senet.from_pretrained("{NAME}")' in card
    assert "license: mit" in card


def test_what_was_pushed_comes_back_and_from_the_cache_without_the_hub(hub, model, tmp_path, monkeypatch):
    senet.push_to_hub(model, NAME, token="hf_test")
    x = torch.randn(2, 3, 16, 16)
    for source in (NAME, f"hf:{NAME}"):
        again = senet.from_pretrained(source, cache_dir=tmp_path)
        assert torch.equal(again(x), model(x))
    hub.asked.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    offline = senet.from_pretrained(NAME, cache_dir=tmp_path, num_classes=0)
    assert offline(x).shape == (2, model.num_features)
    assert hub.asked == []
    with pytest.raises(senet.InputError, match=one_line("somebody/other: … no such folder")):
        senet.from_pretrained("somebody/other", cache_dir=tmp_path)


def test_repositories_of_others_are_refused(hub, tmp_path):
    hub.files = {"config.json": b'{"architecture": "resnet50"}', "model.safetensors": safetensors.torch.save({})}
    with pytest.raises(senet.InputError, match=one_line(f"{NAME}: … which network")):
        senet.from_pretrained(NAME, cache_dir=tmp_path)
    hub.files = {}
    with pytest.raises(senet.InputError, match=one_line(f"{NAME}: … no such folder … Hub")):
        senet.from_pretrained(NAME, cache_dir=tmp_path)


def test_a_refused_upload_is_one_line(hub, model):
    hub.refuses = True
    with pytest.raises(senet.InputError, match=one_line(f"{NAME} … not uploaded … hf auth login")):
        senet.push_to_hub(model, NAME, token="hf_test")


def test_what_cannot_be_made_again_is_refused_before_anything_is_sent(hub, model):
    model.relu = torch.nn.GELU()
    with pytest.raises(senet.InputError, match="relu is GELU"):
        senet.push_to_hub(model, NAME, token="hf_test")
    assert hub.asked == []
