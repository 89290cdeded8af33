"""Whatever kernel a step launches, start-up has launched it before, so that no request waits for Triton's compiler."""

import pytest

from helpers import random_prompts, save_model
from launches import Specialization, record, without_interpreter

pytest.importorskip("triton", reason="triton is published for Linux only")


def record_engine(
    path: str, enforce_eager: bool, batch_invariant: bool
) -> tuple[set[Specialization], set[Specialization]]:
    """What is compiled for the start-up of an engine that takes the CPU for CUDA, and for its steps of every kind.

    What kernels would write is zero.
    """
    import torch

    from nanovllm import LLM, SamplingParams
    from nanovllm.engine import cuda_graphs
    from nanovllm.engine.model_runner import ModelRunner
    from nanovllm.kernels import attention, fused, triton_fused
    from nanovllm.kernels.triton_attention import TritonAttention
    from nanovllm.kernels.triton_invariant_attention import InvariantTritonAttention
    from nanovllm.kernels.triton_linear import TritonWeight
    from nanovllm.layers import weight

    backend = InvariantTritonAttention if batch_invariant else TritonAttention

    class Graph:
        """Replayed, it launches nothing that Triton would look at."""

        pool = replay = lambda self: None

    def allocate_kv_cache(runner, backend, *args):
        for layer in runner.attentions:
            layer.backend = backend
        runner._activation_bytes()
        return allocate(runner, backend, *args)

    allocate, ModelRunner._allocate_kv_cache = ModelRunner._allocate_kv_cache, allocate_kv_cache
    ModelRunner._can_capture = lambda runner, backend: not runner.config.enforce_eager
    ModelRunner._can_record = lambda runner: False
    torch.Tensor.new_empty, torch.empty_like = torch.Tensor.new_zeros, torch.zeros_like
    torch.cuda.memory_reserved = torch.cuda.max_memory_reserved = torch.cuda.reset_peak_memory_stats = lambda device: 0
    weight.plain_kernel = lambda values, *_: (TritonWeight if batch_invariant else weight.PlainWeight)(values)
    attention.TOLERANCE = float("inf")
    attention.BACKENDS["triton"] = lambda *settings: (backend, "triton")
    fused._kernels = lambda *_: triton_fused
    cuda_graphs.capture = lambda work, pool: (Graph(), work())
    cuda_graphs.LARGEST = 4

    llm = None

    def start() -> None:
        nonlocal llm
        llm = LLM(
            path, device="cpu", dtype="bfloat16", attention_backend="triton", enforce_eager=enforce_eager,
            kvcache_block_size=16, num_kvcache_blocks=60, max_num_seqs=9, max_num_batched_tokens=64,
        )  # fmt: skip

    def generate() -> None:
        every = {"top_p": 0.5}, {"temperature": 0}, {"logprobs": 1, "prompt_logprobs": 1}, {"n": 2}
        batches = [1], [2, 17], [33, 5, 1], [3] * 4, [40, 1, 2, 3, 4, 5, 6, 7, 8]  # of which some are chunked
        plain = [(lens, {}) for lens in batches]
        for lens, options in plain + [(lens, options) for options in every for lens in (batches[2], batches[4])]:
            params = SamplingParams(max_tokens=3, ignore_eos=True, **options)
            for _ in range(2):  # the second time with cached prefixes
                llm.generate(random_prompts(lens), params, use_tqdm=False)

    return record(start), record(generate)


@pytest.mark.parametrize(("enforce_eager", "batch_invariant"), [(False, False), (True, False), (False, True)])
def test_no_step_needs_a_kernel_that_start_up_did_not(tmp_path, enforce_eager, batch_invariant):
    save_model(tmp_path)
    start_up, steps = without_interpreter(record_engine, str(tmp_path), enforce_eager, batch_invariant)
    ours = {"_prefill_kernel", "_split_kernel", "_merge_splits_kernel"}
    if batch_invariant:
        ours = {"_attend_kernel", "_merge_kernel", "linear_kernel"}
    assert {each.kernel for each in steps} == ours | {
        "_store_kernel", "_add_rms_norm_kernel", "_norm_rope_kernel", "_silu_and_mul_kernel", "_sum_kernel",
        "_pick_kernel", "_copy_kernel",
    }  # fmt: skip
    assert sorted(map(str, steps - start_up)) == []
