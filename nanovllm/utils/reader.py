"""Reads an iterable ahead of who needs it, in a thread of its own."""

import threading
from collections.abc import Iterable, Iterator
from queue import SimpleQueue

END = object()  # among the news: the iterable has ended


class Reader(threading.Thread):
    """Puts the places and items of `source` into `news`, then `END` or an error; at most `lead` before `release`.

    The source may block without holding up anything else.
    """

    def __init__(self, source: Iterator, news: SimpleQueue, lead: int):
        super().__init__(name="nanovllm reader", daemon=True)
        self._source, self._news = source, news
        self._room = threading.Semaphore(lead)
        self._is_stopped = False

    def run(self) -> None:
        try:
            for given in enumerate(self._source):
                self._news.put(given)
                self._room.acquire()
                if self._is_stopped:
                    return
            self._news.put(END)
        except BaseException as error:  # raised to the caller
            self._news.put(error)

    def release(self) -> None:
        """One of the items is done with."""
        self._room.release()

    def stop(self) -> None:
        """Nobody needs more: it ends, if it is in the iterable then when that gives the next item."""
        self._is_stopped = True
        self._room.release()


def read_ahead(source: Iterable, lead: int) -> Iterator:
    """The items of `source`, which a thread of its own reads from now on, at most `lead` of them ahead."""
    news = SimpleQueue()
    reader = Reader(iter(source), news, lead)
    reader.start()

    def items() -> Iterator:
        try:
            while (given := news.get()) is not END:
                if isinstance(given, BaseException):
                    raise given
                reader.release()
                yield given[1]
        finally:
            reader.stop()

    return items()
