"""Writes weights alone as safetensors; says what a checkpoint file holds.

python -m simla.checkpoint export | inspect
"""

import argparse
from collections import Counter
from pathlib import Path

from simla.configs.reader import add_overrides, task_name
from simla.configs.schema import TABLES
from simla.engine.command import run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simla.checkpoint", description="Export or inspect a checkpoint file."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="weights alone, as safetensors")
    out.add_argument("source", help=".pth file, of this code or published")
    out.add_argument("target", help=".safetensors file; every script takes it as --checkpoint")
    out.add_argument(
        "--task", type=task_name, choices=TABLES, help="leave out what this script has no place for"
    )
    out.add_argument("--inference", action="store_true", help="leave out momentum twins and queues")
    show = commands.add_parser("inspect", help="what a file holds, without reading its weights")
    show.add_argument("file")
    show.add_argument(
        "--task", type=task_name, choices=TABLES, help="with --config: would this script take it?"
    )
    show.add_argument("--config", default="", help="YAML file of the task")
    add_overrides(show)
    show.add_argument(
        "--check", action="store_true", help="read the whole file: checksums, weights that are not finite"
    )
    args = parser.parse_args()
    if args.command == "export":
        from simla.checkpoint.export import export  # here, as below: torch takes seconds

        left_out = export(args.source, args.target, args.task, args.inference)
        parts = Counter(name.split(".")[0] for name in left_out)
        described = ", ".join(f"{part} ({number})" for part, number in parts.items()) or "nothing"
        print(f"{args.target}: {Path(args.target).stat().st_size / 2**20:.1f} MiB; left out: {described}")
        return
    if bool(args.task) != bool(args.config):
        parser.error("--task and --config go together")
    from simla.checkpoint.inspect import check_whole, inspect

    print(inspect(args.file, args.task, args.config, args.overrides))
    if args.check:
        check_whole(args.file)
        print("all checksums match, all weights are finite")


if __name__ == "__main__":
    run_command(main)
