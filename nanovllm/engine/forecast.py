"""Whether the cache will hold what is admitted until it ends: an offline engine knows how long sequences may get."""

import numpy as np

from nanovllm.engine.block_manager import Block, BlockManager
from nanovllm.engine.sequence import Sequence

Load = tuple[int, int, float]  # of a sequence: blocks held, tokens, and tokens expected to come


def learn_output_ratio(ratio: float, seq: Sequence) -> float:
    """The share of `max_tokens` that requests use, a moving average, after one more has ended."""
    allowed = seq.max_len - seq.num_prompt_tokens
    return ratio + 0.1 * (seq.num_completion_tokens / allowed - ratio) if allowed > 0 else ratio


class Forecast:
    """Of one step, for the sequences that run then and those that are added.

    Every `max_tokens` is known, so the blocks in use can be foreseen: just before the i-th sequence to finish does so,
    those that finish later have grown by as many tokens and those before have gone. The largest such sum, with lengths
    scaled by `output_ratio`, must fit. Where the guess is too low, preemption makes room.
    """

    def __init__(self, manager: BlockManager, running: list[Sequence], output_ratio: float):
        self._manager, self._output_ratio = manager, output_ratio
        self._loads = [self._load_of(seq, len(seq.block_table)) for seq in running]
        # Blocks that all of them together will take beside those they hold, if none ended before.
        self._growth = sum(map(self._growth_of, self._loads))

    def add(self, seq: Sequence) -> None:
        """`seq`, which has its blocks, runs too."""
        self._loads.append(self._load_of(seq, len(seq.block_table)))
        self._growth += self._growth_of(self._loads[-1])

    def admits(self, seq: Sequence, hits: list[Block]) -> bool:
        """Whether `seq`, which would begin with these blocks, will probably fit beside the others until it ends."""
        manager = self._manager
        blocks_now = manager.num_blocks_for(len(seq)) - len(hits)
        available = manager.num_free_blocks - sum(block.ref_count == 0 for block in hits)
        new = self._load_of(seq, len(hits))
        if blocks_now > available or self._growth + self._growth_of(new) <= available:
            return blocks_now <= available  # plainly, without a look at each
        held, num_tokens, remaining = np.array([*self._loads, new]).T
        order = np.argsort(remaining)
        num_tokens, remaining = num_tokens[order], remaining[order]
        num_left = np.arange(len(order), 0, -1)
        tokens_left = num_tokens[::-1].cumsum()[::-1] + num_left * remaining  # of the i-th and all that outlive it
        blocks_left = tokens_left / manager.block_size + 0.5 * num_left  # the last block is half full on average
        return (blocks_left - held.sum()).max() <= available

    def _load_of(self, seq: Sequence, num_held: int) -> Load:
        return num_held, len(seq), max((seq.max_len - len(seq)) * self._output_ratio, 1)

    def _growth_of(self, load: Load) -> float:
        num_held, num_tokens, remaining = load
        return (num_tokens + remaining) / self._manager.block_size + 0.5 - num_held
