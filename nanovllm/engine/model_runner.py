"""One rank's tensors: loads the model, sizes the cache, turns a batch into tensors, runs it, samples.

Legend: S sequences.
"""

import logging
import math
import os
import threading
from collections.abc import Callable
from functools import partial
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from nanovllm.config import Config
from nanovllm.engine.batch import Batch, BatchBuilder
from nanovllm.engine.cuda_graphs import DecodeGraphs, RecordedSteps, graph_sizes, take_samples
from nanovllm.engine.grammar import MaskMaker
from nanovllm.engine.sampling import OptionsSampler, Samples
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels import cpu as cpu_kernels
from nanovllm.kernels.attention import AttentionBackend, choose_backend
from nanovllm.kernels.fused import triton_problem
from nanovllm.kernels.plain_attention import CPUAttention
from nanovllm.layers.attention import Attention
from nanovllm.layers.experts import Experts
from nanovllm.layers.logits_processor import logprob_entries, num_top_of, token_logprobs
from nanovllm.layers.parallel_sampler import sample_on_ranks
from nanovllm.layers.sampler import sample
from nanovllm.layers.weight import Weight, check_batch_invariance
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.checks import reading
from nanovllm.utils.context import Context, Step, use_step
from nanovllm.utils.device import (
    CPU_CACHE_BYTES,
    GIB,
    Download,
    available_memory,
    default_cache_bytes,
    default_threads,
    is_number_of_threads_chosen,
    upload,
)
from nanovllm.utils.loader import load_dummy, load_model
from nanovllm.utils.openmp import stop_spinning
from nanovllm.utils.parallel import TensorParallel
from nanovllm.utils.timeline import mark
from nanovllm.utils.topology import allowed_cpus, cpus_near, on_cpus

LOGPROB_ROWS = 128  # of given tokens at a time, whose logits over the vocabulary are in memory together
GRAPH_BYTES = 16 * 2**20  # reserved for each CUDA graph, an estimate
BUILDING = threading.Lock()  # PyTorch's default dtype, which is changed meanwhile, is one for all threads
logger = logging.getLogger("nanovllm")


