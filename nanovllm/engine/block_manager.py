"""Paged KV accounting and the prefix cache: who holds which block, and what is in it. Knows nothing of tensors.

PagedAttention's block tables (Kwon et al., 2023, arXiv:2309.06180) with hash-chained prefix reuse: a full block is
looked up under `xxh64(hash of the previous block, its token ids)`.
"""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import count

from xxhash import xxh64_intdigest

from nanovllm.engine.sequence import Sequence

ROOT = 0  # the uid of "nothing before this block"


@dataclass(slots=True)
class Block:
    """One block of the KV cache.

    `uid` names the block's tokens together with everything before them and is never reused. A hash only finds a
    candidate: the candidate is a hit when its tokens and its parent's uid are equal too, so a collision anywhere in
    the chain cannot serve another prompt's keys.
    """

    block_id: int
    ref_count: int = 0
    hash: int | None = None  # the key in the prefix cache, None while the block is not in it
    uid: int = ROOT
    parent_uid: int = ROOT
    tokens: bytes = b""


class BlockManager:
    """Hands out `num_blocks` blocks of `block_size` tokens.

    A block is free xor referenced. A freed block keeps its content until it is the least recently used one when
    a new block is needed.
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.block_size = block_size
        self.blocks = [Block(i) for i in range(num_blocks)]
        self.free_ids = OrderedDict.fromkeys(range(num_blocks))  # next to be taken first
        self.cached: dict[int, Block] = {}  # hash -> block with computed content
        self.copies: list[tuple[int, int, int]] = []  # (from, to, filled slots): before the next step, in this order
        self._uids = count(ROOT + 1)

    @property
    def num_free_blocks(self) -> int:
        return len(self.free_ids)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def hashes(self, seq: Sequence) -> list[int]:
        """The chained hashes of all full blocks of `seq`; each is computed once for a prompt and its completions."""
        hashes, size = seq.block_hashes, self.block_size
        if not hashes and seq.source is not None:
            hashes += self.hashes(seq.source)[: seq.num_prompt_tokens // size]
        for k in range(len(hashes), len(seq) // size):
            previous = hashes[-1].to_bytes(8, "little") if hashes else b""
            hashes.append(xxh64_intdigest(previous + self._tokens(seq, k)))
        return hashes

    def match(self, seq: Sequence) -> list[Block]:
        """The longest cached prefix of `seq`, as blocks.

        At least the last token is left out: its logits are needed, so it must be computed again.
        """
        hits: list[Block] = []
        uid = ROOT
        for k, block_hash in enumerate(self.hashes(seq)[: seq.num_reusable_tokens // self.block_size]):
            block = self.cached.get(block_hash)
            if block is None or block.parent_uid != uid or block.tokens != self._tokens(seq, k):
                break
            hits.append(block)
            uid = block.uid
        return hits

    def blocks_of(self, seq: Sequence, num_tokens: int) -> list[Block]:
        """The blocks of the first `num_tokens` tokens of `seq`."""
        return [self.blocks[i] for i in seq.block_table[: self.num_blocks_for(num_tokens)]]

    def attach(self, seq: Sequence, blocks: list[Block], num_tokens: int) -> None:
        """Gives `seq`, which holds no blocks, those of its first `num_tokens` tokens: a cached prefix, or another's.

        The last of them may be partly filled: whoever writes to it first while it is shared takes a copy.
        """
        assert not seq.block_table
        for block in blocks:
            if block.ref_count == 0:
                del self.free_ids[block.block_id]
            block.ref_count += 1
            seq.block_table.append(block.block_id)
        seq.num_computed_tokens = num_tokens
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = num_tokens

    def num_blocks_missing(self, seq: Sequence, num_tokens: int) -> int:
        """How many more blocks `seq` needs to compute its next `num_tokens` tokens."""
        needed = self.num_blocks_for(seq.num_computed_tokens + num_tokens)
        return needed - len(seq.block_table) + self._must_copy(seq)

    def allocate(self, seq: Sequence, num_tokens: int) -> None:
        """Gives the next `num_tokens` tokens of `seq` slots that no other sequence reads."""
        if self._must_copy(seq):
            shared = self.blocks[seq.block_table[-1]]
            shared.ref_count -= 1
            seq.block_table[-1] = self._take()
            self.copies.append((shared.block_id, seq.block_table[-1], seq.num_computed_tokens % self.block_size))
        elif seq.num_computed_tokens % self.block_size:
            self._forget(self.blocks[seq.block_table[-1]])  # another may have filled it before
        for _ in range(self.num_blocks_missing(seq, num_tokens)):
            seq.block_table.append(self._take())

    def trim(self, seq: Sequence, num_tokens: int) -> None:
        """Takes back the blocks after those of the first `num_tokens` tokens of `seq`, which nobody else holds."""
        while len(seq.block_table) > self.num_blocks_for(num_tokens):
            block_id = seq.block_table.pop()
            self.blocks[block_id].ref_count = 0
            self.free_ids[block_id] = None
            self.free_ids.move_to_end(block_id, last=False)  # nothing in it is worth keeping

    def _must_copy(self, seq: Sequence) -> bool:
        """Whether the next token of `seq` goes into a block that others hold too."""
        return seq.num_computed_tokens % self.block_size > 0 and self.blocks[seq.block_table[-1]].ref_count > 1

    def _take(self) -> int:
        """A block to be overwritten, the least recently used one that is free."""
        block_id, _ = self.free_ids.popitem(last=False)
        block = self.blocks[block_id]
        assert block.ref_count == 0
        self._forget(block)
        block.ref_count = 1
        return block_id

    def _forget(self, block: Block) -> None:
        """Before something else is written to it."""
        if block.hash is not None:
            del self.cached[block.hash]
            block.hash = None
        block.uid = ROOT

    def publish(self, seq: Sequence, start: int, end: int) -> None:
        """Enters into the prefix cache the blocks that `seq` has filled by computing its tokens from `start` on."""
        for k in range(start // self.block_size, end // self.block_size):
            block = self.blocks[seq.block_table[k]]
            block.parent_uid = self.blocks[seq.block_table[k - 1]].uid if k else ROOT
            block.tokens = self._tokens(seq, k)
            block_hash = self.hashes(seq)[k]
            twin = self.cached.get(block_hash)
            if twin is not None and (twin.parent_uid, twin.tokens) == (block.parent_uid, block.tokens):
                block.uid = twin.uid  # the same content is cached already; this copy stays private
                continue
            if twin is not None:  # a collision, or an orphan whose parent was evicted: the newest wins
                twin.hash = None
            block.uid, block.hash = next(self._uids), block_hash
            self.cached[block_hash] = block

    def free(self, seq: Sequence) -> None:
        """Drops all references of `seq`. The tail goes first, so that a prefix outlives what hangs on it."""
        for block_id in reversed(seq.block_table):
            block = self.blocks[block_id]
            block.ref_count -= 1
            assert block.ref_count >= 0
            if block.ref_count == 0:
                self.free_ids[block_id] = None
                if block.hash is None:  # nothing worth keeping: first to be taken
                    self.free_ids.move_to_end(block_id, last=False)
        seq.block_table = []
        seq.num_computed_tokens = 0

    def reset(self) -> None:
        """Takes all blocks back, whoever holds them, after an exception at any point. What is cached stays."""
        self.copies = []
        for block in self.blocks:
            block.ref_count = 0
        self.cached = {block.hash: block for block in self.blocks if block.hash is not None}
        blank_first = sorted(self.blocks, key=lambda block: block.hash is not None)
        self.free_ids = OrderedDict.fromkeys(block.block_id for block in blank_first)

    def _tokens(self, seq: Sequence, k: int) -> bytes:
        return seq.token_ids[k * self.block_size : (k + 1) * self.block_size].tobytes()
