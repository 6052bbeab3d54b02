"""Vocabularies of any BERT, and one's own: capital letters, accents, Chinese characters, unknown words.

The small ones are laid out as Hugging Face's official files: OFFICIAL is the whole tokenizer_config.json of
bert-base-cased, bert-base-multilingual-cased and bert-base-chinese (transformers' tests hold the first).
"""

import json

import pytest
import torch
from PIL import Image
from tiny import ROOT
from tokenizers import Tokenizer, models, normalizers

from simla.checkpoint.tokenizer import tokenizer_from_text, tokenizer_text
from simla.configs.reader import read_config
from simla.configs.schema import TABLES
from simla.dataset.check.tasks import Source
from simla.dataset.check.texts import WordPieces, measured_texts
from simla.dataset.items import (
    Collate,
    TrainItems,
    evaluation_batches,
    finetune_loader,
    warn_of_unknown_words,
)
from simla.dataset.prepare.__main__ import main as prepare
from simla.dataset.prepare.vocabulary import fit_vocabulary
from simla.dataset.pretrain import pretrain_loader, read_sets
from simla.dataset.retrieval import RetrievalEvalData
from simla.dataset.text import build_tokenizer, clean_caption, clean_question, lowers_case
from simla.dataset.ve import read_ve
from simla.dataset.vqa import vqa_loader
from simla.inputs import read_texts
from simla.utils import UserError

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
OFFICIAL = {"do_lower_case": False, "model_max_length": 512}
GERMAN = [
    "Ein Mädchen läuft über die Straße.",
    "Zwei Hunde laufen; ein Mädchen lacht!",
    "Die Straße ist leer",
]


