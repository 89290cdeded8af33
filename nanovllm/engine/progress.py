"""The progress bar of a call: what is done, what the engine computes a second, and when it will be over."""

from time import perf_counter

from tqdm import tqdm

from nanovllm.engine.call_loop import CallLoop
from nanovllm.engine.request import Request
from nanovllm.sampling_params import SamplingParams

INTERVAL = 0.2  # seconds between two looks at the engine while no request ends
FORMAT = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}"  # useful at 80 columns; the bar takes what is left


class Progress:
    """Counts the prompts that are finished. How long it still takes is estimated by tokens, as prompts differ."""

    def __init__(self, params: list[SamplingParams], max_len: int, loop: CallLoop, is_shown: bool):
        self.interval = INTERVAL if is_shown else None
        self._loop = loop
        self._tokens, self._seconds = dict(loop.num_tokens), dict(loop.seconds)  # before this call
        self._start = perf_counter()
        self._max_tokens = [p.n * min(p.max_tokens or max_len, max_len) for p in params]
        self._most_left = sum(self._max_tokens)  # tokens that unfinished requests may come to
        self._num_finished = 0  # tokens of those that are finished
        self._bar = tqdm(
            total=len(params), desc="Generating", disable=not is_shown, bar_format=FORMAT, dynamic_ncols=True
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()

    def update(self, request: Request) -> None:
        """Counts a request that has ended."""
        self._most_left -= self._max_tokens[request.index]
        self._num_finished += sum(seq.num_completion_tokens for seq in request.seqs)
        self._bar.update()
        self.show()

    def show(self, num_tokenized: int | None = None) -> None:
        """Refreshes the rates. While prompts are still tokenized, it says of how many that is done."""
        if self._bar.disable:
            return
        tokens = {kind: self._loop.num_tokens[kind] - self._tokens[kind] for kind in (True, False)}
        rates = {kind: tokens[kind] / max(self._loop.seconds[kind] - self._seconds[kind], 1e-9) for kind in tokens}
        text = f"{self._time_left(tokens[False])} left, prefill {rates[True]:.0f}, decode {rates[False]:.0f} tok/s"
        if num_tokenized is not None and num_tokenized < self._bar.total:
            text = f"{num_tokenized} tokenized, prefill {rates[True]:.0f} tok/s"
        self._bar.set_postfix_str(text)

    def _time_left(self, num_decoded: int) -> str:
        """By the mean rate so far, in tokens; of `max_tokens` requests are taken to use what those before have used."""
        expected = self._most_left * self._loop.output_ratio - max(num_decoded - self._num_finished, 0)
        if not num_decoded:
            return "?"
        return tqdm.format_interval(max(expected, 0) / num_decoded * (perf_counter() - self._start))
