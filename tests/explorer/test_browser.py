"""The page in headless Chromium, as its users have it: opened from disk, clicked and typed at."""

import io

import numpy as np
import pytest
from pages import NASTY, draw_shapes, explore, read_page, train
from PIL import Image
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1800)]

REAL = [pytest.mark.real_data, pytest.mark.slow]


@pytest.fixture(
    scope="module",
    params=[
        "labelled",
        "plain",
        pytest.param("cars196", marks=REAL),
        pytest.param("omniglot", marks=REAL),
    ],
)
def path(request, tmp_path_factory):
    """A page: of a run with labels, of a plain folder, of the Cars half, of some of Omniglot."""
    if request.param in ("labelled", "plain"):
        return request.getfixturevalue(f"{request.param}_page")
    root = request.getfixturevalue(f"{request.param}_root")
    where = tmp_path_factory.mktemp(request.param)
    dataset = {"cars196": "cars196", "omniglot": "sop"}[request.param]
    options = (f"data.dataset={dataset}", "data.image_size=48", "data.num_classes=20", "train.num_steps=2")
    run = train(root, where / "run", *options)
    # All 98 classes of the cars; of Omniglot, whose 32,460 pictures take minutes, 3,000.
    num_classes, num_pictures = {"cars196": ("null", 4_052), "sop": ("150", 3_000)}[dataset]
    page = explore(run, where / "page.html", f"data.num_classes={num_classes}", "data.num_workers=2")
    assert read_page(page).meta["num_pictures"] == num_pictures
    assert page.stat().st_size < 100e6
    return page


@pytest.fixture(scope="module")
def contents(path):
    return read_page(path)


class Opened:
    """A page in the browser."""

    def __init__(self, browser, path):
        self.browser, self.path = browser, path

    def open(self, state="", width=1280, height=900):
        """Open anew. Whatever state the page was in is gone."""
        self.browser.get("about:blank")
        self.browser.get_log("browser")
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.browser.get(f"{self.path.as_uri()}#{state}")
        self.browser.execute_async_script("uhml.ready.then(arguments[0])")
        return self

    def run(self, script, *arguments):
        return self.browser.execute_script(f"return {script}", *arguments)

    def find(self, selector):
        """The elements that are shown."""
        return [found for found in self.browser.find_elements(By.CSS_SELECTOR, selector) if found.is_displayed()]

    def wait(self, condition):
        waiting = WebDriverWait(self.browser, 20, ignored_exceptions=[StaleElementReferenceException])
        return waiting.until(lambda _: condition())

    def wait_for_state(self, said):
        self.wait(lambda: said in self.run("location.hash"))

    def press(self, *keys):
        ActionChains(self.browser).send_keys(*keys).perform()

    def numbers(self, selector, key="picture"):
        return [int(found.get_attribute(f"data-{key}")) for found in self.find(selector)]

    def canvas_middle(self):
        return np.array(self.run("[disk.clientWidth / 2, disk.clientHeight / 2]"))


@pytest.fixture
def page(browser, path):
    """The page, freshly opened; afterwards it must have asked the network for nothing and complained of nothing."""
    opened = Opened(browser, path).open()
    yield opened
    # A dialog of alert() would fail this, too.
    assert opened.run("performance.getEntriesByType('resource').filter(e => !/^(blob|data):/.test(e.name)).length") == 0
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("view", ["tree", "disk"])
def test_fits_wide_and_narrow_screens(page, contents, view, width):
    page.open(f"view={view}&picture=0", width, 844)
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.find("h1")[0].text == contents.meta["title"]
    for selector in ("#view-tree", "#view-disk", "#search", "#panel"):
        box = page.find(selector)[0].rect
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width


