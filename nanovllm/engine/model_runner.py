"""One rank's tensors: loads the model, sizes the cache, turns a batch into tensors, runs it, samples.

Legend: S sequences.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.engine.batch import Batch, BatchBuilder
from nanovllm.engine.sampling import sample_with_options
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.attention import Attention, choose_backend
from nanovllm.layers.logits_processor import token_logprobs
from nanovllm.layers.sampler import sample
from nanovllm.models import MODELS
from nanovllm.utils.context import Context, reset_context, set_context
from nanovllm.utils.device import GIB, available_memory, default_cache_bytes
from nanovllm.utils.loader import load_dummy, load_model
from nanovllm.utils.parallel import TensorParallel

LOGPROB_ROWS = 128  # of prompt tokens at a time, whose logits over the vocabulary are in memory together


class ModelRunner:
    """Runs the steps that the scheduler decides on.

    Args:
        config: The engine's settings; `num_kvcache_blocks` is set here if it is -1.
        tp: This rank's place among those that share the model; by default there are no others.

    Raises:
        ValueError: The checkpoint does not fit the model, or the memory left cannot hold the cache.
    """

    failure: str | None = None  # why no further step can run

    def __init__(self, config: Config, tp: TensorParallel | None = None):
        self.config = config
        self.device = config.device
        self.tp = tp or TensorParallel()
        self.model = self._build_model()
        self.attentions = [module for module in self.model.modules() if isinstance(module, Attention)]
        self.block_size = config.kvcache_block_size
        max_blocks = -(-config.max_model_len // self.block_size)
        self.batch_builder = BatchBuilder(self.block_size, max_blocks)
        self._allocate_kv_cache(max_blocks)

    @torch.inference_mode()
    def run(self, seqs: list[Sequence], is_prefill: bool) -> list[int]:
        """Computes the scheduled tokens of each sequence and samples the one after them.

        Log-probabilities, where asked for, are added to the sequences.

        Returns:
            S token ids. Those of sequences whose prompt is not complete yet mean nothing.
        """
        batch = self.batch_builder.prefill(seqs) if is_prefill else self.batch_builder.decode(seqs)
        logits = self.forward(batch, partial(_score_prompts, seqs, batch))
        temperatures, uniforms = to_tensor(batch.temperatures, self.device), to_tensor(batch.uniforms, self.device)
        if batch.rows_with_options:
            with_options = [(row, seqs[row]) for row in batch.rows_with_options]
            return sample_with_options(logits, temperatures, uniforms, with_options)
        return sample(logits, temperatures, uniforms).tolist()

    def forward(
        self, batch: Batch, score_prompts: Callable[[np.ndarray, torch.Tensor], None] | None = None
    ) -> torch.Tensor | None:
        """Fills the cache. All ranks must do so for the same batch.

        Args:
            batch: The step's work.
            score_prompts: Called with some of `batch.prompt_logprob_rows` and their logits until all are done, on
                rank 0.

        Returns:
            [S, vocabulary] logits of the last scheduled token of each sequence on rank 0, None on the others.
        """
        set_context(make_context(batch, self.device))
        try:
            hidden_states = self.model(to_tensor(batch.input_ids, self.device), to_tensor(batch.positions, self.device))
            if batch.prompt_logprob_rows is not None:
                wanted = batch.prompt_logprob_rows
                for rows in np.split(wanted, range(LOGPROB_ROWS, len(wanted), LOGPROB_ROWS)):
                    logits = self.model.lm_head.project(hidden_states[to_tensor(rows, self.device)])
                    if logits is not None:
                        score_prompts(rows, logits)
            return self.model.compute_logits(hidden_states)
        finally:
            reset_context()

    @torch.inference_mode()
    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copies whole blocks of the cache, `(from, to)`, in order."""
        for layer in self.attentions:
            for source, target in copies:
                layer.k_cache[target] = layer.k_cache[source]
                layer.v_cache[target] = layer.v_cache[source]

    def close(self) -> None:
        """Ends what runs beside this process: with one rank, nothing."""

    def _check_ranks(self) -> None:
        """Raises if another rank has failed."""

    def _build_model(self) -> torch.nn.Module:
        config = self.config
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(config.dtype)
        try:
            with torch.device(config.device):
                model = MODELS[config.architecture](config.hf_config, config.max_model_len, self.tp)
        finally:
            torch.set_default_dtype(default_dtype)
        if config.load_format == "dummy":
            load_dummy(model, config.seed)
        else:
            load_model(model, config.model_path, self.tp.rank == 0, self._check_ranks)
        return model.eval()

    def _allocate_kv_cache(self, max_blocks: int) -> None:
        config, attention = self.config, self.attentions[0]
        backend = choose_backend(config.attention_backend)
        layout = self.block_size, attention.num_kv_heads, attention.head_dim
        block_bytes = 2 * len(self.attentions) * math.prod(backend.cache_shape(1, *layout)) * config.dtype.itemsize
        num_sharing = self.tp.size if self.device.type == "cpu" else 1
        activations = self._activation_bytes() if self.device.type == "cuda" else 0
        available = available_memory(self.device, config.gpu_memory_utilization) - activations
        # A block exists on every rank, so the one with the least memory decides; on a CPU they share one memory.
        available = self.tp.minimum(available, self.device)
        if config.num_kvcache_blocks == -1:
            budget = default_cache_bytes(self.device, available)
            affordable = budget // (block_bytes * num_sharing)
            config.num_kvcache_blocks = min(max(affordable, 1), config.max_num_seqs * max_blocks)
        needed = config.num_kvcache_blocks * block_bytes * num_sharing
        if needed > available:
            raise ValueError(
                f"the KV cache needs {needed / GIB:.2f} GiB and the {self.device.type} has {available / GIB:.2f} GiB "
                "left: lower num_kvcache_blocks or max_num_batched_tokens, raise gpu_memory_utilization, or free memory"
            )
        shape = backend.cache_shape(config.num_kvcache_blocks, *layout)
        for layer in self.attentions:
            layer.backend = backend
            layer.k_cache = torch.empty(shape, dtype=config.dtype, device=self.device)
            layer.v_cache = torch.empty(shape, dtype=config.dtype, device=self.device)

    def _activation_bytes(self) -> int:
        """What the largest prefill step takes beside weights and cache, measured by running one."""
        config = self.config
        num_tokens = config.max_num_batched_tokens
        num_seqs = min(config.max_num_seqs, -(-num_tokens // config.max_model_len))
        lens = np.full(num_seqs, min(config.max_model_len, num_tokens), dtype=np.int32)
        cu_seqlens = np.concatenate([[0], lens.cumsum()]).astype(np.int32)
        zeros = np.zeros(cu_seqlens[-1], dtype=np.int64)
        batch = Batch(True, zeros, zeros, zeros, context_lens=lens, cu_seqlens_q=cu_seqlens)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        with torch.inference_mode():
            logits = self.forward(batch)
            if logits is not None:
                sample(logits)
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.empty_cache()
        return peak - before


def make_context(batch: Batch, device: torch.device) -> Context:
    """What the layers need to know of a batch, on their device."""
    context = Context(
        is_prefill=batch.is_prefill,
        slot_mapping=to_tensor(batch.slot_mapping, device),
        context_lens=to_tensor(batch.context_lens, device),
        block_tables=to_tensor(batch.block_tables, device),
        max_seqlen_q=1,
        max_seqlen_k=int(batch.context_lens.max()),
    )
    if batch.is_prefill:
        cu_seqlens_k = np.concatenate([[0], batch.context_lens.cumsum()]).astype(np.int32)
        context.cu_seqlens_q = to_tensor(batch.cu_seqlens_q, device)
        context.cu_seqlens_k = to_tensor(cu_seqlens_k, device)
        context.max_seqlen_q = int(np.diff(batch.cu_seqlens_q).max())
    return context


def to_tensor(array: np.ndarray | None, device: torch.device) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(array).to(device, non_blocking=True)


def _score_prompts(seqs: list[Sequence], batch: Batch, rows: np.ndarray, logits: torch.Tensor) -> None:
    """Adds to each sequence the log-probabilities of the prompt tokens after `rows` (of the T in the step)."""
    owners = np.searchsorted(batch.cu_seqlens_q, rows, side="right") - 1
    for owner in np.unique(owners).tolist():
        seq, mine = seqs[owner], np.flatnonzero(owners == owner)
        start = int(batch.positions[rows[mine[0]]]) + 1
        del seq.prompt_logprobs[start:]  # of an attempt that was preempted
        tokens = seq.token_ids[start : start + len(mine)].tolist()
        seq.prompt_logprobs += token_logprobs(logits[mine.tolist()], tokens, seq.params.prompt_logprobs)
