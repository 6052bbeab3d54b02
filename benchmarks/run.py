"""`make bench`: every benchmark at the size that a CPU does in minutes, one after the other; writes
benchmarks/RESULTS.md and benchmarks/results.json.

python benchmarks/run.py [NAME ...]     only these; the others' results stay
"""

import datetime
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from simla.utils import code_revision

HERE = ROOT / "benchmarks"
COMMANDS = {  # name in results.json -> arguments
    "train_step": ["train_step.py", "--batch", "6", "--steps", "1", "--profile"],
    "rerank": ["rerank.py"],
    "vqa_rank": ["vqa_rank.py"],
    "data": ["data.py"],
    "annotations": ["annotations.py"],
    "checkpoint": ["checkpoint.py"],
    "scaling": ["scaling.py"],
}


def run(name: str) -> dict:
    """Return the figures of one benchmark, with its command, output and seconds."""
    command = ["python", f"benchmarks/{COMMANDS[name][0]}", *COMMANDS[name][1:]]
    begin, lines = time.monotonic(), []
    print(f"== {' '.join(command)}", flush=True)
    process = subprocess.Popen(
        [sys.executable, *command[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    for line in process.stdout:
        lines.append(line.rstrip())
        print(line, end="", flush=True)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed, see above")
    run_seconds = round(time.monotonic() - begin, 1)
    about = {"command": " ".join(command), "run_seconds": run_seconds, "code_revision": code_revision()}
    today = datetime.date.today().isoformat()
    return {**json.loads(lines[-1]), **about, "date": today, "output": "\n".join(lines[:-1]).strip()}


def write(results: dict[str, dict]) -> None:
    figures = {name: {k: v for k, v in found.items() if k != "output"} for name, found in results.items()}
    (HERE / "results.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    parts = ["# Benchmarks\n\nWritten by `make bench`; the figures are in results.json too.\n"]
    for name in COMMANDS:
        if name in results:
            found = results[name]
            parts.append(
                f"## {name}\n\n`{found['command']}`, {found['run_seconds']} s, {found['device']}, "
                f"torch {found['versions']['torch']}, revision {found['code_revision']}, {found['date']}\n\n"
                f"```\n{found['output']}\n```\n"
            )
    (HERE / "RESULTS.md").write_text("\n".join(parts), encoding="utf-8")


def earlier() -> dict[str, dict]:
    """Return what the two files hold, "output" being the block of RESULTS.md."""
    try:
        results = json.loads((HERE / "results.json").read_bytes())
        text = (HERE / "RESULTS.md").read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    for part in text.split("\n## ")[1:]:
        name = part.split("\n")[0]
        if name in results:
            results[name]["output"] = part.split("```\n")[1].rstrip()
    return {name: found for name, found in results.items() if "output" in found}


def main() -> None:
    names = sys.argv[1:] or list(COMMANDS)
    if unknown := set(names) - set(COMMANDS):
        raise SystemExit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(COMMANDS)}")
    results = earlier()
    for name in names:
        results[name] = run(name)
        write(results)


if __name__ == "__main__":
    main()
