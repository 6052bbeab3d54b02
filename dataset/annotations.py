"""Reads annotation files: JSON lists of entries, checked field by field, with image paths made absolute."""

import json
import os
from pathlib import Path

from utils import UserError

TEXT = (str,)
TEXTS = (str, list)
NUMBER = (int,)
ANY = (object,)


def read_annotations(
    files: str | list[str], fields: dict[str, tuple], image_root: str = "", suffix: str = ""
) -> list[dict]:
    """The entries of all files; `images` lists the absolute paths of the field `image` (or `images`),
    `suffix` added, and `where` says which entry of which file it is.

    fields: name -> accepted types, all required. An image path may be absolute, relative to `image_root`, or,
    where that is empty, relative to the annotation file. Raises UserError, naming file and entry, for a
    missing, truncated or empty file and for an entry that lacks a field or has one of another type.
    """
    entries = []
    for name in [files] if isinstance(files, str) else files:
        path = expand(name)
        root = expand(image_root) if image_root else path.parent
        for number, entry in enumerate(read_json(path, list)):
            where = f"{path}: entry {number}"
            _check_entry(entry, fields, where)
            images = entry["images"] if "images" in fields else [entry["image"]]
            images = [str((root / (image + suffix)).absolute()) for image in images]
            entries.append({**entry, "images": images, "where": where})
    if not entries:
        raise UserError(f"no entries in {files}; an annotation file is a JSON list of {_example(fields)}")
    return entries


def expand(path: str) -> Path:
    """With environment variables and ~ filled in."""
    return Path(os.path.expandvars(path)).expanduser()


def read_json(path: Path, kind: type[list] | type[dict]) -> list | dict:
    """What the file holds; UserError where it is missing, truncated or holds no list (or object)."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"annotation file {path} cannot be read: {error.strerror}; check the config's paths"
        ) from error
    except ValueError as error:
        raise UserError(f"annotation file {path} is not valid JSON (truncated?): {error}") from error
    if not isinstance(content, kind):
        wanted = {list: "list", dict: "object"}[kind]
        raise UserError(f"annotation file {path} must hold a JSON {wanted}, found {type(content).__name__}")
    return content


def _check_entry(entry: object, fields: dict[str, tuple], where: str) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be an object {_example(fields)}, found {entry!r}"[:500])
    for field, types in fields.items():
        if field not in entry:
            raise UserError(
                f"{where} has no {field!r}; found {', '.join(entry) or 'nothing'}, not {_example(fields)}"
            )
        value = entry[field]
        if not isinstance(value, types) or value == [] or (isinstance(value, list) and not _all_text(value)):
            wanted = {TEXT: "text", TEXTS: "text or a non-empty list of texts", NUMBER: "a whole number"}
            wanted = wanted.get(types, "a non-empty list of texts")
            raise UserError(f"{where}: {field!r} must be {wanted}, found {value!r}"[:500])


def _all_text(values: list) -> bool:
    return all(isinstance(value, str) for value in values)


def _example(fields: dict[str, tuple]) -> str:
    return "{" + ", ".join(f'"{field}": ...' for field in fields) + "}"
