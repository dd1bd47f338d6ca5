"""The report page in a real browser: it draws, its controls change the plot, and it asks nobody for anything."""

import re
import shutil

import numpy as np
import pytest
from playwright.sync_api import Error, sync_playwright

from helpers.excitations import recording_of
from senet.inspection import report
from senet.inspection.report import write_report

pytestmark = pytest.mark.browser
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
CLASSES = ("goldfish", "pug", "plane", "cliff", "<b>bold</b>", "empty", *(f"class {i}" for i in range(6)))


@pytest.fixture(scope="module")
def excitations():
    rng = np.random.default_rng(0)
    targets = np.arange(220) % 11
    targets[targets >= 5] += 1  # class 5 has no images
    values = {
        name: rng.uniform(0.2, 0.5, (220, width)) + selective * (targets[:, None] == np.arange(width) % 12)
        for name, width, selective in (("layer1.0.se", 16, 0.05), ("layer2.0.se", 40, 0.4), ("layer3.0.se", 24, 0.15))
    }
    values["layer1.0.se"][:, [3, 4, 9]] = 0.001
    return recording_of(values, targets, CLASSES)


@pytest.fixture(scope="module")
def address(excitations, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, excitations, picture=lambda i: np.full((8, 8, 3), i % 256, np.uint8) if i % 2 else None)
    return (folder / "index.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.fail("no Chromium: apt-get install chromium, or leave these tests out with -m 'not browser'")
    with sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=program, args=FLAGS)
        except Error as error:  # a sandbox in which no browser runs; what the pages do is not known then
            pytest.skip(f"{program} does not start here: {error.message.splitlines()[0]}")
        yield started
        started.close()


@pytest.fixture
def open_page(browser, address):
    """Opens the page; afterwards: no errors, no request but for the file itself."""
    opened = []

    def open_(**options):
        page = browser.new_page(**{"viewport": {"width": 1300, "height": 900}, **options})
        page.set_default_timeout(20_000)  # a busy machine is no defect of the page
        complaints, requests = [], []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        page.wait_for_selector("html[data-ready]", state="attached")
        opened.append((page, complaints, requests))
        return page

    yield open_
    for page, complaints, requests in opened:
        page.close()
        assert complaints == []
        assert [url for url in requests if not url.startswith("data:")] == [address]


def lines(page):
    return page.eval_on_selector_all("#plot .line", "all => all.map(l => l.dataset.name)")


def points(page, name="all images"):
    return page.get_attribute(f'#plot .line[data-name="{name}"]', "points")


def spoken(page):
    """Channel and values under the cursor, as a screen reader says them."""
    text = page.get_attribute("#plot", "aria-valuetext")
    channel, values = re.match(r"channel (\d+): (.*)", text).groups()
    pairs = (part.rsplit(" ", 1) for part in values.split(", "))
    return int(channel), {name: float(value) for name, value in pairs}


def test_it_opens_on_the_most_selective_gate_with_the_numbers_that_were_recorded(open_page, excitations):
    page = open_page()
    assert page.inner_text("#site-name") == "layer2.0.se"
    assert "se_test · 3 gates · 220 images · 12 classes" in page.inner_text("#about")
    shown = lines(page)
    assert shown[-1] == "all images"
    assert len(shown) == 5
    site = excitations["layer2.0.se"]
    page.focus("#plot")
    for key, channel in (("Home", 0), ("ArrowRight", 1), ("PageUp", 11), ("ArrowLeft", 10), ("End", 39)):
        page.keyboard.press(key)
        heard, values = spoken(page)
        assert heard == channel
        assert values["all images"] == pytest.approx(site.overall()[0][channel], abs=6e-4)
        for name in shown[:-1]:
            expected = site.class_mean()[CLASSES.index(name), channel]
            assert values[name] == pytest.approx(expected, abs=0.003)
    assert page.inner_text("#channel-title") == "Channel 39 of layer2.0.se"


def test_choosing_and_sorting_gates(open_page):
    page = open_page()
    before = points(page)
    page.get_by_role("radio", name="layer1.0.se").check()
    page.locator("#site-name", has_text="layer1.0.se").wait_for()
    assert points(page) != before

    def order():
        return page.eval_on_selector_all("#sites .name", "all => all.map(e => e.textContent)")

    assert order() == ["layer1.0.se", "layer2.0.se", "layer3.0.se"]
    page.get_by_label("Sort by").select_option("selectivity")
    assert order() == ["layer2.0.se", "layer3.0.se", "layer1.0.se"]
    assert page.get_by_role("radio", name="layer1.0.se").is_checked()


