"""One pass, any order, any number of processes: the same statistics as over all values at once."""

import functools
import io
import json
import logging
import math
import zipfile

import numpy as np
import pytest
import scipy.stats
import timm
import torch
from torch import nn

import helpers.excitations
import senet
from helpers.messages import assert_said, one_line
from senet.data.images import ArrayStore, ImageSet
from senet.data.loaders import make_loader

site_of = functools.partial(helpers.excitations.site_of, classes=4, top=3, batch=7)


def values_of(seed=0, images=41, channels=6, classes=4):
    rng = np.random.default_rng(seed)
    targets = rng.integers(-1, classes, images)
    values = rng.random((images, channels)) * 0.4 + np.linspace(0, 0.5, channels) * (targets[:, None] == 1)
    return values, targets, rng.permutation(1000)[:images]


def same(a, b, tolerance=1e-12):
    assert list(a.sites) == list(b.sites)
    assert a.classes == b.classes
    assert a.names == b.names
    for one, two in zip(a, b, strict=True):
        for name in ("name", "kind", "function", "low", "neutral", "high"):
            assert getattr(one, name) == getattr(two, name)
        assert np.array_equal(one.count, two.count)
        for name in ("mean", "m2", "lowest", "highest"):
            np.testing.assert_allclose(getattr(one, name), getattr(two, name), rtol=tolerance, atol=tolerance)
        for end in ("opening", "closing"):
            assert np.array_equal(getattr(one, end).images, getattr(two, end).images)
            ends = (getattr(one, end).values, getattr(two, end).values)
            np.testing.assert_allclose(*ends, rtol=tolerance, atol=tolerance)


def test_statistics_are_numpys():
    values, targets, images = values_of()
    site = site_of(values, targets, images)
    for k in range(4):
        chosen = values[targets == k]
        np.testing.assert_allclose(site.class_mean()[k], chosen.mean(0), rtol=1e-12)
        np.testing.assert_allclose(site.class_std()[k], chosen.std(0), rtol=1e-12)
    mean, std = site.overall()
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, values.std(0), rtol=1e-12)
    assert np.array_equal(site.lowest, values.min(0))
    assert np.array_equal(site.highest, values.max(0))
    order = np.argsort(values, axis=0)
    assert np.array_equal(site.closing.images, images[order[:3]].T)
    assert np.array_equal(site.opening.images, images[order[::-1][:3]].T)
    expected = math.sqrt((values.std(0) ** 2).mean()) / math.sqrt((values.mean(0) ** 2).mean())
    assert site.variation() == pytest.approx(expected, rel=1e-12)


def test_class_selectivity_is_that_of_the_analysis_of_variance():
    values, targets, images = values_of(images=200)
    site = site_of(values, targets, images)
    known = targets >= 0
    n, k = known.sum(), 4
    f = scipy.stats.f_oneway(*(values[targets == c] for c in range(k))).statistic
    share = f * (k - 1) / (f * (k - 1) + n - k)
    np.testing.assert_allclose(
        site.channel_selectivity(), (1 - (1 - share) * (n - 1) / (n - k)).clip(0), rtol=1e-10, atol=1e-12
    )
    assert site.channel_selectivity()[-1] > 0.5 > site.channel_selectivity()[0]
    assert 0.1 < site.selectivity() < 0.9


def test_selectivity_needs_classes_and_movement():
    values, targets, images = values_of()
    assert math.isnan(site_of(values, np.full_like(targets, -1), images).selectivity())
    assert math.isnan(site_of(values[:4], np.arange(4), images[:4]).selectivity())
    constant = np.full_like(values, np.float32(0.3)) + 1e-9 * values
    assert site_of(constant, targets, images).selectivity() == 0
    assert np.array_equal(site_of(constant, targets, images).channel_selectivity(), np.zeros(6))


def test_large_offsets_do_not_cost_digits():
    values, targets, images = values_of()
    site = site_of(values * 1e-6 + 1e3, targets, images)
    np.testing.assert_allclose(site.overall()[1], (values * 1e-6 + 1e3).std(0), rtol=1e-6)


def test_ties_go_to_the_lower_number_in_any_order():
    values = np.ones((9, 2))
    numbers = np.array([5, 3, 8, 1, 7, 2, 6, 4, 0])
    site = site_of(values, np.zeros(9, int), numbers, batch=2)
    assert site.opening.images.tolist() == site.closing.images.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("ranks", [1, 2, 3, 50])
def test_merge_is_the_whole(ranks):
    values, targets, images = values_of()
    whole = senet.Excitations({"se": site_of(values, targets, images, batch=41)}, ("a", "b", "c", "d"))
    parts = [
        senet.Excitations({"se": site_of(values[r::ranks], targets[r::ranks], images[r::ranks])}, ("a", "b", "c", "d"))
        for r in range(ranks)
    ]
    same(senet.Excitations.merge(parts), whole)
    same(senet.Excitations.merge(parts[::-1]), whole)


