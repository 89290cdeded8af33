"""How likely given completions are: sequences that have theirs from the start, computed in one prefill each."""

import reprlib
from array import array
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from nanovllm.engine.call_loop import News
from nanovllm.engine.inputs import SLICE, Prompt, Prompts, Rendered, as_list, check_ids, tokenize
from nanovllm.engine.request import Request, as_integers
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import Score
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import LLMEngine

Completion = str | SequenceOf[int]
Completions = SequenceOf[Completion | SequenceOf[Completion]]  # of each prompt one, or several
Place = tuple[int, int]  # of a score: the prompt's, and the completion's among its own
SCORED = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=0)


def score(engine: "LLMEngine", prompts: Prompts, completions: Completions, use_tqdm: bool) -> list[Score | list[Score]]:
    """See `LLM.score`."""
    prompts, given = as_list(prompts), _as_lists(completions)
    if len(given) != len(prompts):
        raise ValueError(f"completions has {len(given)} entries for {len(prompts)} prompts; give each one or a list")
    scores: list[list[Score | None]] = [[None] * len(own) for own in given]
    places: dict[int, Place] = {}  # by sequence
    num_unfinished, news = 0, News()
    try:
        engine._loop.open_call(news)
        with tqdm(total=sum(map(len, given)), desc="Scoring", unit="completion", disable=not use_tqdm) as progress:
            for start in range(0, len(prompts), SLICE):
                part = slice(start, start + SLICE)
                requests = _requests(engine, _encode(engine, prompts[part], given[part], start), news, places)
                engine._loop.add([seq for request in requests for seq in request.seqs], news)
                num_unfinished += len(requests)
            while num_unfinished:
                request = engine._loop.next_news(news)
                num_unfinished -= 1
                for seq in request.seqs:
                    i, j = places.pop(seq.seq_id)
                    scores[i][j] = _score(seq)
                progress.update(len(request.seqs))
    finally:
        engine._close_call(news, num_unfinished == 0)
    return [own[0] if _is_one(item) else own for item, own in zip(completions, scores, strict=True)]


def _is_one(item: Completion | SequenceOf[Completion]) -> bool:
    is_list = isinstance(item, (SequenceOf, np.ndarray)) and not isinstance(item, str)
    return not is_list or (len(item) > 0 and isinstance(item[0], (int, np.integer)))


def _as_lists(completions: Completions) -> list[dict[str, Completion]]:
    """Each prompt's completions, by what they are called in errors."""
    if isinstance(completions, str) or not isinstance(completions, SequenceOf):
        raise TypeError(f"completions must be a list with an entry for each prompt, got {reprlib.repr(completions)}")
    return [
        {f"completions[{i}]": item} if _is_one(item) else {f"completions[{i}][{j}]": one for j, one in enumerate(item)}
        for i, item in enumerate(completions)
    ]


def _encode(
    engine: "LLMEngine", prompts: list[Prompt], given: list[dict[str, Completion]], start: int
) -> list[tuple[Place, np.ndarray, np.ndarray]]:
    """Token ids of each pair of a prompt and a completion, checked, as int32; the first prompt is `prompts[start]`."""
    config, pairs, texts = engine.config, [], {}
    for i, (prompt, own) in enumerate(zip(prompts, given, strict=True), start):
        for j, (name, completion) in enumerate(own.items()):
            is_whole = isinstance(prompt, str) and isinstance(completion, str)
            if is_whole:
                context, rest = prompt.rstrip(), prompt + completion
            else:
                context, rest = prompt, Rendered(completion) if isinstance(completion, str) else completion
            pairs.append(((i, j), name, context, rest, is_whole))
            texts |= {(type(text), text): text for text in (context, rest) if isinstance(text, str)}
    with engine._lock:
        tokenized = dict(zip(texts, tokenize(list(texts.values()), config, engine.tokenizer), strict=True))
    encoded = []
    for (i, j), name, context, rest, is_whole in pairs:
        context, rest = (tokenized[type(x), x] if isinstance(x, str) else x for x in (context, rest))
        context = check_ids(context, f"prompts[{i}]", SCORED, config)
        completion = check_ids(rest[len(context) :] if is_whole else rest, name, SCORED, config)
        check_ids(np.concatenate([context, completion]), f"prompts[{i}] with {name}", SCORED, config)
        encoded.append(((i, j), context, completion))
    return encoded


def _requests(
    engine: "LLMEngine", encoded: list[tuple[Place, np.ndarray, np.ndarray]], news: News, places: dict[int, Place]
) -> list[Request]:
    """One for all completions of equal prompts, whose sequences share what is computed of these."""
    requests: dict[bytes, Request] = {}
    first_id = engine._new_ids(len(encoded))
    for seq_id, (place, context, completion) in enumerate(encoded, first_id):
        request = requests.setdefault(context.tobytes(), Request(place[0], None, news))
        source = request.seqs[0] if request.seqs else None
        seq = Sequence(seq_id, array("i", context.tobytes()), SCORED, source=source)
        seq.token_ids.frombytes(completion.tobytes())
        request.watch(seq)
        places[seq_id] = place
    return list(requests.values())


def _score(seq: Sequence) -> Score:
    logprobs = [entry["logprob"] for entry in seq.prompt_logprobs]
    return Score(
        logprob=sum(logprobs),
        is_greedy=all(entry["rank"] == 1 for entry in seq.prompt_logprobs),
        num_tokens=len(logprobs),
        token_ids=as_integers(seq.token_ids[seq.num_prompt_tokens :]),
        token_logprobs=logprobs,
    )