def test_choosing_classes(open_page):
    page = open_page()
    page.get_by_role("button", name="None", exact=True).click()
    assert lines(page) == ["all images"]
    page.get_by_label("<b>bold</b>").check()
    page.get_by_label("pug").check()
    assert lines(page) == ["<b>bold</b>", "pug", "all images"]
    page.get_by_label("Remove <b>bold</b>").click()
    assert lines(page) == ["pug", "all images"]
    assert page.get_by_label("empty").is_disabled()
    page.get_by_role("searchbox", name="Find").fill("CLA")
    assert page.locator("#classes label:visible").count() == 6
    page.get_by_role("searchbox", name="Find").fill("")
    for name in ("goldfish", "plane", "cliff", "class 0", "class 1", "class 2", "class 3"):
        page.get_by_label(name).check()
    assert len(lines(page)) == 9
    page.get_by_label("class 4").click()
    assert "at most 8" in page.inner_text("#class-count")
    assert not page.get_by_label("class 4").is_checked()
    page.get_by_role("button", name="Most different").click()
    assert len(lines(page)) == 5


def test_channels_order_band_and_zoom(open_page, excitations):
    page = open_page()
    site = excitations["layer2.0.se"]
    field = page.get_by_label("Channels")
    field.fill("2-5, 11")
    field.press("Enter")
    assert page.get_attribute("#plot", "aria-valuemax") == "4"
    assert len(points(page).split()) == 5
    for text, message in (("5-2", "channels 0 to 39"), ("40", "channels 0 to 39"), ("x", "is not a channel")):
        field.fill(text)
        field.press("Enter")
        assert message in page.get_by_role("alert").inner_text()
    field.fill("")
    field.press("Enter")
    assert page.inner_text("#channels-error") == ""
    page.get_by_label("Order").select_option("mean")
    page.focus("#plot")
    page.keyboard.press("Home")
    assert spoken(page)[0] == site.overall()[0].argmax()
    assert page.locator("#plot .band").count() == 0
    page.get_by_label("standard deviation").check()
    assert page.locator("#plot .band").count() == 5
    before = points(page)
    page.get_by_label("fit the axis").check()
    assert points(page) != before


def test_the_doctors_findings_and_their_channels(open_page):
    page = open_page()
    page.get_by_role("radio", name="layer1.0.se").check()
    page.wait_for_selector("text=3 of 16 channels stay at 0")
    page.get_by_role("button", name="Show these 3 channels").click()
    assert page.input_value("#channels") == "3-4, 9"
    assert len(points(page).split()) == 3
    page.get_by_text("Limits", exact=True).click()
    assert "|mean| + 2 std ≤ 0.05" in page.inner_text("#thresholds")


def test_images_that_open_and_close_a_channel(open_page, excitations):
    page = open_page()
    page.focus("#plot")
    page.keyboard.press("Home")
    for end, extremes in (("open", excitations["layer2.0.se"].opening), ("close", excitations["layer2.0.se"].closing)):
        names = page.eval_on_selector_all(f"#images-{end} li > span", "all => all.map(e => e.textContent)")
        assert names == [excitations.names[i] for i in extremes.images[0, :6].tolist()]
        values = page.eval_on_selector_all(f"#images-{end} b", "all => all.map(e => Number(e.textContent))")
        np.testing.assert_allclose(values, extremes.values[0, :6], atol=6e-4)
        shown = page.eval_on_selector_all(f"#images-{end} img", "all => all.map(e => [e.alt, e.naturalWidth])")
        assert shown == [[excitations.names[i], 8] for i in extremes.images[0, :6].tolist() if i % 2]


def test_the_table_says_what_the_plot_shows(open_page, excitations):
    page = open_page()
    page.get_by_role("button", name="None", exact=True).click()
    page.get_by_label("pug").check()
    page.get_by_text("The plot as a table").click()
    table = page.get_by_role("table", name="Mean activation of layer2.0.se by channel")
    table.get_by_role("row").nth(8).wait_for()
    assert table.get_by_role("columnheader").all_inner_texts() == ["channel", "pug", "std", "all images", "std"]
    row = [float(text) for text in table.get_by_role("row").nth(8).inner_text().split()]
    site = excitations["layer2.0.se"]
    expected = [7, site.class_mean()[1, 7], site.class_std()[1, 7], site.overall()[0][7], site.overall()[1][7]]
    np.testing.assert_allclose(row, expected, atol=0.003)