def test_merge_refuses_strangers():
    values, targets, images = values_of()
    one = senet.Excitations({"se": site_of(values, targets, images)}, ("a", "b", "c", "d"))
    other = senet.Excitations({"se": site_of(values, targets, images)}, ("a", "b", "x", "d"))
    fewer = senet.Excitations({"se": site_of(values[:, :5], targets, images)}, ("a", "b", "c", "d"))
    for parts, message in (([one, other], "classes"), ([one, fewer], "gates"), ([], "nothing")):
        with pytest.raises(senet.InputError, match=message):
            senet.Excitations.merge(parts)


def photos(count=30):
    arrays = np.random.default_rng(1).integers(0, 255, (count, 8, 8, 3)).astype(np.uint8)
    names = [f"photo_{i}.png" for i in range(count)]
    return ImageSet(ArrayStore(arrays), list(range(count)), ("cat", "dog", "owl"), [i % 3 for i in range(count)], names)


def shown(images):
    return images.with_transform(lambda picture, rng=None: torch.from_numpy(picture.array.copy()).permute(2, 0, 1))


def normalize(images):
    return images.double() / 255 - 0.5


def test_record_is_what_timms_gates_computed_and_leaves_the_network_alone():
    network = timm.create_model("seresnet18", num_classes=3, layers=(1, 2, 1, 1), zero_init_last=False).double()
    network.layer1[0].bn1.eval()
    modes = [module.training for module in network.modules()]
    state = {key: value.clone() for key, value in network.state_dict().items()}
    images = shown(photos())
    found = senet.record_excitations(network, make_loader(images, 7, train=False), preprocess=normalize, top=2)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())
    assert found.classes == ("cat", "dog", "owl")
    assert found.images == 30
    expected = []
    se = network.layer2[1].se
    handle = se.gate.register_forward_hook(lambda m, a, out: expected.append(out.flatten(1)))
    with torch.no_grad():
        network.eval()(normalize(torch.stack([images[i].image for i in range(30)])))
    handle.remove()
    values = expected[0].numpy()
    site = found["layer2.1.se"]
    np.testing.assert_allclose(site.class_mean(), [values[k::3].mean(0) for k in range(3)], rtol=1e-9)
    np.testing.assert_allclose(site.overall()[1], values.std(0), rtol=1e-7)
    assert np.array_equal(site.opening.images[:, 0], values.argmax(0))
    assert found.names[int(site.opening.images[0, 0])] == f"photo_{values[:, 0].argmax()}.png"


def test_ranks_with_the_loaders_own_shares_merge_to_the_whole():
    network = senet.create_model("se_resnet8", 3).double()
    images = shown(photos())
    whole = senet.record_excitations(network, make_loader(images, 30, train=False), preprocess=normalize)
    parts = [
        senet.record_excitations(
            network, make_loader(images, 4, train=False, rank=rank, world_size=3), preprocess=normalize
        )
        for rank in range(3)
    ]
    merged = senet.Excitations.merge(parts)
    same(merged, whole)


def test_memory_does_not_grow_with_images():
    def sizes(batches):
        torch.manual_seed(0)
        network = nn.Sequential(senet.SqueezeExcite(8))
        found = senet.record_excitations(network, (torch.randn(4, 8, 3) for _ in range(batches)), top=4)
        site = found["0"]
        return [a.nbytes for a in (site.mean, site.m2, site.count, site.opening.values, site.closing.images)]

    assert sizes(1) == sizes(50)


def test_plain_loaders_of_pairs_and_of_images():
    network = nn.Sequential(senet.SqueezeExcite(8)).double()
    x = torch.randn(10, 8, 5, dtype=torch.float64)
    pairs = senet.record_excitations(network, [(x[:6], torch.tensor([0, 1, 2, 0, 1, -1])), (x[6:], torch.arange(4))])
    assert pairs.classes == ("0", "1", "2", "3")
    assert pairs["0"].count.tolist() == [3, 3, 2, 1, 1]
    alone = senet.record_excitations(network, [x])
    assert alone.classes == ()
    np.testing.assert_allclose(alone["0"].overall()[0], pairs["0"].overall()[0], rtol=1e-12)
    parts = [senet.record_excitations(network, [(x[:6], torch.tensor([0, 1, 2, 0, 1, -1]), torch.arange(6))])]
    parts += [senet.record_excitations(network, [(x[6:], torch.arange(4), torch.arange(6, 10))])]
    same(senet.Excitations.merge(parts), pairs)


