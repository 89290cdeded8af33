"""Reference counts, prefix hits and eviction, case by case. The property test is in test_scheduler.py."""

import subprocess
import sys
from array import array

from xxhash import xxh64_intdigest

from helpers import ROOT
from nanovllm.engine import block_manager as module
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

SIZE = 4


def make_seq(tokens, seq_id=0) -> Sequence:
    return Sequence(seq_id, tokens, SamplingParams())


def compute(manager: BlockManager, seq: Sequence) -> int:
    """Runs a whole prompt as the scheduler would; returns how many tokens were cached."""
    hits = manager.match(seq)
    manager.attach(seq, hits, len(hits) * SIZE)
    num_new = len(seq) - seq.num_computed_tokens
    manager.allocate(seq, num_new)
    seq.num_computed_tokens += num_new
    manager.publish(seq, len(seq) - num_new, len(seq))
    return seq.num_cached_tokens


def test_equal_prefixes_share_blocks():
    manager = BlockManager(10, SIZE)
    first, second = make_seq([1, 2, 3, 4, 5, 6, 7, 8, 9]), make_seq([1, 2, 3, 4, 5, 6, 7, 8, 10, 11])
    assert compute(manager, first) == 0
    assert compute(manager, second) == 8
    assert first.block_table[:2] == second.block_table[:2]
    assert first.block_table[2] != second.block_table[2]
    assert [manager.blocks[i].ref_count for i in first.block_table] == [2, 2, 1]
    assert manager.num_free_blocks == 10 - 4


def test_full_prefix_hit_recomputes_the_last_token():
    manager = BlockManager(10, SIZE)
    compute(manager, make_seq(range(8)))
    assert compute(manager, make_seq(range(8))) == 4  # not 8: the last token's logits are needed


def test_a_private_copy_of_cached_content_continues_the_same_chain():
    manager = BlockManager(10, SIZE)
    compute(manager, make_seq(range(8)))
    copy = make_seq(range(8))
    compute(manager, copy)  # its second block has the content of the first sequence's
    copy.token_ids.extend([8, 9, 10, 11, 12])
    manager.allocate(copy, 4)
    copy.num_computed_tokens += 4
    manager.publish(copy, 8, 12)
    assert compute(manager, make_seq(range(13))) == 12


def test_blocks_are_not_found_before_they_are_computed():
    manager = BlockManager(10, SIZE)
    seq = make_seq(range(8))
    manager.allocate(seq, 8)
    assert manager.match(make_seq(range(9))) == []


def test_a_freed_block_keeps_its_content_until_it_is_taken():
    manager = BlockManager(3, SIZE)
    first = make_seq(range(9))
    compute(manager, first)
    manager.free(first)
    assert manager.num_free_blocks == 3
    again = make_seq(range(9))
    assert compute(manager, again) == 8
    assert manager.num_free_blocks == 0  # the hits were taken off the free list
    manager.free(again)
    compute(manager, make_seq(range(100, 112)))  # takes all three
    assert manager.match(make_seq(range(9))) == []


def test_the_least_recently_used_block_is_evicted_first_and_tails_before_heads():
    manager = BlockManager(5, SIZE)
    old, new = make_seq(range(8)), make_seq(range(50, 58))
    compute(manager, old)
    compute(manager, new)
    manager.free(old)
    manager.free(new)
    taker = make_seq(range(90, 94))
    compute(manager, taker)  # the blank fifth block
    assert len(manager.match(make_seq(range(9)))) == 2
    manager.allocate(taker, 4)
    assert len(manager.match(make_seq(range(9)))) == 1
    assert len(manager.match(make_seq(range(50, 59)))) == 2


def test_a_hash_collision_never_serves_other_tokens(monkeypatch):
    monkeypatch.setattr(module, "xxh64_intdigest", lambda data: 7)
    manager = BlockManager(20, SIZE)
    compute(manager, make_seq(range(9)))
    assert compute(manager, make_seq([9, 9, 9, 9, 5])) == 0


def test_a_collision_earlier_in_the_chain_never_serves_another_prompts_block(monkeypatch):
    """Two prompts whose first blocks collide and whose second blocks hold the same tokens."""
    monkeypatch.setattr(module, "xxh64_intdigest", lambda data: len(data))
    manager = BlockManager(20, SIZE)
    tail = [5, 6, 7, 8]
    first = make_seq([1, 1, 1, 1, *tail, 0])
    compute(manager, first)
    compute(manager, make_seq([2, 2, 2, 2, *tail, 0]))
    hits = manager.match(make_seq([1, 1, 1, 1, *tail, 0]))
    assert [block.block_id for block in hits] == first.block_table[: len(hits)]


def test_hash_is_chained_xxh64_of_previous_hash_and_tokens():
    manager = BlockManager(1, SIZE)
    first = xxh64_intdigest(array("i", [1, 2, 3, 4]).tobytes())
    second = xxh64_intdigest(first.to_bytes(8, "little") + array("i", [5, 6, 7, 8]).tobytes())
    assert manager.hashes(make_seq(range(1, 10))) == [first, second]


def test_scheduling_imports_no_torch():
    code = """
import sys, types, pathlib
package = types.ModuleType("nanovllm")
package.__path__ = [str(pathlib.Path("nanovllm").resolve())]  # without the package's own __init__
sys.modules["nanovllm"] = package
import nanovllm.engine.scheduler, nanovllm.engine.batch
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
