"""Paged attention in Triton for CUDA GPUs: nothing to compile or to install beside PyTorch, no tuning at run time.

FlashAttention-2's online softmax in base 2 (Dao, 2023, arXiv:2307.08691), in two kernels. One takes many queries of a
head over all keys; the other a few queries with all heads that share their keys, over a stretch of them, so that few
sequences with long prefixes fill the GPU: decodes, drafts, the ends of prompts whose prefix is cached. In a step with
both kinds each kernel leaves the other's sequences out. What varies from step to step never specialises a kernel, and
no launch waits for the device, so that a CUDA graph can hold it.
Legend: T tokens in the step, S sequences, H/KH query/KV heads, D head_dim, B block-table columns, P splits.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.utils.context import Context

MAX_SPLITS = 64
MERGED = 16  # splits that are merged at a time
FEW = 64  # queries of a sequence, up to which its keys are split: a block's worth
ROWS_PER_SM = 256  # wanted when keys are split: some programs to run beside each other, the rest to even out lengths
RAGGED = ["slots", "cu_seqlens_q", "cu_seqlens_k", "context_lens", "block_tables", "num_seqs", "columns", "most"]
RAGGED += ["num_splits"]


def store_kvcache(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes [T, KH, D] keys and values to their slots of [blocks, block_size, KH, D] caches; -1 is not stored."""
    k, v = k.flatten(1), v.flatten(1)  # views: the heads of a token are contiguous
    size, block = k.shape[1], triton.next_power_of_2(k.shape[1])
    _store_kernel[(len(k),)](k, v, k_cache, v_cache, slot_mapping, k.stride(0), v.stride(0), size, block)


def copy_blocks(k_cache: Tensor, v_cache: Tensor, copies: Tensor) -> None:
    """See `nanovllm.kernels.attention.AttentionBackend`; of [blocks, block_size, KH, D] caches."""
    _, block_size, num_kv_heads, head_dim = k_cache.shape
    row = num_kv_heads * head_dim
    _copy_kernel[(triton.cdiv(block_size * row, 1024),)](
        k_cache, v_cache, copies, len(copies), ROW=row, BLOCK=block_size * row, CHUNK=1024
    )


class TritonAttention:
    """See `nanovllm.kernels.attention.AttentionBackend`. Caches are contiguous; head_dim is 16 to 256."""

    block_size = 64  # a tile of keys is in one block

    @staticmethod
    def cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        return num_blocks, block_size, num_kv_heads, head_dim

    store = staticmethod(store_kvcache)
    copy_blocks = staticmethod(copy_blocks)

    @staticmethod
    def prefill(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, context: Context) -> Tensor:
        out = q.new_empty(q.shape)
        if context.block_tables is None:
            _attend_whole(q, k, v, out, context, block_size=0)
            return out
        if context.max_seqlen_q > FEW:
            _attend_whole(q, k_cache.flatten(0, 1), v_cache.flatten(0, 1), out, context, k_cache.shape[1])
        _attend_split(q, k_cache, v_cache, out, context)
        return out

    @staticmethod
    def decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, context: Context) -> Tensor:
        out = q.new_empty(q.shape)
        _attend_split(q, k_cache, v_cache, out, context)
        return out


def _attend_whole(q: Tensor, k: Tensor, v: Tensor, out: Tensor, context: Context, block_size: int) -> None:
    """Of a cache with block tables, which has a `block_size`, only the sequences with more than FEW queries."""
    (num_tokens, num_heads, head_dim), group = q.shape, q.shape[1] // k.shape[1]
    tables = context.block_tables if block_size else context.cu_seqlens_q  # not a table, but neither is it read
    q, k, v = (x.flatten(1) for x in (q, k, v))  # views: the heads of a token are contiguous
    num_seqs = len(context.cu_seqlens_q) - 1
    config = prefill_config(_device(q.device)[0], head_dim, q.dtype)
    _prefill_kernel[num_heads, num_tokens // config["ROWS"] + num_seqs](
        q, k, v, out, context.cu_seqlens_q, context.cu_seqlens_k, tables, num_seqs, tables.stride(0),
        q.stride(0), k.stride(0), v.stride(0),
        H=num_heads, GROUP=group, D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_SIZE=block_size,
        FEW=FEW if block_size else 0, **config
    )  # fmt: skip


