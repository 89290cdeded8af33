"""A step as one launch for all of a model's kernels: CUDA graphs of decode steps, and recordings of a CPU's small ones.

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
MOST_RECORDINGS = 1024  # of some 50 KB
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

    def takes(self, batch: Batch) -> bool:
        """Whether there is a graph for such a step."""
        return batch.cu_seqlens_q is None and len(batch.positions) <= self.sizes[-1]

    def replay(self, batch: Batch, last_tokens: torch.Tensor | None = None) -> torch.Tensor:
        """[T, hidden_size] of a batch that it takes; valid until the next replay.

        `last_tokens` are those that `batch.sources` refers to.
        """
        num_seqs = len(batch.context_lens)
        size = next(size for size in self.sizes if size >= num_seqs)
        take_samples(self._inputs.write(batch, size)[1], batch.sources, last_tokens)
        mark("upload")
        graph, output = self._graphs[size]
        graph.replay()
        return output[:num_seqs]


class RecordedSteps:
    """The same on a CPU, for steps of at most `max_tokens` of any kind, of up to `max_tokens` rows of the block tables.

    A recording is for T tokens of S rows, and made when these first come together: that takes no time. All that `model`
    does must be the CPU's kernels.
    """

    def __init__(self, model: Model, max_tokens: int, max_blocks: int):
        self._model, self._inputs = model, _Inputs(max_tokens, max_blocks, torch.device("cpu"))
        self._memory = Memory(max_tokens)
        self._recordings: dict[tuple[int, int], Recording] = {}

    def takes(self, batch: Batch) -> bool:
        """As `DecodeGraphs.takes`. Prompts without a prefix in the cache come without block tables."""
        return len(batch.positions) <= self._memory.max_rows and batch.block_tables is not None

    def replay(self, batch: Batch, last_tokens: torch.Tensor | None = None) -> torch.Tensor:
        """As `DecodeGraphs.replay`."""
        size = len(batch.positions), len(batch.context_lens)
        inputs = self._inputs.write(batch)
        take_samples(inputs[1], batch.sources, last_tokens)
        mark("upload")
        if size in self._recordings:
            return self._recordings[size].replay()
        if len(self._recordings) == MOST_RECORDINGS:
            del self._recordings[next(iter(self._recordings))]
        self._recordings[size] = Recording(partial(_run, self._model, *inputs), self._memory)
        return self._recordings[size].output


class _Inputs:
    """Where graphs and recordings of up to `max_size` rows read their batch."""

    def __init__(self, max_size: int, max_blocks: int, device: torch.device):
        self._device = device
        num_bytes = max_size * (3 * 8 + 2 * 4) + (len(INPUTS) + 2) * ALIGNMENT
        self._buffer = torch.empty(num_bytes + 12 * MOST_CELLS, dtype=torch.uint8, device=device)
        self._tables = torch.zeros(max_size, max_blocks, dtype=torch.int32, device=device)
        self._sent = np.zeros((max_size, max_blocks), dtype=np.int32)  # what they hold

    def write(self, batch: Batch, size: int | None = None) -> list[torch.Tensor]:
        """The arguments of `_run` for the batch, for the same sizes at the same places each time.

        A decode is padded to `size` rows, if that is given. Of the block tables goes what changes; rows that are not
        used keep what they had.
        """
        arrays = [getattr(batch, name).astype(dtype, copy=False) for name, (dtype, _) in INPUTS.items()]
        if size is not None:
            paddings = (padding for _, padding in INPUTS.values())
            arrays = [_pad(array, size, padding) for array, padding in zip(arrays, paddings, strict=True)]
        if len(batch.positions) > len(batch.context_lens):  # else its chunks, if any, are of one token
            arrays.append(batch.all_bounds)
        sent = self._sent[: len(batch.block_tables)]
        cells = np.flatnonzero(sent != batch.block_tables)
        if len(cells) <= MOST_CELLS:
            changes = [cells, batch.block_tables.take(cells)]
            *inputs, to, block_ids = upload([*arrays, *changes], self._device, self._buffer)
            self._tables.view(-1).index_copy_(0, to, block_ids)
        else:
            inputs = upload(arrays, self._device, self._buffer)
            upload([batch.block_tables], self._device, self._tables.view(-1).view(torch.uint8))
        sent[:] = batch.block_tables
        return [self._tables[: size or len(sent)], *inputs]


def _pad(array: np.ndarray, size: int, padding: int) -> np.ndarray:
    return np.concatenate([array, np.full(size - len(array), padding, array.dtype)])


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
    model: Model, tables: torch.Tensor, input_ids: torch.Tensor, positions: torch.Tensor, slot_mapping: torch.Tensor,
    context_lens: torch.Tensor, bounds: torch.Tensor | None = None
) -> torch.Tensor:  # fmt: skip
    """A step of single tokens; or with the bounds of all rows, a token or a chunk each."""
    context = Context(bounds, context_lens=context_lens, block_tables=tables)
    step = Step(context, None, slot_mapping) if bounds is None else Step(None, context, slot_mapping)
    with use_step(step):
        return model(input_ids, positions)


def capture(work: Callable[[], torch.Tensor], pool: object) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of what `work` launches, and its output, which each replay writes again."""
    work()  # compiles and allocates what must exist before
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):  # other threads watch collectives
        output = work()
    return graph, output
