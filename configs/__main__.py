"""Prints docs/config.md, every key of every config: python -m simla.configs > docs/config.md"""

from simla.configs.schema import reference
from simla.engine.command import run_command

INTRODUCTION = """# Config keys

A config is a YAML file for one script, such as `configs/VQA.yaml`. A file with `base: other.yaml` holds the
keys that it changes, as those of `configs/as_published/` and `configs/single_gpu/` do. Any value can be given
on the command line, `--overrides batch_size=32 optimizer.lr=5e-5`, where `val_file=` means none.

Unknown keys are errors that name the nearest valid one, other values are errors that say the range,
and what has no effect is refused. ALBEF's and SIMLA's published configs are read too: `batch_size` and
`image_tokenizer_path` count under their names here, which is said.

`python -m simla.configs > docs/config.md` writes this page.
"""


def page() -> str:
    """Return the page as Markdown: what a config is, then every key in tables."""
    return f"{INTRODUCTION}\n{reference()}\n"


if __name__ == "__main__":
    run_command(lambda: print(page(), end=""))
