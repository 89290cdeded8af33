"""Beam search on top of the scheduler: hypotheses are sequences of one step each, forked from their parents' blocks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm import tqdm

from nanovllm.engine.call_loop import News
from nanovllm.engine.detokenizer import decode
from nanovllm.engine.inputs import Prompts, as_list
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import BeamHypothesis, BeamOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.checks import check_bool, check_float, check_int

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import LLMEngine


@dataclass(frozen=True, slots=True)
class BeamSearchParams:
    """How to search, by the rules of transformers' beam search. TypeError or ValueError if a value is wrong."""

    beam_width: int = 5  # hypotheses kept at each length, and returned
    max_tokens: int = 50  # most tokens of a hypothesis; the model's length ends it earlier
    length_penalty: float = 1.0  # a score is the sum of log-probabilities divided by the length to this power
    # Stop once there are `beam_width` finished ones; else when the best other one scores below the worst of them now.
    early_stopping: bool = False
    ignore_eos: bool = False  # treat end-of-sequence tokens like others

    def __post_init__(self) -> None:
        check_int("beam_width", self.beam_width, 1)
        check_int("max_tokens", self.max_tokens, 1)
        check_float("length_penalty", self.length_penalty, -1e3)
        check_bool("early_stopping", self.early_stopping)
        check_bool("ignore_eos", self.ignore_eos)


def beam_search(engine: "LLMEngine", prompts: Prompts, params: BeamSearchParams, use_tqdm: bool) -> list[BeamOutput]:
    """See `LLM.beam_search`."""
    if not isinstance(params, BeamSearchParams):
        raise TypeError(f"params must be a BeamSearchParams, got {params!r}")
    at_once = engine.config.max_num_seqs // params.beam_width
    if not at_once:
        raise ValueError(f"beam_width={params.beam_width} must not exceed max_num_seqs={engine.config.max_num_seqs}")
    prompts = as_list(prompts)
    encoded = engine._encode(prompts, [SamplingParams()] * len(prompts))
    searches: list[_Search] = []
    num_unfinished, news = 0, News()
    try:
        engine._loop.open_call(news)
        with tqdm(total=len(encoded), desc="Searching", unit="prompt", disable=not use_tqdm) as progress:
            for start in range(0, len(encoded), at_once):
                group = [_Search(engine, ids.tolist(), params, news) for ids in encoded[start : start + at_once]]
                searches += group
                num_unfinished = len(group)
                engine._loop.add([seq for search in group for seq, _ in search.live], news)
                while num_unfinished:
                    engine._loop.next_news(news)
                    num_unfinished -= 1
                    progress.update()
    finally:
        engine._close_call(news, num_unfinished == 0)
    return [BeamOutput(search.finished[0], outputs=search.finished) for search in searches]


class _Search:
    """The search over one prompt: its live beams, best first, and the best finished hypotheses. Watches the beams."""

    follows = False

    def __init__(self, engine: "LLMEngine", prompt: list[int], params: BeamSearchParams, news: News):
        self.engine, self.params, self.news = engine, params, news
        self.num_prompt_tokens = len(prompt)
        self.max_tokens = min(params.max_tokens, engine.config.max_model_len - len(prompt))
        self.eos = frozenset() if params.ignore_eos else engine.config.eos_token_ids
        # So many that `beam_width` remain when each beam's best tokens are all end-of-sequence ones.
        self.num_candidates = max(2, 1 + len(self.eos)) * params.beam_width
        self.one_step = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, logprobs=self.num_candidates)
        self.finished: list[BeamHypothesis] = []  # best first
        self.live: list[tuple[Sequence, float]] = [(self._sequence(prompt), 0.0)]  # with sums of log-probabilities

    def on_token(self, seq: Sequence) -> None:
        """Does not come: each beam ends after a token."""

    def on_end(self, seq: Sequence) -> None:
        """Once every live beam has run a step, goes on with their best continuations. In the engine's thread."""
        if not self.live or any(beam.finish_reason in (None, "abort") for beam, _ in self.live):
            return
        self._advance()
        if not self.live:
            self.news.put(self)

    def _advance(self) -> None:
        parents, width = self.live, self.params.beam_width
        length = max(len(seq) for seq, _ in parents) - self.num_prompt_tokens
        candidates = [
            (score + logprob, seq, token_id)
            for seq, score in parents
            for entry in seq.logprobs
            for token_id, logprob in entry["top"]
        ]
        candidates.sort(key=lambda candidate: -candidate[0])
        going = []
        for rank, (score, seq, token_id) in enumerate(candidates[: self.num_candidates]):
            if length < self.max_tokens and token_id not in self.eos:
                going.append((score, seq, token_id))
            elif rank < width:
                self._finish(score, [*seq.token_ids[self.num_prompt_tokens : -1], token_id])
        for seq, score in parents:
            if not seq.logprobs:  # the cache could not hold it, even alone
                self._finish(score, seq.token_ids[self.num_prompt_tokens :].tolist())
        self.live = []
        if going and not self._is_decided(going[0][0] / length**self.params.length_penalty):
            for score, seq, token_id in going[:width]:
                child = self._sequence([*seq.token_ids[:-1], token_id])
                self.engine.scheduler.fork(seq, child)
                self.live.append((child, score))
        self.engine.scheduler.drop_held([seq for seq, _ in parents])

    def _sequence(self, token_ids: list[int]) -> Sequence:
        """A hypothesis that runs for one step and then keeps its blocks, for its children."""
        max_len = self.engine.config.max_model_len
        seq = Sequence(self.engine._new_ids(1), token_ids, self.one_step, max_len=max_len, keeps_blocks=True)
        seq.watcher = self
        return seq

    def _finish(self, total: float, token_ids: list[int]) -> None:
        has_stopped = bool(token_ids) and token_ids[-1] in self.eos
        text = decode(self.engine.tokenizer, token_ids[:-1] if has_stopped else token_ids)
        score = total / max(len(token_ids), 1) ** self.params.length_penalty
        reason = "stop" if has_stopped else "length"
        self.finished.append(BeamHypothesis(text=text, token_ids=token_ids, score=score, finish_reason=reason))
        self.finished.sort(key=lambda hypothesis: -hypothesis["score"])
        del self.finished[self.params.beam_width :]

    def _is_decided(self, best_live: float) -> bool:
        is_full = len(self.finished) == self.params.beam_width
        return is_full and (self.params.early_stopping or best_live <= self.finished[-1]["score"])
