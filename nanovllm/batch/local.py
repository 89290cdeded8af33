"""Requests answered by an engine of this process: a job's without a cluster, and what each replica on one does."""

from collections.abc import Iterable, Iterator

from nanovllm.batch.lines import Item, LineError, prompt_of
from nanovllm.llm import LLM
from nanovllm.outputs import RequestOutput


def answer(llm: LLM, items: Iterable[Item]) -> Iterator[tuple[Item, RequestOutput]]:
    """Each item with its output, as `LLM.generate_unordered` yields them: lazily, in the order in which they finish.

    What fails has `finish_reason` "error". A KeyboardInterrupt has `outputs`: the pairs that had come.
    """
    running: dict[int, Item] = {}

    def prompts() -> Iterator:
        for i, item in enumerate(items):
            running[i] = item
            try:
                yield prompt_of(item, llm.tokenizer), item.params
            except LineError as error:
                yield error

    try:
        for output in llm.generate_unordered(prompts()):
            yield running.pop(output.index), output
    except KeyboardInterrupt as interrupt:
        interrupt.outputs = [(running.pop(output.index), output) for output in interrupt.outputs]
        raise


class LocalBackend:
    """An engine in this process."""

    def __init__(self, model: str, settings: dict[str, object]):
        self._llm = LLM(model, **settings)
        self.stats, self.close = self._llm.stats, self._llm.exit

    def run(self, items: Iterable[Item]) -> Iterator[tuple[Item, RequestOutput]]:
        return answer(self._llm, items)