def test_progress_and_choice_of_sites():
    network = senet.create_model("se_resnet8", 3)
    calls = []
    found = senet.record_excitations(
        network, [torch.randn(2, 3, 8, 8)] * 3, sites="layer[23]*", progress=calls.append, classes=["a"]
    )
    assert list(found.sites) == ["layer2.0.se", "layer3.0.se"]
    assert calls == [2, 4, 6]


def test_accelerated_and_compiled_networks_are_recorded():
    network = senet.create_model("se_resnet8", 3).double().eval()
    x = [torch.randn(5, 3, 16, 16, dtype=torch.float64)]
    expected = senet.record_excitations(network, x)
    same(senet.record_excitations(senet.accelerate(network, "reference"), x), expected)
    same(senet.record_excitations(torch.compile(network), x), expected)


@pytest.mark.gpu
def test_a_network_on_another_device_gets_its_images_there():
    network = senet.create_model("se_resnet8", 3).double()
    batches = [(torch.randn(20, 3, 16, 16, dtype=torch.float64), torch.arange(20) % 3)]
    expected = senet.record_excitations(network, batches)
    same(senet.record_excitations(network.cuda(), batches), expected, tolerance=1e-9)


def test_attached_gates_are_recorded():
    network = senet.create_model("resnet8", 3)
    x = torch.randn(5, 3, 16, 16)
    senet.attach(network, example_input=x[:1])
    found = senet.record_excitations(network, [x])
    assert {gate.name for gate in senet.find_gates(network)} == set(found.sites)
    assert all(site.neutral == 1 and site.overall()[0].tolist() == [1.0] * site.channels for site in found)
    assert {finding.kind for one in senet.diagnose(found) for finding in one.findings} == {"untrained"}


def test_a_class_without_images_is_named(caplog):
    with caplog.at_level(logging.WARNING, "senet.inspection"):
        found = senet.record_excitations(
            nn.Sequential(senet.SqueezeExcite(4)), [(torch.randn(3, 4, 2), torch.tensor([0, 0, 2]))],
            classes=("ant", "bee", "cow"),
        )  # fmt: skip
    assert_said(caplog.text, "1 of 3 classes … no images … 'bee'")
    assert found.empty_classes() == ["bee"]
    assert np.isnan(found["0"].class_mean()[1]).all()
    assert np.isnan(found["0"].class_std()[1]).all()


class Lookalike(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.sigmoid = nn.Linear(8, 4), nn.Linear(4, 8), nn.Sigmoid()

    def forward(self, x):
        return self.sigmoid(self.b(self.a(x.mean(2))))[:, :, None] + x


def test_lookalikes_are_left_out_by_name(caplog):
    network = nn.Sequential(Lookalike(), senet.SqueezeExcite(8))
    found = senet.record_excitations(network, [torch.randn(2, 8, 5)])
    assert list(found.sites) == ["1"]
    assert_said(caplog.text, "skipped 0: … gate × input")
    with pytest.raises(senet.InputError, match="none of the gates"):
        senet.record_excitations(nn.Sequential(Lookalike()), [torch.randn(2, 8, 5)])


def broken():
    module = senet.SqueezeExcite(8)
    module.fc2.weight.data[3] = torch.nan
    return nn.Sequential(module)


X = torch.randn(4, 8, 5)


@pytest.mark.parametrize(
    ("network", "batches", "options", "message"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3)), [X], {}, "Sequential has no SE gates"),
        (lambda: nn.Sequential(senet.SqueezeExcite(8)), [X], {"sites": "layer9*"}, "'layer9*'"),
        (lambda: nn.Sequential(senet.SqueezeExcite(8)), [], {}, "gave no images"),
        (
            broken,
            [(X, torch.arange(4), torch.arange(70, 74))],
            {},
            "gate '0' … NaN … 4 of 4 … image 70",
        ),
        (lambda: nn.Sequential(senet.SqueezeExcite(8)), [X.byte()], {}, "torch.uint8 … preprocess"),
        (lambda: nn.Sequential(senet.SqueezeExcite(8)), [(X, torch.rand(4, 3))], {}, "targets … (4, 3) float32"),
        (lambda: nn.Sequential(senet.SqueezeExcite(8)), [{"image": X}], {}, "gives dict"),
        (lambda: nn.Sequential(senet.SqueezeExcite(8)), [(X, torch.arange(4))], {"classes": "abc"}, "target 3"),
        (lambda: nn.Sequential(senet.SqueezeExcite(8)).to("meta"), [X], {}, "meta device"),
        (lambda: nn.Sequential(senet.SqueezeExcite(8)), [X], {"top": -1}, "top=-1"),
    ],
)
def test_bad_input_gets_one_line(network, batches, options, message):
    with pytest.raises(senet.InputError, match=one_line(message)):
        senet.record_excitations(network(), batches, **options)


