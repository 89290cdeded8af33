"""What several ranks compute is what one computes, and they read, send and wait for no more than they must."""

import json
import os
import pickle
import signal
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file

from helpers import DEMO_MODEL, default_interrupts, random_prompts, reference_tokens, save_model
from nanovllm import LLM, BeamSearchParams, SamplingParams
from nanovllm.config import Config
from nanovllm.engine import drafts, workers
from nanovllm.kernels.cpu.compiled import load_kernels
from nanovllm.utils import loader
from nanovllm.utils.parallel import TensorParallel
from schemas import SCHEMAS

BLOCK = 8
MAX_TOKENS = 24
SETTINGS = {"max_num_batched_tokens": 16384, "kvcache_block_size": BLOCK, "dtype": "float32", "device": "cpu"}
PRESSURED = SETTINGS | {"num_kvcache_blocks": 13, "max_num_batched_tokens": 11}
LENGTHS = [1, 5, BLOCK, 3 * BLOCK - 1, 3 * BLOCK, 3 * BLOCK + 1, 70]


@pytest.fixture(scope="module")
def llm(checkpoint):
    with LLM(str(checkpoint[0]), tensor_parallel_size=2, num_kvcache_blocks=4000, **SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="module")
def single(checkpoint):
    with LLM(str(checkpoint[0]), num_kvcache_blocks=400, **SETTINGS) as llm:
        yield llm


def generate(llm, prompts, params):
    return llm.generate(prompts, params, use_tqdm=False)


def tokens_of(outputs):
    return [output["token_ids"] for output in outputs]


# ---- results


@pytest.mark.parametrize(("size", "most_guesses"), [(4, 0), (2, 4)])
def test_greedy_and_seeded_tokens_equal_those_of_one_rank_whatever_happens_to_a_request(
    checkpoint, single, monkeypatch, size, most_guesses
):
    """Greedy ones equal transformers' too; with chunks, preemption and, the second time, prefix hits."""
    path, model = checkpoint
    monkeypatch.setattr(drafts.Drafter, "_best_counts", lambda self, chances, n: np.full(len(chances), self.most))
    guesses, look_up = [], drafts.look_up
    monkeypatch.setattr(drafts, "look_up", lambda ids, most: guesses.append(look_up(ids, most)) or guesses[-1])
    prompts = random_prompts(LENGTHS)
    prompts.append(prompts[-1][: 4 * BLOCK] + prompts[0])  # shares four blocks
    greedy = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    seeded = [SamplingParams(temperature=1.2, max_tokens=MAX_TOKENS, seed=i, top_k=50) for i in range(len(prompts))]
    expected = [reference_tokens(model, prompt, MAX_TOKENS) for prompt in prompts]
    sampled = tokens_of(generate(single, prompts, seeded))
    assert len(set(map(tuple, sampled))) == len(prompts) and sampled != expected
    with LLM(str(path), tensor_parallel_size=size, speculative_tokens=most_guesses, **PRESSURED) as llm:
        llm.scheduler.output_ratio = 0.0  # admit without foresight, so that preemption must happen
        for _ in range(2):
            assert tokens_of(generate(llm, prompts, greedy)) == expected
        assert tokens_of(generate(llm, prompts, seeded)) == sampled
        assert llm.scheduler.num_preemptions > 0
        assert llm.block_manager.num_free_blocks == llm.config.num_kvcache_blocks
    assert any(guesses) == (most_guesses > 0)


def test_structured_completions_equal_those_of_one_rank():
    """Masks are rank 0's alone, and what is certain goes to all."""
    params = [
        SamplingParams(1.5, max_tokens=120, n=2, seed=1, structured_outputs=outputs)
        for outputs in ({"json": SCHEMAS["long keys"]}, {"regex": "[a-z]{3,20}"}, {"choice": ["one", "another"]}, None)
    ]
    made = []
    for size in (1, 2):
        settings = SETTINGS | {"num_kvcache_blocks": 100, "tensor_parallel_size": size}
        with LLM(str(DEMO_MODEL), **settings) as llm:
            outputs = generate(llm, ["Who are you?"] * 4, params)
            assert llm.stats()["decode_tokens"] > 1.5 * sum(llm.stats()["step_times"].values())
        made.append([[(c.text, c.token_ids, c.finish_reason) for c in output.outputs] for output in outputs])
    assert made[0] == made[1]
    assert all(json.loads(text) for text, *_ in made[0][0]) and made[0][2][0][0] in ("one", "another")


