"""The web page in a headless Chromium, and over HTTP as a program asks it."""

import io
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from api_data import make_checkpoints
from browser import open_browser
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import expect
from tiny import ROOT

import app
import simla
from dataset.transforms import load_image
from inference.page import (
    MAX_FILES,
    MAX_LETTERS,
    MAX_PIXELS,
    MAX_TEXTS,
    build_page,
    demo_examples,
    describing,
)
from plots import plot_word_maps
from utils import UserError, free_port

START_SECONDS, END_SECONDS = 180, 30
expect.set_options(timeout=30_000)
KINDS = ("pretrain", "vqa", "nlvr", "ve")
TEXTS = ["a turtle on a beach", "a cake at sunset"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_checkpoints(tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="module")
def models(tiny):
    return {kind: simla.load(tiny.checkpoints[kind], "cpu") for kind in KINDS}


@pytest.fixture(scope="module")
def images(tiny):
    return [str(tiny.data / entry["image"]) for entry in tiny.entries("retrieval_test")]


class Site:
    """A running app.py."""

    def __init__(self, *flags: str):
        self.port, self.lines = free_port(), []
        command = [
            sys.executable,
            ROOT / "app.py",
            "--port",
            str(self.port),
            "--device",
            "cpu",
            *map(str, flags),
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        is_up = threading.Event()

        def read() -> None:
            for line in self.process.stdout:
                self.lines.append(line)
                if line.startswith("open http"):
                    is_up.set()
            is_up.set()

        self.reader = threading.Thread(target=read)
        self.reader.start()
        assert is_up.wait(START_SECONDS) and self.process.poll() is None, self.log

    @property
    def url(self) -> str:
        return re.search(r"open (\S+) in a browser", self.log)[1]

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        code = self.process.wait(END_SECONDS)
        self.reader.join()
        return code


@pytest.fixture(scope="module")
def site(tiny):
    files = [tiny.checkpoints[kind] for kind in KINDS]
    site = Site("--checkpoint", *files, "--demo_data", tiny.data)
    yield site
    site.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def browser():
    with open_browser() as page:
        yield page


class Tab:
    """What a person does in a tab."""

    def __init__(self, page, name: str):
        self.page = page
        page.get_by_role("tab", name=name, exact=True).click()
        self.panel = page.get_by_role("tabpanel").filter(visible=True)
        expect(self.panel).to_have_count(1)

    def upload(self, *files: str, place: int = 0) -> None:
        self.panel.locator("input[type=file]").nth(place).set_input_files(list(files))
        if len(files) == 1:
            expect(self.panel.get_by_label("Remove Image")).to_have_count(place + 1)

    def type(self, label: str, text: str) -> None:
        self.panel.get_by_label(label).fill(text)

    def click(self, button: str) -> None:
        self.panel.get_by_role("button", name=button, exact=True).click()

    def shows(self, *texts: str | re.Pattern) -> None:
        for text in texts:
            expect(self.panel).to_contain_text(text)

    def picture(self, elem_id: str) -> np.ndarray:
        """The pixels of an image that the page shows."""
        shown = self.panel.locator(f"#{elem_id} img")
        expect(shown).to_have_js_property("complete", True)
        with urllib.request.urlopen(shown.get_attribute("src")) as answer:
            return np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))


@pytest.fixture
def page(site, browser):
    """The page, freshly opened; fails where it asked another host for anything, or its scripts failed."""
    asked, failed = set(), []
    browser.on("request", lambda request: asked.add(request.url.split("/")[2]))
    browser.on("pageerror", lambda error: failed.append(str(error)))
    browser.goto(site.url)
    yield browser
    assert asked == {f"127.0.0.1:{site.port}"} and not failed
    assert "Traceback" not in site.log


def percent(probabilities: Iterable[tuple[str, float]]) -> list[re.Pattern]:
    """As the page shows them, in whole numbers."""
    return [re.compile(rf"{re.escape(name)}\s*{int(100 * value + 0.5)}%") for name, value in probabilities]


def drawn(model, image: str, text: str, mode: str) -> np.ndarray:
    found, file = model.ground(image, text, mode=mode), io.BytesIO()
    boxes = [] if found.box is None else [("hottest region", found.box)]
    plot_word_maps(load_image(image), found.text, found.heat, found.words, boxes, file, num_columns=4)
    return np.asarray(Image.open(file).convert("RGB"))


# ---- what people see ----


def test_an_upload_and_a_text_give_the_probability_and_the_heat_map(page, models, images):
    tab = Tab(page, "Match and ground")
    tab.upload(images[0])
    tab.type("Descriptions", "\n".join(TEXTS))
    tab.click("Match")
    values = models["pretrain"].match(images[0], TEXTS).tolist()
    tab.shows(*percent(zip(TEXTS, values, strict=True)))
    best = TEXTS[int(values[1] > values[0])]
    assert np.array_equal(tab.picture("heat-maps"), drawn(models["pretrain"], images[0], best, "itm"))
    tab.panel.get_by_label("similarity of features").check()
    with page.expect_response(lambda answer: "/file=" in answer.url):
        tab.click("Match")
    assert np.array_equal(tab.picture("heat-maps"), drawn(models["pretrain"], images[0], best, "itc"))


