"""The progress bar of a call."""

from tqdm import tqdm

from nanovllm.engine.engine_loop import EngineLoop
from nanovllm.engine.request import Request
from nanovllm.sampling_params import SamplingParams

INTERVAL = 0.2  # seconds between two looks at the engine while no request ends


class Progress:
    """Counts the prompts that are finished, and shows what the engine computes a second, in prefill and decode."""

    def __init__(self, params: list[SamplingParams], loop: EngineLoop, is_shown: bool):
        self.interval = INTERVAL if is_shown else None
        self._loop = loop
        self._before = dict(loop.num_tokens), dict(loop.seconds)
        self._bar = tqdm(total=len(params), desc="Generating", unit="prompt", disable=not is_shown)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()

    def update(self, request: Request) -> None:
        """Counts a request that has ended."""
        self._bar.update()
        self.show()

    def show(self) -> None:
        """Refreshes the rates."""
        if self._bar.disable:
            return
        tokens, seconds = self._before
        rates = [
            (self._loop.num_tokens[kind] - tokens[kind]) / max(self._loop.seconds[kind] - seconds[kind], 1e-9)
            for kind in (True, False)
        ]
        self._bar.set_postfix_str(f"prefill {rates[0]:.0f} tok/s, decode {rates[1]:.0f} tok/s")
