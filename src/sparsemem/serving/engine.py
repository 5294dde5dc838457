"""One thread that answers: requests wait in a queue, join the running batch, and get their text in pieces."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tokenizers.decoders import DecodeStream

from ..data.conversations import end_tokens
from .decoding import Chosen, Decoder, Row


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


logger = logging.getLogger(__name__)


class Piece(NamedTuple):
    """New text of an answer.

    Attributes:
        finish: why the answer ends with it: "stop" or "length"; None: more will come.
        error: what went wrong, if the answer ends because of that.
        chosen: its tokens with their log-probabilities, if the request asks for them.
        facts: adapters and numbers of the facts that the answer gave, in its last piece, if asked for.
    """

    text: str
    finish: str | None = None
    error: str | None = None
    chosen: Sequence[Chosen] = ()
    facts: Sequence[tuple[str, int]] = ()


@dataclass(eq=False)
class Request:
    """One prompt to answer.

    Attributes:
        deliver: gets the pieces of the answer in order, on the engine's thread.
        names_facts: whether the last piece says which facts were given.
        cancelled: set by whoever no longer wants the answer.
    """

    row: Row
    max_tokens: int
    text: AnswerText
    deliver: Callable[[Piece], None]
    names_facts: bool = False
    cancelled: bool = False
    num_delivered: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.row.tokens)

    def send(self, text: str, finish: str | None = None, facts: Sequence[tuple[str, int]] = ()) -> None:
        """Deliver text and the tokens since the last piece; the token that ends an answer has no text."""
        ends = finish == "stop" and not self.text.stopped
        chosen = self.row.chosen[self.num_delivered : len(self.row.chosen) - ends]
        self.num_delivered += len(chosen)
        self.deliver(Piece(text, finish, chosen=chosen, facts=facts))


class QueueFull(Exception):
    """Too many requests wait already."""


class Engine:
    """Answers requests, up to `max_batch` of them at once; up to `max_queue` others wait."""

    def __init__(
        self, model: Any, tokenizer: Any, *,
        max_batch: int = 16, max_queue: int = 256, precision: str | None = None,
    ) -> None:  # fmt: skip
        self._decoder = Decoder(model, precision)
        self._ends = end_tokens(model, tokenizer)
        self.max_batch, self.max_queue = max_batch, max_queue
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._changed = threading.Condition()
        self._stopping = False
        self.num_prompt_tokens = self.num_generated_tokens = self.num_cancelled = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; requests that are not finished end with an error."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def submit(self, *requests: Request) -> None:
        """Put requests into the queue, all or none.

        Raises:
            QueueFull: too many wait.
        """
        with self._changed:
            if len(self._waiting) + len(requests) > self.max_queue:
                raise QueueFull
            self._waiting.extend(requests)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._stopping):
                    self._changed.wait()
                if self._stopping:
                    break
                new = self._admitted()
            try:
                self._advance(new)
            except Exception as error:
                # one bad batch must not end the server
                logger.exception("a batch failed")
                self._fail([*self._running, *new], f"the model failed: {error}")
        self._fail([*self._running, *self._waiting], "the server is shutting down")

    def _admitted(self) -> list[Request]:
        new: list[Request] = []
        while self._waiting and len(self._running) + len(new) < self.max_batch:
            request = self._waiting.popleft()
            if request.cancelled:
                self.num_cancelled += 1
            else:
                new.append(request)
        return new

    def _advance(self, new: list[Request]) -> None:
        """One token for every request: the running ones first, then those that join."""
        if self._running:
            self._decoder.step()
            self._hand_out(self._running)
        if new:
            self._decoder.join([request.row for request in new])
            self.num_prompt_tokens += sum(len(request.row.prompt) for request in new)
            self._running = [*self._running, *new]
            self._hand_out(new)

    def _hand_out(self, requests: list[Request]) -> None:
        """Deliver the text of each request's last token, and let finished requests leave."""
        self.num_generated_tokens += len(requests)
        done = [request for request in requests if self._deliver(request)]
        if done:
            self._decoder.leave([request.row for request in done])
            self._running = [request for request in self._running if request not in done]

    def _deliver(self, request: Request) -> bool:
        """Whether the request is finished."""
        if request.cancelled:
            self.num_cancelled += 1
            return True
        try:
            if request.row.error is not None:
                raise request.row.error
            return self._deliver_token(request)
        except Exception as error:
            logger.exception("an answer failed")
            request.deliver(Piece("", None, f"the answer failed: {error}"))
            return True

    def _deliver_token(self, request: Request) -> bool:
        token = request.row.tokens[-1]
        if token in self._ends:
            request.send(request.text.rest(), "stop", self._facts(request))
            return True
        piece = request.text.add(token)
        if request.text.stopped:
            request.send(piece, "stop", self._facts(request))
            return True
        if request.num_tokens >= request.max_tokens:
            request.send(piece + request.text.rest(), "length", self._facts(request))
            return True
        if piece:
            request.send(piece)
        return False

    def _facts(self, request: Request) -> Sequence[tuple[str, int]]:
        return self._decoder.facts_given(request.row) if request.names_facts else ()

    def _fail(self, requests: list[Request], message: str) -> None:
        # one that has just joined may be in both lists
        for request in dict.fromkeys(requests):
            request.deliver(Piece("", None, message))
        self._running = []
        self._decoder.leave(self._decoder.rows)