def vocabulary(folder, words, config=None):
    """Write a folder as `text_encoder` names it, and return its tokenizer."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *words]) + "\n", encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return build_tokenizer(str(folder))


# ---- what the files say ----

WORDS = [
    "A",
    "a",
    "ein",
    "Ein",
    "der",
    "##r",
    "mad",
    "mäd",
    "Mäd",
    "##chen",
    "uber",
    "über",
    "世",
    "界",
    "cafe",
]


@pytest.mark.parametrize(
    ("config", "read"),
    [
        (OFFICIAL, "Ein Mäd ##chen über [UNK] 世 界"),  # CAFÉ is no piece, and is no other word either
        ({**OFFICIAL, "do_lower_case": True}, "ein mad ##chen uber cafe 世 界"),
        ({**OFFICIAL, "do_lower_case": True, "strip_accents": False}, "ein mäd ##chen über [UNK] 世 界"),
        ({**OFFICIAL, "strip_accents": True}, "Ein [UNK] uber [UNK] 世 界"),
        ({**OFFICIAL, "tokenize_chinese_chars": False}, "Ein Mäd ##chen über [UNK] [UNK]"),
        (None, "Ein Mäd ##chen über [UNK] 世 界"),  # vocab.txt alone: "A" is in it
        ({"model_max_length": 512}, "Ein Mäd ##chen über [UNK] 世 界"),
    ],
)
def test_capitals_accents_and_chinese_characters_are_read_as_the_files_say(config, read, tmp_path):
    tokenizer = vocabulary(tmp_path / "bert", WORDS, config)
    assert tokenizer.tokenize("Ein Mädchen über CAFÉ 世界") == read.split(" ")
    assert lowers_case(tokenizer.backend_tokenizer) == bool(config and config.get("do_lower_case"))
    kept = tokenizer_from_text(tokenizer_text(tokenizer), "a checkpoint")
    assert kept.tokenize("Ein Mädchen über CAFÉ 世界") == read.split(" ")


def test_a_vocabulary_alone_without_capitals_stays_uncased(tmp_path):
    words = [word for word in WORDS if word != "A"]
    assert vocabulary(tmp_path / "bert", words).tokenize("EIN CAFÉ") == ["ein", "cafe"]


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_whole_tokenizer_says_how_it_reads_where_no_configuration_does(lowercase, tmp_path):
    """As sentence encoders have it, padding and all."""
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate([*SPECIAL_TOKENS, *WORDS])}))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.enable_padding(length=128)
    tokenizer.enable_truncation(128)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    read = build_tokenizer(str(tmp_path))
    assert read.tokenize("Ein Mädchen") == (["ein", "mad"] if lowercase else ["Ein", "Mäd"]) + ["##chen"]
    assert len(read.backend_tokenizer.encode("a", add_special_tokens=False)) == 1


# ---- one's own vocabulary ----


@pytest.mark.parametrize(
    ("flags", "pieces"),
    [
        ([], ["ein", "madchen", "lauft", "uber", "die", "straße"]),
        (["--keep_accents"], ["ein", "mädchen", "läuft", "über", "die", "straße"]),
        (["--cased"], ["Ein", "Mädchen", "läuft", "über", "die", "Straße"]),
    ],
)
def test_a_vocabulary_of_one_s_own_texts_reads_all_of_them(flags, pieces, tmp_path, capsys):
    captions = [{"image": "a.jpg", "caption": GERMAN[:2]}, {"image": "b.jpg", "caption": GERMAN[2]}] * 5
    (tmp_path / "texts.json").write_text(json.dumps(captions))
    (tmp_path / "vqa.json").write_text(
        json.dumps([{"question": "Wie viele Hunde?", "answer": ["Zwei", "2"]}])
    )
    files = ["--texts", str(tmp_path / "texts.json"), str(tmp_path / "vqa.json")]
    for out in ("one", "other"):
        prepare(["vocabulary", *files, "--size", "250", "--out", str(tmp_path / out), *flags])
    assert (tmp_path / "one" / "vocab.txt").read_bytes() == (tmp_path / "other" / "vocab.txt").read_bytes()
    tokenizer = build_tokenizer(str(tmp_path / "one"))
    assert f"{len(tokenizer)} pieces; set text_encoder: {tmp_path / 'one'}" in capsys.readouterr().out
    assert tokenizer.convert_ids_to_tokens(range(5)) == SPECIAL_TOKENS
    assert tokenizer.tokenize(clean_caption(GERMAN[0], lower="--cased" not in flags)) == pieces
    assert tokenizer.unk_token not in tokenizer.tokenize(
        " ".join([*GERMAN, "Wie viele", "2"]).replace(";", " ")
    )
    assert lowers_case(tokenizer.backend_tokenizer) == ("--cased" not in flags)


def test_words_too_long_for_the_tokenizer_are_named(tmp_path, caplog):
    """As whole sentences are, in languages that are written without spaces."""
    (tmp_path / "v").mkdir()
    fit_vocabulary(["ab " * 3 + "ab" * 60, "ab " + "ab" * 50], 60 + 70, tmp_path / "v")
    assert (
        "1 words have more than 100 letters, such as abababababababababab..., and each is [UNK]"
        in caplog.text
    )
    assert build_tokenizer(str(tmp_path / "v")).tokenize("ab" * 60) == ["[UNK]"]


def test_equally_frequent_pieces_are_chosen_alike(tmp_path):
    """The library alone chooses among them by a random order."""
    words = [f"{a}{b}{c}" for a in "abcde" for b in "fghij" for c in "klmno"]
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        assert fit_vocabulary([" ".join(words)] * 2, 130, tmp_path / str(number)) == 130
    assert len({(tmp_path / str(number) / "vocab.txt").read_text() for number in range(3)}) == 1


@pytest.mark.parametrize(
    ("texts", "size", "expected"),
    [
        (["?!"], 500, "texts without a word"),
        (["ab ß"], 109, "109 pieces: single characters alone are 110; raise"),
    ],
)
def test_texts_that_give_no_vocabulary_are_refused(texts, size, expected, tmp_path):
    with pytest.raises(UserError, match=expected):
        fit_vocabulary(texts, size, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("entry", [{"image": "a.jpg"}, {"caption": 3}, {"caption": ["a", None]}, 5])
def test_an_entry_without_a_text_is_named(entry, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"caption": "a dog"}, entry]))
    with pytest.raises(UserError, match=r"a\.json: entry 1 must have text, or texts, under caption"):
        prepare(["vocabulary", "--texts", str(tmp_path / "a.json"), "--out", str(tmp_path / "out")])


# ---- texts are cleaned as the tokenizer reads them ----


@pytest.fixture(scope="module")
def cased(tmp_path_factory):
    return vocabulary(tmp_path_factory.mktemp("cased") / "bert", [*WORDS, "Hund"], OFFICIAL)


@pytest.fixture(scope="module")
def uncased(tmp_path_factory):
    return vocabulary(tmp_path_factory.mktemp("uncased") / "bert", [*WORDS, "hund"], {"do_lower_case": True})


@pytest.mark.parametrize(
    ("clean", "text"), [(clean_caption, "Ein  Hund, der A!"), (clean_question, "Ein Hund?")]
)
def test_every_reader_of_texts_keeps_capitals_for_a_cased_tokenizer_alone(
    clean, text, cased, uncased, tmp_path
):
    item = {"images": torch.zeros(1, 3, 2, 2, dtype=torch.uint8), "text": text, "where": "entry 0"}
    (tmp_path / "test.json").write_text(json.dumps([{"image": "a.jpg", "caption": [text]}]))
    for tokenizer, expected in ((cased, clean(text, lower=False)), (uncased, clean(text))):
        assert (expected != expected.lower()) == (tokenizer is cased)
        batch = Collate(tokenizer, 64, clean=clean)([item])
        assert batch["text"] == [expected]
        assert tokenizer.unk_token_id not in batch["text_ids"]
        assert read_texts([text], tokenizer, clean, 30, 30) == [expected]
        source = Source("train", "a.json", clean, 30, 64, [], "", 0, None)
        (measured,) = measured_texts(source, {"text": text}, WordPieces(tokenizer.backend_tokenizer))
        assert measured.num_tokens == len(batch["text_ids"][0])
        if clean is clean_caption:
            lower = lowers_case(tokenizer.backend_tokenizer)
            config = {"image_root": "", "image_res": 8, "skip_unreadable": False}
            assert RetrievalEvalData(str(tmp_path / "test.json"), config, lower).texts == [expected]


@pytest.mark.parametrize(
    ("text", "words", "names"),
    [
        ("Ein Hund auf der Linken", ["links", "linke", "rechts", "rechte"], True),
        ("LINKS ein Hund", ["links"], True),
        ("左边有一只狗", ["左", "右"], True),
        ("ein Hund", ["links"], False),
        ("the left dog", ["links"], False),
        ("links ein Hund", [], False),
    ],
)
def test_images_are_not_mirrored_under_the_side_words_of_the_texts_language(text, words, names, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    entry = {"images": [str(tmp_path / "a.png")], "text": text, "where": "entry 0"}
    items = TrainItems([entry], lambda image, rng, may_flip: torch.tensor(may_flip), 0, side_words=words)
    assert items[0, 0]["images"].tolist() == [not names]


# ---- unknown words ----


def test_many_unknown_words_are_said_before_training(cased, caplog):
    entries = [{"text": "ein Hund"}] * 300 + [{"text": ["Hund Katze Maus", "ein Katze"]}] * 300
    warn_of_unknown_words(entries, cased, "my/bert")
    (message,) = caplog.messages  # of every third entry: 100 of 2 pieces, 100 of 5 in two texts, 3 unknown
    assert message.startswith(
        "43% of the pieces of 300 texts that were looked at are [UNK]: text_encoder 'my/bert' "
    )
    assert "words such as 'Katze', 'Maus', which" in message
    caplog.clear()
    warn_of_unknown_words([{"text": "ein Hund " * 15}] * 20 + [{"text": "ein Katze"}] * 20, cased, "my/bert")
    assert not caplog.messages  # one of 32 pieces


def test_an_entry_that_cannot_be_read_is_left_to_the_training(cased, caplog):
    class Broken(list):
        def __getitem__(self, index):
            raise UserError("broken")

    warn_of_unknown_words(Broken([0, 1]), cased, "my/bert")
    assert not caplog.messages


def test_an_evaluation_looks_for_unknown_words_once(uncased, tmp_path, caplog):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "test.json").write_text(json.dumps([{"image": "a.png", "caption": ["Katze", "Maus"]}]))
    overrides = [f"image_root={tmp_path}", "text_encoder=my/bert", "num_workers=0", "image_res=32"]
    config = read_config(str(ROOT / "configs" / "Retrieval_flickr.yaml"), TABLES["Retrieval"], overrides)
    data = RetrievalEvalData(str(tmp_path / "test.json"), config)
    for _ in range(2):
        list(evaluation_batches(data, config, uncased, torch.device("cpu"), "Images"))
    assert caplog.text.count("100% of the pieces of 2 texts that were looked at are [UNK]") == 1


@pytest.mark.parametrize("task", ["Pretrain", "VE", "VQA"])
def test_every_task_looks_for_unknown_words(task, uncased, tmp_path, caplog):
    texts = {"caption": "Katze Maus", "sentence": "Katze Maus", "question": "Katze Maus?"}
    entry = {"image": "a", "label": "neutral", "dataset": "vqa", "answer": ["ja"], **texts}
    (tmp_path / "train.json").write_text(json.dumps([entry] * 64))
    overrides = [f"train_file={tmp_path / 'train.json'}", "text_encoder=my/bert", "num_workers=0"]
    config = read_config(str(ROOT / "configs" / f"{task}.yaml"), TABLES[task], overrides)
    if task == "Pretrain":
        pretrain_loader(read_sets(config["train_file"]), config, uncased, 112, 0)
    elif task == "VQA":
        vqa_loader(config, uncased, 0)
    else:
        finetune_loader(read_ve(config["train_file"], ""), config, uncased, 0)
    assert (
        "100% of the pieces of 64 texts that were looked at are [UNK]: text_encoder 'my/bert' has no pieces"
        in caplog.text
    )