@pytest.fixture(scope="module")
def recording():
    torch.manual_seed(0)
    network = senet.create_model("se_resnet8", 3)
    loader = make_loader(shown(photos()), 8, train=False)
    found = senet.record_excitations(network, loader, preprocess=lambda x: x.float() / 255, top=5)
    found.about["model"] = "se_resnet8"
    return found


@pytest.mark.parametrize("ending", ["npz", "parquet"])
@pytest.mark.parametrize("top", [5, 0])
def test_files_come_back_equal(recording, tmp_path, ending, top):
    if top == 0:
        network = nn.Sequential(senet.SqueezeExcite(8, senet.SEConfig(gate="relu")))
        recording = senet.record_excitations(network, [X], top=0)
    path = tmp_path / f"excitations.{ending}"
    recording.save(path)
    again = senet.Excitations.load(path)
    same(again, recording, tolerance=0)
    assert again.about == recording.about
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_parquet_is_a_table_for_other_tools(recording, tmp_path):
    from pyarrow import parquet

    recording.save(tmp_path / "e.parquet")
    table = parquet.read_table(tmp_path / "e.parquet").select(["gate", "channel", "class", "images", "mean", "std"])
    rows = [r for r in table.to_pylist() if r["gate"] == "layer2.0.se" and r["channel"] == 3]
    site = recording["layer2.0.se"]
    assert [r["class"] for r in rows] == ["cat", "dog", "owl", "(no class)", None]
    assert rows[1]["mean"] == site.class_mean()[1, 3]
    assert rows[4]["std"] == site.overall()[1][3]
    assert [r["images"] for r in rows] == [10, 10, 10, 0, 30]


@pytest.mark.parametrize("ending", ["npz", "parquet"])
def test_unreadable_files(tmp_path, recording, ending):
    path = tmp_path / f"e.{ending}"
    with pytest.raises(senet.InputError, match="no such file"):
        senet.Excitations.load(path)
    recording.save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"nothing", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(senet.InputError, match=one_line("not a readable file")):
            senet.Excitations.load(path)
    for call in (senet.Excitations.load, recording.save):
        with pytest.raises(senet.InputError, match=r"\.npz or \.parquet"):
            call(tmp_path / "e.csv")


def test_npz_of_something_else(tmp_path):
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(senet.InputError, match=one_line("not a readable file")):
        senet.Excitations.load(tmp_path / "other.npz")


def test_npz_that_claims_more_numbers_than_it_has_is_refused_unread(recording, tmp_path):
    """12 GB in an array's header, or in the archive's."""
    path, huge = tmp_path / "e.npz", tmp_path / "huge.npz"
    recording.save(path)
    header = io.BytesIO()
    shape = {"descr": "<f8", "fortran_order": False, "shape": (1_500_000_000,)}
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(huge, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, header.getvalue() if part.filename == "0.mean.npy" else old.read(part))
    with pytest.raises(senet.InputError, match=r"0\.mean\.npy claims 12,000,000,000 bytes"):
        senet.Excitations.load(huge)
    content = bytearray(path.read_bytes())
    place = content.rindex(b"0.mean.npy") - 46  # of the archive's own directory; its sizes stand 24 bytes behind
    content[place + 24 : place + 28] = (3_999_999_999).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(senet.InputError, match=r"0\.mean\.npy claims 3,999,999,999 bytes"):
        senet.Excitations.load(path)
    path.write_bytes(header.getvalue())
    with pytest.raises(senet.InputError, match=one_line("not a readable file")):
        senet.Excitations.load(path)


@pytest.mark.parametrize("text", ["null", "[]", "{}", "3", '"x"', "9" * 5000, "[" * 900 + "]" * 900])
def test_damaged_headers_are_one_line(recording, tmp_path, text):
    path = tmp_path / "e.npz"
    recording.save(path)
    with np.load(path) as file:
        arrays = dict(file)
    header = json.loads(str(arrays["header"]))
    first, *others = header["gates"]
    for name in ("classes", "names", "gates", "format", "name", "low"):
        if (name, text) in (("names", "{}"), ("gates", "[]"), ("name", '"x"'), ("low", "3")):
            continue  # of the right type
        change = {name: "@"} if name in header else {"gates": [first | {name: "@"}, *others]}
        arrays["header"] = np.array(json.dumps(header | change).replace('"@"', text))
        np.savez(path, **arrays)
        with pytest.raises(senet.InputError, match=one_line("e.npz: not a readable file")):
            senet.Excitations.load(path)


def test_without_pyarrow_there_is_npz(recording, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(senet.InputError, match=r"pip install 'senet\[report\]'"):
        recording.save(tmp_path / "e.parquet")


def test_unknown_names(recording):
    with pytest.raises(senet.InputError, match="no gate 'fc'"):
        recording["fc"]
    with pytest.raises(senet.InputError, match="no class 'cow'"):
        recording.class_index("cow")
    assert recording.class_index("dog") == 1
