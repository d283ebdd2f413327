"""Pictures of README.md, after a run of the demo: python tests/report/screenshots.py results workflow/report.

And after `snakemake tune` of subject 04 with stiffness 2e-7 and 2e-6, twicing 0 and 0.9.
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

#: In which the plots of the four scans of the demo leave room for the table.
INDEX_HEIGHT = 830


def main(results, output):
    qc = results / "qc"
    with sync_playwright() as playwright:
        executable = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": INDEX_HEIGHT})
        page.on("dialog", lambda dialog: dialog.accept())  # ratings that are in no file

        def save(name, height):
            page.set_viewport_size({"width": 1280, "height": height})
            page.wait_for_timeout(500)
            with Image.open(io.BytesIO(page.screenshot())) as picture:
                picture.save(output / name, quality=60, method=6)

        page.goto((qc / "index.html").resolve().as_uri())
        page.click("#rater")
        page.keyboard.type("ann")
        page.keyboard.press("Tab")
        page.click("h1")
        for key in "1jj1j2kkk":
            page.keyboard.press(key)
        save("index.webp", INDEX_HEIGHT)
        page.goto(f"{page.url.partition('#')[0]}#sub-04_T1w")
        page.frame_locator("#frames iframe:not(.away)").locator("h1").wait_for()
        save("example.webp", 900)
        page.keyboard.press("v")
        page.frame_locator("#frames iframe:not(.away)").locator("#viewer canvas").first.wait_for()
        page.keyboard.press("b")
        save("viewer.webp", 680)
        page.goto((qc / "guide.html").resolve().as_uri() + "#fine")
        save("guide.webp", 720)
        page.goto((results / "tune" / "index.html").resolve().as_uri())
        page.evaluate("scrollTo(0, document.querySelector('h2').offsetTop - 12)")
        save("tune.webp", 860)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
