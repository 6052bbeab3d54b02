"""A Chromium for the tests of the web page: the one that is installed, or Playwright's own.

python tests/browser.py    finds or installs one: Playwright's, else, as root on Debian, the system's
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ("--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update")
MISSING = "no Chromium was found: run `make browser`, or install the package chromium of your system"
TIMEOUT_MS = 60_000


def find_browser(playwright) -> str | None:
    """The path of a Chromium, or of Chrome."""
    found = next(filter(None, map(shutil.which, NAMES)), playwright.chromium.executable_path)
    return found if Path(found).exists() else None


@contextmanager
def open_browser(size: tuple[int, int] = (1200, 900)) -> Iterator[Page]:
    """An empty page of a headless browser, whose window has that width and height."""
    with sync_playwright() as playwright:
        path = find_browser(playwright)
        if path is None:
            raise FileNotFoundError(MISSING)
        as_root = ["--no-sandbox"] if os.geteuid() == 0 else []  # as root it refuses to start with one
        browser = playwright.chromium.launch(executable_path=path, args=[*QUIET, *as_root])
        page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme="light")
        page.set_default_timeout(TIMEOUT_MS)
        yield page
        browser.close()


def install() -> None:
    """Downloads Playwright's Chromium into the user's cache; where that fails, Debian's package has
    its turn if root asks.
    """
    commands = [[sys.executable, "-m", "playwright", "install", "--only-shell", "chromium"]]
    if os.geteuid() == 0 and shutil.which("apt-get"):
        packages = ["install", "-y", "--no-install-recommends", "chromium"]
        commands += [["apt-get", "update"], ["apt-get", *packages]]
    said = ""
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said += f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        if done.returncode == 0 and command[-1] == "chromium":
            return
    print(said, file=sys.stderr)


def find_or_install() -> None:
    with sync_playwright() as playwright:
        path = find_browser(playwright)
    if path is None:
        install()
        with sync_playwright() as playwright:
            path = find_browser(playwright)
    if path is None:
        sys.exit(MISSING)
    print(f"browser: {path}")


if __name__ == "__main__":
    find_or_install()
