"""The web page: a tab for each thing that trained models can be asked. `python -m simla.web` serves it.

One request is computed after the other.
"""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import gradio as gr
from PIL import Image

from simla.checkpoint.tasks import written_by
from simla.dataset.images import load_image
from simla.folders import describe
from simla.index import Index
from simla.model import MAX_TEXT_TOKENS, Simla
from simla.plots import plot_word_maps
from simla.utils import UserError
from simla.web.uploads import (
    MAX_FILES,
    MAX_LETTERS,
    MAX_TEXTS,
    bounded,
    checked_image,
    checked_lines,
    checked_text,
    only_files,
    told_to_sender,
)

MAX_WAITING = 32  # requests
MAX_HEIGHT = 10  # widths of an image with heat maps, each of which is drawn in the same width
DRAWN_SIDE = 768  # pixels of that image at most; a map is shown in 250
TOP = 5  # answers and keywords
MAX_HITS = 20
SHOWN_SIDE = 384  # pixels of an image found
NUM_EXAMPLES = 4
DESCRIBING = ("retrieval", "pretrain")  # kinds that match texts and images, the better one first

EXAMPLE_FILE = {"path": "photo.jpg", "meta": {"_type": "gradio.FileData"}}  # in the API's description

Examples = dict[str, list[list]]  # of each tab, rows of its inputs


