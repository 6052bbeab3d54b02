"""Text: recorded cleaning, the tokenizer without [SEP], padding and truncation, the draw of masked words."""

import json
import logging
import pickle
import re

import pytest
import torch
from goldens_io import golden
from hypothesis import given, settings
from hypothesis import strategies as st

from simla.dataset import text as text_module
from simla.dataset.text import (
    build_tokenizer,
    clean_caption,
    clean_question,
    mask_tokens,
    names_side,
    tokenize,
)
from simla.dataset.vqa import answer_texts
from simla.utils import UserError

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "man",
    "rid",
    "##ing",
    "horse",
    "##s",
    "yes",
    "left",
]
PAD, UNK, CLS, SEP, MASK, A, MAN, RID, ING, HORSE, S, YES, LEFT = range(len(WORDS))


@pytest.fixture(scope="module")
def vocab_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer(vocab_folder):
    return build_tokenizer(str(vocab_folder))


@pytest.mark.parametrize("case", golden("text")["cases"], ids=lambda case: repr(case["input"][:20]))
def test_recorded_cleaning(case):
    assert clean_caption(case["input"], 30) == case["pre_caption_30"]
    assert clean_caption(case["input"], 5) == case["pre_caption_5"]
    assert clean_question(case["input"], 30) == case["pre_question_30"]
    assert clean_question(case["input"], 50) == case["pre_question_50"]
    assert clean_caption(case["input"]) == case["pre_caption_30"]
    assert clean_question(case["input"]) == case["pre_question_50"]


@given(st.text())
def test_cleaning_any_text(text):
    clean = clean_caption(text, 7)
    assert clean == clean_caption(clean, 7) or "<" in text or "\n" in text
    assert len(clean.split(" ")) <= 7
    assert not set(clean + clean_question(text)) & set(",.'!?\"()*#:;~-/")


SIDES = "the left one|Right of the car|LEFT|left-hand side|rightmost girl|man on the left.|(right)|lefthand"
SIDES += "|leftmost|right-most|leftward|upper-left|top_right|right's|far left,|left/right"


@pytest.mark.parametrize("text", SIDES.split("|"))
def test_texts_that_name_a_side(text):
    assert names_side(text)
    assert names_side(clean_caption(text))


@pytest.mark.parametrize(
    "text",
    ["", "bright", "upright", "leftover pizza", "copyright", "rightful", "cleft", "righteous", "a cat"],
)
def test_texts_that_name_none(text):
    assert not names_side(text)


