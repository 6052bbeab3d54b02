"""Bounds on what strangers send to the web page, and messages that name no path of this machine."""

import logging
import threading
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import gradio as gr
from gradio_client.utils import is_http_url_like
from starlette.responses import PlainTextResponse

from simla.dataset.images import BadImage, open_content
from simla.inputs import log_texts
from simla.utils import UserError

MAX_UPLOAD = "20mb"  # a file
MAX_PIXELS = 50_000_000  # of a picture: a small file can hold a huge one
MAX_FILES, MAX_LETTERS, MAX_TEXTS = 100, 1000, 10
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")  # whose headers tell the true size
MAX_SCANS = 50  # of a JPEG, each a pass over all of its pixels; 10 are usual


def told_to_sender(function: Callable) -> Callable:
    """Make a function show on the page what is wrong with its inputs, files by their names alone, and what is
    said of texts, such as that one is cut.
    """

    @wraps(function)
    def answer(*inputs):
        said = _Said()
        log_texts.addHandler(said)
        try:
            return function(*inputs)
        except (UserError, BadImage) as error:
            message = str(error)
            files = [file for value in inputs for file in (value if isinstance(value, list) else [value])]
            for problem in (error, error.__cause__):
                if isinstance(problem, BadImage):  # also of an image found, which has changed since the start
                    files.append(problem.path)
            for file in files:
                if isinstance(file, str) and Path(file).is_absolute():
                    message = message.replace(file, Path(file).name)
            raise gr.Error(message, print_exception=False) from error
        finally:
            log_texts.removeHandler(said)
            for message in said.messages:
                gr.Warning(message)

    return answer


class _Said(logging.Handler):
    """A log handler that keeps the different messages of this thread, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.messages, self.thread_number = {}, threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self.thread_number:
            self.messages[record.getMessage()] = True


def checked_image(file: str | None, name: str = "an image") -> str:
    """Return the path of an upload. Raises UserError for none, for a rare format, and for a picture that is
    too large to be decoded.
    """
    if not file:
        raise UserError(f"upload {name} first")
    try:
        with open_content(Path(file).read_bytes(), None) as header:
            width, height, form = *header.size, header.format
    except Exception:  # whoever decodes it says what is wrong with it
        return file
    if form not in FORMATS:
        raise UserError(f"{Path(file).name} is of the format {form}; read are {', '.join(FORMATS)}")
    if width * height > MAX_PIXELS:
        what = f"{Path(file).name} has {width} x {height} pixels"
        raise UserError(f"{what}; at most {MAX_PIXELS // 1_000_000} million are read")
    if form in ("JPEG", "MPO") and Path(file).read_bytes().count(b"\xff\xda") > MAX_SCANS:
        raise UserError(f"{Path(file).name} is written in more than {MAX_SCANS} scans; save it anew")
    return file


def bounded(text: str | None) -> str:
    """Return the text. Raises UserError where it is too long: not all of them come through the text box."""
    text = text or ""
    if len(text) > MAX_LETTERS:
        raise UserError(f"{len(text)} letters are too many: at most {MAX_LETTERS}")
    return text


def checked_text(text: str | None, name: str) -> str:
    if not (text or "").strip():
        raise UserError(f"type {name} first")
    return bounded(text)


def checked_lines(texts: str | None) -> list[str]:
    """Return the different lines of a text."""
    lines = list(dict.fromkeys(line.strip() for line in (texts or "").splitlines() if line.strip()))
    if len(lines) > MAX_TEXTS:
        raise UserError(f"{len(lines)} descriptions are too many: at most {MAX_TEXTS}")
    return [checked_text(line, "a description") for line in lines or [""]]


def only_files(component: gr.components.Component) -> gr.components.Component:
    """Refuse an address in place of a file: Gradio would fetch what is there, however large."""
    move = component.async_move_resource_to_block_cache

    async def move_file(path: str | None) -> str | None:
        if is_http_url_like(path):
            raise gr.Error("send the file itself: this page fetches nothing", print_exception=False)
        return await move(path)

    component.async_move_resource_to_block_cache = move_file
    return component


class FetchNothing:
    """ASGI middleware that refuses /file=https://..., for which Gradio would fetch the address."""

    def __init__(self, app: Callable) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        app = self.app
        if scope["type"] == "http" and is_http_url_like(scope["path"].partition("/file=")[2]):
            app = PlainTextResponse("this page fetches nothing", 403)
        await app(scope, receive, send)
