"""What the README says is there is there."""

import re
from pathlib import Path

from simla.configs.schema import reference

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_config_reference_is_the_code_s():
    assert reference() in README


def test_scripts_and_files_exist_or_are_marked():
    for line in README.splitlines():
        for script in re.findall(r"`(\w+\.py)`", line):
            assert (ROOT / script).is_file() or "not there yet" in line, script
    for path in re.findall(r"(?:configs|docs)/[\w/]+\.(?:yaml|png|md)", README):
        assert (ROOT / path).is_file(), path


def test_no_file_of_the_map_is_left_out():
    part = README.split("## Map of the files")[1].split("```")[1]
    for path in [*ROOT.glob("*.py"), *ROOT.glob("models/*.py"), *ROOT.glob("dataset/*.py")]:
        assert path.name in part or path.name == "__init__.py", path