class ModelRunner:
    """Runs the steps that the scheduler decides on; sets `config.num_kvcache_blocks` if it is -1.

    ValueError if the checkpoint does not fit the model, or the memory left cannot hold the cache.
    """

    may_lead = True  # whether a step may begin before the last one's tokens are read
    failure: str | None = None  # why no further step can run
    last_tokens: Tensor | None = None  # [R] that the last step has sampled, on the device
    graphs: DecodeGraphs | RecordedSteps | None = None
    mask_maker: MaskMaker | None = None

    def __init__(self, config: Config, tp: TensorParallel | None = None):
        self.config = config
        self.device = config.device
        self.tp = tp or TensorParallel()
        self.cpus = self._choose_cpus()
        with on_cpus(self.cpus):
            self.num_threads = default_threads()
        stop_spinning(self.num_threads)
        self.sample_with_options = OptionsSampler()
        times = [perf_counter()]
        with on_cpus(self.cpus):  # memory is near to whoever writes to it first
            self.model = self._build_model()
        times.append(perf_counter())
        self.attentions = [module for module in self.model.modules() if isinstance(module, Attention)]
        layer, wanted = self.attentions[0], config.kvcache_block_size
        backend = choose_backend(
            config.attention_backend, self.device, config.dtype, layer, wanted, config.batch_invariant
        )
        self.block_size = config.kvcache_block_size = wanted or backend.block_size
        max_blocks = -(-config.max_model_len // self.block_size)
        # New keys are those of the cache, too, where it rounds them: else what is seen would depend on the chunk.
        self.batch_builder = BatchBuilder(self.block_size, max_blocks, config.kv_cache_dtype == "int8")
        self.mask_maker = MaskMaker(config.hf_config.vocab_size, self.num_threads)
        sizes = graph_sizes(config.max_decode_tokens) if self._can_capture(backend) else []
        cache_bytes = self._allocate_kv_cache(backend, max_blocks, len(sizes) * GRAPH_BYTES)
        times.append(perf_counter())
        free = available_memory(self.device, 1.0)
        if sizes:
            self.graphs = DecodeGraphs(self.model, sizes, max_blocks, self.device, self.tp.rank == 0)
        elif self._can_record():
            self.graphs = RecordedSteps(self.model, config.max_decode_tokens + config.chunk_tokens, max_blocks)
        times.append(perf_counter())
        weights = {id(module.weight): module.weight for module in self.model.modules() if hasattr(module, "weight")}
        weight_bytes = sum(weight.nbytes for weight in weights.values())
        graph_bytes = free - available_memory(self.device, 1.0) if sizes else 0
        names = ["weights", f"{config.num_kvcache_blocks} cache blocks"] + [f"{len(sizes)} CUDA graphs"] * bool(sizes)
        parts = zip(names, (weight_bytes, cache_bytes, graph_bytes), np.diff(times), strict=False)
        logger.info("start-up: " + ", ".join(f"{part} {n / GIB:.2f} GiB in {s:.1f} s" for part, n, s in parts))

    def enter_thread(self) -> None:
        """Prepares the thread that will run the steps: PyTorch's settings are each thread's own, and so are CPUs."""
        if self.cpus:
            os.sched_setaffinity(0, self.cpus)
        torch.set_num_threads(self.num_threads)
        if cpu_kernels.has_kernels(torch.empty(0, dtype=self.config.dtype, device=self.device)):
            cpu_kernels.set_num_threads(self.num_threads)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.attentions[0].k_cache.device)

    @torch.inference_mode()
    def run(self, seqs: list[Sequence], unread: list[Sequence] = ()) -> Samples:
        """Computes the scheduled tokens of each sequence; returns what it samples after them, maybe unfinished.

        Nothing for incomplete prompts. Log-probabilities, where asked for, are added to the sequences. The tokens that
        the step before has sampled may still be `unread`, and are then taken where they are.
        """
        batch = self.batch_builder.build(seqs, unread)
        masks = self.mask_maker.start(seqs, batch.num_sampled) if batch.has_options else None
        mark("build batch")
        try:
            logits = self.forward(batch, partial(_score_given, seqs, batch))
        finally:
            masks = masks and masks.result()
        mark("forward")
        if logits is None:
            return Samples(seqs, None, None)
        random = () if logits.dim() == 1 else upload(batch.random, self.device)
        if batch.has_options:
            samples = self.sample_with_options(logits, *random, seqs, batch.num_sampled, masks)
        else:
            samples = Samples(seqs, batch.num_sampled, sample(logits, *random) if random else logits)
        self.last_tokens = samples.tokens
        mark("sample")
        return samples

    def forward(self, batch: Batch, score_given: Callable[[np.ndarray, Tensor], None] | None = None) -> Tensor | None:
        """Fills the cache, on all ranks for the same batch. [R, vocabulary] logits to sample from on rank 0, if any; or
        the [R] tokens, if there are other ranks to help with them.

        There `score_given` is called with parts of `batch.prompt_logprob_rows` and their logits until all are done.
        """
        rows, wanted = batch.logit_rows, batch.prompt_logprob_rows
        has_none = rows is not None and not len(rows)  # chunks, and no prompt's last
        if self.graphs is not None and wanted is None and self.graphs.takes(batch):
            hidden_states = self.graphs.replay(batch, self.last_tokens)
            if rows is not None:
                hidden_states = hidden_states[torch.from_numpy(rows)]
            return None if has_none else self._finish(batch, hidden_states)
        input_ids, positions, step = make_inputs(batch, self.device)
        take_samples(input_ids, batch.sources, self.last_tokens)
        mark("upload")
        with use_step(step):
            hidden_states = self.model(input_ids, positions)
            if wanted is not None:
                for given in np.split(wanted, range(LOGPROB_ROWS, len(wanted), LOGPROB_ROWS)):
                    logits = self.model.lm_head.project(hidden_states[upload([given], self.device)[0]])
                    if logits is not None:
                        score_given(given, logits)
            return None if has_none else self._finish(batch, hidden_states)

    def _finish(self, batch: Batch, hidden_states: Tensor) -> Tensor | None:
        """What `forward` returns."""
        logits, head = self.model.compute_logits(hidden_states), self.model.lm_head
        if self.tp.size == 1 or batch.has_options:
            return head.gather(logits)
        return sample_on_ranks(self.tp, logits, head.vocab_size, *upload(batch.random, self.device))

    @torch.inference_mode()
    def copy_blocks(self, copies: list[tuple[int, int, int]]) -> None:
        """Copies the filled slots of blocks of the cache, `(from, to, number of slots)`, in order."""
        [table] = upload([np.array(copies, dtype=np.int64)], self.device)
        for layer in self.attentions:
            layer.backend.copy_blocks(layer.k_cache, layer.v_cache, table)

    def close(self) -> None:
        """Gives memory back, and ends what runs beside this process: with one rank, nothing. Idempotent."""
        self.model, self.attentions, self.graphs = None, [], None
        if self.mask_maker is not None:
            self.mask_maker.close()
        torch.cuda.empty_cache()

    def _check_ranks(self) -> None:
        """Raises if another rank has failed."""

    def _choose_cpus(self) -> set[int]:
        """Those that are near the memory that the model takes, if this is all that runs here; none are all."""
        if self.device.type != "cpu" or self.tp.size > 1 or is_number_of_threads_chosen():
            return set()
        weight_bytes = sum(file.stat().st_size for file in self.config.model_path.glob("*.safetensors"))
        cpus = cpus_near(weight_bytes + CPU_CACHE_BYTES)
        if cpus:
            logger.info(
                f"runs on {len(cpus)} of {len(allowed_cpus())} CPUs, those of the NUMA nodes that hold the model: "
                "data_parallel_size has more replicas of it use the others"
            )
        return cpus

    def _build_model(self) -> torch.nn.Module:
        config = self.config
        if config.batch_invariant:
            sizes, head_dim = config.hf_config, config.hf_config.head_dim
            inputs = [n // self.tp.size for n in (sizes.intermediate_size, sizes.num_attention_heads * head_dim)]
            inputs.append(sizes.hidden_size)
            check_batch_invariance(config.dtype, config.device, head_dim, inputs)

        with BUILDING, torch.device(config.device):
            default_dtype = torch.get_default_dtype()
            torch.set_default_dtype(config.dtype)
            try:
                with reading(config.model_path / "config.json"):
                    model = config.model_class(config.hf_config, config.max_model_len, self.tp)
            finally:
                torch.set_default_dtype(default_dtype)
        is_dummy = config.load_format == "dummy"
        for weight in stored_weights(model).values():
            if weight.least_bits == 4 or not is_dummy:
                weight.format = config.weight_format
        finish = partial(Weight.finish, quantization=config.quantization, is_invariant=config.batch_invariant)
        if is_dummy:
            load_dummy(model, config.seed, finish)
        else:
            shows_progress = self.tp.rank == 0 and config.data_parallel_size == 1
            load_model(model, config.model_path, finish, shows_progress, self._check_ranks)
        return model.to(config.device).eval()

    def _can_capture(self, backend: AttentionBackend) -> bool:
        if self.device.type != "cuda" or backend is CPUAttention or self.config.enforce_eager:
            return False
        return triton_problem() is None or not self._has_experts()

    def _has_experts(self) -> bool:
        return any(isinstance(module, Experts) for module in self.model.modules())

    def _can_record(self) -> bool:
        """Whether the kernels for CPUs do all of a decode step; if only some of it, the log says what they do not."""
        nothing, head_dim = torch.empty(0, dtype=self.config.dtype, device=self.device), self.attentions[0].head_dim
        if self.config.enforce_eager or not cpu_kernels.has_kernels(nothing):
            return False
        others = ["sums over ranks"] if self.tp.size > 1 else []
        others += ["the choice of experts"] if self._has_experts() else []
        if not cpu_kernels.has_kernels(nothing, head_dim=head_dim):
            others.append(f"attention with head_dim={head_dim}, above 256")
        weights = stored_weights(self.model).items()
        unpacked = [(name, w) for name, w in weights if not isinstance(w.kernel, cpu_kernels.PackedWeight)]
        if unpacked:
            name, weight = unpacked[0]
            others.append(
                f"{len(unpacked)} products, the first with {name}.weight, of {weight.shape[1]} inputs, no multiple of 4"
            )
        if others:
            logger.info("decode steps are not recorded, since PyTorch does " + "; ".join(others))
        return not others

    def _allocate_kv_cache(self, backend: AttentionBackend, max_blocks: int, graph_bytes: int) -> int:
        """Returns the cache's bytes. Graphs hold its addresses, so their memory is reserved before they are made."""
        config, attention = self.config, self.attentions[0]
        dtype, columns = config.dtype, attention.head_dim
        if config.kv_cache_dtype == "int8":
            dtype, columns = torch.uint8, columns + cpu_kernels.SCALE_BYTES
        layout = self.block_size, attention.num_kv_heads, columns
        block_bytes = 2 * len(self.attentions) * math.prod(backend.cache_shape(1, *layout)) * dtype.itemsize
        for layer in self.attentions:
            layer.backend = backend
        num_sharing = self.tp.size * config.data_parallel_size if self.device.type == "cpu" else 1
        reserved = self._activation_bytes() + graph_bytes if self.device.type == "cuda" else 0
        available = available_memory(self.device, config.gpu_memory_utilization) - reserved
        # A block exists on every rank, so the one with the least memory decides; on a CPU they share one memory.
        available = self.tp.minimum(available, self.device)
        if config.num_kvcache_blocks == -1:
            budget = default_cache_bytes(self.device, available)
            affordable = budget // (block_bytes * num_sharing)
            config.num_kvcache_blocks = min(max(affordable, 1), config.max_num_seqs * max_blocks)
        needed = config.num_kvcache_blocks * block_bytes * num_sharing
        if needed > available:
            raise ValueError(
                f"the KV cache needs {needed / GIB:.2f} GiB, {(needed - available) / GIB:.2f} GiB more than the "
                f"{self.device.type} has left (a step takes {reserved / GIB:.2f} GiB): lower num_kvcache_blocks, "
                "max_num_batched_tokens or max_num_seqs, raise gpu_memory_utilization, or free memory"
            )
        shape = backend.cache_shape(config.num_kvcache_blocks, *layout)
        # flash-attn 3 reads past a sequence's end: 0 times NaN is NaN. On a CPU zeros would take their memory at once.
        allocate = torch.zeros if self.device.type == "cuda" else torch.empty
        for layer in self.attentions:
            layer.k_cache = allocate(shape, dtype=dtype, device=self.device)
            layer.v_cache = allocate(shape, dtype=dtype, device=self.device)
        return needed // num_sharing

    def _activation_bytes(self) -> int:
        """What the largest step takes beside weights and cache, measured by running it: prefill, sampling, reports.

        What libraries take beside PyTorch's allocator stays taken, so that it is not free any more afterwards.
        """
        config = self.config
        num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        num_tokens = min(config.max_num_batched_tokens, num_seqs * config.max_model_len)
        cu_seqlens = np.linspace(0, num_tokens, num_seqs + 1).astype(np.int32)
        zeros = np.zeros(num_tokens, dtype=np.int64)
        lasts = cu_seqlens[1:].astype(np.int64) - 1
        batch = Batch(zeros, zeros, zeros, np.diff(cu_seqlens), cu_seqlens, logit_rows=lasts, has_options=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_reserved(self.device)
        try:
            with torch.inference_mode():
                one = Batch(*[zeros[:1]] * 3, np.ones(1, np.int32), np.array([0, 1], np.int32), logit_rows=zeros[:1])
                self.forward(one)  # few rows have kernels of their own
                logits = self.forward(batch)
                if logits is not None:
                    sample(logits)  # compiles its kernels, which it has for each dtype
                    ones, params = torch.ones(num_seqs, device=self.device), SamplingParams(top_p=0.9, logprobs=1)
                    seqs = [Sequence(row, [], params) for row in range(num_seqs)]
                    self.sample_with_options(logits, ones, ones.double() / 2, seqs)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"a step of {num_tokens} tokens of {num_seqs} sequences needs more memory than the GPU has left beside "
                f"the weights: lower max_num_batched_tokens or max_num_seqs. PyTorch said: {error}"
            ) from error
        peak = torch.cuda.max_memory_reserved(self.device)
        del logits
        torch.cuda.empty_cache()
        return peak - before


def stored_weights(model: torch.nn.Module) -> dict[str, Weight]:
    """A model's weights by the names of the modules that have them first."""
    found = {}
    for name, module in model.named_modules():
        weight = vars(module).get("weight")
        if isinstance(weight, Weight):
            found.setdefault(id(weight), (name, weight))
    return dict(found.values())


def make_inputs(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Step]:
    """[T] token ids, [T] positions, and what the layers need to know of a batch, on their device."""
    n, lens, bounds = batch.num_decode, batch.context_lens, []
    if batch.cu_seqlens_q is not None:
        bounds = [batch.cu_seqlens_q, np.concatenate([[0], lens[n:].cumsum()]).astype(np.int32), batch.logit_rows]
    arrays = batch.input_ids, batch.positions, batch.slot_mapping, lens, batch.block_tables
    uploaded = upload([*arrays, *bounds], device)
    input_ids, positions, slot_mapping, context_lens, tables, *bounds = uploaded
    if not bounds:
        decode = Context(None, None, 1, int(lens.max()), context_lens, tables)
        return input_ids, positions, Step(decode, None, slot_mapping)
    *bounds, logit_rows = bounds
    max_seqlens = int(np.diff(batch.cu_seqlens_q).max()), int(lens[n:].max())
    prefill = Context(*bounds, *max_seqlens, context_lens[n:], None if tables is None else tables[n:])
    decode = Context(None, None, 1, int(lens[:n].max()), context_lens[:n], tables[:n]) if n else None
    return input_ids, positions, Step(decode, prefill, slot_mapping, logit_rows)


def _score_given(seqs: list[Sequence], batch: Batch, rows: np.ndarray, logits: Tensor) -> None:
    """Adds to each sequence the log-probabilities of the given tokens after `rows` (of the T in the step)."""
    bounds, positions = batch.cu_seqlens_q, (batch.positions[rows] + 1).tolist()
    owners = len(seqs) - len(bounds) + np.searchsorted(bounds, rows - batch.num_decode, side="right")
    given = [(seqs[owner], position) for owner, position in zip(owners.tolist(), positions, strict=True)]
    tokens = np.array([seq.token_ids[position] for seq, position in given], dtype=np.int64)
    num_top = num_top_of([seq.params.prompt_logprobs for seq, _ in given], logits.shape[1])
    found = token_logprobs(logits, *upload([np.arange(len(rows)), tokens], logits.device), num_top)
    entries = logprob_entries(num_top, tokens, *Download(found).read())
    for (seq, position), entry in zip(given, entries, strict=True):
        del seq.prompt_logprobs[position - seq.unscored.start :]  # of an attempt that was preempted
        seq.prompt_logprobs.append(entry)