def test_the_tree_opens_down_to_a_leaf(page, contents):
    levels = contents.arrays[f"levels-{len(contents.meta['steps']) - 1}"]
    cluster = None
    for _ in levels:
        # Cells come when they are in view.
        cards = page.wait(lambda: page.find("#tree .card:not(.mini)"))
        shown = [(int(c.get_attribute("data-level")), int(c.get_attribute("data-cluster"))) for c in cards]
        if cluster is not None:
            # What is inside a cluster is of it.
            assert all(set(levels[cluster[0]][levels[level] == c]) == {cluster[1]} for level, c in shown)
        cluster = shown[0]
        cards[0].find_element(By.CSS_SELECTOR, "button.title").click()
        page.wait_for_state(f"level={cluster[0]}")
    page.wait(lambda: page.find("#tree .grid button.thumb"))
    assert not page.find("#tree .card:not(.mini)")
    members = set(np.flatnonzero(levels[cluster[0]] == cluster[1]))
    leaves = page.find("#tree button.thumb")
    assert leaves
    picture = int(leaves[0].get_attribute("data-picture"))
    assert picture in members
    leaves[0].click()
    panel = page.wait(lambda: page.find("#panel"))[0]
    assert contents.meta["names"][picture].split("/")[-1].split() == panel.find_element(By.TAG_NAME, "h2").text.split()
    # The way up again.
    stations = list(zip(page.numbers("#path button", "level"), page.numbers("#path button", "cluster"), strict=True))
    assert stations[-1] == (-1, 0)
    assert all(levels[level][picture] == c for level, c in stations[:-1])
    page.find("#path button")[-1].click()
    page.wait(lambda: page.find("#tree h2")[0].text == "All pictures")


