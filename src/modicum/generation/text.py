"""Text from tokens as they come: a piece is handed out once later tokens can no longer change it."""

from __future__ import annotations

import re
from typing import Any

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_OPEN = "\N{REPLACEMENT CHARACTER}"  # how tokenizers decode bytes that are not yet a whole character


def decode(tokenizer: Any, tokens: list[int]) -> str:
    """The text of new tokens, special ones left out."""
    # Cleaning up spaces would change text that a stream has already handed out.
    text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


class TextStream:
    """Turns tokens into text pieces; the pieces joined are `decode` of all tokens.

    transformers' TextStreamer decodes from the last line break on, where sentencepiece tokenizers lose the
    leading space, and holds text back until a space. Here each step decodes a few tokens of context with the
    new ones, so its cost does not grow with the answer, and only unfinished characters wait. (Where a
    tokenizer spells what it lacks in byte tokens, a run of them waits for its end: one bad byte voids it.)
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        """Those that have text: special ones are left out, as if they had never been."""
        self._special = frozenset(tokenizer.all_special_ids)
        self._context = 0
        self._done = 0
        self._sent: list[str] = []

    def put(self, tokens: list[int]) -> str:
        """Take new tokens; return the text that is complete ("" if none is)."""
        self.tokens += [token for token in tokens if token not in self._special]
        if not self.tokens or _BYTE.fullmatch(str(self.tokenizer.convert_ids_to_tokens(self.tokens[-1]))):
            return ""
        before = decode(self.tokenizer, self.tokens[self._context : self._done])
        now = decode(self.tokenizer, self.tokens[self._context :])
        if now.endswith(_OPEN) or not now.startswith(before) or len(now) == len(before):
            return ""
        self._context, self._done = self._done, len(self.tokens)
        piece = now[len(before) :]
        self._sent.append(piece)
        return piece

    def end(self) -> str:
        """The rest of the text, unfinished characters included."""
        sent, whole = "".join(self._sent), decode(self.tokenizer, self.tokens)
        # Where a tokenizer's text of the parts is not that of the whole, nothing can be taken back.
        rest = whole[len(sent) :] if whole.startswith(sent) else ""
        self._sent.append(rest)
        return rest
