"""Text files are UTF-8 whatever the locale, with a byte-order mark or without."""

import ast
import io
import sys
from pathlib import Path

import pytest
from tiny import ROOT

from simla.configs.reader import read_config
from simla.configs.schema import PRETRAIN
from simla.dataset.prepare.common import read_source
from simla.dataset.readers.annotations import TEXT, read_annotations
from simla.dataset.readers.json_list import read_json
from simla.dataset.readers.tables import read_json_lines
from simla.engine.launch import run_script
from simla.engine.run_record import save_config
from simla.models.bert import BertConfig
from simla.utils import UserError

MARK = "\ufeff"


def is_silent(call: ast.Call) -> bool:
    """Whether a method that opens a text file is called, and not told the encoding."""
    mode = call.args[0] if call.args else ast.Constant("r")
    opens = call.func.attr == "open" and ast.unparse(call.func) != "tarfile.open"
    opens = opens and isinstance(mode, ast.Constant) and set(str(mode.value)) <= set("rwax+t")
    is_told = any(word.arg == "encoding" for word in call.keywords)
    return (opens or call.func.attr in ("read_text", "write_text")) and not is_told


def test_every_text_file_names_its_encoding():
    """Ruff's unspecified-encoding asks for it where it knows that something is a path; here of any path."""
    folders = [
        path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name != "tests"
    ]
    silent = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in (*ROOT.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py")))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_silent(node)
    ]
    assert not silent


def test_a_config_is_utf_8_under_any_locale(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "text_encoding", lambda encoding, _=2: encoding or "ascii")  # as LC_ALL=C has it
    path = tmp_path / "c.yaml"
    values = (ROOT / "configs/Pretrain.yaml").read_text(encoding="utf-8")
    path.write_text(f"{MARK}# Größe\n{values}\ntext_encoder: /café\n", encoding="utf-8")
    config = read_config(str(path), PRETRAIN)
    assert config["text_encoder"] == "/café"
    save_config(config, str(tmp_path))
    assert read_config(str(tmp_path / "config.yaml"), PRETRAIN) == config


def test_a_config_that_is_not_utf_8_is_one_sentence(tmp_path):
    (tmp_path / "c.yaml").write_bytes("# Größe\na: 1\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"c.yaml is not valid YAML: unacceptable character #x00f6"):
        read_config(str(tmp_path / "c.yaml"), PRETRAIN)


def test_a_terminal_without_umlauts_does_not_end_a_program(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    run_script(lambda: print("Bär"))
    assert sys.stdout.buffer.getvalue() == b"B\\xe4r\n"


def test_json_may_begin_with_a_mark(tmp_path):
    def put(name: str, text: str) -> Path:
        (tmp_path / name).write_text(MARK + text, encoding="utf-8")
        return tmp_path / name

    answers = put("answers.json", '["café", "no"]')
    assert read_json(answers, list) == read_source(answers) == ["café", "no"]
    entries = read_annotations(str(put("a.json", '[{"image": "é.jpg"}]')), {"image": TEXT})
    assert entries[0]["image"] == "é.jpg"
    assert [row for _, row in read_json_lines(put("a.jsonl", '{"a": "é"}\n{"a": 2}\n'))] == [
        {"a": "é"},
        {"a": 2},
    ]
    sizes = (ROOT / "configs/config_bert.json").read_text(encoding="utf-8")
    assert BertConfig.read(str(put("bert.json", sizes))) == BertConfig.read(
        str(ROOT / "configs/config_bert.json")
    )
