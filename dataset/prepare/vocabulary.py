"""A WordPiece vocabulary of your own texts: a folder for config `text_encoder`.

    python -m simla.dataset.prepare vocabulary --texts data/mine.json --size 8000 --out data/vocabulary

Reads annotation files of any task (captions, texts, sentences, questions and answers), cleans the texts as
training does, and writes vocab.txt, of at most --size pieces, and tokenizer_config.json. All characters of
the texts, and of ASCII, are pieces, so that no word of them is unknown. The same texts give the same
vocabulary. It is for models whose words start from random weights (`init: scratch` or `image`): pre-trained
weights need the vocabulary that they were trained with.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from string import ascii_letters, ascii_lowercase, digits, punctuation

from simla.dataset.readers.json_list import JsonList
from simla.dataset.text import clean_caption
from simla.utils import UserError, atomic_write, fill_in, log, make_output_folder

MAX_LETTERS = 100  # of a word that BERT's tokenizer takes apart

TEXT_FIELDS = ("caption", "text", "sentence", "question", "answer")
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # by their ids
LEAST_TIMES = 2  # that neighbouring pieces have to be seen to be joined


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m simla.dataset.prepare vocabulary",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--texts", nargs="+", action="extend", required=True, help="annotation files")
    parser.add_argument("--size", type=int, default=8000, help="most pieces (default: %(default)s)")
    parser.add_argument("--out", required=True, help="folder for what is written, made where missing")
    parser.add_argument("--cased", action="store_true", help="keep capital letters, and accents")
    parser.add_argument(
        "--keep_accents", action="store_true", help="u and ü are two letters, without --cased, too"
    )
    args = parser.parse_args(arguments)
    texts = (text for file in args.texts for text in texts_in(Path(fill_in(file))))
    folder = make_output_folder(fill_in(args.out), "--out")
    number = fit_vocabulary(texts, args.size, folder, args.cased, args.keep_accents)
    print(f"{folder}: {number} pieces; set text_encoder: {folder} and, in bert_config, vocab_size: {number}")


def texts_in(path: Path) -> Iterator[str]:
    """Yield all texts of an annotation file. Raises UserError for an entry that has none."""
    for entry in JsonList(path, _check_texts, "texts of a vocabulary"):
        for field in TEXT_FIELDS:
            value = entry.get(field, [])
            yield from [value] if isinstance(value, str) else value


def _check_texts(entry: object, where: str) -> None:
    values = [entry[field] for field in TEXT_FIELDS if field in entry] if isinstance(entry, dict) else []
    listed = [text for value in values for text in (value if isinstance(value, list) else [value])]
    if not listed or not all(isinstance(text, str) for text in listed):
        raise UserError(
            f"{where} must have text, or texts, under {', '.join(TEXT_FIELDS)}, found {entry!r:.200}"
        )


def fit_vocabulary(
    texts: Iterable[str], size: int, folder: Path, cased: bool = False, keep_accents: bool = False
) -> int:
    """Write vocab.txt, of at most `size` WordPiece pieces of the texts, and tokenizer_config.json, which
    `build_tokenizer` reads, to the folder, and return the number of pieces.

    Raises UserError for texts without a word and for a size that has no room for all their characters.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    accents = False if keep_accents else None  # None: they go where capitals do
    normalizer = normalizers.BertNormalizer(lowercase=not cased, strip_accents=accents)
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in texts:
        clean = normalizer.normalize_str(clean_caption(text, lower=not cased))
        words.update(word for word, _ in pre_tokenizer.pre_tokenize_str(clean))
    if not words:
        raise UserError("no vocabulary of texts without a word; give others")
    letters = ascii_letters if cased else ascii_lowercase
    inner = {f"##{character}" for word in (*words, f"-{letters}{digits}") for character in word[1:]}
    alphabet = {*punctuation, *(word[0] for word in words), *(piece[2:] for piece in inner)}
    if size < (least := len(SPECIAL_TOKENS) + len(alphabet) + len(inner)):
        raise UserError(
            f"no vocabulary of {size} pieces: single characters alone are {least}; raise the size"
        )
    if long := [word for word in words if len(word) > MAX_LETTERS]:
        log.warning(
            f"{sum(words[word] for word in long):,} words have more than {MAX_LETTERS} letters, such as "
            f"{long[0][:20]}..., and each is [UNK] as a whole: in a language that is written without spaces "
            "put some between words"
        )
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # The inner characters are named beforehand, because the library numbers them in a random order, and by
    # the numbers it chooses among pieces that are equally frequent.
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=LEAST_TIMES,
        initial_alphabet=sorted(alphabet),
        special_tokens=[*SPECIAL_TOKENS, *sorted(inner)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (" ".join([word] * times) for word, times in sorted(words.items())), trainer
    )
    vocabulary = tokenizer.get_vocab()
    num_pieces = sum(len(tokenizer.encode(word).ids) * times for word, times in words.items())
    num_words = words.total()
    log.info(
        f"{num_words:,} words, {len(words):,} different ones: {num_pieces / num_words:.2f} pieces a word"
    )
    settings = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": not cased,
        "strip_accents": accents,
        "tokenize_chinese_chars": True,
        "model_max_length": 512,
    }
    with atomic_write(folder / "vocab.txt", text=True) as file:
        file.writelines(f"{piece}\n" for piece in sorted(vocabulary, key=vocabulary.get))
    with atomic_write(folder / "tokenizer_config.json", text=True) as file:
        json.dump(settings, file, indent=2)
    return len(vocabulary)
