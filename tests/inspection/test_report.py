"""What is packed for the page is what was recorded, and it fits; figures show what the paper's show."""

import base64
import csv
import io
import json
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import senet
from helpers.excitations import gate, recording_of
from helpers.messages import one_line
from senet.inspection.doctor import Thresholds, diagnose
from senet.inspection.figures import figure_classes, figure_sites, plot_class_means, sampled_channels
from senet.inspection.page_data import SHOWN_IMAGES, THUMBNAILS, channel_ranges, data_uri, thumbnails
from senet.inspection.report import FILES, build_page, finding_rows, write_report
from senet.inspection.site_excitations import SiteExcitations


def recording(widths=(8, 8, 12), classes=("ant", "bee", "cow"), images=60, filled=None):
    rng = np.random.default_rng(0)
    targets = np.arange(images) % (filled or max(len(classes), 1)) if classes else np.full(images, -1)
    values = {
        f"layer{number}.se": rng.uniform(0.1, 0.6, (images, width)) + 0.3 * (targets[:, None] == np.arange(width) % 3)
        for number, width in enumerate(widths)
    }
    return recording_of(values, targets, classes)


def page_of(excitations, **options):
    lines = Thresholds()
    return build_page(excitations, diagnose(excitations, lines), lines, **options)


class Page(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.data, self.inside = [], None, False
        self.feed(page.decode())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = dict(attributes).get("id") == "report-data"

    def handle_data(self, data):
        if self.inside:
            self.data = json.loads(data)

    def handle_endtag(self, tag):
        self.inside = False


def unpacked(site, classes):
    """The block of a gate, read by the words of report_data's docstring."""
    block = zlib.decompress(base64.b64decode(site["data"]))
    n, top = site["kept"], site["top"]
    ends = np.frombuffer(block, "<u4", 2 * n * top)
    at = ends.nbytes
    sixteen = np.frombuffer(block, "<u2", n * (5 + 2 * top), at).astype(float) / 65535
    at += n * (5 + 2 * top) * 2
    eight = np.frombuffer(block, "u1", 2 * n * classes, at).astype(float).reshape(2, classes, n)
    assert at + eight.size == len(block)
    mean, lowest, highest = (
        site["low"] + sixteen[i * n : (i + 1) * n] * (site["high"] - site["low"]) for i in range(3)
    )
    return {
        "images": ends.reshape(2, n, top),
        "mean": mean,
        "lowest": lowest,
        "highest": highest,
        "std": sixteen[3 * n : 4 * n] * site["widest"],
        "class_mean": np.where(eight[0] > 0, mean + (eight[0] - 128) / 127 * site["reach"], np.nan),
        "class_std": eight[1] / 255 * site["widest"],
    }


def test_the_page_holds_what_was_recorded():
    excitations = recording(classes=("ant", "bee", "cow", "dodo"), filled=3)
    data = Page(page_of(excitations)).data
    assert data["classes"] == ["ant", "bee", "cow", "dodo"]
    assert data["counts"] == [20, 20, 20, 0]
    assert [site["name"] for site in data["sites"]] == list(excitations.sites)
    names = json.loads(zlib.decompress(base64.b64decode(data["imageNames"])))
    for shown, site in zip(data["sites"], excitations, strict=True):
        read = unpacked(shown, 4)
        mean, std = site.overall()
        np.testing.assert_allclose(read["mean"], mean, atol=1e-5)
        np.testing.assert_allclose(read["std"], std, atol=1e-5)
        np.testing.assert_allclose(read["lowest"], site.lowest, atol=1e-5)
        np.testing.assert_allclose(read["highest"], site.highest, atol=1e-5)
        np.testing.assert_allclose(read["class_mean"], site.class_mean(), atol=shown["reach"] / 250)
        np.testing.assert_allclose(read["class_std"][:3], site.class_std()[:3], atol=shown["widest"] / 500)
        for end, extremes in enumerate((site.opening, site.closing)):
            expected = [[excitations.names[i] for i in row] for row in extremes.images[:, :SHOWN_IMAGES]]
            assert [[names[i] for i in row] for row in read["images"][end]] == expected


def test_the_page_asks_nobody_for_anything_and_nothing_breaks_out_of_it():
    evil = "</script><img src=https://example.com/x onerror=alert(1)>"
    excitations = recording(classes=("ant", evil, "/* script */"))
    excitations.about["model"] = evil
    excitations.names[0] = evil
    page = page_of(excitations)
    tags = Page(page).tags
    assert not any("src" in attributes or attributes.get("href", "#")[0] != "#" for _, attributes in tags)
    assert not any(tag in ("img", "link", "iframe") for tag, _ in tags)
    policy = next(a["content"] for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert Page(page).data["classes"][1] == evil


def big(sites=50, classes=1000, channels=256):
    """As large as a page may get, of pure noise, which no compression helps; all gates share their arrays."""
    rng = np.random.default_rng(0)
    site = SiteExcitations.empty(gate("0", channels), classes, channels, 8)
    site.count += 50
    site.mean += rng.random(site.mean.shape)
    site.m2 += rng.random(site.m2.shape)
    site.lowest, site.highest = np.zeros(channels), np.ones(channels)
    for extremes in (site.opening, site.closing):
        extremes.images[:] = rng.integers(0, 50_000, extremes.images.shape)
        extremes.values[:] = rng.random(extremes.values.shape)
    alike = {}
    for number in range(sites):
        name = f"layer{number // 10}.{number % 10}.se"
        alike[name] = SiteExcitations(**{**vars(site), "name": name})
    names = {i: f"val/n{i % 1000:08d}/ILSVRC2012_val_{i:08d}.JPEG" for i in range(50_000)}
    return senet.Excitations(alike, tuple(f"class {i}, also called {i}" for i in range(classes)), names)


def test_fifty_gates_and_a_thousand_classes_stay_below_five_megabytes():
    picture = np.random.default_rng(1).integers(0, 255, (72, 72, 3)).astype(np.uint8)
    page = page_of(big(), picture=lambda number: picture)
    data = Page(page).data
    assert len(page) < 5_000_000
    assert len(page) > 2_500_000  # room that is there is used
    assert len(data["sites"]) == 50
    assert len(data["classes"]) == 1000
    assert data["sites"][0]["kept"] >= 20
    assert data["sites"][0]["kept"] * data["sites"][0]["step"] >= 256
    assert len(data["pictures"]) > 50
    with pytest.raises(senet.InputError, match="record fewer sites"):
        page_of(big(channels=2), most_bytes=100_000)


def test_thumbnails_are_few_small_and_the_most_shown():
    excitations = recording(widths=(64,) * 3, images=900)
    asked = []

    def uri(number):
        asked.append(number)
        return None if number == asked[0] else data_uri(np.full((90, 200, 3), number % 256, np.uint8))

    found = thumbnails(excitations, 64, 700_000, uri)
    assert 0 < len(found) <= THUMBNAILS
    assert 0 < len(thumbnails(excitations, 64, 20_000, uri)) < 20_000 / 500
    assert str(asked[0]) not in found
    kind, content = next(iter(found.values())).split(";base64,")
    assert kind == "data:image/jpeg"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (68, 31)
    kind, content = data_uri(np.full((8, 8, 1), 7, np.uint8)).split(";base64,")
    assert kind == "data:image/png"
    assert np.array_equal(np.array(Image.open(io.BytesIO(base64.b64decode(content)))), np.full((8, 8), 7))


def test_figures_show_the_gates_and_channels_of_the_papers():
    names = [f"layer{stage}.{i}.se" for stage, count in ((1, 3), (2, 4), (3, 6), (4, 3)) for i in range(count)]
    widths = [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3  # SE-ResNet-50's
    small = recording(widths=widths, images=6)
    sites = dict(zip(names, small.sites.values(), strict=True))
    for name, site in sites.items():
        site.name = name
    excitations = senet.Excitations(sites, small.classes)
    shown = ["layer1.2.se", "layer2.3.se", "layer3.5.se", "layer4.0.se", "layer4.1.se", "layer4.2.se"]
    assert figure_sites(excitations) == shown
    assert [len(sampled_channels(c)) for c in (256, 512, 1024, 2048)] == [43, 47, 49, 50]
    assert len(figure_sites(recording(widths=range(8, 50), images=4))) == 12
    assert figure_classes(recording(classes=list("abcdefgh"), filled=8), 4) == ["a", "c", "f", "h"]
    assert figure_classes(recording(classes=list("abcd"), filled=2), 4) == ["a", "b"]


def test_figures_draw_a_line_a_class_and_all(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **kw: (drawn.append(self), file.write(b"x")))
    excitations = recording(widths=(100, 4))
    plot_class_means(tmp_path / "a.png", excitations, classes=["ant", "cow"])
    panel = drawn[0].axes[0]
    assert [line.get_label() for line in panel.lines] == ["ant", "cow", "all"]
    assert (panel.get_xlabel(), panel.get_ylabel(), panel.get_ylim()) == ("channel index", "activation", (0, 1))
    site = excitations["layer0.se"]
    assert np.array_equal(panel.lines[1].get_xdata(), np.arange(0, 100, 2))
    assert np.array_equal(panel.lines[1].get_ydata(), site.class_mean()[2, ::2])
    assert np.array_equal(panel.lines[2].get_ydata(), site.overall()[0][::2])


def test_every_name_of_a_class_is_in_the_legend_as_it_is(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **kw: (drawn.append(self), save(self, file, **kw)))
    names = ("_other", "$x^$", "猫", *(f"c{i}" for i in range(9)))
    excitations = recording(classes=names)
    excitations.about["data"] = "$HOME^$"
    plot_class_means(tmp_path / "a.png", excitations, classes=names)
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [*names, "all"]
    looks = [(line.get_color(), str(line._unscaled_dash_pattern)) for line in drawn[0].axes[0].lines]
    assert len(set(looks)) == len(names) + 1


def test_all_files_are_written_and_read_back(tmp_path):
    excitations = recording()
    diagnoses = write_report(tmp_path / "report", excitations)
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == sorted(FILES)
    for name in ("class_means.png", "class_spread.png"):
        with Image.open(tmp_path / "report" / name) as image:
            assert image.width > 1000
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report" / "findings.csv").read_text())))
    assert [row["site"] for row in rows] == list(excitations.sites)
    assert len(finding_rows(diagnoses)) == 3
    again = senet.Excitations.load(tmp_path / "report" / "excitations.npz")
    assert np.array_equal(again["layer0.se"].mean, excitations["layer0.se"].mean)


def test_images_without_classes_and_single_channels(tmp_path):
    write_report(tmp_path, recording(widths=(1, 1), classes=()))
    data = Page((tmp_path / "index.html").read_bytes()).data
    assert data["classes"] == []
    assert data["sites"][0]["selectivity"] is None


def test_a_class_without_images_cannot_be_drawn(tmp_path):
    excitations = recording(classes=("ant", "bee"), filled=1)
    with pytest.raises(senet.InputError, match=one_line("'bee' … no images")):
        plot_class_means(tmp_path / "a.png", excitations, classes=["bee"])
    with pytest.raises(senet.InputError, match="no class 'cow'"):
        plot_class_means(tmp_path / "a.png", excitations, classes=["cow"])
    with pytest.raises(senet.InputError, match="no gate 'x'"):
        plot_class_means(tmp_path / "a.png", excitations, sites=["x"])
    assert not list(tmp_path.iterdir())


def test_ranges_of_channels():
    assert channel_ranges(()) == ""
    assert channel_ranges((3,)) == "3"
    assert channel_ranges((0, 1, 2, 7, 9, 10)) == "0-2, 7, 9-10"
