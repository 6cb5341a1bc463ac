"""Take the screenshots of a run's report for the README, in the light and the dark theme.

usage: python scripts/screenshots.py out/demo/report.html docs/report.png   (needs Chromium, pillow)
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

WIDTH, HEIGHT = 1080, 1266  # of the visible part of the page, in pixels
SCHEMES = {"": "1", "_dark": "0"}  # Chromium's values of the colour scheme
COLOURS = 128


def main(page: Path, target: Path) -> None:
    """Write `target`, and next to it the dark version, with `_dark` in its name."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        sys.exit("error: there is no Chromium\nhint: apt-get install chromium")
    for suffix, scheme in SCHEMES.items():
        file = target.with_stem(target.stem + suffix)
        with tempfile.TemporaryDirectory() as folder:
            shot = Path(folder) / "shot.png"
            subprocess.run(
                [
                    browser, "--headless=new", "--no-sandbox", "--hide-scrollbars",
                    f"--blink-settings=preferredColorScheme={scheme}",
                    f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={shot}",
                    page.resolve().as_uri(),
                ],
                check=True, capture_output=True,
            )  # fmt: skip
            with Image.open(shot) as image:
                image.convert("RGB").crop((0, 0, WIDTH, HEIGHT)).quantize(COLOURS).save(
                    file, optimize=True
                )
        print(f"{file}  {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
