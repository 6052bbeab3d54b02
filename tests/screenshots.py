"""A screenshot of every tab of the web page, asking what `make demo-all` has trained.

python tests/screenshots.py [--demo output/demo-all] [-o output/screenshots]
"""

import argparse
import json
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from browser import open_browser
from playwright.sync_api import expect
from test_app import Site, Tab
from tiny import ROOT

STAGES = ("pretrain", "vqa", "nlvr", "ve")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=ROOT / "output" / "demo-all")
    parser.add_argument("--demo_data", type=Path, default=ROOT / "data" / "demo")
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "output" / "screenshots")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    records = [json.loads((args.demo / stage / "stage.json").read_text()) for stage in STAGES]
    files = [args.demo.parents[1] / record["checkpoint"] for record in records]
    site = Site(
        "--demo_data", args.demo_data, "--text_encoder", args.demo_data / "bert", "--checkpoint", *files
    )
    try:
        with open_browser((1200, 1100)) as page:
            page.goto(site.url)

            def shoot(name: str) -> None:
                page.wait_for_timeout(1000)  # the progress bar fades
                file = args.out / f"app_{name}.png"
                page.screenshot(path=file)
                print(file)

            def example(tab: Tab, number: int) -> None:
                """Fills in an example; of a single input it is a button, else the row of a table."""
                rows = tab.panel.locator("tr.tr-body, button.gallery-item")
                rows.nth(number).click()

            tab = Tab(page, "Search")
            tab.type("What to look for", "a turtle on a sandy beach")
            tab.click("Search")
            expect(tab.panel.get_by_label("Thumbnail 8")).to_be_visible()
            shoot("search")
            tab = Tab(page, "Match and ground")
            example(tab, 1)
            field = tab.panel.get_by_label("Descriptions")
            expect(field).not_to_have_value("")
            field.fill(field.input_value() + "\na turtle at sunset\na green car")
            tab.click("Match")
            expect(tab.panel.locator("#heat-maps img")).to_be_visible()
            shoot("ground")
            for name, number, button in (
                ("Questions", 0, "Ask"),
                ("Keywords", 1, "Name keywords"),
                ("Statements on two images", 0, "True or false?"),
                ("Entailment", 0, "Does it follow?"),
            ):
                tab = Tab(page, name)
                example(tab, number)
                expect(tab.panel.get_by_label("Remove Image").first).to_be_visible()
                tab.click(button)
                tab.shows("%")
                shoot(name.split()[0].lower())
    finally:
        site.end(signal.SIGKILL)


if __name__ == "__main__":
    main()
