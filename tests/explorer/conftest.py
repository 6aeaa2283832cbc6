"""Pages of small runs, and a browser to open them with."""

import shutil

import pytest
from pages import NASTY, draw_shapes, explore, train
from PIL import Image
from selenium import webdriver

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium that records what its console says."""
    if not (CHROMIUM and DRIVER):
        pytest.skip("browser: chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def labelled_run(tmp_path_factory):
    """A run on 160 pictures of 8 classes, and as many of 8 others to test on. Not to be written to."""
    where = tmp_path_factory.mktemp("labelled")
    draw_shapes(where / "shapes", 16, 20)
    return train(where / "shapes", where / "run")


@pytest.fixture(scope="session")
def labelled_page(labelled_run):
    return explore(labelled_run, labelled_run.parent / "page.html")


@pytest.fixture(scope="session")
def plain_page(tmp_path_factory):
    """The page of a plain folder of 46 pictures without classes, some with names that a page must not believe."""
    where = tmp_path_factory.mktemp("plain")
    draw_shapes(where / "shapes", 4, 10)
    (where / "pictures" / "<").mkdir(parents=True)
    for path in (where / "shapes").rglob("*.png"):
        path.rename(where / "pictures" / f"{path.parent.name}-{path.name}")
    some = sorted((where / "pictures").glob("*.png"))
    for name, path in zip(NASTY, some, strict=False):
        if name.endswith(".jpg"):
            Image.open(path).save(where / "pictures" / name)
        else:
            shutil.copy(path, where / "pictures" / name)
    return explore(train(where / "pictures", where / "run"), where / "page.html")
