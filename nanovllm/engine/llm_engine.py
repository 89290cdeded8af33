"""Requests in, outputs out: owns the tokenizer, the scheduler and the model runner. Knows nothing of tensors."""

import difflib
import struct
import warnings
import weakref
from collections.abc import Sequence as SequenceOf
from dataclasses import fields
from time import perf_counter

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from xxhash import xxh64_intdigest

from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

Prompt = str | SequenceOf[int]


class LLMEngine:
    """Generates text for any number of requests, batched step by step.

    Also a context manager: `with LLM(...) as llm:` calls `exit` at the end.

    Args:
        model: A Hugging Face checkpoint directory, or an `owner/name` id of the hub.
        **kwargs: Fields of `Config`. Others are ignored with a `UserWarning`.

    Raises:
        TypeError, ValueError: See `Config`; also when the checkpoint is damaged or the memory is too small.
    """

    def __init__(self, model: str, **kwargs):
        config = Config(model, **_known_fields(kwargs))
        self.config = config
        self.tokenizer = _load_tokenizer(config)
        if config.eos is None and self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            config.eos_token_ids |= {self.tokenizer.eos_token_id}
        self.model_runner = ModelRunner(config)
        self.block_manager = BlockManager(config.num_kvcache_blocks, config.kvcache_block_size)
        self.scheduler = Scheduler(self.block_manager, config.max_num_seqs, config.max_num_batched_tokens)
        self._num_requests = 0
        self._unclaimed: list[Sequence] = []  # finished beside a `generate` that had not asked for them
        self._finalizer = weakref.finalize(self, _close, self.__dict__)

    def __enter__(self) -> "LLMEngine":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.exit()

    def exit(self) -> None:
        """Gives the model's memory back. Idempotent; also happens when the engine is garbage or Python ends."""
        self._finalizer()

    # ---- requests

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queues one prompt.

        Args:
            prompt: Text or token ids.
            sampling_params: `SamplingParams()` by default.

        Returns:
            The request's id, by which `step` reports it.

        Raises:
            TypeError, ValueError: See `generate`.
        """
        self._check_open()
        params = _broadcast(SamplingParams() if sampling_params is None else sampling_params, 1)
        return self._enqueue(self._encode([prompt])[0], params[0]).seq_id

    def is_finished(self) -> bool:
        """Whether no request is waiting or running, and `step` has nothing left to report."""
        return self.scheduler.is_finished() and not self._unclaimed

    def step(self) -> tuple[list[tuple[int, list[int]]], int]:
        """Runs one prefill or decode step.

        Returns:
            `(seq_id, completion token ids)` of each request that finished, and how many tokens a prefill step
            computed, or minus how many sequences a decode step advanced.
        """
        self._check_open()
        finished, num_tokens = self._step()
        finished, self._unclaimed = self._unclaimed + finished, []
        return [(seq.seq_id, seq.completion_token_ids) for seq in finished], num_tokens

    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] = SamplingParams(),  # noqa: B008 (frozen)
        use_tqdm: bool = True,
    ) -> list[dict]:
        """Completes prompts. Nothing runs unless all of them are valid.

        Args:
            prompts: Texts, lists of token ids, or a mix; a bare string is one prompt.
            sampling_params: One for all, or one for each prompt.
            use_tqdm: Show a progress bar with prefill and decode tokens per second.

        Returns:
            For each prompt, in order: `text` (without special tokens; empty if the model has no tokenizer),
            `token_ids` (the completion, with the end-of-sequence token if it was sampled) and `finish_reason`
            ("stop" at an end-of-sequence token; "length" at `max_tokens`, at the model's length, or when the cache
            cannot hold the sequence even alone).

        Raises:
            TypeError: A prompt is neither text nor integers, or `sampling_params` is not of its type.
            ValueError: A prompt is empty, too long for the model or the cache, or has ids outside the vocabulary,
                or there are more or fewer `sampling_params` than prompts.
        """
        self._check_open()
        prompts = _as_list(prompts)
        params = _broadcast(sampling_params, len(prompts))
        encoded = self._encode(prompts)
        seqs = [self._enqueue(ids, p) for ids, p in zip(encoded, params, strict=True)]
        try:
            self._run(seqs, use_tqdm)
        except BaseException:  # Ctrl-C too: the engine stays usable
            self.scheduler.abort({seq.seq_id for seq in seqs})
            raise
        return [self._output(seq) for seq in seqs]

    # ---- inside

    def _step(self) -> tuple[list[Sequence], int]:
        """`step`, with the finished sequences themselves."""
        scheduler = self.scheduler
        seqs, is_prefill = scheduler.schedule()
        num_tokens = sum(seq.num_scheduled_tokens for seq in seqs) if is_prefill else -len(seqs)
        if seqs:
            try:
                token_ids = self.model_runner.run(seqs, is_prefill)
            except BaseException:
                scheduler.requeue(seqs)
                raise
            scheduler.postprocess(seqs, token_ids)
        finished, scheduler.finished = scheduler.finished, []
        return finished, num_tokens

    def _run(self, seqs: list[Sequence], use_tqdm: bool) -> None:
        """Steps until `seqs` are finished."""
        pending = {seq.seq_id for seq in seqs}
        tokens, seconds = {True: 0, False: 0}, {True: 0.0, False: 0.0}  # by whether it is prefill
        with tqdm(total=len(seqs), desc="Generating", unit="prompt", disable=not use_tqdm) as progress:
            while pending:
                start = perf_counter()
                finished, num_tokens = self._step()
                tokens[num_tokens > 0] += abs(num_tokens)
                seconds[num_tokens > 0] += perf_counter() - start
                for seq in finished:
                    if seq.seq_id in pending:
                        pending.remove(seq.seq_id)
                        progress.update()
                    else:
                        self._unclaimed.append(seq)
                if use_tqdm:
                    rates = {is_prefill: tokens[is_prefill] / max(seconds[is_prefill], 1e-9) for is_prefill in tokens}
                    progress.set_postfix_str(f"prefill {rates[True]:.0f} tok/s, decode {rates[False]:.0f} tok/s", False)

    def _encode(self, prompts: list[Prompt]) -> list[np.ndarray]:
        """Token ids of each prompt, checked. All texts are tokenized in one call, which runs in parallel."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if texts and self.tokenizer is None:
            raise ValueError(f"{self.config.model_path} has no tokenizer; pass token ids instead of text")
        tokenized = iter(self.tokenizer(texts)["input_ids"] if texts else ())
        encoded = []
        for i, prompt in enumerate(prompts):
            ids = next(tokenized) if isinstance(prompt, str) else prompt
            encoded.append(self._check_prompt(ids, f"prompts[{i}]"))
        return encoded

    def _check_prompt(self, ids: SequenceOf[int], name: str) -> np.ndarray:
        """`ids` as int32, or an error that says what is wrong with them."""
        try:
            array = np.asarray(ids)
        except ValueError:  # ragged
            array = np.empty((0, 0))
        if array.size == 0 and array.ndim == 1:
            raise ValueError(f"{name} is empty: give it at least one token")
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise TypeError(f"{name} must be a string or a list of token ids, got {_shorten(ids)}")
        config = self.config
        vocab_size = config.hf_config.vocab_size
        outside = array[(array < 0) | (array >= vocab_size)]
        if outside.size:
            raise ValueError(f"{name} has the token id {outside[0]}, outside the vocabulary of {vocab_size}")
        if array.size >= config.max_model_len:
            raise ValueError(
                f"{name} has {array.size} tokens and leaves no room to generate within max_model_len="
                f"{config.max_model_len}: shorten it, or raise max_model_len if the model supports more"
            )
        capacity = config.num_kvcache_blocks * config.kvcache_block_size
        if array.size > capacity:
            raise ValueError(
                f"{name} has {array.size} tokens, the KV cache holds {capacity}: shorten it or raise num_kvcache_blocks"
            )
        return array.astype(np.int32)

    def _enqueue(self, token_ids: np.ndarray, params: SamplingParams) -> Sequence:
        config = self.config
        # Each request has a random stream of its own, so what else runs beside it does not change its draws.
        rng_key = xxh64_intdigest(struct.pack("<qq", config.seed, self._num_requests))
        seq = Sequence(
            self._num_requests, token_ids.tolist(), params, config.eos_token_ids, config.max_model_len, rng_key
        )
        self._num_requests += 1
        self.scheduler.add(seq)
        return seq

    def _output(self, seq: Sequence) -> dict:
        token_ids = seq.completion_token_ids
        text = "" if self.tokenizer is None else self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return {"text": text, "token_ids": token_ids, "finish_reason": seq.finish_reason}

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeError("this LLM was closed by exit(); make a new one")