@pytest.mark.parametrize(
    "kind", ["vocab.txt", "with tokenizer_config", "with a byte-order mark", "tokenizer.json"]
)
def test_every_kind_of_folder_makes_the_same_tokenizer(kind, vocab_folder, tmp_path):
    if kind == "tokenizer.json":
        from transformers import BertTokenizer

        BertTokenizer.from_pretrained(vocab_folder).save_pretrained(tmp_path)
        for file in tmp_path.iterdir():
            if file.name != kind:
                file.unlink()
    else:
        encoding = "utf-8-sig" if kind == "with a byte-order mark" else "utf-8"
        (tmp_path / "vocab.txt").write_text("\n".join(WORDS), encoding=encoding)
    if kind == "with tokenizer_config":
        config = {"do_lower_case": True, "model_max_length": 512, "tokenizer_class": "BertTokenizer"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = build_tokenizer(str(tmp_path))
    assert len(tokenizer) == len(WORDS)
    ids = (tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id)
    assert ids == (PAD, CLS, SEP, MASK)
    assert tokenizer("A man RIDING horses")["input_ids"] == [CLS, A, MAN, RID, ING, HORSE, S]


def test_no_sep_is_added_and_none_is_reserved_for(tokenizer):
    assert tokenizer("a man")["input_ids"] == [CLS, A, MAN]
    assert tokenizer("")["input_ids"] == [CLS]
    assert tokenizer("yes[SEP]")["input_ids"] == [CLS, YES, SEP]
    assert tokenizer.num_special_tokens_to_add() == 1
    assert tokenizer("a man a man", truncation=True, max_length=4)["input_ids"] == [CLS, A, MAN, A]
    assert pickle.loads(pickle.dumps(tokenizer))("a man")["input_ids"] == [CLS, A, MAN]


@pytest.mark.parametrize("make", ["nothing", "empty", "without special tokens", "hub"])
def test_a_vocabulary_that_is_not_there_is_one_clear_sentence(make, tmp_path):
    name = "bert-base-uncased-that-nobody-has" if make == "hub" else str(tmp_path / "folder")
    if make in ("empty", "without special tokens"):
        (tmp_path / "folder").mkdir()
    if make == "without special tokens":
        (tmp_path / "folder" / "vocab.txt").write_text("a\nman\n")
    with pytest.raises(UserError) as error:
        build_tokenizer(name)
    assert name in str(error.value)
    assert "name as text_encoder a folder" in str(error.value)
    assert "vocab.txt" in str(error.value)


def test_padding_and_truncation(tokenizer, caplog):
    ids, mask = tokenize(tokenizer, ["a man", "a man riding horses", "yes[SEP]"])
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.tolist() == [
        [CLS, A, MAN, PAD, PAD, PAD, PAD],
        [CLS, A, MAN, RID, ING, HORSE, S],
        [CLS, YES, SEP, PAD, PAD, PAD, PAD],
    ]
    assert mask.tolist() == [[1] * 3 + [0] * 4, [1] * 7, [1] * 3 + [0] * 4]

    ids, mask = tokenize(tokenizer, ["a man", "a man riding horses"], max_length=4)
    assert ids.tolist() == [[CLS, A, MAN, PAD], [CLS, A, MAN, RID]]

    with caplog.at_level(logging.INFO, text_module.log.name):
        ids, mask = tokenize(tokenizer, ["a man", "a " * 40], max_length=30, padding="max_length")
    assert caplog.messages == ["1 of 2 texts have more than 30 tokens, of which the rest is not read"]
    assert ids.shape == (2, 30)
    assert mask.sum(1).tolist() == [3, 30]
    with pytest.raises(ValueError, match="max_length"):
        tokenize(tokenizer, ["a"], padding="max_length")


@given(
    st.lists(st.integers(0, 60), max_size=4),
    st.one_of(st.none(), st.integers(1, 50)),
    st.sampled_from(["longest", "max_length"]),
    st.integers(1, 50),
)
@settings(max_examples=60)
def test_tokenize_any_lengths(tokenizer, num_words, max_length, padding, position_limit):
    if padding == "max_length" and max_length is None:
        max_length = 20
    ids, mask = tokenize(tokenizer, ["a " * n for n in num_words], max_length, padding, position_limit)
    limit = min(max_length or position_limit, position_limit)
    kept = [min(n + 1, limit) for n in num_words]
    assert mask.sum(1).tolist() == kept
    assert ids.shape == mask.shape == (len(kept), limit if padding == "max_length" else max(kept, default=0))
    assert torch.equal(ids == PAD, mask == 0)


def test_a_text_beyond_the_positions_is_cut_and_logged_once(tokenizer, caplog):
    text_module._warn_cut.cache_clear()
    with caplog.at_level(logging.WARNING, "simla"):
        tokenize(tokenizer, ["a " * 600], max_length=25)  # asked for: nothing to say
        tokenize(tokenizer, ["a " * 511])
        assert not caplog.records
        for _ in range(3):
            assert tokenize(tokenizer, ["a " * 600, "a"])[0].shape == (2, 512)
    assert [record.name for record in caplog.records] == ["simla"]
    assert "512" in caplog.text


def test_the_share_of_masked_tokens_and_what_becomes_of_them():
    ids = torch.randint(10, 1000, (400, 250))
    masked, labels = mask_tokens(
        ids, pad_id=0, cls_id=1, mask_id=2, vocab_size=100_000, generator=torch.Generator().manual_seed(0)
    )
    chosen = labels != -100
    assert abs(chosen.float().mean() - 0.15) < 0.005  # 4.4 standard deviations
    became_mask, same = (masked == 2)[chosen], (masked == ids)[chosen]
    assert abs(became_mask.float().mean() - 0.8) < 0.015  # 4.6
    assert abs(same.float().mean() - 0.1) < 0.011
    words = masked[chosen][~became_mask & ~same]
    assert abs(words.float().mean() / 50_000 - 1) < 0.06


@given(st.integers(1, 6), st.integers(1, 12), st.floats(0, 1), st.integers(0, 999))
@settings(max_examples=100)
def test_what_holds_for_every_draw(num_texts, length, probability, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 20, (num_texts, length), generator=generator)
    before = ids.clone()
    options = {"pad_id": 0, "cls_id": 1, "mask_id": 2, "vocab_size": 20, "probability": probability}
    masked, labels = mask_tokens(ids, **options, generator=torch.Generator().manual_seed(seed))
    again = mask_tokens(ids, **options, generator=torch.Generator().manual_seed(seed))
    chosen = labels != -100
    assert torch.equal(ids, before)
    assert torch.equal(masked, again[0])
    assert torch.equal(labels, again[1])
    assert not (chosen & (ids < 2)).any()
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(masked[~chosen], ids[~chosen])
    assert masked.dtype == labels.dtype == torch.int64
    assert ((masked >= 0) & (masked < 20)).all()
    if probability == 1:
        assert torch.equal(chosen, ids >= 2)
    if probability == 0:
        assert not chosen.any()


def test_a_name_left_out_of_a_caption_is_a_person_for_a_cased_tokenizer_too():
    assert clean_caption("<PERSON> and <person> run", lower=False) == "person and person run"


def test_half_a_surrogate_pair_becomes_what_a_tokenizer_takes():
    assert clean_caption("A dog \ud83d runs \U0001f600") == "a dog ? runs \U0001f600"
    assert clean_question("Where\udc00") == "where?"


ANSWERS = """
    10:15, 3.5, 1,000, 2,500,000, $5, 50%, b&w, black & white, it's, don't, #1, u.s., t-shirt, yes/no,
    5 o'clock, coca-cola, 7:30 p.m., st. louis, mother's day, no, c++, 1/2, 红色, 3个, 红，白。, 50+,
    2 + 3 = 5, i don't know., girls' room, girls’ room, ‘stop’ sign, it’s, l'eau, aujourd'hui, qu'il,
    o'neill, 5'10
"""


@pytest.mark.parametrize(
    "answer", [*re.split(r",\s+", ANSWERS.strip()), "red, white and blue", "1, 2, 3", "2 & 3"]
)
def test_what_a_tokenizer_parts_is_written_as_people_do(answer, tmp_path):
    """Of letters and marks alone: every word is in several pieces."""
    letters = sorted(set(answer.replace(" ", "")))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    tokenizer = build_tokenizer(str(tmp_path))
    ids = torch.tensor(tokenizer(answer)["input_ids"])
    assert answer_texts(tokenizer, ids[None, None]) == [[answer]]
