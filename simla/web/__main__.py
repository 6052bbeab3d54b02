"""A web page on which people ask trained checkpoints about their own images.

python -m simla.web --checkpoint output/demo/checkpoint_04.pth
python -m simla.web --checkpoint retrieval.pth vqa.pth nlvr.pth --images photos/ --index photos.index

Only this machine sees it, at http://127.0.0.1:7860, unless --host says otherwise.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from simla.dataset.text import MAX_TEXT_TOKENS
from simla.engine.command import run_command, whole_number
from simla.utils import ROOT, UserError, fill_in, log

if TYPE_CHECKING:  # torch takes seconds: what needs it is imported once the command line is read
    from simla.index import Index
    from simla.model import Simla

LOCAL = "127.0.0.1"
DEMO = ROOT / "data" / "demo"


def load_models(args: argparse.Namespace) -> dict[str, Simla]:
    """Return kind -> model. Raises UserError for two checkpoints of a kind: the page could ask one."""
    configs = args.config or [None] * len(args.checkpoint)
    if len(configs) != len(args.checkpoint):
        numbers = f"{len(configs)} --config for {len(args.checkpoint)} --checkpoint"
        raise UserError(f"{numbers}: give one for each, or none")
    from simla.loading import load

    models = {}
    for file, config in zip(args.checkpoint, configs, strict=True):
        log.info(f"loading {file}")
        model = load(file, args.device, args.dtype, config, args.text_encoder)
        if other := models.get(model.kind):
            both = f"{other.source} and {file}"
            raise UserError(f"{both} are both {model.kind} checkpoints; leave one of them out")
        models[model.kind] = model
    return models


def searched_images(
    model: Simla | None, images: str | Path | None, folder: str | None, default: Path
) -> Index | None:
    """Return the images of the search tab: those of --images, or of the default where it exists."""
    if model is None and (images or folder):
        raise UserError("--images and --index need a checkpoint of Pretrain.py or Retrieval.py, which search")
    if folder and not images:
        raise UserError("--index keeps what is computed of --images, which is missing")
    if images is None and default.is_dir() and any(default.iterdir()):
        images = default
    if model is None or images is None:
        return None
    from simla.model import kept_index

    return kept_index(model, images, folder) if folder else model.index(images)


def serve(page, examples: dict[str, list[list]], host: str, port: int) -> None:
    """Start the page in threads of this process. Raises UserError where the address cannot be used."""
    import gradio as gr
    from starlette.middleware import Middleware

    from simla.web.uploads import MAX_UPLOAD, FetchNothing

    cells = [cell for rows in examples.values() for row in rows for cell in row]
    name = f"[{host}]" if ":" in host else host  # as Gradio writes addresses of IPv6
    # Gradio asks the page whether it is up, which a proxy could not tell.
    around = [os.environ.get("no_proxy"), os.environ.get("NO_PROXY"), LOCAL, "localhost", host]
    os.environ["no_proxy"] = ",".join(filter(None, around))
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass  # Gradio would not say why it cannot listen
        page.launch(
            server_name=name,
            server_port=port,
            max_file_size=MAX_UPLOAD,
            allowed_paths=[cell for cell in cells if Path(cell).is_absolute()],  # and nothing else
            theme=gr.themes.Default(
                font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
            ),
            app_kwargs={"middleware": [Middleware(FetchNothing)]},
            footer_links=["api", "gradio"],
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        what = f"port {port} of {host} cannot be used ({error.strerror or error})"
        raise UserError(f"{what}; choose another --port or --host") from error


def is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m simla.web", description=__doc__.splitlines()[0])
    add = parser.add_argument
    text = "files of any tasks, one of each kind"
    add("--checkpoint", nargs="+", action="extend", required=True, type=fill_in, help=text)
    text = "a YAML file for each checkpoint, where they hold no config"
    add("--config", nargs="+", action="extend", type=fill_in, help=text)
    add(
        "--images",
        type=fill_in,
        help="folder that the search tab looks through (default: the demo's test scenes)",
    )
    add("--index", type=fill_in, help="folder that keeps what was computed of --images; made when missing")
    add(
        "--demo_data",
        default=DEMO,
        type=fill_in,
        help="the demo's data set, for examples (default: data/demo)",
    )
    add("--host", default=LOCAL, help="address to listen on; 0.0.0.0: all (default: %(default)s)")
    add("--port", type=whole_number(1, 65535), default=7860, help="(default: %(default)s)")
    text = "tokens of a description that are read, and at most 30 words (default: %(default)s)"
    add("--max_tokens", type=whole_number(2), default=MAX_TEXT_TOKENS, help=text)
    add("--text_encoder", help="tokenizer: hub name or folder; replaces the configs'")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--dtype", default="fp32", help="fp32, tf32, bf16 or fp16 (default: %(default)s)")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    log.setLevel(logging.INFO)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing is sent anywhere
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError("the web page needs Gradio: pip install -r requirements-app.txt") from error
    from simla.web.page import build_page, demo_examples, describing

    models = load_models(args)
    scenes = Path(args.demo_data, "images", "test")
    index = searched_images(describing(models), args.images, args.index, scenes)
    examples = demo_examples(Path(args.demo_data))
    if not is_local(args.host):
        log.warning(f"--host {args.host}: whoever reaches this machine can use the page, without a password")
    # For uploads; Gradio's own folder is shared by all its pages and all users of the machine.
    with tempfile.TemporaryDirectory(prefix="simla_page_", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build_page(models, index, examples, args.max_tokens)
        serve(page, examples, args.host, args.port)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        log.info(f"open {page.local_url} in a browser; Ctrl-C ends the page")
        page.block_thread()


if __name__ == "__main__":
    run_command(main)
