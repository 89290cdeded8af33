"""Requests in, outputs out: owns the tokenizer, the scheduler and the model runner. Knows nothing of tensors."""

import weakref
from collections.abc import Iterator
from time import perf_counter

from tqdm import tqdm
from xxhash import xxh64_intdigest

from nanovllm.config import Config, known_fields
from nanovllm.engine import inputs
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.detokenizer import TextStream, completion_text
from nanovllm.engine.inputs import Params, Prompt, Prompts, Request
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.parallel_runner import ParallelRunner
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.outputs import CompletionOutput, RequestOutput, StreamDelta
from nanovllm.sampling_params import SamplingParams


class LLMEngine:
    """Generates text for any number of requests, batched step by step.

    Also a context manager: `with LLM(...) as llm:` calls `exit` at the end.

    Args:
        model: A Hugging Face checkpoint directory, or an `owner/name` id of the hub.
        **kwargs: Fields of `Config`. Others are ignored with a `UserWarning`.

    Raises:
        TypeError, ValueError: See `Config`; also when the checkpoint is damaged or the memory is too small.
        RuntimeError: A process of `tensor_parallel_size` failed, or may not be started here.
    """

    def __init__(self, model: str, **kwargs):
        config = Config(model, **known_fields(kwargs))
        self.config = config
        self.tokenizer = inputs.load_tokenizer(config)
        if config.eos is None and self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            config.eos_token_ids |= {self.tokenizer.eos_token_id}
        self.model_runner = ModelRunner(config) if config.tensor_parallel_size == 1 else ParallelRunner(config)
        self.block_manager = BlockManager(config.num_kvcache_blocks, config.kvcache_block_size)
        self.scheduler = Scheduler(self.block_manager, config.max_num_seqs, config.max_num_batched_tokens)
        self._failure: str | None = None  # that has closed the engine
        self._num_sequences = 0
        self._unclaimed: list[Sequence] = []  # finished, and not reported by `step` yet
        self._texts: dict[int, TextStream] = {}  # of the sequences whose text must be known as it grows, by seq_id
        self._finalizer = weakref.finalize(self, _close, self.__dict__)

    def __enter__(self) -> "LLMEngine":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.exit()

    def exit(self) -> None:
        """Gives the model's memory back and ends other ranks. Idempotent; `del` and the end of Python do it too."""
        self._finalizer()

    @property
    def is_closed(self) -> bool:
        """Whether `exit` was called, or a failure has ended the engine."""
        return not self._finalizer.alive

    # ---- requests, step by step

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queues one prompt, text or token ids; errors are those of `generate`.

        Returns the id by which `step` reports the request; with `n` above 1 the first of `n` consecutive ones.
        """
        [seqs] = self._add(self._checked([prompt], sampling_params), is_owned=False)
        return seqs[0].seq_id

    def abort(self, seq_id: int) -> bool:
        """Ends a request with what it has, and `finish_reason` "abort"; returns whether it was still unfinished."""
        self._check_open()
        self.scheduler.abort({seq_id})
        return any(seq.seq_id == seq_id for seq in self._take_finished())

    def is_finished(self) -> bool:
        """Whether no request is waiting or running, and `step` has nothing left to report."""
        self._check_open()
        return self.scheduler.is_finished() and not self._unclaimed

    def step(self) -> tuple[list[tuple[int, list[int]]], int]:
        """Runs one prefill or decode step.

        Returns `(seq_id, completion token ids)` of each added request that finished, and how many tokens a prefill
        step computed, or minus how many sequences a decode step advanced.
        """
        self._check_open()
        _, num_tokens = self._step()
        finished, self._unclaimed = self._unclaimed, []
        for seq in finished:
            self._texts.pop(seq.seq_id, None)
        return [(seq.seq_id, seq.completion_token_ids) for seq in finished], num_tokens

    # ---- whole calls

    def generate(self, prompts: Prompts, sampling_params: Params = None, use_tqdm: bool = True) -> list[RequestOutput]:
        """Completes prompts. Nothing runs unless all of them are valid.

        Args:
            prompts: Texts, lists of token ids, or a mix; a bare string is one prompt.
            sampling_params: One for all, or one for each prompt; `SamplingParams()` by default.
            use_tqdm: Show a progress bar with prefill and decode tokens per second.

        Returns:
            For each prompt, in order, a dict with at least `text` (empty if the model has no tokenizer), `token_ids`
            (the completion, with the token that ended it) and `finish_reason`. `nanovllm.outputs` has all fields.

        Raises:
            TypeError: A prompt is neither text nor integers, or `sampling_params` is not of its type.
            ValueError: A prompt is empty, too long for the model or the cache, or has ids outside the vocabulary;
                there are more or fewer `sampling_params` than prompts; or some do not fit the model.
        """
        requests = self._add(self._checked(inputs.as_list(prompts), sampling_params))
        seqs = [seq for request in requests for seq in request]
        try:
            self._run(seqs, use_tqdm)
            return [self._request_output(request) for request in requests]
        finally:  # after an error, Ctrl-C too, nothing of this call stays behind
            self._drop(seqs)

    def generate_stream(self, prompts: Prompts, sampling_params: Params = None) -> Iterator[StreamDelta]:
        """Completes prompts, and yields each piece as it is produced.

        The prompts are checked at once, and run while the iterator is read. The pieces of a completion add up to
        what `generate` returns. Leaving the iterator frees its sequences.

        Args:
            prompts, sampling_params: As for `generate`.

        Yields:
            Dicts with `index` (of the prompt), `completion` (below `n`), `text` and `token_ids` (what is new; text may
            lag behind while a character or a stop string is incomplete), and `finish_reason` and `stop_reason`, None
            until the completion's last piece.

        Raises:
            TypeError, ValueError: See `generate`; also when the model's tokenizer is a slow one.
        """
        self._check_open()
        if self.tokenizer is not None and not self.tokenizer.is_fast:
            raise ValueError("streaming needs a model with a fast tokenizer (a tokenizer.json)")
        return self._stream(self._checked(inputs.as_list(prompts), sampling_params))

    # ---- inside

    def _checked(self, prompts: list[Prompt], sampling_params: Params) -> list[Request]:
        self._check_open()
        return inputs.check_requests(prompts, sampling_params, self.config, self.tokenizer)

    def _add(self, requests: list[Request], is_owned: bool = True, is_streamed: bool = False) -> list[list[Sequence]]:
        """Queues checked requests; returns the `n` sequences of each, of which the others share the first's blocks."""
        added, config = [], self.config
        for token_ids, params in requests:
            bad_words_ids = inputs.encode_bad_words(params, self.tokenizer)
            seqs: list[Sequence] = []
            for i in range(params.n):
                seq_id = self._num_sequences
                # Each completion has a random stream of its own, so what else runs beside it does not change its draws.
                origin = f"{config.seed} {seq_id}" if params.seed is None else f"seed {params.seed} {i}"
                request = token_ids.tolist(), inputs.sibling_params(params) if i else params
                limits = config.eos_token_ids, config.max_model_len
                rng_key, source = xxh64_intdigest(origin.encode()), seqs[0] if i else None
                seq = Sequence(seq_id, *request, *limits, rng_key, source, bad_words_ids, is_owned)
                if params.stop or (is_streamed and self.tokenizer is not None):
                    self._texts[seq_id] = TextStream(self.tokenizer, seq)
                self._num_sequences += 1
                self.scheduler.add(seq)
                seqs.append(seq)
            added.append(seqs)
        return added

    def _step(self) -> tuple[list[Sequence], int]:
        """One step; returns the sequences that finished, whosever they are, and its tokens as `step` does."""
        scheduler = self.scheduler
        seqs, is_prefill = scheduler.schedule()
        num_tokens = sum(seq.num_scheduled_tokens for seq in seqs) if is_prefill else -len(seqs)
        copies, self.block_manager.copies = self.block_manager.copies, []
        if seqs:
            try:
                if copies:
                    self.model_runner.copy_blocks(copies)
                token_ids = self.model_runner.run(seqs, is_prefill)
            except BaseException:
                if self.model_runner.failure is None:
                    scheduler.requeue(seqs)
                else:
                    self._failure = self.model_runner.failure
                    self.exit()
                raise
            scheduler.postprocess(seqs, token_ids)
            if self._texts:
                self._read_texts(seqs)
        return self._take_finished(), num_tokens

    def _read_texts(self, seqs: list[Sequence]) -> None:
        """Ends the sequences whose text has reached a stop string."""
        for seq in seqs:
            stop = self._texts[seq.seq_id].feed() if seq.seq_id in self._texts else None
            if stop is not None:
                self.scheduler.abort({seq.seq_id}, "stop")
                seq.finish_reason, seq.stop_reason = "stop", stop  # also where a length ended it in the same step

    def _take_finished(self) -> list[Sequence]:
        finished, self.scheduler.finished = self.scheduler.finished, []
        self._unclaimed += [seq for seq in finished if not seq.is_owned]
        return finished

    def _run(self, seqs: list[Sequence], use_tqdm: bool) -> None:
        """Steps until `seqs` are finished."""
        tokens, seconds = {True: 0, False: 0}, {True: 0.0, False: 0.0}  # by whether it is prefill
        with tqdm(total=len(seqs), desc="Generating", unit="prompt", disable=not use_tqdm) as progress:
            unfinished = {seq.seq_id for seq in seqs}
            while unfinished:
                start = perf_counter()
                finished, num_tokens = self._step()
                tokens[num_tokens > 0] += abs(num_tokens)
                seconds[num_tokens > 0] += perf_counter() - start
                unfinished.difference_update(seq.seq_id for seq in finished)
                if use_tqdm:
                    progress.update(len(seqs) - len(unfinished) - progress.n)
                    rates = {is_prefill: tokens[is_prefill] / max(seconds[is_prefill], 1e-9) for is_prefill in tokens}
                    progress.set_postfix_str(f"prefill {rates[True]:.0f} tok/s, decode {rates[False]:.0f} tok/s", False)

    def _stream(self, requests: list[Request]) -> Iterator[StreamDelta]:
        self._check_open()
        added = self._add(requests, is_streamed=True)
        unfinished = {seq: (index, i) for index, seqs in enumerate(added) for i, seq in enumerate(seqs)}
        num_yielded = dict.fromkeys(unfinished, 0)
        try:
            while unfinished:
                self._step()
                for seq, (index, completion) in list(unfinished.items()):
                    token_ids = seq.token_ids[seq.num_prompt_tokens + num_yielded[seq] :].tolist()
                    num_yielded[seq] += len(token_ids)
                    if seq.finish_reason:
                        del unfinished[seq]
                    if token_ids or seq.finish_reason:
                        text = self._texts[seq.seq_id].take_delta() if seq.seq_id in self._texts else ""
                        delta = {"index": index, "completion": completion, "text": text, "token_ids": token_ids}
                        yield {**delta, "finish_reason": seq.finish_reason, "stop_reason": seq.stop_reason}
        finally:
            self._drop(list(num_yielded))

    def _drop(self, seqs: list[Sequence]) -> None:
        """Ends what is unfinished of a call's sequences, and forgets them."""
        if not self.is_closed:
            if any(seq.status is not SequenceStatus.FINISHED for seq in seqs):
                self.scheduler.abort({seq.seq_id for seq in seqs})
                self._take_finished()
            self.scheduler.drop_held(seqs)
        for seq in seqs:
            self._texts.pop(seq.seq_id, None)

    def _request_output(self, seqs: list[Sequence]) -> RequestOutput:
        first, completions = seqs[0], [self._completion_output(seq) for seq in seqs]
        output: RequestOutput = {
            **completions[0],
            "prompt_logprobs": None if first.params.prompt_logprobs is None else first.prompt_logprobs,
            "num_cached_tokens": first.num_cached_tokens or 0,
        }
        if len(seqs) > 1:
            output["outputs"] = completions
        return output

    def _completion_output(self, seq: Sequence) -> CompletionOutput:
        text = self._texts.get(seq.seq_id)
        logprobs = None if seq.params.logprobs is None else seq.logprobs[: seq.num_completion_tokens]
        return {
            "text": completion_text(self.tokenizer, seq) if text is None else text.finish(),
            "token_ids": seq.completion_token_ids,
            "finish_reason": seq.finish_reason,
            "stop_reason": seq.stop_reason,
            "logprobs": logprobs,
            "cumulative_logprob": None if logprobs is None else sum(entry["logprob"] for entry in logprobs),
        }

    def _check_open(self) -> None:
        if self.is_closed:
            reason = "exit()" if self._failure is None else f"a failure: {self._failure}"
            raise RuntimeError(f"this LLM was closed by {reason}; make a new one")


def _close(state: dict) -> None:
    """Drops what holds memory. Gets the engine's attributes, not the engine, which it must not keep alive."""
    if "model_runner" in state:
        state["model_runner"].close()
    for name in ("model_runner", "scheduler", "block_manager"):
        state.pop(name, None)
