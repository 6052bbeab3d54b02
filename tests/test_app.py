"""The web page in a headless Chromium, and over HTTP as a program asks it."""

import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import httpx
import numpy as np
import pytest
import torch
from api_data import make_checkpoints
from browser import open_browser
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from gradio_client.utils import Status
from PIL import Image
from playwright.sync_api import expect
from tiny import ROOT

import simla
from simla.dataset.images import load_image
from simla.inputs import log_texts
from simla.plots import plot_word_maps
from simla.utils import UserError, free_port
from simla.web import __main__ as app
from simla.web import page as page_module
from simla.web.page import DRAWN_SIDE, NUM_EXAMPLES, build_page, demo_examples, describing
from simla.web.uploads import (
    MAX_FILES,
    MAX_LETTERS,
    MAX_PIXELS,
    MAX_SCANS,
    MAX_TEXTS,
    checked_image,
    told_to_sender,
)

START_SECONDS, END_SECONDS = 180, 30
expect.set_options(timeout=30_000)
KINDS = ("pretrain", "vqa", "nlvr", "ve")
TEXTS = ["a turtle on a beach", "a cake at sunset"]


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_checkpoints(tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="module")
def models(tiny):
    return {kind: simla.load(tiny.checkpoints[kind], "cpu") for kind in KINDS}


@pytest.fixture(scope="module")
def images(tiny):
    return [str(tiny.data / entry["image"]) for entry in tiny.entries("retrieval_test")]


