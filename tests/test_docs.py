"""What the pages name is there: links, files, commands with their flags and config keys."""

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed.launch
import torch.distributed.run
from ruamel.yaml import YAML
from test_house import tracked
from tiny import ROOT

from simla.configs import reader as config
from simla.configs.schema import TABLES, describe
from simla.engine import launch

PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
    if not path.name.startswith(".")
)
SOURCES = [ROOT / path for path in tracked() if path.suffix == ".py"]
OTHERS_FLAGS = {  # of torchrun, SLURM, img2dataset and TensorBoard
    *("--nproc_per_node", "--master_port", "--max-restarts", "--use_env"),
    *("--signal", "--nodes", "--requeue", "--output_format", "--caption_col", "--logdir"),
    *("--url_list", "--url_col", "--input_format"),
}
LAUNCHERS = {
    "torchrun": torch.distributed.run.parse_args,
    "torch.distributed.launch": torch.distributed.launch.parse_args,
}
real_parse_args = argparse.ArgumentParser.parse_args


class Parsed(Exception):
    """The command line is a valid one."""


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[str]:
    return re.findall(r"^ *```\w*\n(.*?)^ *```", text_of(page), re.M | re.S)


def prose(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```", "", text_of(page), flags=re.M | re.S)


def spans(page: Path) -> list[str]:
    """Code within the text."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def anchors(page: Path) -> set[str]:
    """Those that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


COMMAND = re.compile(r" *(?:\$ )?(?:[A-Z_]+=\S+ )*((?:python|simla|torchrun|sbatch|make|scripts/\S+) .*)")


def commands() -> list:
    """The words of every line of a block that runs Python, a script of scripts/, or make."""
    found = []
    for page in PAGES:
        for block in blocks(page):
            for match in filter(None, map(COMMAND.match, block.replace("\\\n", " ").splitlines())):
                words = [word for word in shlex.split(match[1], comments=True) if word != "..."]
                found.append(pytest.param(words, id=f"{page.name}: {' '.join(words)[:60]}"))
    return found


# ---- links and files ----


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert linked.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_exist(page):
    folder = "|".join({path.parts[0] for path in tracked() if len(path.parts) > 1})
    pattern = rf"(?<![\w/])(?:(?:{folder})/)+[\w/]+\.(?:yaml|json|md|png|sh|sbatch|py)\b"
    for path in re.findall(pattern, text_of(page)):
        assert (ROOT / path).is_file() or (page.parent / path).is_file(), path
    for script in re.findall(r"`(\w+\.py)`", prose(page)):
        assert script in {path.name for path in SOURCES}, script


def test_pages_are_reached_from_the_readme():
    readme = text_of(ROOT / "README.md")
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        assert name in readme or name == "README.md", name


# ---- commands ----


@contextmanager
def own_modules_forgotten() -> Iterator[None]:
    """What is imported inside holds the patched functions: it is imported anew by whoever comes next."""
    known = set(sys.modules)
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    own = packages | {path.stem for path in ROOT.glob("*.py")}
    try:
        yield
    finally:
        for name in set(sys.modules) - known:
            if name.partition(".")[0] in own:
                del sys.modules[name]
                parent, _, last = name.rpartition(".")
                if hasattr(sys.modules.get(parent), last):
                    delattr(sys.modules[parent], last)


def check_script(words: list[str]) -> None:
    """Runs `FILE.py flags` or `-m package flags` up to where its command line is read."""

    def parse(parser, table):
        args = real_parse_args(parser)
        config.read_config(args.config, table, args.overrides)
        raise Parsed

    def parse_args(parser, *args):
        real_parse_args(parser, *args)
        raise Parsed

    is_module = words[0] == "-m"
    name, flags = (words[1], words[2:]) if is_module else (words[0], words[1:])
    with (
        own_modules_forgotten(),
        mock.patch.object(sys, "argv", [name, *flags]),
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args),
        mock.patch.object(config, "parse", parse),
        mock.patch.object(launch, "run_script", lambda main: main()),  # which would end the process
        pytest.raises(Parsed),
    ):
        if is_module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # of runpy
@pytest.mark.parametrize("words", commands())
def test_commands_are_understood(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *rest = words
    if program == "simla":
        check_script(["-m", "simla", *rest])
        return
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert all(word in targets for word in rest if "=" not in word)
        return
    launcher = "torch.distributed.launch" if rest[:2] == ["-m", "torch.distributed.launch"] else program
    if launcher in LAUNCHERS:
        args = LAUNCHERS[launcher](rest[2:] if launcher != program else rest)
        rest = [args.training_script, *args.training_script_args]
    if program == "sbatch" or program.startswith("scripts/"):
        number = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
        assert (ROOT / words[number]).is_file()
        rest = words[number + (1 if program == "sbatch" else 3) :]
    if rest == ["-m", "simla.configs"]:  # takes no flags
        return
    if rest[0].startswith("docs/images/"):
        assert (ROOT / rest[0]).is_file()
        return
    check_script(rest)


def test_a_command_with_a_wrong_flag_or_key_is_found(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        check_script(["VE.py", "--confg", "configs/VE.yaml"])
    with pytest.raises(SystemExit):
        check_script(["-m", "simla.dataset.prepare", "coco", "--roots", "data"])
    with pytest.raises(config.UserError, match="unknown key batch_sise"):
        check_script(["VE.py", "--overrides", "batch_sise=3"])
    with pytest.raises(config.UserError, match=r"configs/none\.yaml"):
        check_script(["VE.py", "--config", "configs/none.yaml"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_and_keys_in_the_text_exist(page):
    known = OTHERS_FLAGS | {
        flag for file in SOURCES for flag in re.findall(r'"(--[\w-]+)"', file.read_text())
    }
    keys = {row.split("`")[1] for table in TABLES.values() for row in describe(table)}
    keys |= {"base"} | {".".join(key.split(".")[:i]) for key in keys for i in range(1, key.count(".") + 2)}
    leaves = {key.split(".")[-1] for key in keys}
    for span in spans(page):
        for flag in re.findall(r"(?<!\S)(--[a-z][\w-]*)", span):
            assert flag in known, span
        assigned = re.fullmatch(r"([a-z_]+(?:\.[a-z_]+)*)(?:=(?!\x22)|: )\S.*", span)
        if assigned and not span.startswith(("http", "bert_config.")):
            assert assigned[1] in keys | leaves, span
        if span.startswith("released_code."):
            assert span.split("=")[0] in keys, span


# ---- the rest ----


def test_the_citation_names_the_paper():
    citation = YAML(typ="safe").load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    paper = citation["preferred-citation"]
    assert paper["url"].endswith("2203.14395") and paper["year"] == 2022
    assert [author["family-names"] for author in paper["authors"]] == [
        "Khan",
        "B G",
        "Yu",
        "Schulter",
        "Chandraker",
        "Fu",
    ]
    bibtex = text_of(ROOT / "README.md").split("```bibtex")[1].split("```")[0]
    assert paper["title"] in bibtex and all(author["family-names"] in bibtex for author in paper["authors"])