def test_logprobs_of_completions_and_prompts_equal_those_of_one_rank(llm, single):
    prompts = random_prompts([9, 150, 33], seed=1)  # the second one's are scored in two parts
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=3, prompt_logprobs=2)
    for ours, theirs in zip(generate(llm, prompts, params), generate(single, prompts, params), strict=True):
        for name in ("logprobs", "prompt_logprobs"):
            for a, b in zip(ours[name], theirs[name], strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    assert (a["token_id"], a["rank"]) == (b["token_id"], b["rank"])
                    assert a["logprob"] == pytest.approx(b["logprob"], abs=1e-4)
                    assert [token for token, *_ in a["top"]] == [token for token, *_ in b["top"]]
    completions = [random_prompts([1, 5, 140], seed=i) for i in range(3)]
    for ours, theirs in zip(
        *(engine.score(prompts, completions, use_tqdm=False) for engine in (llm, single)), strict=True
    ):
        for a, b in zip(ours, theirs, strict=True):
            assert a.token_logprobs == pytest.approx(b.token_logprobs, abs=1e-4)


@pytest.mark.skipif(load_kernels() is None, reason="no kernels for this processor, or no compiler")
def test_beside_others_and_in_chunks_two_ranks_change_no_bit_of_a_request(tmp_path):
    save_model(tmp_path, dtype=torch.bfloat16)
    prompts, settings = random_prompts([3, 70, 130]), {"tensor_parallel_size": 2, "num_kvcache_blocks": 100}
    settings |= SETTINGS | {"dtype": "bfloat16", "batch_invariant": True}
    params = [SamplingParams(i, max_tokens=20, ignore_eos=True, seed=i, logprobs=1) for i in range(3)]
    with LLM(str(tmp_path), **settings | {"kvcache_block_size": 64}) as llm:
        alone = [generate(llm, [p], param)[0] for p, param in zip(prompts, params, strict=True)]
    with LLM(str(tmp_path), **settings | {"max_num_batched_tokens": 50}) as llm:
        outputs = generate(llm, random_prompts([5, 90, 33], seed=9) + prompts, [SamplingParams(0)] * 3 + params)[3:]
    assert [(o.token_ids, o.logprobs) for o in outputs] == [(o.token_ids, o.logprobs) for o in alone]


def test_forked_blocks_are_copied_on_every_rank(llm, single):
    """Several completions of a prompt, and beams, share blocks until one of them writes."""
    prompts = random_prompts([13, 30], seed=2)
    params = SamplingParams(temperature=1.0, max_tokens=12, n=3, seed=7, ignore_eos=True)
    ours, theirs = (generate(engine, prompts, params) for engine in (llm, single))
    assert [tokens_of(o["outputs"]) for o in ours] == [tokens_of(o["outputs"]) for o in theirs]
    beams = BeamSearchParams(beam_width=4, max_tokens=10)
    for a, b in zip(*(engine.beam_search(prompts, beams, use_tqdm=False) for engine in (llm, single)), strict=True):
        assert tokens_of(a["outputs"]) == tokens_of(b["outputs"])
        assert a["score"] == pytest.approx(b["score"], abs=1e-4)


# ---- traffic


@pytest.fixture
def sizes(llm, monkeypatch):
    """Bytes of each message to the workers from now on, by kind: "prefill", "decode" or another."""
    publish, sizes = llm.model_runner.workers.publish, {"prefill": [], "decode": []}

    def measured(method, message):
        kind = ("decode" if message[0].cu_seqlens_q is None else "prefill") if method == "forward" else method
        sizes.setdefault(kind, []).append(len(pickle.dumps((method, message), 5)))
        publish(method, message)

    monkeypatch.setattr(llm.model_runner.workers, "publish", measured)
    return sizes


def test_a_step_of_16384_tokens_and_512_sequences_passes(llm, single, sizes):
    prompts = [[i % 300 + 2, *prompt] for i, prompt in enumerate(random_prompts([31] * 512, seed=3))]
    counts = []
    ids = [llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)) for prompt in prompts]
    results = {}
    while not llm.is_finished():
        finished, count = llm.step()
        results |= {output["request_id"]: output["token_ids"] for output in finished}
        counts.append(count)
    assert counts == [16384, -512, -512]
    assert sizes["prefill"][0] > 2 * workers.CAPACITY  # it went in parts
    expected = generate(single, prompts[::100], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    assert [results[i] for i in ids[::100]] == tokens_of(expected)


def test_a_decode_step_of_256_sequences_sends_less_than_20_kib(llm, sizes):
    """Of sequences that all have filled several blocks, also in the steps after one of them has finished."""
    params = [SamplingParams(temperature=1.0, max_tokens=20 + i % 3, ignore_eos=True) for i in range(256)]
    generate(llm, random_prompts([40 + i % 8 for i in range(256)], seed=4), params)
    sent = sorted(sizes["decode"])
    print(f"bytes per decode step at 256 sequences: median {sent[len(sent) // 2]}, most {sent[-1]}")
    assert len(sent) == 21 and sent[-1] < 20 * 1024


class CountingGroup:
    """Stands in for a group; notes what passes."""

    def __init__(self, group):
        self.group, self.reduced, self.gathered, self.exchanged = group, [], [], []

    def allreduce(self, tensors, *args):
        self.reduced += [tensor.nbytes for tensor in tensors]
        return self.group.allreduce(tensors, *args)

    def alltoall_base(self, output, x, *args):
        self.exchanged.append(x.nbytes)
        return self.group.alltoall_base(output, x, *args)

    def gather(self, outputs, inputs, options):
        self.gathered += [tensor.nbytes for tensor in inputs]
        return self.group.gather(outputs, inputs, options)


def test_a_decode_step_communicates_what_theory_says(llm, monkeypatch):
    """Two all-reduces of hidden_size a layer and token, one for the embedding; each rank samples some rows."""
    tp, model = llm.model_runner.tp, llm.config.hf_config
    generate(llm, random_prompts([9] * 5, seed=5), SamplingParams(temperature=0, max_tokens=1))
    for prompt in random_prompts([9] * 5, seed=5):
        llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    assert llm.step()[1] > 0
    counting = CountingGroup(tp.group)
    monkeypatch.setattr(tp, "group", counting)
    assert llm.step()[1] == -5
    assert counting.reduced == [5 * model.hidden_size * 4] * (2 * model.num_hidden_layers + 1)
    assert counting.exchanged == [6 * -(-model.vocab_size // 2) * 4]  # the logits, of rows that divide by the ranks
    assert counting.gathered == [3 * 8]  # token ids


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_together_read_the_checkpoint_once(tmp_path, monkeypatch, size):
    """All but norms, which each has, and KV heads where there are fewer than ranks."""
    save_model(tmp_path, num_key_value_heads=4)
    config = Config(str(tmp_path), device="cpu", dtype="float32")
    num_read = []

    class Counted:
        def __init__(self, loaded):
            self.get_shape, self.get_dtype, self.loaded = loaded.get_shape, loaded.get_dtype, loaded

        def __getitem__(self, index):
            part = self.loaded[index]
            num_read.append(part.nbytes)
            return part

    @contextmanager
    def counting_open(*args, **kwargs):
        with safe_open(*args, **kwargs) as tensors:
            yield SimpleNamespace(keys=tensors.keys, get_slice=lambda name: Counted(tensors.get_slice(name)))

    monkeypatch.setattr(loader, "safe_open", counting_open)
    for rank in range(size):
        model = config.model_class(config.hf_config, 64, TensorParallel(rank, size))
        loader.load_model(model, tmp_path, lambda weight: None)
    nbytes = {name: tensor.nbytes for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    norms = sum(n for name, n in nbytes.items() if "norm" in name)
    assert sum(num_read) == sum(nbytes.values()) + (size - 1) * norms
    assert norms < 0.01 * sum(nbytes.values())


# ---- beside others


def test_two_engines_and_the_users_own_process_group_live_side_by_side(llm, checkpoint, tmp_path):
    prompts = random_prompts([9, 30], seed=6)
    params = SamplingParams(temperature=0, max_tokens=6)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/users", rank=0, world_size=1)
    try:
        with LLM(str(checkpoint[0]), tensor_parallel_size=2, num_kvcache_blocks=99, **SETTINGS) as other:
            assert tokens_of(generate(llm, prompts, params)) == tokens_of(generate(other, prompts, params))
        dist.all_reduce(torch.ones(1))
    finally:
        dist.destroy_process_group()
    assert len(generate(llm, prompts, params)) == 2


@pytest.mark.parametrize("delay", [0.02, 0.1, 0.3])
def test_ctrl_c_aborts_the_requests_and_leaves_engine_and_workers_alive(llm, delay):
    prompts = random_prompts([9, 30], seed=7)
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    pids = [process.pid for process in llm.model_runner.workers._processes]
    expected = tokens_of(generate(llm, prompts, SamplingParams(temperature=0, max_tokens=6)))

    def interrupt():
        time.sleep(delay)
        for pid in (*pids, os.getpid()):  # as a terminal does
            os.kill(pid, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    with default_interrupts(), pytest.raises(KeyboardInterrupt):
        thread.start()
        generate(llm, prompts * 20, params)
        time.sleep(10)
    thread.join()
    assert llm.is_finished() and llm.block_manager.num_free_blocks == llm.config.num_kvcache_blocks
    assert tokens_of(generate(llm, prompts, SamplingParams(temperature=0, max_tokens=6))) == expected
    assert [process.pid for process in llm.model_runner.workers._processes if process.is_alive()] == pids
