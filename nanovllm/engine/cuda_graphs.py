"""The decode step as one launch for all of a model's kernels: CUDA graphs, and recordings of the CPU's.

A graph reads its inputs where they were when it was captured, so each step writes them there, padded to the graph's
size. Knows nothing of models.
Legend: S sequences, N rows of a graph, B block-table columns.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from nanovllm.engine.batch import Batch
from nanovllm.kernels.cpu.compiled import Memory, Recording
from nanovllm.utils.context import Context, Step, use_step
from nanovllm.utils.device import ALIGNMENT, upload
from nanovllm.utils.timeline import mark

MOST_CELLS = 512  # of the block tables that are sent one by one; if more have changed, whole rows are
LARGEST = 512  # with more sequences the GPU is busy for longer than the launches take
INPUTS = {  # of a batch: dtype, and what stands in rows that are not used, which so store nothing and read nothing
    "input_ids": (np.int64, 0),
    "positions": (np.int64, 0),
    "slot_mapping": (np.int64, -1),
    "context_lens": (np.int32, 0),
}
Model = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Up to `max_num_seqs` and 512: 1, 2, 4, 8, then steps of 16, from 128 on of a quarter of the power of two below.

    Fewer than a fifth of the rows of a large batch are padding, and in a small one it is the weights that take time.
    """
    top, sizes, size = min(max_num_seqs, LARGEST), [1, 2, 4, 8], 16
    while size < top:
        sizes.append(size)
        size += max(16, 2 ** (size.bit_length() - 3))
    return [size for size in sizes if size < top] + [top]


class DecodeGraphs:
    """For ascending `sizes` N; captured largest first, so that the smaller ones fit into its memory.

    `model` makes [N, hidden_size] of [N] token ids and positions. Logits stay outside: one launch, only for S rows.
    `max_blocks` is B, of a sequence at its full length.
    """

    def __init__(self, model: Model, sizes: list[int], max_blocks: int, device: torch.device, show_progress: bool):
        self.sizes, self._inputs = sizes, _Inputs(sizes[-1], max_blocks, device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        empty = np.zeros(0)
        nothing = Batch(empty, empty, empty, empty, block_tables=np.zeros((0, max_blocks), np.int32))
        pool = None
        with torch.inference_mode():
            for size in tqdm(sizes[::-1], "Capturing CUDA graphs", unit="graph", disable=not show_progress):
                graph, output = capture(partial(_run, model, *self._inputs.write(nothing, size)), pool)
                pool = graph.pool()
                self._graphs[size] = graph, output

    def replay(self, batch: Batch, last_tokens: torch.Tensor | None = None) -> torch.Tensor:
        """[S, hidden_size] of at most `sizes[-1]` sequences; valid until the next replay.

        `last_tokens` are those that `batch.sources` refers to.
        """
        num_seqs = len(batch.context_lens)
        size = next(size for size in self.sizes if size >= num_seqs)
        take_samples(self._inputs.write(batch, size)[0], batch.sources, last_tokens)
        mark("upload")
        graph, output = self._graphs[size]
        graph.replay()
        return output[:num_seqs]


class RecordedSteps:
    """The same on a CPU, made for each number of sequences when it first decodes: to record a step costs no time.

    All that `model` does must be the CPU's kernels.
    """

    def __init__(self, model: Model, max_num_seqs: int, max_blocks: int):
        self.sizes = range(1, max_num_seqs + 1)
        self._model, self._inputs = model, _Inputs(max_num_seqs, max_blocks, torch.device("cpu"))
        self._memory = Memory(max_num_seqs)
        self._recordings: dict[int, Recording] = {}

    def replay(self, batch: Batch, last_tokens: torch.Tensor | None = None) -> torch.Tensor:
        """As `DecodeGraphs.replay`."""
        size = len(batch.context_lens)
        inputs = self._inputs.write(batch, size)
        take_samples(inputs[0], batch.sources, last_tokens)
        mark("upload")
        if size in self._recordings:
            return self._recordings[size].replay()
        self._recordings[size] = Recording(partial(_run, self._model, *inputs), self._memory)
        return self._recordings[size].output


class _Inputs:
    """Where graphs and recordings of up to `max_size` rows read their batch."""

    def __init__(self, max_size: int, max_blocks: int, device: torch.device):
        self._device = device
        num_bytes = max_size * (3 * 8 + 4) + (len(INPUTS) + 1) * ALIGNMENT
        self._buffer = torch.empty(num_bytes + 12 * MOST_CELLS, dtype=torch.uint8, device=device)
        self._tables = torch.zeros(max_size, max_blocks, dtype=torch.int32, device=device)
        self._sent = np.zeros((max_size, max_blocks), dtype=np.int32)  # what they hold

    def write(self, batch: Batch, size: int) -> list[torch.Tensor]:
        """The batch in `size` rows; for each size at its own places, which are the same each time.

        Of the block tables goes what changes; rows that are not used keep what they had.
        """
        padded = []
        for name, (dtype, padding) in INPUTS.items():
            array = getattr(batch, name)
            padded.append(np.full(size, padding, dtype))
            padded[-1][: len(array)] = array
        sent = self._sent[: len(batch.block_tables)]
        cells = np.flatnonzero(sent != batch.block_tables)
        if len(cells) <= MOST_CELLS:
            changes = [cells, batch.block_tables.take(cells)]
            *inputs, to, block_ids = upload([*padded, *changes], self._device, self._buffer)
            self._tables.view(-1).index_copy_(0, to, block_ids)
        else:
            inputs = upload(padded, self._device, self._buffer)
            upload([batch.block_tables], self._device, self._tables.view(-1).view(torch.uint8))
        sent[:] = batch.block_tables
        return [*inputs, self._tables[:size]]


def take_samples(input_ids: torch.Tensor, sources: np.ndarray | None, last_tokens: torch.Tensor | None) -> None:
    """Fills into [T] `input_ids` those [R] tokens of the last step that the host has not read: `Batch.sources`."""
    if sources is None:
        return
    if len(sources) == len(last_tokens) and (sources == np.arange(len(sources))).all():  # the same sequences again
        input_ids[: len(sources)].copy_(last_tokens)
        return
    rows = np.flatnonzero(sources >= 0)
    to, by = upload([rows, sources[rows]], last_tokens.device)
    input_ids.index_copy_(0, to, last_tokens.index_select(0, by).to(input_ids.dtype))


def _run(
    model: Model, input_ids: torch.Tensor, positions: torch.Tensor, slot_mapping: torch.Tensor, *cache: torch.Tensor
) -> torch.Tensor:
    decode = Context(None, None, 1, 0, *cache)
    with use_step(Step(decode, None, slot_mapping)):
        return model(input_ids, positions)


def capture(work: Callable[[], torch.Tensor], pool: object) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of what `work` launches, and its output, which each replay writes again."""
    work()  # compiles and allocates what must exist before
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):  # other threads watch collectives
        output = work()
    return graph, output