def test_search_with_enter_and_among_uploads(page, models, images, tiny):
    model, folder = models["pretrain"], tiny.data / "images" / "test"
    tab = Tab(page, "Search")
    tab.type("What to look for", TEXTS[0])
    tab.panel.get_by_label("What to look for").press("Enter")
    hits = model.search(folder, TEXTS[0], top=8)
    expect(tab.panel.get_by_label(re.compile("Thumbnail"))).to_have_count(len(hits))
    tab.shows(*(f"{hit.score:.2f} {Path(hit.file).name}" for hit in hits))
    tab.upload(*images[2:5])
    tab.shows(*(Path(file).name.removesuffix(".jpg") for file in images[2:5]))
    tab.click("Search")
    hits = model.search(images[2:5], TEXTS[0])
    expect(tab.panel.get_by_label(re.compile("Thumbnail"))).to_have_count(3)
    tab.shows(*(f"{hit.score:.2f} {Path(hit.file).name}" for hit in hits))


def test_questions_keywords_statements_and_entailment(page, models, images):
    tab = Tab(page, "Questions")
    tab.upload(images[0])
    tab.type("Question", "what is the place?")
    tab.type("Answers to choose from", "beach, desert")
    tab.click("Ask")
    tab.shows(*percent(models["vqa"].answer(images[0], "what is the place?", ["beach", "desert"])))

    tab = Tab(page, "Keywords")
    tab.upload(images[0])
    tab.click("Name keywords")
    tab.shows(*percent(models["pretrain"].keywords(images[0], 10)))

    tab = Tab(page, "Statements on two images")
    tab.upload(images[0])
    tab.upload(images[1], place=1)
    tab.type("Statement on both", "both show a beach")
    tab.click("True or false?")
    true = models["nlvr"].compare(images[0], images[1], "both show a beach")
    tab.shows(*percent([("true", true), ("false", 1 - true)]))

    tab = Tab(page, "Entailment")
    tab.upload(images[0])
    tab.type("Sentence", "there is a cake")
    tab.click("Does it follow?")
    tab.shows(*percent(models["ve"].entails(images[0], "there is a cake").items()))


def test_examples_fill_the_inputs(page, models, tiny):
    image, caption = demo_examples(tiny.data)["Match and ground"][1]
    tab = Tab(page, "Match and ground")
    tab.panel.get_by_text(caption, exact=True).click()
    expect(tab.panel.get_by_label("Descriptions")).to_have_value(caption)
    tab.click("Match")
    tab.shows(*percent([(caption, models["pretrain"].match(image, caption).item())]))


