"""Makes annotation files of official downloads.

    python -m simla.dataset.prepare                                  lists the names
    python -m simla.dataset.prepare coco --help                      what it needs and what it writes
    python -m simla.dataset.prepare coco --root data --out data      does it

The files are written anew by every run, and replace the old ones only when they are complete.
"""

import argparse
import logging
from importlib import import_module
from pathlib import Path
from types import ModuleType

from simla.dataset.prepare import CONVERTERS
from simla.dataset.prepare.common import Report
from simla.engine.command import run_command
from simla.utils import fill_in, make_output_folder, printable


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    width = max(map(len, CONVERTERS))
    listed = "\n".join(f"  {name:{width}}  {about}" for name, (_, about) in CONVERTERS.items())
    parser = argparse.ArgumentParser(
        "python -m simla.dataset.prepare",
        description=__doc__,
        epilog=f"names:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("name", nargs="?", choices=CONVERTERS, metavar="NAME", help="one of the names below")
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.name is None:
        parser.print_help()
        return
    converter = import_module(f"simla.dataset.prepare.{CONVERTERS[chosen.name][0]}")
    if hasattr(converter, "main"):
        converter.main(rest)
        return
    options = _options(chosen.name, converter, rest)
    report = Report(chosen.name, without_images=getattr(options, "without_images", False))
    try:
        root, out = (Path(fill_in(folder)).absolute() for folder in (options.root, options.out))
        converter.prepare(root, make_output_folder(out, "--out"), options, report)
    finally:
        if report:
            print(printable(str(report)), flush=True)


def _options(name: str, converter: ModuleType, arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        f"python -m simla.dataset.prepare {name}",
        description=converter.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root = getattr(converter, "ROOT", "")
    parser.add_argument("--root", required=not root, default="", help=root or "folder with the downloads")
    parser.add_argument("--out", required=True, help="folder for what is written, made where missing")
    if hasattr(converter, "add_options"):
        converter.add_options(parser)
    return parser.parse_args(arguments, argparse.Namespace(name=name))


if __name__ == "__main__":
    run_command(main)
