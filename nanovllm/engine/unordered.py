"""Any number of prompts, of which only as many are in memory as keep the engine busy."""

import reprlib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from nanovllm.engine.call_loop import News
from nanovllm.engine.inputs import SLICE, Prompt, as_list, as_params
from nanovllm.engine.request import Request, error_text
from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.reader import END, Reader

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import LLMEngine

Given = tuple[int, object]  # the place of an item among all, and what the iterable gave


def generate_unordered(
    engine: "LLMEngine", prompts: Iterable[Prompt | tuple[Prompt, SamplingParams]], params: SamplingParams | None
) -> Iterator[RequestOutput]:
    """See `LLM.generate_unordered`."""
    if isinstance(prompts, str | dict) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts must be an iterable of prompts, got {reprlib.repr(prompts)}; pass [prompt] for one")
    [params] = as_params(params, 1, engine.config, engine.tokenizer, engine.grammars)
    return _generate(engine, prompts, params)


def _generate(engine: "LLMEngine", prompts: Iterable, params: SamplingParams) -> Iterator[RequestOutput]:
    engine._check_open()
    loop, news = engine._loop, News()  # items from the reader, and requests that have ended
    most = engine.config.max_num_seqs * engine.config.data_parallel_size  # that run at the same time
    reader = Reader(iter(prompts), news, most + 2 * SLICE)
    num_unfinished, is_read, outputs = 0, False, deque()
    try:
        loop.open_call(news)
        reader.start()
        while num_unfinished or not is_read:
            batch = [loop.next_news(news)]
            while not news.empty() and len(batch) < SLICE:
                batch.append(loop.next_news(news))
            is_read |= END in batch
            given = [item for item in batch if isinstance(item, tuple)]
            num_unfinished += len(given)
            requests, failed = _requests(engine, given, params, news)
            loop.add([seq for request in requests for seq in request.seqs], news)
            outputs += failed
            outputs += [_output(engine, request) for request in batch if isinstance(request, Request)]
            while outputs:
                output = outputs.popleft()
                num_unfinished -= 1
                reader.release()
                yield output
    except KeyboardInterrupt as interrupt:
        ended = [news.get() for _ in range(news.qsize())]
        outputs += [_output(engine, request) for request in ended if isinstance(request, Request)]
        interrupt.outputs = list(outputs)
        raise
    finally:
        reader.stop()
        engine._close_call(news, is_read and num_unfinished == 0)


def _output(engine: "LLMEngine", request: Request) -> RequestOutput:
    output = request.output(engine.tokenizer)
    output["index"] = request.index
    return output


def _requests(
    engine: "LLMEngine", given: list[Given], params: SamplingParams, news: News
) -> tuple[list[Request], list[RequestOutput]]:
    """Requests of the items, not queued yet, and outputs of those that cannot run."""
    failed: list[RequestOutput] = []

    def encoded(items: list[tuple]) -> list[tuple]:
        """Each with its token ids; if one fails, each alone."""
        try:
            ids = engine._encode([prompt for _, prompt, _ in items], [p for *_, p in items], items[0][0])
            return [(*item, own_ids) for item, own_ids in zip(items, ids, strict=True)]
        except Exception as error:  # a tokenizer's own, too
            if len(items) > 1:
                return [one for item in items for one in encoded([item])]
            failed.append(failed_output(*items[0][:2], error))
            return []

    items = []
    for index, item in given:
        is_pair = isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], SamplingParams)
        prompt, own = item if is_pair else (item, params)
        try:
            if isinstance(prompt, Exception):
                raise prompt
            [prompt] = as_list([prompt])
            items.append((index, prompt, as_params(own, 1, engine.config, engine.tokenizer, engine.grammars, index)[0]))
        except Exception as error:
            failed.append(failed_output(index, prompt, error))
    if not items or not (items := encoded(items)):
        return [], failed
    indices, prompts, own_params, ids = zip(*items, strict=True)
    requests = engine._requests(prompts, own_params, ids, news)
    for request, index in zip(requests, indices, strict=True):
        request.index = index
    return requests, failed


def failed_output(index: int, prompt: object, error: Exception) -> RequestOutput:
    """Of a prompt that has failed without having run."""
    end = {"finish_reason": "error", "stop_reason": None, "error": error_text(error)}
    completion = CompletionOutput(index=0, text="", token_ids=[], logprobs=None, cumulative_logprob=None, **end)
    text = prompt if isinstance(prompt, str) else None
    about_prompt = {"prompt": text, "prompt_token_ids": [], "prompt_logprobs": None, "num_cached_tokens": 0}
    return RequestOutput(completion | about_prompt, index=index, outputs=[completion])