def hear_ctrl_c() -> None:
    """As in a terminal: what was started in the background inherits that it shall not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Site:
    """A running web page. variables: of its environment, besides ours."""

    def __init__(self, *flags: str, **variables: str):
        self.port, self.lines = free_port(), []
        command = [
            sys.executable,
            "-m",
            "simla.web",
            "--port",
            str(self.port),
            "--device",
            "cpu",
            *map(str, flags),
        ]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **variables},
            preexec_fn=hear_ctrl_c,
        )
        is_up = threading.Event()

        def read() -> None:
            for line in self.process.stdout:
                self.lines.append(line)
                if line.startswith("open http"):
                    is_up.set()
            is_up.set()

        self.reader = threading.Thread(target=read)
        self.reader.start()
        assert is_up.wait(START_SECONDS) and "open http" in self.log, self.log

    @property
    def url(self) -> str:
        return re.search(r"open (\S+) in a browser", self.log)[1]

    @cached_property
    def client(self) -> Client:
        return Client(self.url, verbose=False)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        code = self.process.wait(END_SECONDS)
        self.reader.join()
        return code


@pytest.fixture(scope="module")
def site(tiny, searched, tmp_path_factory):
    """Started where the network is behind a proxy that does not answer."""
    files, folder = [tiny.checkpoints[kind] for kind in KINDS], tmp_path_factory.mktemp("uploads")
    data, dead = ["--demo_data", tiny.data, "--images", searched], f"http://127.0.0.1:{free_port()}"
    site = Site("--checkpoint", *files, *data, TMPDIR=str(folder), http_proxy=dead, no_proxy="")
    yield site
    assert site.end(signal.SIGTERM) in (0, 130)
    assert not any(path.is_file() for path in folder.rglob("*.*"))  # what was uploaded has gone


@pytest.fixture(scope="module")
def searched(tiny, tmp_path_factory):
    """The images of the search tab, in a folder of which a test may delete one."""
    return shutil.copytree(tiny.data / "images" / "test", tmp_path_factory.mktemp("searched") / "private")


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


def test_search_with_enter_and_among_uploads(page, models, images, searched):
    model, folder = models["pretrain"], searched
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


def test_an_answer_written_in_two_ways_has_its_larger_probability(models, images, monkeypatch):
    rows = [("yes", 0.3), ("no", 0.25), ("yes", 0.01)]
    monkeypatch.setattr(type(models["vqa"]), "answer", lambda *_: rows)
    asked = {}
    monkeypatch.setattr(page_module, "_wire", lambda function, *_: asked.setdefault("answer", function))
    build_page({"vqa": models["vqa"]}, None, {})
    assert asked["answer"](images[0], "is it?", "") == {"yes": 0.3, "no": 0.25}


def test_words_are_asked_for_as_they_are_written(models, images, monkeypatch):
    """A cased vocabulary has Essen and essen; the tokenizer lowers what it should."""
    given = []
    monkeypatch.setattr(
        type(models["pretrain"]), "keywords", lambda _, image, top, words: given.append(words) or []
    )
    asked = {}
    monkeypatch.setattr(
        page_module, "_wire", lambda function, *_: asked.update({function.__name__: function})
    )
    build_page({"pretrain": models["pretrain"]}, None, {})
    asked["keywords"](images[0], "Essen beach")
    assert given == [["Essen", "beach"]]


def test_examples_fill_the_inputs(page, models, tiny):
    examples = demo_examples(tiny.data)
    assert {tab: len(rows) for tab, rows in examples.items()} == dict.fromkeys(examples, NUM_EXAMPLES)
    image, caption = examples["Match and ground"][1]
    tab = Tab(page, "Match and ground")
    tab.panel.get_by_text(caption, exact=True).click()
    expect(tab.panel.get_by_label("Descriptions")).to_have_value(caption)
    tab.click("Match")
    tab.shows(*percent([(caption, models["pretrain"].match(image, caption).item())]))


def test_the_size_of_a_picture_is_seen_beside_a_profile_for_which_pil_would_not_open_it(tmp_path):
    path, profile = tmp_path / "large.png", bytes(2_000_000)
    Image.new("1", (10_000, MAX_PIXELS // 10_000 + 1)).save(path, icc_profile=profile)
    with pytest.raises(UserError, match=r"large\.png has 10000 x 5001 pixels"):
        checked_image(str(path))


def test_what_is_wrong_is_said_on_the_page(page, images, tmp_path):
    content = Path(images[0]).read_bytes()
    Path(tmp_path, "half.jpg").write_bytes(content[: len(content) // 2])
    Path(tmp_path, "text.jpg").write_text("no image", encoding="utf-8")
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
    return site.client.predict(*inputs, api_name=f"/{name}", **more)


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


def test_a_full_queue_turns_the_next_request_away(monkeypatch, images):
    begun, may_end = threading.Event(), threading.Event()

    def entails(image: str, sentence: str) -> dict[str, float]:
        begun.set()
        assert may_end.wait(START_SECONDS)
        return {"entailment": 1.0}

    monkeypatch.setattr(page_module, "MAX_WAITING", 1)
    model, port = SimpleNamespace(source="ve.pth", device="cpu", entails=entails), free_port()
    page = build_page({"ve": model}, None, {})
    app.serve(page, {}, app.LOCAL, port)
    try:
        client = Client(page.local_url, verbose=False)

        def send():
            return client.submit(handle_file(images[0]), "a cat", api_name="/entails")

        first = send()
        assert begun.wait(START_SECONDS)
        second = send()
        while second.status().code != Status.IN_QUEUE:
            time.sleep(0.01)
        with pytest.raises(Exception, match=r"(?i)queue is full"):
            send().result(START_SECONDS)
        may_end.set()
        assert [job.result(START_SECONDS)["label"] for job in (first, second)] == ["entailment"] * 2
    finally:
        may_end.set()
        page.close()


def test_inputs_of_programs_are_bounded_too(site, images):
    lines = "\n".join(f"scene {number}" for number in range(MAX_TEXTS + 1))
    with pytest.raises(AppError, match=f"{MAX_TEXTS + 1} descriptions are too many"):
        ask(site, "match", handle_file(images[0]), lines, "itm")
    with pytest.raises(AppError, match="letters are too many"):
        ask(site, "search", "a" * (MAX_LETTERS + 1), None, 5)
    with Path(images[0]).open("rb") as file:
        (path,) = httpx.post(f"{site.url}gradio_api/upload", files={"files": file}).json()
    files = [{"path": path, "meta": {"_type": "gradio.FileData"}}] * (MAX_FILES + 1)
    search = f"{site.url}gradio_api/call/search"
    event = httpx.post(search, json={"data": ["a turtle", files, 5]}).json()["event_id"]
    assert f"{MAX_FILES + 1} files are too many" in httpx.get(f"{search}/{event}").text
    with pytest.raises(AppError):  # not in the list of the radio buttons
        ask(site, "match", handle_file(images[0]), "a turtle", "itx")
    for name, inputs in (("answer", ["what is it?"]), ("keywords", [])):
        with pytest.raises(AppError, match="letters are too many"):
            ask(site, name, handle_file(images[0]), *inputs, "a " * MAX_LETTERS)


def test_a_program_that_leaves_a_text_out_is_told(site, images):
    image = handle_file(images[0])
    with pytest.raises(AppError, match="type a description first"):
        ask(site, "match", image, None, "itm")
    with pytest.raises(AppError, match="type a question first"):
        ask(site, "answer", image, None, None)
    assert ask(site, "keywords", image, None) == ask(site, "keywords", image, "")


def test_images_that_would_take_much_memory(site, tmp_path):
    Image.new("1", (6000, 8000)).save(tmp_path / "large.png")
    Image.new("1", (1, 40_000)).save(tmp_path / "tower.png")
    content = Path(tmp_path, "large.png").read_bytes()
    header = struct.pack("<3H4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(content), 22)  # 16 x 16: a lie
    Path(tmp_path, "small.ico").write_bytes(header + content)
    large, tower, icon = (handle_file(tmp_path / name) for name in ("large.png", "tower.png", "small.ico"))
    _, picture = ask(site, "match", large, TEXTS[0], "itm")
    with Image.open(picture) as shown:
        assert shown.width < 1000
    with pytest.raises(AppError, match="up to 10 times as high as wide"):
        ask(site, "match", tower, TEXTS[0], "itm")
    with pytest.raises(AppError, match=r"small\.ico is of the format ICO"):
        ask(site, "keywords", icon, "")


def test_a_jpeg_of_too_many_scans(site, tmp_path):
    Image.new("L", (64, 64), 100).save(tmp_path / "scans.jpg", progressive=True)
    content = Path(tmp_path, "scans.jpg").read_bytes()
    last = content[content.rindex(b"\xff\xda") : -2]
    ask(site, "keywords", handle_file(tmp_path / "scans.jpg"), "")
    Path(tmp_path, "scans.jpg").write_bytes(content[:-2] + last * MAX_SCANS + content[-2:])
    with pytest.raises(AppError, match=f"more than {MAX_SCANS} scans"):
        ask(site, "keywords", handle_file(tmp_path / "scans.jpg"), "")


def test_what_is_said_of_texts_reaches_the_sender_once(monkeypatch):
    said = []
    monkeypatch.setattr("simla.web.uploads.gr.Warning", said.append)

    def answer(text: str) -> None:
        for number in (0, 0, 1):
            log_texts.warning(f"{number} {text}")
        raise UserError("no answer")

    with pytest.raises(gr.Error, match="no answer"):
        told_to_sender(answer)("is cut")
    assert said == ["0 is cut", "1 is cut"] and not log_texts.handlers


def test_the_box_is_where_it_was_in_the_large_image(monkeypatch):
    image, boxes = Image.new("RGB", (2 * DRAWN_SIDE, DRAWN_SIDE)), []
    found = SimpleNamespace(width=2 * DRAWN_SIDE, height=DRAWN_SIDE, box=[10, 20, 30, 40], heat=0, words=[])
    found.text = "a turtle"
    model = SimpleNamespace(ground=lambda *_, **__: found)
    monkeypatch.setattr(page_module, "load_image", lambda file: image)
    monkeypatch.setattr(page_module, "plot_word_maps", lambda *inputs, **_: boxes.extend(inputs[4]))
    monkeypatch.setattr(page_module.Image, "open", lambda file: file)
    page_module._heat_picture(model, "file", "a turtle", "itm")
    assert image.size == (DRAWN_SIDE, DRAWN_SIDE // 2)
    assert boxes == [("hottest region", [5, 10, 15, 20])]


def test_an_image_that_has_gone_is_named_without_its_folder(site, searched):
    gone = min(searched.iterdir())
    content = gone.read_bytes()
    gone.unlink()
    try:
        with pytest.raises(AppError, match=f"^{gone.name}: is gone; update the index") as said:
            ask(site, "search", "a turtle", None, 20)
        assert "private" not in str(said.value)
    finally:
        gone.write_bytes(content)


def test_nothing_is_fetched(site):
    address = "https://example.com/photo.jpg"
    with pytest.raises(AppError, match="this page fetches nothing"):
        ask(site, "keywords", handle_file(address), "")
    with pytest.raises(AppError, match="this page fetches nothing"):
        ask(site, "search", "a turtle", [handle_file(address)], 5)
    with pytest.raises(urllib.error.HTTPError, match="403") as refused:
        urllib.request.urlopen(f"{site.url}gradio_api/file=%68ttps://example.com/photo.jpg")
    assert refused.value.read() == b"this page fetches nothing"
    with urllib.request.urlopen(f"{site.url}gradio_api/info") as answer:  # programs copy its examples
        assert "githubusercontent" not in json.dumps(json.load(answer))


@pytest.mark.parametrize("file", ["/etc/passwd", ROOT / "utils.py", "checkpoint"])
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
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 cannot be used .*in use"):
            app.serve(build_page({}, None, {}), {}, "127.0.0.1", port)
    finally:
        page.close()


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_an_address_of_ipv6():
    page, port = build_page({}, None, {}), free_port()
    app.serve(page, {}, "::1", port)
    try:
        assert page.local_url == f"http://[::1]:{port}/"
        with socket.create_connection(("::1", port), timeout=5):
            pass
    finally:
        page.close()


@pytest.mark.parametrize("host", ["203.0.113.1", "no.such.invalid"])
def test_an_address_that_is_not_this_machines(host):
    with pytest.raises(UserError, match=rf"of {host} cannot be used \((?!.*GRADIO)"):
        app.serve(build_page({}, None, {}), {}, host, free_port())


@pytest.mark.parametrize("port", ["0", "-1", "65536", "a"])
def test_no_port(port, capsys):
    with pytest.raises(SystemExit):
        app.build_parser().parse_args(["--checkpoint", "x.pth", f"--port={port}"])
    assert "expected a number from 1 to 65535" in capsys.readouterr().err


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
    for scripts in ("Retrieval.py or Grounding.py or Pretrain.py", "VQA.py", "VE.py", "Pretrain.py"):
        assert f"This needs a checkpoint of {scripts}: start the page with it" in shown
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
    monkeypatch.setattr(sys, "argv", ["simla.web", "--demo_data", str(tmp_path), "--checkpoint", *words])
    with pytest.raises(UserError, match=re.escape(message)):
        app.main()


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["simla.web", "--checkpoint", "x.pth"])
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


def test_the_page_says_what_a_folder_has_that_is_not_searched(models, tiny, tmp_path):
    shutil.copy(tiny.data / "images" / "test" / "00000.jpg", tmp_path / "noext")
    (tmp_path / "film.mp4").write_bytes(bytes(40))
    (tmp_path / "text.jpg").write_text("no image", encoding="utf-8")
    index = app.searched_images(models["pretrain"], tmp_path, None, tmp_path)
    shown = str(build_page(models, index, demo_examples(tiny.data)).get_config_file())
    assert "1 images cannot be read; passed over: 1 files that are no images (.mp4)" in shown
    assert index.files == [str(tmp_path / "noext")]


def test_a_demo_that_is_partly_deleted(tiny, tmp_path):
    for file in tiny.data.glob("*_test.json"):
        shutil.copy(file, tmp_path)
    assert not demo_examples(tmp_path)["Keywords"] and len(demo_examples(tmp_path)["Search"]) == NUM_EXAMPLES
    folder = tmp_path / "images" / "test"
    folder.mkdir(parents=True)
    assert app.searched_images(SimpleNamespace(kind="pretrain"), None, None, folder) is None
    entry = tiny.entries("retrieval_test")[0]
    shutil.copy(tiny.data / entry["image"], folder)
    assert demo_examples(tmp_path)["Keywords"] == [[str(tmp_path / entry["image"])]]
    Path(tmp_path, "vqa_test.json").write_text("[{", encoding="utf-8")
    with pytest.raises(UserError, match="is not the demo's data set"):
        demo_examples(tmp_path)


def test_ctrl_c_ends_it(tiny, tmp_path):
    site = Site("--checkpoint", tiny.checkpoints["ve"], "--demo_data", tmp_path, "--host", "127.0.0.1")
    assert "without a password" not in site.log
    begin = time.monotonic()
    code = site.end(signal.SIGINT)
    assert code in (0, 130) and time.monotonic() - begin < END_SECONDS and "Traceback" not in site.log
    assert gr.__version__.split(".")[0] >= "6"