def _close(state: dict) -> None:
    """Drops what holds memory. Gets the engine's attributes, not the engine, which it must not keep alive."""
    for name in ("model_runner", "scheduler", "block_manager"):
        state.pop(name, None)


def _known_fields(kwargs: dict) -> dict:
    known = [f.name for f in fields(Config) if f.init and f.name != "model"]
    for name in kwargs.keys() - set(known):
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        warnings.warn(f"LLM ignores the unknown setting {name!r}; the nearest is {nearest[0]!r}", stacklevel=3)
    return {name: value for name, value in kwargs.items() if name in known}


def _load_tokenizer(config: Config) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer, or None if it has none (such a model takes and gives token ids)."""
    path = config.model_path
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise ValueError(f"the tokenizer files in {path} could not be read: {error}") from error


def _as_list(prompts: Prompt | SequenceOf[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, (SequenceOf, np.ndarray)):
        raise TypeError(f"prompts must be a list of strings or of token-id lists, got {_shorten(prompts)}")
    if len(prompts) and isinstance(prompts[0], (int, np.integer)):
        raise TypeError("prompts must be a list of prompts; for one prompt of token ids pass [token_ids]")
    return list(prompts)


def _broadcast(params: SamplingParams | SequenceOf[SamplingParams], n: int) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * n
    if not isinstance(params, SequenceOf) or not all(isinstance(p, SamplingParams) for p in params):
        raise TypeError(f"sampling_params must be a SamplingParams or a list of them, got {_shorten(params)}")
    if len(params) != n:
        raise ValueError(f"sampling_params has {len(params)} entries for {n} prompts; give one for all or one for each")
    return list(params)


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
