"""The words that the concept head of pre-training (PSL) sees in an image.

I images, E shared embedding, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from simla.utils import UserError, check_scores, printable

# They name nothing in the picture, and a head that learned from captions is sure of them.
IN_EVERY_CAPTION = """
a an the this that these those some any each every another other its it his him her hers their them there
here is are was were be been being has have had do does did not no nor and or but as if while than then so
very too just of in on at by with without from to into onto up down over under off out for about near
between through who whom which what where when how he she they we you us your my our all both
"""
FUNCTION_WORDS = frozenset(IN_EVERY_CAPTION.split())


class Concepts:
    """The head (E -> V) and which of its outputs are words."""

    def __init__(self, head: nn.Linear, tokenizer):
        self.head, self.tokenizer = head, tokenizer
        left_out = {*tokenizer.all_special_tokens, *FUNCTION_WORDS}
        tokens = enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
        words = ((i, token) for i, token in tokens if token.isalpha() and len(token) > 1)
        ids = [i for i, token in words if not {token, token.lower()} & left_out]
        self.words = torch.tensor(ids, dtype=torch.int64, device="cpu")

    def best(self, features: Tensor, top: int, words: Sequence[str] | None) -> list[list[tuple[str, float]]]:
        """Return (word, probability) for each of the features (I, E), best first, among `words` or all."""
        chosen = self.words if words is None else torch.tensor(list(map(self._number, words)))
        probabilities = self.head(features).sigmoid()[:, chosen.to(features.device)]
        check_scores(probabilities, "probabilities of keywords", "fp32")
        values, columns = probabilities.topk(min(top, len(chosen)))
        names = [self.tokenizer.convert_ids_to_tokens(chosen[row].tolist()) for row in columns.cpu()]
        return [list(zip(*row, strict=True)) for row in zip(names, values.tolist(), strict=True)]

    def _number(self, word: str) -> int:
        if not isinstance(word, str):
            raise UserError(f"a word is a {type(word).__name__}, expected str")
        tokens = self.tokenizer.tokenize(word) if printable(word) == word else []
        if len(tokens) != 1 or tokens[0] == self.tokenizer.unk_token:
            raise UserError(
                f"{word!r} is no word of the vocabulary ({' '.join(tokens) or 'nothing'}); the concept head "
                "knows single words of it alone. Try a more common word, or match() with a sentence"
            )
        return self.tokenizer.convert_tokens_to_ids(tokens[0])
