"""The tokenizer as text, as checkpoints keep it."""

from typing import TYPE_CHECKING

from simla.utils import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_text(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the whole tokenizer as JSON, vocabulary, lower-casing and rules, for `tokenizer_from_text`."""
    return tokenizer.backend_tokenizer.to_str()


def tokenizer_from_text(text: str, source: str) -> "PreTrainedTokenizerBase":
    """Return the tokenizer that a checkpoint keeps. Raises UserError naming `source` where it is none."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        backend = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exceptions
        raise UserError(
            f"{source}: its tokenizer is damaged ({error}); name one, text_encoder=..."
        ) from error
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.model_max_length = int(1e9)  # texts are cut by us, not by a warning of the library
    return tokenizer