def test_neighbors_are_those_of_the_ball(page, contents):
    count = len(contents.meta["names"])
    for picture in (0, count // 3, count - 1):
        page.run("uhml.openPicture(arguments[0])", picture)
        assert page.numbers("#neighbors button") == contents.arrays["neighbors"][picture].tolist()
        shown = [float(found.text) for found in page.find("#neighbors small")]
        np.testing.assert_allclose(shown, contents.arrays["distances"][picture], atol=6e-4)
    nearest = page.find("#neighbors button")[0]
    number = int(nearest.get_attribute("data-picture"))
    nearest.click()
    page.wait_for_state(f"picture={number}")
    assert page.numbers("#neighbors button") == contents.arrays["neighbors"][number].tolist()


def test_thumbnails_show_their_pictures(page, contents):
    for picture in (0, len(contents.meta["names"]) - 1):
        page.run("uhml.openPicture(arguments[0])", picture)
        portrait = page.find("#panel .portrait > *")[0]
        page.run("arguments[0].scrollIntoView()", portrait)
        expected = contents.tile(picture).convert("RGB")

        def apart(portrait=portrait, expected=expected):
            shot = Image.open(io.BytesIO(portrait.screenshot_as_png)).convert("RGB")
            # Away from rounded corners.
            inner = [image.resize((96, 96)).crop((16, 16, 80, 80)) for image in (shot, expected)]
            return np.abs(np.subtract(*(np.asarray(image, float) for image in inner))).mean()

        page.wait(lambda: apart() < 12)


def test_the_disk_pans_by_moebius_transformations(page, contents):
    page.find("#view-disk")[0].click()
    middle = page.canvas_middle()
    page.wait(lambda: page.run("disk.width") == 2 * middle[0])
    radius = 0.47 * 2 * middle.min()
    disk = contents.arrays["disk"].astype(float) @ [1, 1j]
    some = np.linspace(0, len(disk) - 1, 40).astype(int)

    def screen():
        found = np.array([page.run("uhml.disk.screen(arguments[0])", int(p)) for p in some])
        return ((found - middle) / radius) @ [1, -1j]

    assert page.run("uhml.disk.center()") == pytest.approx([0, 0], abs=1e-9)
    np.testing.assert_allclose(screen(), disk[some], atol=2e-3)
    target = disk[len(disk) // 2]
    page.run("uhml.disk.panTo(arguments[0], arguments[1])", target.real, target.imag)
    assert page.run("uhml.disk.center()") == pytest.approx([target.real, target.imag], abs=1e-6)
    moved = screen()
    # The textbook's map, up to a turn: it takes the target to the centre and the disk to itself.
    expected = (disk[some] - target) / (1 - target.conjugate() * disk[some])
    np.testing.assert_allclose(np.abs(moved), np.abs(expected), atol=2e-3)
    assert np.abs(moved).max() <= 1 + 1e-6
    page.wait(lambda: page.run("uhml.disk.pick(arguments[0], arguments[1])", *middle) >= 0)
    # By hand, across.
    page.press(Keys.ESCAPE)
    canvas = page.find("#disk")[0]
    for _ in range(4):
        ActionChains(page.browser).move_to_element(canvas).click_and_hold().move_by_offset(90, 60).release().perform()
    center = page.run("uhml.disk.center()")
    assert np.hypot(*center) < 1
    assert np.hypot(center[0] - target.real, center[1] - target.imag) > 1e-6
    assert np.abs(screen()).max() <= 1 + 1e-6


def test_a_picture_is_found_by_its_name(page, contents):
    names = contents.meta["names"]
    wanted = [name for name in names if name in NASTY] or [names[0], names[len(names) // 2]]
    for name in wanted:
        box = page.find("#search")[0]
        box.clear()
        # Typing beyond the basic plane is beyond the driver.
        page.run("(search.value = arguments[0], search.dispatchEvent(new Event('input')))", name)
        box.send_keys(Keys.ARROW_DOWN)
        found = page.numbers("#results [role=option]")
        assert [names[picture] for picture in found if names[picture] == name]
        assert all(name.lower() in names[picture].lower() for picture in found)
        shown = page.find("#results [role=option] .name")[found.index(names.index(name))]
        assert shown.get_property("textContent") == name
        for _ in range(found.index(names.index(name))):
            box.send_keys(Keys.ARROW_DOWN)
        box.send_keys(Keys.ENTER)
        page.wait_for_state(f"picture={names.index(name)}")
        assert page.find("#panel h2")[0].get_property("textContent") == name.split("/")[-1]
    page.find("#search")[0].send_keys("no such name anywhere")
    assert page.find("#results .none")


def test_the_keyboard_is_enough(page):
    page.press("/")
    assert page.run("document.activeElement.id") == "search"
    page.press(Keys.TAB)
    page.run("document.activeElement.blur()")
    for _ in range(60):
        page.press(Keys.TAB)
        if page.run("document.activeElement.matches('.card button.title')"):
            break
    page.press(Keys.ENTER)
    page.wait_for_state("level=0")
    page.press("u")
    page.wait(lambda: "level=" not in page.run("location.hash"))
    page.press("d")
    page.wait(lambda: page.find("#disk"))
    page.run("disk.focus()")
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_UP)
    assert np.hypot(*page.run("uhml.disk.center()")) > 0.05
    page.press(Keys.HOME)
    page.wait(lambda: np.hypot(*page.run("uhml.disk.center()")) < 1e-3)
    page.press(Keys.ENTER)
    page.wait(lambda: page.find("#panel"))
    page.press(Keys.ESCAPE)
    page.wait(lambda: not page.find("#panel"))
    page.press("t")
    page.wait(lambda: page.find("#tree h2"))


def test_every_colour_and_every_step(page, contents):
    page.open("view=disk")
    choices = [option.get_attribute("value") for option in page.find("#color-by option")]
    levels = contents.meta["steps"][-1]["levels"]
    assert len(choices) == len(levels) + 1 + (contents.meta["labels"] is not None) + bool(contents.meta["super_labels"])
    for choice in choices:
        page.open(f"view=disk&color={choice}")
        assert page.find("#color-by")[0].get_property("value") == choice
        assert page.find("#legend-title")
    steps = contents.meta["steps"]
    page.open("view=tree")
    assert bool(page.find("#step")) == (len(steps) > 1)
    if len(steps) > 1:
        page.find("#step")[0].send_keys(Keys.HOME)
        page.wait_for_state("step=0")
        sizes = np.bincount(contents.arrays["levels-0"][0])
        shown = page.wait(lambda: page.find("#tree .card .size"))
        said = [int(found.text.split()[0].replace(",", "")) for found in shown]
        assert said == [size for size in sizes.tolist() if size > 1][: len(said)]
        assert said


def test_names_run_no_script(browser, tmp_path):
    """The same of a run's own folder, which is in the title, and of class folders."""
    root = tmp_path / "shapes"
    draw_shapes(root, 8, 8)
    for i, folder in enumerate(sorted(root.iterdir())):
        folder.rename(root / f"<svg onload=alert({i})>&amp;\"'")
    run = train(root, tmp_path / "<b onclick=alert(1)>")
    page = Opened(browser, explore(run, tmp_path / "page.html")).open("view=disk&color=label&picture=0")
    assert page.find("h1")[0].text == "<b onclick=alert(1)>: train pictures"
    assert "<svg onload=alert(" in page.find("#panel")[0].text
    assert browser.get_log("browser") == []
