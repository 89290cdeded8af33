"""What arrives at the other ranks is what the batch builder made, whatever the scheduler did in between."""

import pickle
import random

import numpy as np
import pytest

from nanovllm.engine.batch import BatchBuilder
from nanovllm.engine.batch_codec import BatchCodec
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

BLOCK, MAX_BLOCKS = 4, 20
SHARED = (
    "input_ids", "positions", "slot_mapping", "context_lens", "cu_seqlens_q", "block_tables", "logit_rows",
    "prompt_logprob_rows", "temperatures", "uniforms", "has_options",
)  # fmt: skip


def same(a, b) -> bool:
    if a is None or b is None:
        return a is b
    return np.array_equal(a, b) and getattr(a, "dtype", None) == getattr(b, "dtype", None)


@pytest.mark.parametrize("seed", range(20))
def test_decoded_batches_equal_those_that_were_built(seed):
    """Through chunks, prefix hits, preemption, aborts and failed steps."""
    rng = random.Random(seed)
    manager = BlockManager(24, BLOCK)
    scheduler = Scheduler(manager, rng.randrange(4, 9), rng.randrange(5, 60))
    scheduler.output_ratio = 0.0
    builder = BatchBuilder(BLOCK, MAX_BLOCKS)
    here, there = BatchCodec(BLOCK, MAX_BLOCKS), BatchCodec(BLOCK, MAX_BLOCKS)
    num_prefills = num_decodes = seq_id = 0
    for _ in range(300):
        if rng.random() < 0.15:
            options = rng.choice([{}, {}, {"prompt_logprobs": 1}, {"top_k": 3}, {"temperature": 0}])
            params = SamplingParams(max_tokens=30, **options)
            prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 40))]
            scheduler.add(Sequence(seq_id, prompt, params, max_len=BLOCK * MAX_BLOCKS))
            seq_id += 1
        if rng.random() < 0.02 and scheduler.running:
            scheduler.finish(rng.choice(scheduler.running), "abort")
        seqs = scheduler.schedule()
        if not seqs:
            continue
        batch = builder.build(seqs)
        arrived = there.decode(pickle.loads(pickle.dumps(here.encode(batch))))
        for name in SHARED:
            assert same(getattr(arrived, name), getattr(batch, name)), name
        assert arrived.num_sampled is None
        is_decode = batch.cu_seqlens_q is None
        num_prefills, num_decodes = num_prefills + (not is_decode), num_decodes + is_decode
        if rng.random() < 0.03:
            scheduler.recover()
        else:
            ends = scheduler.advance(seqs)
            complete = [end == len(seq) for seq, end in zip(seqs, ends, strict=True)]
            scheduler.postprocess(seqs, ends, [[rng.randrange(2)] * is_complete for is_complete in complete])
    assert num_prefills > 20 and num_decodes > 20
    assert scheduler.num_preemptions


def test_a_steady_decode_step_sends_the_last_tokens_and_the_cells_that_changed():
    manager = BlockManager(40, BLOCK)
    scheduler = Scheduler(manager, 8, 100)
    builder, codec = BatchBuilder(BLOCK, MAX_BLOCKS), BatchCodec(BLOCK, MAX_BLOCKS)
    for i, length in enumerate((5, 6)):
        scheduler.add(Sequence(i, [i] * length, SamplingParams(ignore_eos=True)))
    cells = []
    for step in range(5):
        seqs = scheduler.schedule()
        batch = builder.build(seqs)
        if batch.cu_seqlens_q is None:
            sent, changed, block_ids = codec.encode(batch)
            assert sent.input_ids.dtype == np.int32 and sent.input_ids.tolist() == [7 + step - 1] * 2
            assert sent.seq_ids == [0, 1] and sent.context_lens.tolist() == [5 + step, 6 + step]
            assert sent.positions is sent.slot_mapping is sent.block_tables is None
            assert len(changed) == len(block_ids)
            cells.append(changed.tolist())
        scheduler.postprocess(seqs, scheduler.advance(seqs), [[7 + step]] * 2)
    assert cells == [[1, 20, 21], [], [22], [2]]  # the ninth token of a sequence is in its third block
