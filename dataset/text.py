"""Text: cleaning of captions and questions, the tokenizer, and the draw of masked words.

Shapes: B texts, T tokens. One text is [CLS] and its word pieces, *without* the [SEP] BERT tokenizers add: the
published checkpoints were trained that way.
"""

from __future__ import annotations

import codecs
import json
import re
from ast import literal_eval
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from simla.utils import UserError, hub_answer, log, printable

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Normalizer
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

CLEANED = str.maketrans("-/", "  ", ",.'!?\"()*#:;~")
SIDE = re.compile(r"(?<![a-z])(left|right)(s|most|wards?|sides?|hand(s|ed|ers?)?)?(?![a-z])", re.IGNORECASE)
PERSON = re.compile("<person>", re.IGNORECASE | re.ASCII)  # a name, in Conceptual Captions
MAX_TEXT_TOKENS = 30  # of a text in retrieval
STRING = re.compile(r"""[uU]?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")
# A list of strings as Python prints it, or, without commas, an array of them as numpy does.
LIST_OF_STRINGS = re.compile(rf"\[\s*{STRING.pattern}(?:(?:\s*,\s*|\s+){STRING.pattern})*\s*,?\s*\]")
SPECIAL_TOKENS = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}


CJK = r"\u3000-\u30ff\u3400-\u9fff\uff00-\uff65"  # with its punctuation
# What a tokenizer parts at punctuation, as people write it: (pattern, replacement), in this order.
WRITTEN = [
    (re.compile(r" ?([-/_]) ?"), r"\1"),  # t-shirt, yes/no
    (re.compile(r" ?(['’]) ?(?=(?:s|t|d|m|re|ve|ll|clock)\b)"), r"\1"),  # it's, o'clock
    (re.compile(r"\b([cdjlmnost]|\w*qu|aujourd) (['’]) (?=[^\W\d])"), r"\1\2"),  # l'eau, o'neill
    (re.compile(r"(?<=\d) (['’]) (?=\d)"), r"\1"),  # 5'10
    (re.compile(r"(?<=\d) ([.:]|,(?= \d{3}\b)) (?=\d)"), r"\1"),  # 10:15, 1,000
    (re.compile(r"\b([^\W\d]) ([.&]) (?=[^\W\d]\b)"), r"\1\2"),  # p.m., b&w
    (re.compile(r" (?=[.,:;?!%'’”)\]])"), ""),
    (re.compile(r" (?=\+(?: \+|$))"), ""),  # 50+, c++
    (re.compile(r"([$€£#(\[‘“]) "), r"\1"),
    (re.compile(rf"(?<=[{CJK}]) (?=[{CJK}\d])|(?<=\d) (?=[{CJK}])"), ""),
]


def written(tokens: Iterable[str]) -> str:
    """Return the text of word pieces with the blanks that people write between words and marks; where they
    would not agree (St. Louis, amazon.com) a full stop is followed by one.
    """
    text = " ".join(tokens).replace(" ##", "")
    for pattern, replacement in WRITTEN:
        text = pattern.sub(replacement, text)
    return text


def listed_texts(text: str) -> list[str] | None:
    """Return the strings of a list written as text, in JSON's or Python's way; None for any other text."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        if not LIST_OF_STRINGS.fullmatch(text):
            return None
        try:
            # One by one: Python would join strings that stand side by side without a comma.
            return [literal_eval(string) for string in STRING.findall(text)]
        except (ValueError, SyntaxError):
            return None
    return values if all(isinstance(value, str) for value in values) else None


def clean_caption(text: str, max_words: int = 30, lower: bool = True) -> str:
    """Return the caption's first words without punctuation, in lower case unless the tokenizer keeps it."""
    text = PERSON.sub("person", (text.lower() if lower else text).translate(CLEANED))
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return _first_words(text, max_words)


def clean_question(text: str, max_words: int = 50, lower: bool = True) -> str:
    """Return the question cleaned; runs of white space (each empty word counts) and <person> stay."""
    return _first_words((text.lower() if lower else text).translate(CLEANED).rstrip(" "), max_words)


def _first_words(text: str, max_words: int) -> str:
    """Return the words; half of a surrogate pair, which no tokenizer takes, becomes a question mark."""
    return printable(" ".join(text.split(" ")[:max_words]))


def names_side(text: str, words: Sequence[str] = ()) -> bool:
    """Return whether the text says left or right, so that it would be wrong for the mirrored image: in
    English, or, in any case and within longer words, too, one of `words`.
    """
    if words:
        return any(word.lower() in text.lower() for word in words)
    return SIDE.search(text) is not None


def lowers_case(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer, given its `backend_tokenizer`, reads no capital letters, so that texts for
    it are cleaned to lower case.
    """
    return tokenizer.normalizer is not None and tokenizer.normalizer.normalize_str("A") == "a"


def build_tokenizer(name_or_folder: str) -> PreTrainedTokenizerBase:
    """Return BERT's WordPiece from a hub name, or a folder with vocab.txt or tokenizer.json, which reads
    capital letters, accents and Chinese characters as `_normalizer` says.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import BertTokenizer  # here, because this import takes seconds

    words, cause = {}, None
    where = "on the Hugging Face hub" if Path(name_or_folder).exists() else hub_answer()
    try:
        given = _words_after_a_mark(Path(name_or_folder) / "vocab.txt")
        tokenizer = BertTokenizer.from_pretrained(name_or_folder, **given)
        backend = tokenizer.backend_tokenizer
        words = backend.get_vocab(with_added_tokens=False)
        backend.normalizer = _normalizer(name_or_folder, backend.normalizer, words)
    except Exception as error:  # of many types, by way of the network, the cache and the files
        words, cause = {}, error
    # Where it finds no file, transformers 5 silently makes up a vocabulary of the special tokens alone.
    if not words.keys() > SPECIAL_TOKENS:
        raise UserError(
            f"No BERT vocabulary for {name_or_folder!r}, neither as vocab.txt or tokenizer.json in a "
            f"folder of that name nor {where}: name as text_encoder a folder that holds the vocab.txt that "
            "the weights were trained with, mostly that of bert-base-uncased."
        ) from cause

    backend.post_processor = TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A $B", special_tokens=[("[CLS]", tokenizer.cls_token_id)]
    )
    backend.no_padding()  # tokenizer.json of sentence encoders pads and cuts
    backend.no_truncation()
    tokenizer.model_max_length = int(1e9)  # `tokenize` knows the limit, and says so in its own words
    return tokenizer


def _normalizer(name_or_folder: str, as_configured: Normalizer, words: Iterable[str]) -> Normalizer | None:
    """Return how texts are read: as tokenizer_config.json says, or tokenizer.json, or, where neither does, in
    lower case unless capital letters are in the vocabulary.
    """
    from tokenizers import Tokenizer
    from tokenizers.normalizers import BertNormalizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    from transformers.utils import cached_file

    if "do_lower_case" in get_tokenizer_config(name_or_folder):
        return as_configured
    if file := cached_file(name_or_folder, "tokenizer.json", _raise_exceptions_for_missing_entries=False):
        return Tokenizer.from_file(file).normalizer
    is_cased = any(len(word) == 1 and word != word.lower() for word in words)
    if is_cased:
        log.info(f"text_encoder {name_or_folder}: its vocabulary has capital letters, so texts keep theirs")
    return BertNormalizer(lowercase=not is_cased)


def _words_after_a_mark(file: Path) -> dict[str, dict[str, int]]:
    """Return {"vocab": word -> id} of a file that begins with a byte-order mark, {} for any other.

    BertTokenizer would take the mark for a part of the first word, which is [PAD].
    """
    if not file.is_file() or not file.read_bytes().startswith(codecs.BOM_UTF8):
        return {}
    with file.open(encoding="utf-8-sig") as lines:
        return {"vocab": {line.rstrip("\n"): number for number, line in enumerate(lines)}}


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise UserError where the tokenizer has words that the text encoder's embedding has no row for."""
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} words, bert_config only {vocab_size}: raise its vocab_size "
            f"(bert_config.vocab_size={len(tokenizer)}) or name another text_encoder"
        )


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int | None = None,
    padding: Literal["longest", "max_length"] = "longest",
    position_limit: int = 512,
    names: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return input_ids and attention_mask of the texts, each (B, T) int64.

    max_length: tokens to cut to, [CLS] included; None cuts nothing that fits the text encoder's
    `position_limit` positions; a text cut there is logged, by its entry of `names` where they are given.
    padding: to the longest text of the batch, or to max_length, and then how many were cut is logged.
    """
    import torch  # here, as below, because converters of data clean texts alone

    if padding == "max_length" and max_length is None:
        raise ValueError("padding to max_length needs a max_length")
    rows = tokenizer(list(texts))["input_ids"] if len(texts) else []
    longest = max(map(len, rows), default=0)
    limit = min(max_length or position_limit, position_limit)
    width = limit if padding == "max_length" else min(longest, limit)

    num_cut = sum(len(ids) > width for ids in rows)
    if padding == "max_length" and num_cut:
        log.info(
            f"{num_cut} of {len(rows)} texts have more than {width} tokens, of which the rest is not read"
        )

    input_ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(rows):
        if len(ids) > position_limit == limit:
            _warn_cut(position_limit, "some texts" if names is None else names[row])
        kept = torch.tensor(ids[:width])
        input_ids[row, : len(kept)], attention_mask[row, : len(kept)] = kept, 1
    return input_ids, attention_mask


@cache  # once per process and text
def _warn_cut(position_limit: int, name: str) -> None:
    log.warning(
        "%s: more tokens than the text encoder's %d positions, cut to that length; shorten the text or raise "
        "max_position_embeddings in bert_config",
        name,
        position_limit,
    )


def mask_tokens(
    input_ids: Tensor,
    *,
    pad_id: int,
    cls_id: int,
    mask_id: int,
    vocab_size: int,
    probability: float = 0.15,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return masked ids and labels of masked language modelling (BERT), each (B, T) like `input_ids`.

    A share `probability` of the tokens, never padding or [CLS], is to be predicted (labels elsewhere: -100).
    Of them 80% become [MASK], 10% a random token, 10% stay. Never waits for the device, on which `generator`
    has to live too.
    """
    import torch

    draw = torch.rand(input_ids.shape, generator=generator, device=input_ids.device)
    words = torch.randint(vocab_size, input_ids.shape, generator=generator, device=input_ids.device)
    draw = draw.masked_fill((input_ids == pad_id) | (input_ids == cls_id), 1.0)
    # One draw decides all: below 80% of the probability [MASK], below 90% a random token, below 100% itself.
    masked_ids = input_ids.where(draw >= 0.9 * probability, words)
    masked_ids = masked_ids.masked_fill(draw < 0.8 * probability, mask_id)
    return masked_ids, input_ids.masked_fill(draw >= probability, -100)
