"""Real browsers: Debian's Chromium and Firefox, headless, without WebGL, over file://."""

import shutil

import pytest

from n4flow.qc.dataset import make_index
from n4flow.qc.pages import make_subject
from n4flow.study.failures import Failure
from tests.report.reviewing import SCANS
from tests.unit.test_qc import HOSTILE, make_files

#: Milliseconds that a browser may take to start, on a machine that other tests keep busy.
START_MS = 120_000

NAMES = {"chromium": ("chromium", "chromium-browser", "google-chrome"), "firefox": ("firefox-esr", "firefox")}


@pytest.fixture(scope="session")
def playwright():
    api = pytest.importorskip("playwright.sync_api", reason="no Playwright: install envs/requirements-test.txt")
    with api.sync_playwright() as started:
        yield started


@pytest.fixture(scope="session")
def downloads(tmp_path_factory):
    """Where Firefox puts what is downloaded, under its own name."""
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="session", params=list(NAMES))
def browser(request, playwright, downloads):
    found = next(filter(None, map(shutil.which, NAMES[request.param])), None)
    if not found:
        package = NAMES[request.param][0]
        pytest.skip(f"there is no {request.param} on this machine: apt-get install {package}, and run again")
    if request.param == "chromium":
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-3d-apis"]
        started = playwright.chromium.launch(executable_path=found, args=arguments, timeout=START_MS)
    else:
        # Playwright lets all files of a folder share one storage; as people have it, they do not
        preferences = {"security.fileuri.strict_origin_policy": True, "webgl.disabled": True}
        started = playwright.firefox.launch(
            channel="moz-firefox",
            executable_path=found,
            firefox_user_prefs=preferences,
            downloads_path=downloads,
            timeout=START_MS,
        )
    yield started
    started.close()


class Visit:
    """A page in a profile of its own, what it asked for, and what went wrong on it."""

    def __init__(self, browser, **options):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.requests, self.errors, self.warnings = [], [], 0
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.context.on("weberror", lambda error: self.errors.append(str(error.error)))
        self.page = self.open()

    def open(self, path=None):
        page = self.context.new_page()
        page.set_default_timeout(15_000)
        page.on("dialog", self.on_dialog)
        if path:
            page.goto(path.as_uri())
        return page

    def on_dialog(self, dialog):
        if dialog.type == "beforeunload":
            self.warnings += 1
        else:
            self.errors.append(f"dialog {dialog.message}")
        dialog.accept()

    def check(self):
        assert self.errors == []
        outside = [url for url in self.requests if not url.startswith(("file:", "data:", "blob:", "about:"))]
        assert outside == []


@pytest.fixture
def visit(browser):
    """Makes visits; at the end none may have asked for anything outside, or raised an error."""
    visits = []

    def make(path=None, **options):
        visits.append(Visit(browser, **options))
        if path:
            visits[-1].page.goto(path.as_uri())
        return visits[-1]

    yield make
    for made in visits:
        made.check()
        made.context.close()


@pytest.fixture(scope="session")
def qc(tmp_path_factory):
    """A report over three scans and one whose name is hostile."""
    folder = tmp_path_factory.mktemp("a report#1")
    made = []
    for number, name in enumerate((*SCANS, HOSTILE)):
        place = folder / f"scan{number}"
        place.mkdir(parents=True)
        stem = "hostile & <b>" if name == HOSTILE else name
        qc = folder / "qc"
        (qc / "data").mkdir(parents=True, exist_ok=True)
        files = make_files(place, strength=0.1 + 0.1 * number) | {
            "page": qc / f"{stem}.html",
            "metrics": qc / "data" / f"{stem}.json",
            "pictures": qc / "data" / f"{stem}.webp",
            "viewer": qc / "data" / f"{stem}.js",
            "viewer_mb": 1,
        }
        make_subject(name=name, **files)
        made.append(files["metrics"])
    failed = [Failure(HOSTILE, "mask", "<i>broken</i>", "", again=True)]
    make_index(made, folder / "qc" / "index.html", folder / "qc" / "metrics.tsv", failed)
    return folder / "qc"


@pytest.fixture
def export(downloads):
    """Presses the button and takes the file from the downloads."""

    def save(page, path):
        if page.context.browser.browser_type.name == "chromium":
            with page.expect_download() as download:
                page.click("#export")
            assert download.value.suggested_filename == "ratings.tsv"
            download.value.save_as(path)
            return path
        # Playwright hears nothing of Firefox's downloads from a blob
        page.click("#export")
        there = downloads / "ratings.tsv"
        for _ in range(100):
            if there.is_file() and there.stat().st_size:
                break
            page.wait_for_timeout(50)
        there.replace(path)
        return path

    return save


@pytest.fixture
def violations():
    """What axe-core finds on a page as it is, in both colour schemes: rule, scheme and element."""
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="install envs/requirements-test.txt"
    ).Axe()

    def find(page):
        found = []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            # the pages in frames are looked at by themselves
            results = axe.run(page, options={"resultTypes": ["violations"], "iframes": False})
            found += [
                (rule["id"], scheme, node["html"][:120])
                for rule in results.response["violations"]
                for node in rule["nodes"]
            ]
        return found

    return find
