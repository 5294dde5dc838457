"""The text of an answer while its tokens come: whole characters only, and nothing behind a stop string."""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class AnswerText:
    """Turns tokens into text that can be sent.

    Attributes:
        text: all text so far, cut at the stop string.
        stopped: whether a stop string has come; no further token is of use then.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream([], skip_special_tokens=True)
        self._stop = [one for one in stop if one]
        self._num_sent = 0
        self.text, self.stopped = "", False

    def add(self, token: int) -> str:
        """The text that can be sent after this token; what may be the beginning of a stop string waits."""
        piece = self._stream.step(self._tokenizer, token)
        if piece is None or self.stopped:
            return ""
        self.text += piece
        places = [place for one in self._stop if (place := self.text.find(one)) >= 0]
        if places:
            self.stopped = True
            self.text = self.text[: min(places)]
            return self._send(len(self.text))
        return self._send(len(self.text) - self._held())

    def rest(self) -> str:
        """What still waits, when no further token comes."""
        return self._send(len(self.text))

    def _send(self, end: int) -> str:
        start, self._num_sent = self._num_sent, max(self._num_sent, end)
        return self.text[start : self._num_sent]

    def _held(self) -> int:
        """Length of the longest end of the text that is a beginning of a stop string."""
        lengths = (
            size
            for one in self._stop
            for size in range(min(len(one) - 1, len(self.text)), 0, -1)
            if self.text.endswith(one[:size])
        )
        return max(lengths, default=0)
