"""A headless browser for tests: opens a page, gives its picture, its console and its document.

The fixture `browser` (conftest.py) skips where none is installed; where CI is set that is a failure.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from PIL import Image

NAMES = ("chromium", "google-chrome", "chromium-browser")
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
         "--enable-logging=stderr")  # fmt: skip
LIGHT, DARK = "--blink-settings=preferredColorScheme=1", "--blink-settings=preferredColorScheme=0"


class Shown(NamedTuple):
    """What a browser made of a page."""

    picture: Path  # PNG
    console: tuple[str, ...]  # what the page, or an error on it, wrote there
    document: str  # HTML when it was done

    def grey(self) -> Image.Image:
        return Image.open(self.picture).convert("L")


class Browser:
    """Opens pages; `folder` holds its profile and the pictures."""

    def __init__(self, program: str, folder: Path) -> None:
        self.program, self.folder = program, folder

    def open(self, page: Path | str, name: str, *flags: str, size: str = "1100,4000", timeout: float = 200) -> Shown:
        """`page`: a file or an address; `flags` of Chromium, such as DARK or --virtual-time-budget=5000."""
        address = page.as_uri() if isinstance(page, Path) else page
        picture = self.folder / f"{name}.png"
        place = (f"--user-data-dir={self.folder}/profile", f"--screenshot={picture}", f"--window-size={size}")
        done = subprocess.run([self.program, *QUIET, *place, *flags, "--dump-dom", address], capture_output=True,
                              text=True, timeout=timeout)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return Shown(picture, tuple(re.findall(r"CONSOLE.*", done.stderr)), done.stdout)


def find() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)