def _attend_split(q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, context: Context) -> None:
    """Only the sequences with at most FEW queries; without `cu_seqlens_q` each has one."""
    (_, num_heads, head_dim), (_, block_size, num_kv_heads, _) = q.shape, k_cache.shape
    bounds, lens, tables = context.cu_seqlens_q, context.context_lens, context.block_tables
    most, group = 1 if bounds is None else min(context.max_seqlen_q, FEW), num_heads // num_kv_heads
    capability, num_sms = _device(q.device)
    config = split_config(capability, head_dim, q.dtype, group, is_decode=bounds is None)
    rows, tile = config["ROWS"], config["TILE"]
    num_pieces = len(tables) * triton.cdiv(most, rows // group)
    # From what a CUDA graph fixes: the same for every batch that a graph is replayed for.
    wanted = triton.cdiv(ROWS_PER_SM * num_sms, num_pieces * num_kv_heads * rows)
    shortest = tile * rows // 16  # of which the keys are more to read than the partial outputs
    num_splits = min(wanted, triton.cdiv(tables.shape[1] * block_size, shortest), MAX_SPLITS)
    num_parts = len(tables) * most * num_heads * num_splits if num_splits > 1 else 0
    partial = q.new_empty(num_parts, head_dim, dtype=torch.float32)
    log_sums = q.new_empty(num_parts, dtype=torch.float32)
    shape = {"D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "FEW": FEW}
    q = q.flatten(1)
    _split_kernel[num_kv_heads, num_pieces, num_splits](
        q, k_cache, v_cache, out, partial, log_sums, bounds, lens, tables, tables.stride(0), most, q.stride(0),
        KH=num_kv_heads, GROUP=group, BLOCK_SIZE=block_size, **shape, **config
    )  # fmt: skip
    if num_splits > 1:
        _merge_splits_kernel[num_heads, len(tables) * most](
            partial, log_sums, out, bounds, lens, most, num_splits, H=num_heads, TILE=tile, CHUNK=MERGED, **shape
        )


def prefill_config(capability: tuple[int, int], head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Queries a program (ROWS), keys a step (TILE), warps and pipeline stages: what fits and spills no register.

    On Hopper and the larger Blackwell chips a program may have 227 KB of shared memory, on the smallest others 99 KB.
    """
    width = max(triton.next_power_of_2(head_dim), 32)
    if dtype == torch.float32:  # no tensor cores
        return {"ROWS": 16, "TILE": 16, "num_warps": min(width // 8, 16), "num_stages": 3}
    if capability[0] in (9, 10):
        tiles = {32: 128, 64: 128, 128: 64, 256: 32 if capability[0] == 9 else 64}
    else:
        tiles = {32: 32, 64: 64, 128: 32, 256: 16}
    stages = 2 if width == 256 and capability[0] == 10 else 3
    return {"ROWS": 128 if width <= 128 else 64, "TILE": tiles[width], "num_warps": 8, "num_stages": stages}


def split_config(
    capability: tuple[int, int], head_dim: int, dtype: torch.dtype, group: int, is_decode: bool
) -> dict[str, int]:
    """The same where keys are split; for a decode as few rows as tensor cores take, else as Hopper's take at once.

    Three programs of a decode run on a multiprocessor of Hopper, each with two tiles under way.
    """
    width, rows = max(triton.next_power_of_2(head_dim), 32), triton.next_power_of_2(group)
    if dtype == torch.float32:
        return {"ROWS": max(16, rows), "TILE": 16, "num_warps": min(width // 8, 16), "num_stages": 2}
    tile, num_warps = 64 if width <= 128 else 32, 4
    if not is_decode and capability[0] not in (9, 10):
        tile, num_warps = 64 if width <= 128 else 16, 8
    return {"ROWS": max(16 if is_decode else 64, rows), "TILE": tile, "num_warps": num_warps, "num_stages": 3}


@functools.cache
def _device(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors; for Triton's interpreter those of a small one."""
    if device.type == "cpu":
        return (9, 0), 4
    return torch.cuda.get_device_capability(device), torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=RAGGED)
def _store_kernel(
    k, v, k_cache, v_cache, slots, k_stride, v_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A program copies one token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    cols = tl.arange(0, BLOCK)
    tl.store(k_cache + slot * SIZE + cols, tl.load(k + token * k_stride + cols, mask=cols < SIZE), mask=cols < SIZE)
    tl.store(v_cache + slot * SIZE + cols, tl.load(v + token * v_stride + cols, mask=cols < SIZE), mask=cols < SIZE)


@triton.jit(do_not_specialize=["num_copies"])
def _copy_kernel(k_cache, v_cache, copies, num_copies, ROW: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """A program does all copies of the same CHUNK elements of blocks, so that they come one after another."""
    elements = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    for i in range(num_copies):
        source, target = tl.load(copies + 3 * i) * BLOCK, tl.load(copies + 3 * i + 1) * BLOCK
        mask = elements < tl.load(copies + 3 * i + 2) * ROW
        keys = tl.load(k_cache + source + elements, mask=mask)
        values = tl.load(v_cache + source + elements, mask=mask)
        tl.store(k_cache + target + elements, keys, mask=mask)
        tl.store(v_cache + target + elements, values, mask=mask)
        tl.debug_barrier()  # another thread may load next what this one has stored


@triton.jit
def _key_rows(first_row, block_table, tile, end, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Where keys tile to tile + TILE are: from `first_row` on, or through the block table where there is one."""
    keys = tile + tl.arange(0, TILE)
    if BLOCK_SIZE == 0:
        rows = first_row + keys
    elif BLOCK_SIZE % TILE == 0:  # all in one block
        block = tl.load(block_table + tile // BLOCK_SIZE, mask=tile < end, other=0)
        rows = block.to(tl.int64) * BLOCK_SIZE + keys % BLOCK_SIZE
    else:
        blocks = tl.load(block_table + keys // BLOCK_SIZE, mask=keys < end, other=0)
        rows = blocks.to(tl.int64) * BLOCK_SIZE + keys % BLOCK_SIZE
    return rows


@triton.jit
def _attend(
    q, k, v, k_stride, v_stride, first_row, block_table, start, end, last, highest, total, acc,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Takes queries [rows, D] over keys start to end; returns each row's highest score, sum of weights, and output.

    `last` is the last key that each row may see. One that sees none in the first tile of all needs a finite `highest`.
    """
    scale: tl.constexpr = 1.4426950408889634 * D**-0.5  # of base 2
    cols = tl.arange(0, q.shape[1])
    rows = _key_rows(first_row, block_table, start, end, BLOCK_SIZE, TILE)
    for tile in range(start, end, TILE):
        keys = tile + tl.arange(0, TILE)
        mask = (keys < end)[:, None] & (cols < D)[None, :]
        k_tile = tl.load(k + rows[:, None] * k_stride + cols[None, :], mask=mask, other=0.0)
        v_tile = tl.load(v + rows[:, None] * v_stride + cols[None, :], mask=mask, other=0.0)
        # A step ahead, or else the pipeline would count the table's latency for one of its stages.
        rows = _key_rows(first_row, block_table, tile + TILE, end, BLOCK_SIZE, TILE)
        scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        if MASKED:
            scores = tl.where(keys[None, :] <= last[:, None], scores, float("-inf"))
        previous, highest = highest, tl.maximum(highest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - highest[:, None])
        shrink = tl.exp2(previous - highest)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
    return highest, total, acc


@triton.jit
def _owner(cu_seqlens_q, num_seqs, piece, ROWS: tl.constexpr):
    """The sequence of a piece of ROWS queries: sequence i owns those from its start // ROWS + i on."""
    num_before = 0
    for start in range(0, num_seqs, 512):
        seqs = start + tl.arange(0, 512)
        starts = tl.load(cu_seqlens_q + seqs, mask=seqs < num_seqs, other=0)
        num_before += tl.sum(((starts // ROWS + seqs <= piece) & (seqs < num_seqs)).to(tl.int32))
    return num_before - 1


@triton.jit(do_not_specialize=RAGGED)
def _prefill_kernel(
    q, k, v, out, cu_seqlens_q, cu_seqlens_k, block_tables, num_seqs, columns, q_stride, k_stride, v_stride,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, FEW: tl.constexpr = 0
):  # fmt: skip
    """A program takes one head's next ROWS queries of a sequence; the longest stretches of keys start first.

    The T queries make at most T // ROWS + S pieces. Sequences with FEW queries or less are left out.
    """
    head, piece = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    seq = _owner(cu_seqlens_q, num_seqs, piece, ROWS)
    q_start, k_start = tl.load(cu_seqlens_q + seq), tl.load(cu_seqlens_k + seq)
    len_q = tl.load(cu_seqlens_q + seq + 1) - q_start
    len_k = tl.load(cu_seqlens_k + seq + 1) - k_start
    first = (piece - q_start // ROWS - seq) * ROWS
    if (first >= len_q) | (len_q <= FEW):
        return
    rows, cols = first + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    mask = (rows < len_q)[:, None] & (cols < D)[None, :]
    tokens = (q_start + rows).to(tl.int64)[:, None]
    queries = tl.load(q + tokens * q_stride + head * D + cols[None, :], mask=mask, other=0.0)

    last = len_k - len_q + rows
    k, v = k + head // GROUP * D, v + head // GROUP * D
    block_table = block_tables + seq.to(tl.int64) * columns
    end = tl.minimum(len_k, len_k - len_q + first + ROWS)
    visible_end = (len_k - len_q + first + 1) // TILE * TILE  # so far every row sees every key
    highest, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    highest, total, acc = _attend(
        queries, k, v, k_stride, v_stride, k_start.to(tl.int64), block_table, 0, visible_end, last,
        highest, total, acc, D, BLOCK_SIZE, TILE, False
    )  # fmt: skip
    highest, total, acc = _attend(
        queries, k, v, k_stride, v_stride, k_start.to(tl.int64), block_table, visible_end, end, last,
        highest, total, acc, D, BLOCK_SIZE, TILE, True
    )  # fmt: skip
    acc = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + (tokens * H + head) * D + cols[None, :], acc, mask=mask)


@triton.jit
def _split_length(context_len, num_splits, TILE: tl.constexpr):
    return tl.cdiv(tl.cdiv(context_len, num_splits), TILE) * TILE


@triton.jit
def _new_tokens(cu_seqlens_q, seq):
    """Where a sequence's new tokens start, and how many they are: without bounds, one."""
    start, num = seq, tl.full([], 1, tl.int32)
    if cu_seqlens_q is not None:
        start = tl.load(cu_seqlens_q + seq)
        num = tl.load(cu_seqlens_q + seq + 1) - start
    return start, num


@triton.jit(do_not_specialize=RAGGED)
def _split_kernel(
    q, k_cache, v_cache, out, partial, log_sums, cu_seqlens_q, context_lens, block_tables, columns, most, q_stride,
    KH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, FEW: tl.constexpr
):  # fmt: skip
    """A program takes queries of a sequence, each with one group's heads, over a stretch of keys (Flash-Decoding).

    The only stretch is the output, that over no keys zero; of several, each is a part that is yet to be merged. Of each
    sequence there is room for `most` queries; those with more than FEW are left out.
    """
    kv_head, split, num_splits = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    num_pieces = tl.cdiv(most, ROWS // GROUP)
    seq, first = tl.program_id(1) // num_pieces, tl.program_id(1) % num_pieces * (ROWS // GROUP)
    first_token, len_q = _new_tokens(cu_seqlens_q, seq)
    context_len = tl.load(context_lens + seq)
    length = _split_length(context_len, num_splits, TILE)
    start, end = split * length, tl.minimum(context_len, (split + 1) * length)
    if (first >= len_q) | (len_q > FEW) | (start >= tl.maximum(context_len, 1)):
        return
    rows, cols = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    query, head = first + rows // GROUP, kv_head * GROUP + rows % GROUP
    is_row = rows < tl.minimum(ROWS // GROUP, len_q - first) * GROUP
    mask = is_row[:, None] & (cols < D)[None, :]
    starts = (first_token + query).to(tl.int64) * q_stride + head * D
    queries = tl.load(q + starts[:, None] + cols[None, :], mask=mask, other=0.0)
    last = tl.full([ROWS], end - 1, tl.int32)
    if cu_seqlens_q is not None:
        last = tl.minimum(last, context_len - len_q + query)
    highest, total, acc = _attend(
        queries, k_cache + kv_head * D, v_cache + kv_head * D, KH * D, KH * D, 0,
        block_tables + seq.to(tl.int64) * columns, start, end, last,
        tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, BLOCK_D], tl.float32),
        D, BLOCK_SIZE, TILE, True
    )  # fmt: skip
    total = tl.maximum(total, 1e-30)  # of a row that sees no key here
    acc = acc / total[:, None]
    if num_splits == 1:
        places = (first_token + query).to(tl.int64) * KH * GROUP + head
        tl.store(out + places[:, None] * D + cols[None, :], acc.to(out.dtype.element_ty), mask=mask)
    else:
        parts = ((seq * most + query).to(tl.int64) * KH * GROUP + head) * num_splits + split
        tl.store(log_sums + parts, highest + tl.log2(total), mask=is_row)
        tl.store(partial + parts[:, None] * D + cols[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=RAGGED)
def _merge_splits_kernel(
    partial, log_sums, out, cu_seqlens_q, context_lens, most, num_splits,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, FEW: tl.constexpr
):  # fmt: skip
    """Weighs the parts of a head's output by their sums, CHUNK at a time, and of the splits those that have keys."""
    head, slot, cols = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_D)
    seq, query = slot // most, slot % most
    first_token, len_q = _new_tokens(cu_seqlens_q, seq)
    if (query >= len_q) | (len_q > FEW):
        return
    context_len = tl.maximum(tl.load(context_lens + seq), 1)  # the first split is always there
    num_used = tl.cdiv(context_len, _split_length(context_len, num_splits, TILE))
    highest, total, acc = -1e30, 0.0, tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, num_used, CHUNK):
        splits = start + tl.arange(0, CHUNK)
        is_used, parts = splits < num_used, (slot * H + head) * num_splits + splits
        log_sum = tl.load(log_sums + parts, mask=is_used, other=float("-inf"))
        previous, highest = highest, tl.maximum(highest, tl.max(log_sum, 0))
        weights, shrink = tl.exp2(log_sum - highest), tl.exp2(previous - highest)
        mask = is_used[:, None] & (cols < D)[None, :]
        outputs = tl.load(partial + parts[:, None] * D + cols[None, :], mask=mask, other=0.0)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(weights[:, None] * outputs, 0)
    place = ((first_token + query) * H + head) * D + cols
    tl.store(out + place, (acc / total).to(out.dtype.element_ty), mask=cols < D)
