"""Vocabularies of any BERT, and one's own: capital letters, accents, Chinese characters, unknown words.

The small ones are laid out as Hugging Face's official files: OFFICIAL is the whole tokenizer_config.json of
bert-base-cased, bert-base-multilingual-cased and bert-base-chinese (transformers' tests hold the first).
"""

import json

import pytest
from tokenizers import Tokenizer, models, normalizers

from simla.checkpoint.tokenizer import tokenizer_from_text, tokenizer_text
from simla.dataset.prepare.__main__ import main as prepare
from simla.dataset.prepare.vocabulary import fit_vocabulary
from simla.dataset.text import build_tokenizer, clean_caption, lowers_case
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
