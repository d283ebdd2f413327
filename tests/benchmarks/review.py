"""What a reviewer waits for from scan to scan: the section "A review" of RESULTS.md.

    python tests/benchmarks/review.py [--scans 30] [--folder FOLDER]

Makes the pages of so many phantoms of the head that ships with the workflow, with the viewer (in a folder that is
given, those that are there are kept), and goes through them in the system's Chromium, headless, from file://. Between
two scans it waits until the neighbours have loaded, with the viewer's data once the viewer is open, as they have while
a person looks, and then presses `j`: the time runs from the key until all pictures of the next page are decoded and a
frame is drawn, with what it takes to ask the page for that. So for a page that is read, for a viewer that is open, and
for a key that is pressed again at once, of which the page is not loaded yet.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
from playwright.sync_api import sync_playwright

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY / "workflow" / "scripts"), str(REPOSITORY)]

from n4flow.device import available_cores  # noqa: E402
from n4flow.parameters import N4Parameters  # noqa: E402
from n4flow.qc.dataset import make_index  # noqa: E402
from n4flow.qc.pages import make_subject  # noqa: E402
from n4flow.steps.correct import correct_scan  # noqa: E402
from n4flow.steps.mask import mask_scan  # noqa: E402
from tests.phantoms import family, make_scan  # noqa: E402

#: As in config/config.yaml.
WINDOW_LOG, VIEWER_MB = 0.4, 4

#: Every third scan has the workflow's own mask, the others one of the phantoms', some of which are wrong on purpose.
OWN_MASK = 3

# in every frame; the top one keeps the last
KEY_TIME = """
addEventListener("keydown", (event) => top.postMessage({ key: performance.timeOrigin + event.timeStamp }, "*"), true);
if (window === top) addEventListener("message", ({ data }) => { if (data.key) window.pressed = data.key; });
"""
SHOWN = """async () => {
  const seen = [...document.images].filter((image) => image.checkVisibility({ visibilityProperty: true }));
  await Promise.all(seen.map((image) => image.decode()));
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  return performance.timeOrigin + performance.now();
}"""
VIEWER_SHOWN = """async () => {
  while (!document.querySelector("#viewer canvas")?.clientWidth) await new Promise((done) => setTimeout(done, 1));
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  return performance.timeOrigin + performance.now();
}"""

LOADED = """() => [...review.frames.keys()].every((scan) => (review.viewed ? review.loaded : review.ready).has(scan))"""


def make_page(number, case, folder):
    """The page of a phantom, corrected by the workflow's steps; its metrics file."""
    name = f"sub-{number + 1:02d}_T1w"
    files = {
        "page": folder / f"qc/{name}.html",
        "metrics": folder / f"qc/data/{name}.json",
        "pictures": folder / f"qc/data/{name}.webp",
        "viewer": folder / f"qc/data/{name}.js",
    }
    if files["page"].exists():
        return files["metrics"]
    raw, made = folder / "raw", folder / "made"
    scan = make_scan(case)
    affine = np.diag([*scan.voxel_size_mm, 1])
    # one without noise has steps as a phase has
    image, own, mask = raw / f"{name}_part-mag_image.nii", raw / f"{name}_mask.nii", made / f"{name}_mask.nii"
    nib.save(nib.Nifti1Image(scan.image, affine), image)
    nib.save(nib.Nifti1Image(scan.mask.astype(np.uint8), affine), own)
    own = None if number % OWN_MASK == 0 else own
    mask_scan(image, own, mask, made / f"{name}_mask.json", method="otsu", percentile=50)
    corrected = {
        "corrected": made / f"{name}_N4.nii",
        "sidecar": made / f"{name}_N4.json",
        "field": made / f"{name}_field.json",
    }
    correct_scan(image, mask, corrected, parameters=N4Parameters(), device="cpu")
    make_subject(
        name=name,
        image=image,
        mask=mask,
        mask_sidecar=made / f"{name}_mask.json",
        **corrected,
        **files,
        field_window_log=WINDOW_LOG,
        viewer_mb=VIEWER_MB,
    )
    return files["metrics"]


def make_report(folder, scans):
    """An index over so many scans; its path, and what each of them is."""
    for place in ("raw", "made", "qc/data"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    cases = family(("mni",), seeds=range(1, 2 * -(-scans // 4), 2), maps="mni_2mm")[:scans]
    with ProcessPoolExecutor(available_cores()) as pool:
        metrics = list(pool.map(make_page, range(scans), cases, [folder] * scans))
    make_index(metrics, folder / "qc/index.html", folder / "qc/metrics.tsv")
    return folder / "qc/index.html", cases


def open_viewer(page):
    page.keyboard.press("v")
    page.wait_for_function("review.viewed")


def review(page, index, action, shown):
    """Milliseconds from each key to the next scan on show, after an action on the first; and those of keys at once."""
    page.goto(index.as_uri())
    page.keyboard.press("Enter")
    waited, at_once = [], []
    page.wait_for_function("review.ready.has(scanShown())")
    action(page)
    count = page.evaluate("review.order.length")
    while page.evaluate("review.at") + 1 < count:
        # a person looks meanwhile
        page.wait_for_function(LOADED)
        page.wait_for_timeout(300)
        soon = len(waited) % 5 == 4 and len(at_once) < len(waited) // 5 + 1
        page.keyboard.press("j")
        if soon and page.evaluate("review.at") + 1 < count:
            page.wait_for_timeout(100)
            page.keyboard.press("j")
        frame = page.query_selector("#frames iframe:not(.away)").content_frame()
        page.wait_for_function("review.ready.has(scanShown())")
        end = frame.evaluate(shown)
        (at_once if soon else waited).append(end - page.evaluate("window.pressed"))
    return waited, at_once


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scans", type=int, default=30)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        index, _ = make_report((arguments.folder or Path(temporary)).resolve(), arguments.scans)
        arguments_of_browser = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments_of_browser)
        print("| key to next scan on show | keys | median | worst |")
        print("| --- | --- | --- | --- |")
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.add_init_script(KEY_TIME)
        waited, at_once = review(page, index, lambda page: None, SHOWN)
        viewer, _ = review(page, index, open_viewer, VIEWER_SHOWN)
        for what, took in (("page", waited), ("page, two keys at once", at_once), ("viewer", viewer)):
            print(f"| {what} | {len(took)} | {statistics.median(took):.0f} ms | {max(took):.0f} ms |")
        browser.close()


if __name__ == "__main__":
    main()
