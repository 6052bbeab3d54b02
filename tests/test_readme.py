"""README is one page, and what it says that other pages say too is the same."""

import re

from tiny import ROOT

from simla.configs.__main__ import page

README = (ROOT / "README.md").read_text(encoding="utf-8")


def doc(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_readme_is_one_page():
    lines = README.splitlines()
    assert len(lines) <= 160
    assert [line for line in lines if len(line) > 110] == []


def test_config_page_is_what_the_code_prints():
    assert doc("config.md") == page(), "python -m simla.configs > docs/config.md"


def test_readme_repeats_the_papers_numbers():
    numbers = re.findall(r"\d\d\.\d(?:/\d\d\.\d)+", README)
    known = doc("reproduce.md").replace(" / ", "/")
    assert len(numbers) == 8 and all(number in known for number in numbers)


def test_every_folder_of_the_house_is_on_its_page():
    folders = {path.relative_to(ROOT).parts[0] for path in ROOT.glob("*/**/*.py")} - {"output", "data"}
    visible = {folder for folder in folders if not folder.startswith(".")}
    assert {"models", "engine"} <= visible
    for folder in visible:
        assert f"`{folder}/`" in doc("architecture.md"), folder


def test_the_old_launcher_is_named_once():
    pages = [README, *(path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md"))]
    assert sum(text.count("torch.distributed.launch") for text in pages) == 1
