"""The shape of what users get back: dicts, ready for `json.dumps`, whose keys are attributes too."""


class Record(dict):
    """A dict with `record.key` for `record["key"]`."""

    def __getattr__(self, name: str) -> object:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name!r} here, there are {sorted(self)}") from None


class TokenLogprob(Record):
    """One token under the model's own distribution (before temperature, penalties and filters)."""

    token_id: int  # its number in the vocabulary
    token: str  # its text; those of a completion add up to what its tokens decode to, ends of characters included
    logprob: float  # the logarithm of its probability
    rank: int  # 1 is the most likely token
    # `[token_id, logprob, text]` of the most likely tokens, as many as were asked for, the likeliest first.
    top: list[list]


class CompletionOutput(Record):
    """One completion of a prompt."""

    index: int  # below `n`
    text: str  # without special tokens (see `skip_special_tokens`) and without what stopped it
    token_ids: list[int]  # everything that was sampled, the token that ended it included
    # "stop", "length" (also when the cache could not hold the sequence even alone), "abort", or "error"
    finish_reason: str
    stop_reason: int | str | None  # which of `stop_token_ids` or `stop` ended it; None for end of sequence or a length
    logprobs: list[TokenLogprob] | None  # of each of `token_ids`; None unless asked for
    cumulative_logprob: float | None  # sum over `token_ids`; None unless `logprobs` were asked for
    error: str  # what it failed of; there only with `finish_reason` "error"


class RequestOutput(CompletionOutput):
    """What `generate` returns for a prompt: its first completion, and what belongs to the prompt."""

    prompt: str | None  # its text; None if token ids were given
    prompt_token_ids: list[int]  # what the prompt was computed as
    prompt_logprobs: list[TokenLogprob | None] | None  # one for each token; the first has nothing before it and is None
    num_cached_tokens: int  # of the prompt, whose keys and values the prefix cache had when the request was admitted
    outputs: list[CompletionOutput]  # all `n` completions
    request_id: int  # from `step` only: what `add_request` returned
    index: int  # 0; from `generate_unordered` its place among the prompts


class StreamDelta(Record):
    """A piece of a completion, as `generate_stream` yields it."""

    index: int  # of the prompt
    completion: int  # below `n`
    text: str  # what is new of the completion's text
    token_ids: list[int]  # what is new of its tokens
    finish_reason: str | None  # None until the last piece
    stop_reason: int | str | None  # as of a completion; None until the last piece
    error: str  # there only with `finish_reason` "error"


class BeamHypothesis(Record):
    """One finished hypothesis of a beam search."""

    text: str  # without special tokens
    token_ids: list[int]  # with the token that ended it
    score: float  # sum of the log-probabilities, divided by `len(token_ids) ** length_penalty`
    finish_reason: str  # "stop" or "length"


class BeamOutput(BeamHypothesis):
    """What `beam_search` returns for a prompt: its best hypothesis."""

    outputs: list[BeamHypothesis]  # all that were kept, best first


class Score(Record):
    """How likely a given completion is, as `score` returns it."""

    logprob: float  # of the whole completion: the sum over its tokens
    is_greedy: bool  # whether each of its tokens is the most likely one, so that greedy decoding begins with it
    num_tokens: int  # of the completion
    token_ids: list[int]  # what it was computed as
    token_logprobs: list[float]  # of each, given the prompt and those before it


class GenerationError(RuntimeError):
    """Some requests of a call failed of what concerns them alone. `outputs` has those of all its prompts."""

    def __init__(self, message: str, outputs: list[RequestOutput]):
        super().__init__(message)
        self.outputs = outputs