def build_page(
    models: dict[str, Simla], index: Index | None, examples: Examples, max_tokens: int = MAX_TEXT_TOKENS
) -> gr.Blocks:
    """Return the page of the models (kind -> model). index: the images of the search tab, made by the model
    that `describing` returns; max_tokens: of what is looked for and of descriptions. A tab that no model
    serves says which script writes its checkpoint.
    """
    describes = describing(models)
    with gr.Blocks(title="SIMLA", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(_heading(models))
        for title, model, kinds, build in (
            ("Search", describes, DESCRIBING, lambda model, rows: _search(model, rows, index, max_tokens)),
            ("Match and ground", describes, DESCRIBING, lambda model, rows: _match(model, rows, max_tokens)),
            ("Questions", models.get("vqa"), ("vqa",), _answer),
            ("Keywords", models.get("pretrain"), ("pretrain",), _keywords),
            ("Statements on two images", models.get("nlvr"), ("nlvr",), _compare),
            ("Entailment", models.get("ve"), ("ve",), _entails),
        ):
            with gr.Tab(title):
                if model is None:
                    gr.Markdown(
                        f"This needs a checkpoint of {written_by(kinds)}: start the page with it after "
                        "`--checkpoint`, beside the others."
                    )
                else:
                    build(model, examples.get(title, []))
    return page.queue(max_size=MAX_WAITING)


def describing(models: dict[str, Simla]) -> Simla | None:
    """Return the model for search, matching and heat maps."""
    return next((models[kind] for kind in DESCRIBING if kind in models), None)


def demo_examples(data: Path) -> Examples:
    """Return a few inputs for each tab from the test splits of the demo's data set, none where there is no
    split, or its images are gone. Raises UserError for other data.
    """

    def spread(name: str) -> list[dict]:
        """Return entries of a split, far from each other."""
        file = data / f"{name}_test.json"
        entries = json.loads(file.read_bytes()) if file.is_file() else []
        return [entries[number * len(entries) // NUM_EXAMPLES] for number in range(NUM_EXAMPLES) if entries]

    def path(image: str) -> str:
        return str((data / image).absolute())

    def is_whole(row: list[str]) -> bool:
        return all(Path(cell).is_file() for cell in row if Path(cell).is_absolute())

    try:
        scenes = spread("retrieval")
        examples = {
            "Search": [[entry["caption"][0]] for entry in scenes],
            "Match and ground": [[path(entry["image"]), entry["caption"][0]] for entry in scenes],
            "Keywords": [[path(entry["image"])] for entry in scenes],
            "Questions": [[path(entry["image"]), entry["question"]] for entry in spread("vqa")],
            "Statements on two images": [[*map(path, e["images"]), e["sentence"]] for e in spread("nlvr")],
            "Entailment": [[path(f"images/{e['image']}.jpg"), e["sentence"]] for e in spread("ve")],
        }
    except (ValueError, LookupError, TypeError) as error:
        what = f"{data} is not the demo's data set ({type(error).__name__}: {error})"
        remedy = "delete it and run `make demo`, or name another with --demo_data"
        raise UserError(f"{what}; {remedy}") from error
    return {tab: list(filter(is_whole, rows)) for tab, rows in examples.items()}


def _heading(models: dict[str, Simla]) -> str:
    lines = [f"`{Path(model.source).name}` ({kind}, {model.device})" for kind, model in models.items()]
    return "# SIMLA\nWhat a vision-language model sees. " + ", ".join(lines)


# ---- one function for each tab ----


def _notes(index: Index) -> str:
    """Return what the folder holds that is not searched, without a name of this machine's files."""
    unreadable = f"{len(index.unreadable)} images cannot be read" if index.unreadable else ""
    return "; ".join(filter(None, [unreadable, describe(index.passed_over)]))


def _search(model: Simla, examples: list[list], index: Index | None, max_tokens: int) -> None:
    def search(query: str, uploads: list[str] | None, top: float) -> list[tuple[Image.Image, str]]:
        query = checked_text(query, "what to look for")
        searched = index
        if uploads:
            if len(uploads) > MAX_FILES:
                raise UserError(f"{len(uploads)} files are too many: at most {MAX_FILES}")
            searched = model.index([checked_image(file) for file in uploads])
            for file in searched.unreadable:
                gr.Warning(f"{Path(file).name} cannot be read and is left out")
        elif index is None:
            raise UserError("upload the images to search among first")
        candidates = max(MAX_HITS, model.config["k_test"])  # the first hits are the same for any number
        hits = model.search(searched, query, int(top), candidates, max_tokens)
        return [(_thumbnail(hit.file), f"{hit.score:.2f}  {Path(hit.file).name}") for hit in hits]

    with gr.Row():
        with gr.Column():
            query = gr.Textbox(label="What to look for", max_length=MAX_LETTERS)
            if index is not None and (notes := _notes(index)):
                gr.Markdown(notes)
            label = "Your own images" if index is None else f"Your own images instead of the {len(index)}"
            uploads = only_files(gr.File(label=label, file_count="multiple", file_types=["image"]))
            uploads.example_payload = lambda: [EXAMPLE_FILE]
            top = gr.Slider(1, MAX_HITS, value=8, step=1, label="How many")
            button = gr.Button("Search", variant="primary")
        with gr.Column(scale=2):
            gr.Markdown("Best first, with the logit of the matching head:")
            hits = gr.Gallery(show_label=False, columns=4, object_fit="contain", height="auto", format="png")
    _wire(search, [query, uploads, top], hits, button, query)
    _offer(examples, [query])


def _match(model: Simla, examples: list[list], max_tokens: int) -> None:
    def match(image: str | None, texts: str, mode: str) -> tuple[dict[str, float], Image.Image]:
        image, texts = checked_image(image), checked_lines(texts)
        matches = dict(zip(texts, model.match(image, texts, max_tokens).tolist(), strict=True))
        return matches, _heat_picture(model, image, max(matches, key=matches.get), mode, max_tokens)

    with gr.Row():
        with gr.Column():
            image = _upload("Image")
            label = f"Descriptions, one a line (at most {MAX_TEXTS})"
            texts = gr.Textbox(label=label, lines=3, max_length=MAX_TEXTS * MAX_LETTERS)
            modes = [("matching head (itm)", "itm"), ("similarity of features (itc)", "itc")]
            mode = gr.Radio(modes, value="itm", label="The heat map explains the")
            button = gr.Button("Match", variant="primary")
        with gr.Column(scale=2):
            matches = gr.Label(label="Probability that it describes the image", show_heading=False)
            gr.Markdown("Where the likeliest description and each of its words is seen:")
            shown = {"show_label": False, "buttons": ["download", "fullscreen"], "interactive": False}
            heat = gr.Image(elem_id="heat-maps", type="pil", format="png", **shown)
    _wire(match, [image, texts, mode], [matches, heat], button)
    _offer(examples, [image, texts])


def _answer(model: Simla, examples: list[list]) -> None:
    def answer(image: str | None, question: str, answers: str) -> dict[str, float]:
        image, question = checked_image(image), checked_text(question, "a question")
        choices = [answer.strip() for answer in bounded(answers).split(",") if answer.strip()]
        # Two ways of writing the same answer have rows of their own, the likelier one first.
        return dict(reversed(model.answer(image, question, choices or None, TOP)))

    with gr.Row():
        with gr.Column():
            image = _upload("Image")
            question = gr.Textbox(label="Question", max_length=MAX_LETTERS)
            label = "Answers to choose from, with commas between (empty: the model writes its own)"
            answers = gr.Textbox(label=label, max_length=MAX_LETTERS)
            button = gr.Button("Ask", variant="primary")
        shown = gr.Label(label="Answers with their probabilities", scale=2)
    _wire(answer, [image, question, answers], shown, button, question)
    _offer(examples, [image, question])


def _keywords(model: Simla, examples: list[list]) -> None:
    def keywords(image: str | None, words: str) -> dict[str, float]:
        return dict(model.keywords(checked_image(image), 2 * TOP, bounded(words).split() or None))

    with gr.Row():
        with gr.Column():
            image = _upload("Image")
            label = "Words to choose from, with spaces between (empty: the whole vocabulary)"
            words = gr.Textbox(label=label, max_length=MAX_LETTERS)
            button = gr.Button("Name keywords", variant="primary")
        shown = gr.Label(label="Keywords, each with a probability of its own", show_heading=False, scale=2)
    _wire(keywords, [image, words], shown, button, words)
    _offer(examples, [image])


def _compare(model: Simla, examples: list[list]) -> None:
    def compare(first: str | None, second: str | None, statement: str) -> dict[str, float]:
        first, second = checked_image(first, "the first image"), checked_image(second, "the second image")
        probability = model.compare(first, second, checked_text(statement, "a statement"))
        return {"true": probability, "false": 1 - probability}

    with gr.Row():
        with gr.Column():
            with gr.Row():
                first, second = _upload("First image"), _upload("Second image")
            statement = gr.Textbox(label="Statement on both", max_length=MAX_LETTERS)
            button = gr.Button("True or false?", variant="primary")
        shown = gr.Label(label="The statement is")
    _wire(compare, [first, second, statement], shown, button, statement)
    _offer(examples, [first, second, statement])


def _entails(model: Simla, examples: list[list]) -> None:
    def entails(image: str | None, sentence: str) -> dict[str, float]:
        return model.entails(checked_image(image), checked_text(sentence, "a sentence"))

    with gr.Row():
        with gr.Column():
            image = _upload("Image")
            sentence = gr.Textbox(label="Sentence", max_length=MAX_LETTERS)
            button = gr.Button("Does it follow?", variant="primary")
        shown = gr.Label(label="From the image to the sentence")
    _wire(entails, [image, sentence], shown, button, sentence)
    _offer(examples, [image, sentence])


# ---- what the tabs share ----


def _upload(label: str) -> gr.Image:
    image = gr.Image(label=label, type="filepath", sources=["upload", "clipboard"], height=300)
    # The file as it is, read as the task scripts read it, with their messages; Gradio would decode it first.
    image.preprocess = lambda payload: None if payload is None else payload.path
    image.example_payload = lambda: EXAMPLE_FILE
    return only_files(image)


def _wire(
    function: Callable, inputs: Sequence, outputs, button: gr.Button, text: gr.Textbox | None = None
) -> None:
    """Run the function on a click, or Enter in the text; all tabs take their turns in one queue."""
    triggers = [button.click] if text is None else [button.click, text.submit]
    queue = {"concurrency_limit": 1, "concurrency_id": "models", "api_name": function.__name__}
    gr.on(triggers, told_to_sender(function), list(inputs), outputs, **queue)


def _offer(examples: list[list], inputs: list) -> None:
    if examples:
        gr.Examples(examples, inputs, label="Examples: a click fills them in")


def _thumbnail(file: str) -> Image.Image:
    image = load_image(file)
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return image


def _heat_picture(
    model: Simla, file: str, text: str, mode: str, max_tokens: int = MAX_TEXT_TOKENS
) -> Image.Image:
    image, drawn = load_image(file), io.BytesIO()
    if image.height > MAX_HEIGHT * image.width:
        raise UserError(f"heat maps are drawn of images up to {MAX_HEIGHT} times as high as wide")
    image.thumbnail((DRAWN_SIDE, DRAWN_SIDE))
    result = model.ground(file, text, mode=mode, max_tokens=max_tokens)
    scale = max(image.size) / max(result.width, result.height)
    boxes = [] if result.box is None else [("hottest region", [side * scale for side in result.box])]
    plot_word_maps(image, result.text, result.heat, result.words, boxes, drawn, num_columns=4)
    return Image.open(drawn)