def test_the_mouse_picks_a_channel(open_page):
    page = open_page()
    box = page.locator("#plot").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 100)
    assert page.locator("#plot .note").is_visible()
    page.mouse.down()
    page.mouse.up()
    assert spoken(page)[0] in (19, 20)
    page.mouse.move(box["x"] + 5, box["y"] - 80)
    assert not page.locator("#plot .note").is_visible()


def test_everything_is_reached_and_seen_by_keyboard(open_page):
    page = open_page()
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            "() => { const e = document.activeElement, s = getComputedStyle(e.closest('label') ?? e);"
            " const own = getComputedStyle(e).outlineStyle;"
            " const name = e.id || e.name || e.ariaLabel || e.textContent;"
            " return [name, s.outlineStyle === 'none' ? own : s.outlineStyle]; }"
        )
        assert outline != "none", f"the focus on {name} cannot be seen"
        reached.append(name)
        if name == "plot":
            break
    removed = [name for name in reached if name.startswith("Remove")]
    controls = ["theme", "site-order", "site", "channels", "channel-order", "band", "zoom"]
    assert reached == ["Skip to the plot", *controls, *removed, "plot"]
    assert len(removed) == 4
    assert page.get_attribute("#plot", "role") == "slider"
    page.focus("#sites input:checked")
    page.keyboard.press("ArrowDown")
    page.locator("#site-name", has_text="layer3.0.se").wait_for()


def test_every_control_has_a_name(open_page):
    page = open_page()
    nameless = page.eval_on_selector_all(
        "input, select, button, [role]",
        "all => all.filter(e => !(e.labels?.length || e.ariaLabel || e.getAttribute('aria-label')"
        " || e.getAttribute('aria-labelledby') || e.textContent.trim() || ['status', 'alert'].includes(e.role)))"
        ".map(e => e.outerHTML)",
    )
    assert nameless == []
    assert page.get_attribute("html", "lang") == "en"


def luminance(colour):
    channels = np.array([int(part) for part in re.findall(r"\d+", colour)[:3]]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4) @ [
        0.2126,
        0.7152,
        0.0722,
    ]


def contrast(page, front, back):
    script = (
        "([f, b]) => [f, b].map(name => { const e = document.createElement('i'); e.style.color = `var(${name})`;"
        " document.body.append(e); const c = getComputedStyle(e).color; e.remove(); return c; })"
    )
    light, dark = sorted(map(luminance, page.evaluate(script, [front, back])), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_can_be_read_and_toggled(open_page, scheme):
    page = open_page(color_scheme=scheme)

    def ground():
        return luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    for back in ("--panel", "--ground"):
        for front in ("--ink", "--muted", "--accent", "--bad"):
            assert contrast(page, front, back) >= 4.5, (front, back)
    for kind in ("dead", "saturated", "untrained", "input-independent", "class-selective"):
        assert contrast(page, f"--{kind}", "--panel") >= 4.5, kind
    for number in range(8):
        assert contrast(page, f"--s{number}", "--panel") >= 3, number  # WCAG's limit for graphics
    assert (ground() < 0.1) == (scheme == "dark")
    page.locator("#theme").click()
    assert (ground() < 0.1) == (scheme == "light")
    page.locator("#theme").click()
    assert (ground() < 0.1) == (scheme == "dark")


def test_a_narrow_window_needs_no_sideways_scrolling(open_page):
    page = open_page(viewport={"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_thinned_page_says_what_is_left(browser, excitations, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "FIRST_CELLS", 8 * 3 * 12)  # 8 channels of each gate
    write_report(tmp_path, excitations)
    page = browser.new_page()
    page.goto((tmp_path / "index.html").as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    page.get_by_role("radio", name="layer1.0.se").check()
    page.wait_for_selector("text=3 of 16 channels stay at 0")
    assert "only one in 2 of the 16 channels" in page.inner_text("#thinned")
    page.get_by_role("button", name="Show these 3 channels").click()
    assert page.input_value("#channels") == "3-4, 9"
    assert page.get_attribute("#plot", "aria-valuemax") == "0"
    assert page.inner_text("#live") == "The plot shows 1 of these channels."
    page.get_by_label("Channels").fill("1")
    page.keyboard.press("Enter")
    assert "only one in 2 channels" in page.get_by_role("alert").inner_text()
    page.close()