def test_what_is_wrong_is_said_on_the_page(page, images, tmp_path):
    content = Path(images[0]).read_bytes()
    Path(tmp_path, "half.jpg").write_bytes(content[: len(content) // 2])
    Path(tmp_path, "text.jpg").write_text("no image")
    Image.new("1", (10_000, MAX_PIXELS // 10_000 + 1)).save(tmp_path / "large.png")
    Path(tmp_path, "heavy.jpg").write_bytes(content + bytes(21_000_000))
    tab, messages = Tab(page, "Keywords"), page.get_by_test_id("toast-body")
    for name, message in (
        (None, "upload an image first"),
        ("half.jpg", "half.jpg: truncated"),
        ("text.jpg", "text.jpg: not an image"),
        ("large.png", "large.png has 10000 x 5001 pixels"),
        ("heavy.jpg", "exceed the maximum allowed size of 20"),
    ):
        if name:
            if tab.panel.get_by_label("Remove Image").count():
                tab.panel.get_by_label("Remove Image").click()
            tab.panel.locator("input[type=file]").set_input_files(tmp_path / name)
        if name != "heavy.jpg":  # which is refused at once
            if name:
                expect(tab.panel.get_by_label("Remove Image")).to_be_visible()
            tab.click("Name keywords")
        expect(messages).to_contain_text(message)
        assert str(tmp_path.parent) not in messages.inner_text() and "/gradio/" not in messages.inner_text()
        messages.get_by_label("Close").click()
        expect(messages).to_have_count(0)


# ---- what programs see ----


def ask(site, name: str, *inputs, **more):
    return Client(site.url, verbose=False).predict(*inputs, api_name=f"/{name}", **more)


def test_over_http_the_numbers_are_exact_also_of_two_who_ask_at_once(site, models, images):
    expected = {image: models["pretrain"].match(image, TEXTS).tolist() for image in images[:2]}
    found = {}

    def match(image: str) -> None:
        result, _ = ask(site, "match", handle_file(image), "\n".join(TEXTS), "itm")
        values = {row["label"]: row["confidence"] for row in result["confidences"]}
        found[image] = [values[text] for text in TEXTS]

    threads = [threading.Thread(target=match, args=(image,)) for image in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for image, values in expected.items():
        assert found[image] == pytest.approx(values, abs=1e-6)


def test_inputs_of_programs_are_bounded_too(site, images):
    lines = "\n".join(f"scene {number}" for number in range(MAX_TEXTS + 1))
    with pytest.raises(AppError, match=f"{MAX_TEXTS + 1} descriptions are too many"):
        ask(site, "match", handle_file(images[0]), lines, "itm")
    with pytest.raises(AppError, match="letters are too many"):
        ask(site, "search", "a" * (MAX_LETTERS + 1), None, 5)
    with pytest.raises(AppError, match="files are too many"):
        ask(site, "search", "a turtle", [handle_file(images[0])] * (MAX_FILES + 1), 5)
    with pytest.raises(AppError):  # not in the list of the radio buttons
        ask(site, "match", handle_file(images[0]), "a turtle", "itx")


@pytest.mark.parametrize("file", ["/etc/passwd", ROOT / "app.py", "checkpoint"])
def test_files_of_the_machine_stay_there(site, tiny, file):
    file = tiny.checkpoints["pretrain"] if file == "checkpoint" else file
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{site.url}gradio_api/file={file}")
    with pytest.raises(AppError):
        ask(site, "keywords", {"path": str(file), "meta": {"_type": "gradio.FileData"}}, "")


def test_only_this_machine_can_connect(site):
    assert site.url == f"http://127.0.0.1:{site.port}/"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", site.port), timeout=5)


def test_all_addresses_where_that_is_asked_for():
    page, port = build_page({}, None, {}), free_port()
    app.serve(page, {}, "0.0.0.0", port)
    try:
        with socket.create_connection(("127.0.0.2", port), timeout=5):
            pass
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 cannot be used"):
            app.serve(build_page({}, None, {}), {}, "127.0.0.1", port)
    finally:
        page.close()


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("192.168.1.5", False),
        ("lab", False),
    ],
)
def test_hosts(host, is_local):
    assert app.is_local(host) == is_local


# ---- start and end ----


def test_a_tab_without_its_model_names_the_script(models):
    shown = str(build_page({"nlvr": models["nlvr"]}, None, {}).get_config_file())
    for scripts in ("Retrieval.py or Grounding.py or Pretrain.py", "VQA.py", "VE.py", "of Pretrain.py:"):
        assert f"This needs a checkpoint of {scripts}" in shown or f"checkpoint {scripts}" in shown
    assert "NLVR.py" not in shown


def test_the_retrieval_model_describes_before_the_pre_trained_one(models):
    both = {"pretrain": models["pretrain"], "retrieval": models["ve"]}
    assert describing(both) is models["ve"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["vqa", "vqa"], "are both vqa checkpoints; leave one of them out"),
        (["vqa", "--images", "x"], "need a checkpoint of Pretrain.py or Retrieval.py"),
        (["pretrain", "--index", "x"], "--index keeps what is computed of --images, which is missing"),
        (["pretrain", "--config", "a", "b"], "2 --config for 1 --checkpoint"),
        (["pretrain_nlvr"], "half-way to NLVR2"),
    ],
)
def test_flags_that_do_not_fit(tiny, monkeypatch, tmp_path, flags, message):
    words = [str(tiny.checkpoints.get(word, word)) for word in flags]
    monkeypatch.setattr(sys, "argv", ["app.py", "--demo_data", str(tmp_path), "--checkpoint", *words])
    with pytest.raises(UserError, match=re.escape(message)):
        app.main()


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["app.py", "--checkpoint", "x.pth"])
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-app\.txt"):
        app.main()


def test_an_index_is_kept(models, tiny, tmp_path):
    model, folder = models["pretrain"], tiny.data / "images" / "test"
    first = app.searched_images(model, folder, tmp_path / "index", tmp_path)
    second = app.searched_images(model, folder, tmp_path / "index", tmp_path)
    assert second.files == first.files and torch.equal(second.features, first.features)
    assert app.searched_images(model, None, None, tmp_path / "none") is None
    assert app.searched_images(None, None, None, folder) is None
    assert app.searched_images(model, None, None, folder).files == first.files


def test_ctrl_c_ends_it(tiny, tmp_path):
    site = Site("--checkpoint", tiny.checkpoints["ve"], "--demo_data", tmp_path, "--host", "127.0.0.1")
    assert "without a password" not in site.log
    begin = time.monotonic()
    code = site.end(signal.SIGINT)
    assert code in (0, 130) and time.monotonic() - begin < END_SECONDS and "Traceback" not in site.log
    assert gr.__version__.split(".")[0] >= "6"
