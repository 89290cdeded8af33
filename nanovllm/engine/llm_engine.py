"""Requests in, outputs out: owns the tokenizer, and the loop that runs the steps. Knows nothing of tensors."""

import math
import os
import sys
import threading
import weakref
from array import array
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from xxhash import xxh64_intdigest

from nanovllm.config import Config, known_fields
from nanovllm.engine import inputs
from nanovllm.engine.call_loop import CallLoop, News
from nanovllm.engine.detokenizer import TextStream
from nanovllm.engine.engine_loop import EngineLoop
from nanovllm.engine.grammar import Grammars
from nanovllm.engine.inputs import Params, Prompt, Prompts
from nanovllm.engine.parallel_runner import make_runner
from nanovllm.engine.progress import Progress
from nanovllm.engine.replicas import ReplicaLoop
from nanovllm.engine.request import Request, error_text
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.workers import check_main_guard
from nanovllm.outputs import GenerationError, RequestOutput, StreamDelta
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.hf_types import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from typing_extensions import Self


class LLMEngine:
    """Generates text for any number of requests, batched step by step.

    Any thread may call any method, and calls that overlap share their steps. Also a context manager: `with LLM(...) as
    llm:` calls `exit` at the end.

    Args:
        model: A Hugging Face checkpoint directory, or an `owner/name` id of the hub.
        **kwargs: Fields of `Config`. Others are ignored with a `UserWarning`.

    Raises:
        TypeError, ValueError: See `Config`; also when the checkpoint is damaged or the memory is too small.
        RuntimeError: A process of `tensor_parallel_size` or `data_parallel_size` failed, or may not be started here.
    """

    def __init__(self, model: str | Path, **kwargs: object):
        if (kwargs.get("tensor_parallel_size", 1), kwargs.get("data_parallel_size", 1)) != (1, 1):
            check_main_guard()  # before the seconds that reading a configuration takes
        config = Config(model, **known_fields(kwargs))
        self.config = config
        self.tokenizer = inputs.load_tokenizer(config)
        if config.eos is None and self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            config.eos_token_ids |= {self.tokenizer.eos_token_id}
        self.grammars = Grammars(config, self.tokenizer)
        if config.data_parallel_size > 1:
            self._loop: CallLoop = ReplicaLoop(config)
        else:
            self.model_runner = make_runner(config)
            self.scheduler = Scheduler.of(config)
            self.block_manager = self.scheduler.block_manager
            self._loop = EngineLoop(self.model_runner, self.scheduler)
        self._lock = threading.Lock()  # of what several callers would change at once: the tokenizer, the number below
        self._num_sequences = 0
        self._added: dict[int, Request] = {}  # by `add_request`, and not reported by `step` yet
        self._ended: News = News()  # some of these
        self._process = os.getpid()
        self._finalizer = weakref.finalize(self, _finalize, self.__dict__, self._process)

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.exit()

    def __reduce__(self) -> str:
        raise TypeError("an LLM cannot be pickled or copied: send its settings, and make an LLM in each process")

    def exit(self) -> None:
        """Gives the model's memory back and ends other ranks. Idempotent; `del` and the end of Python do it too."""
        if self._finalizer.detach():
            _close(self.__dict__, self._process)

    @property
    def is_closed(self) -> bool:
        """Whether `exit` was called, or a failure has ended the engine."""
        return not self._finalizer.alive or self._loop.failure is not None

    # ---- requests, step by step

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queues one prompt, text or token ids; errors are those of `generate`. Returns the request's id."""
        self._check_single("add_request")
        [params] = inputs.as_params(sampling_params, 1, self.config, self.tokenizer, self.grammars)
        [prompt] = inputs.as_list([prompt])
        [request] = self._requests([prompt], [params], self._encode([prompt], [params]), self._ended)
        request_id = request.seqs[0].seq_id
        self._added[request_id] = request
        self._loop.add(request.seqs)
        return request_id

    def abort(self, request_id: int) -> bool:
        """Ends a request, all its completions, with what it has and `finish_reason` "abort"; `step` reports it.

        Returns whether it was still unfinished.
        """
        self._check_open()
        request = self._added.get(request_id)
        return request is not None and self._loop.abort(request.seqs)

    def is_finished(self) -> bool:
        """Whether no request is waiting or running, and `step` has nothing left to report."""
        self._check_open()
        return self._loop.do(self._loop.is_finished) and self._ended.empty()

    def step(self) -> tuple[list[RequestOutput], int]:
        """Runs one step.

        Returns the outputs of the added requests that have ended, each with its `request_id`, and how many tokens
        the step computed, as a negative number if all were of running sequences and none of a prompt.
        """
        self._check_single("step")
        num_tokens, outputs = self._loop.do(self._loop.step), []
        while not self._ended.empty():
            request = self._ended.get()
            request_id = request.seqs[0].seq_id
            del self._added[request_id]
            outputs.append(request.output(self.tokenizer))
            outputs[-1]["request_id"] = request_id
        return outputs, num_tokens

    def stats(self) -> dict[str, object]:
        """What the engine is doing, and what it has done since it was made. Takes the same time whatever runs.

        `running` and `waiting` sequences; `blocks_used`, `blocks_free` (of which many may still hold a prefix) and
        `blocks_cached` (in the prefix cache, used or free); `preemptions`; `prompt_tokens` of admitted requests,
        `cached_prompt_tokens` of them that the prefix cache had, and their share `prefix_hit_rate`; `output_tokens`;
        tokens and seconds in prefill and in decode steps; and `step_times`, how many steps took less than so many
        milliseconds (and not less than the bound before).
        """
        stats = self._loop.stats()
        stats["prefix_hit_rate"] = stats["cached_prompt_tokens"] / max(stats["prompt_tokens"], 1)
        bounds = [*(2**i for i in range(len(stats["step_times"]) - 1)), math.inf]
        return stats | {"step_times": dict(zip(bounds, stats["step_times"], strict=True))}

    # ---- whole calls

    def generate(
        self, prompts: Prompts, sampling_params: Params = None, use_tqdm: bool = True, raise_on_error: bool = True
    ) -> list[RequestOutput]:
        """Completes prompts.

        Args:
            prompts: Texts, lists of token ids, or a mix; a bare string is one prompt.
            sampling_params: One for all, or one for each prompt; `SamplingParams()` by default.
            use_tqdm: Show a progress bar with prefill and decode tokens per second.
            raise_on_error: Raise if a request fails of something that concerns it alone, such as a logits processor
                that raises, once the others have finished; else its output has `finish_reason` "error".

        Returns:
            For each prompt, in order, a dict with at least `text` (empty if the model has no tokenizer), `token_ids`
            (the completion, with the token that ended it) and `finish_reason`. `nanovllm.outputs` has all fields.

        Raises:
            TypeError: A prompt is neither text nor integers, or `sampling_params` is not of its type.
            ValueError: A prompt is empty, too long for the model or the cache, or has ids outside the vocabulary;
                there are more or fewer `sampling_params` than prompts; or some do not fit the model. Prompts are
                checked 256 at a time, while those before run; after an error nothing of the call runs on.
            GenerationError: See `raise_on_error`; its `outputs` has all of them.
            KeyboardInterrupt: After Ctrl-C, with `outputs`: those of the finished prompts, None for the others.
        """
        self._check_open()
        prompts = inputs.as_list(prompts)
        params = inputs.as_params(sampling_params, len(prompts), self.config, self.tokenizer, self.grammars)
        outputs: list[RequestOutput | None] = [None] * len(prompts)
        failed: list[Request] = []
        num_unfinished, news = len(prompts), News()
        try:
            self._loop.open_call(news)
            with Progress(params, self.config.max_model_len, self._loop, use_tqdm) as progress:
                for request in self._run(prompts, params, news, progress):
                    outputs[request.index] = request.output(self.tokenizer)
                    num_unfinished -= 1
                    progress.update(request)
                    failed += [request] if request.error else []
        except KeyboardInterrupt as interrupt:
            came = [news.get() for _ in range(news.qsize())]
            for request in [item for item in came if isinstance(item, Request)]:  # and not a step's error
                outputs[request.index] = request.output(self.tokenizer)
            interrupt.outputs = outputs
            raise
        finally:  # after an error, Ctrl-C too, nothing of this call stays behind
            self._close_call(news, num_unfinished == 0)
        if failed and raise_on_error:
            raise _failure(failed, outputs)
        return outputs

    def generate_stream(
        self, prompts: Prompts, sampling_params: Params = None, raise_on_error: bool = True
    ) -> Iterator[StreamDelta]:
        """Completes prompts, and yields each piece as it is produced.

        The prompts are checked at once, and run from when the iterator is first read. The pieces of a completion add
        up to what `generate` returns. Leaving the iterator frees its sequences.

        Args:
            prompts, sampling_params, raise_on_error: As for `generate`.

        Yields:
            Dicts with `index` (of the prompt), `completion` (below `n`), `text` and `token_ids` (what is new; text may
            lag behind while a character or a stop string is incomplete), and `finish_reason` and `stop_reason`, None
            until the completion's last piece.

        Raises:
            TypeError, ValueError, GenerationError: See `generate`.
        """
        self._check_open()
        prompts = inputs.as_list(prompts)
        params = inputs.as_params(sampling_params, len(prompts), self.config, self.tokenizer, self.grammars)
        parts = [slice(i, i + inputs.SLICE) for i in range(0, len(prompts), inputs.SLICE)]
        encoded = [ids for part in parts for ids in self._encode(prompts[part], params[part], part.start)]
        return self._stream(prompts, params, encoded, raise_on_error)

    def get_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The checkpoint's tokenizer, as `llm.tokenizer`; None if it has none."""
        return self.tokenizer

    # ---- inside

    def _encode(self, prompts: list[Prompt], params: list[SamplingParams], start: int = 0) -> list[np.ndarray]:
        with self._lock:
            return inputs.encode(prompts, params, self.config, self.tokenizer, start)

    def _new_ids(self, n: int) -> int:
        """The first of `n` consecutive ids for sequences."""
        with self._lock:
            self._num_sequences += n
            return self._num_sequences - n

    def _requests(
        self, prompts: list[Prompt], params: list[SamplingParams], encoded: list[np.ndarray], news: News,
        start: int = 0, is_streamed: bool = False
    ) -> list[Request]:  # fmt: skip
        """Requests that are not queued yet, each with its `n` sequences; further ones share the first's blocks."""
        requests, config = [], self.config
        for index, (prompt, p, token_ids) in enumerate(zip(prompts, params, encoded, strict=True), start):
            request = Request(index, prompt, news, is_streamed)
            token_ids = array("i", token_ids.tobytes())
            first_id = self._new_ids(p.n)
            with self._lock:
                bad_words_ids = inputs.encode_bad_words(p, self.tokenizer)
            for i in range(p.n):
                # Each completion has a random stream of its own, so what else runs beside it does not change its draws.
                origin = f"{config.seed} {first_id + i}" if p.seed is None else f"seed {p.seed} {i}"
                key, source = xxh64_intdigest(origin.encode()), request.seqs[0] if i else None
                limits = config.eos_token_ids, config.max_model_len
                own = inputs.sibling_params(p) if i else p
                seq = Sequence(first_id + i, token_ids, own, *limits, key, source, bad_words_ids)
                seq.guide = self.grammars.guide(seq)
                if p.stop or (is_streamed and self.tokenizer is not None):
                    seq.text = TextStream(self.tokenizer, seq)
                request.watch(seq)
            requests.append(request)
        return requests

    def _run(
        self, prompts: list[Prompt], params: list[SamplingParams], news: News, progress: Progress
    ) -> Iterator[Request]:
        """Queues prompts while those before run, and yields the requests as they end."""
        num_unfinished = 0
        for start in range(0, len(prompts), inputs.SLICE):
            part = slice(start, start + inputs.SLICE)
            encoded = self._encode(prompts[part], params[part], start)
            requests = self._requests(prompts[part], params[part], encoded, news, start)
            self._loop.add([seq for request in requests for seq in request.seqs], news)
            num_unfinished += len(requests)
            progress.show(start + len(requests))
            while not news.empty():
                num_unfinished -= 1
                yield self._loop.next_news(news)
        while num_unfinished:
            request = self._loop.next_news(news, progress.interval)
            progress.show()
            if request is not None:
                num_unfinished -= 1
                yield request

    def _stream(
        self, prompts: list[Prompt], params: list[SamplingParams], encoded: list[np.ndarray], raise_on_error: bool
    ) -> Iterator[StreamDelta]:
        self._check_open()
        news = News()
        requests = self._requests(prompts, params, encoded, news, is_streamed=True)
        seqs = [seq for request in requests for seq in request.seqs]
        num_unfinished = len(seqs)
        try:
            self._loop.open_call(news)
            self._loop.add(seqs, news)
            while num_unfinished:
                piece = self._loop.next_news(news)
                num_unfinished -= piece["finish_reason"] is not None
                yield piece
        finally:
            self._close_call(news, num_unfinished == 0)
        failed = [request for request in requests if request.error]
        if failed and raise_on_error:
            raise _failure(failed, [])

    def _close_call(self, news: News, is_done: bool) -> None:
        """At the end of a call, however it ends. A second Ctrl-C does not wait for what the first has ended."""
        is_interrupted = isinstance(sys.exc_info()[1], KeyboardInterrupt)
        if not self.is_closed:
            with suppress(KeyboardInterrupt) if is_interrupted else nullcontext():
                self._loop.close_call(news, is_done)

    def _check_single(self, name: str) -> None:
        self._check_open()
        if self.config.data_parallel_size > 1:
            raise ValueError(
                f"{name} needs an engine in this process, and data_parallel_size={self.config.data_parallel_size} has "
                "none: use generate, generate_stream or generate_unordered, or data_parallel_size=1"
            )

    def _check_open(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                "this LLM belongs to the process that forked this one, and its threads stayed there: make an LLM in "
                "each process, or start processes with multiprocessing.get_context('spawn')"
            )
        self._loop.check_alive()
        if self._loop.is_this_thread:
            raise RuntimeError(
                "an LLM cannot be called from inside a step, by a logits processor: it would wait forever"
            )


def _failure(failed: list[Request], outputs: list[RequestOutput]) -> GenerationError:
    first = min(failed, key=lambda request: request.index)
    others = f" (and {len(failed) - 1} other prompts failed)" if len(failed) > 1 else ""
    failure = GenerationError(f"prompts[{first.index}] failed: {error_text(first.error)}{others}", outputs)
    failure.__cause__ = first.error
    return failure


def _finalize(state: dict, process: int) -> None:
    """Gets the engine's attributes, not the engine, which it must not keep alive; a Ctrl-C could only be printed."""
    with suppress(KeyboardInterrupt):
        _close(state, process)


def _close(state: dict, process: int) -> None:
    """Drops what holds memory."""
    if os.getpid() == process:  # a forked child has not got the thread
        state["_loop"].end()
    for name in ("model_runner", "scheduler", "block_manager"):
        state.pop(name, None)
