"""Every setting of an engine, checked before anything is loaded."""

import copy
import json
import math
import re
import reprlib
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace

import torch

from nanovllm.kernels.attention import BACKENDS
from nanovllm.kernels.cpu import NEEDS, has_kernels, load_kernels
from nanovllm.layers.rotary_embedding import rope_settings
from nanovllm.layers.weight_formats import Format, read_format
from nanovllm.models import MODELS
from nanovllm.utils.checks import check_bool, check_choice, check_float, check_int, nearest_name, reading
from nanovllm.utils.device import default_batched_tokens, default_chunk_tokens, resolve_device, suitable_dtype
from nanovllm.utils.hf_types import PretrainedConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
MAX_GUESSING = 512  # tokens of a step that computes guesses: with more every device is busy
GGUF_ADVICE = "GGUF is llama.cpp's format: pass the Hugging Face checkpoint (safetensors) that it was made from"
# What vLLM's settings are here.
VLLM_SETTINGS = {
    "block_size": "use kvcache_block_size",
    "num_gpu_blocks_override": "use num_kvcache_blocks",
    "enable_prefix_caching": "prefixes are always cached, at no cost where none is shared",
    "enable_chunked_prefill": "a prompt longer than max_num_batched_tokens is always computed in chunks",
    "tokenizer": "the tokenizer is the checkpoint's",
    "tokenizer_mode": "the tokenizer is the checkpoint's",
    "trust_remote_code": "a checkpoint's own code is never run",
    "revision": "download the revision and pass its directory as model",
    "download_dir": "the environment variable HF_HOME says where downloads go",
    "swap_space": "preempted requests are computed again, nothing is swapped",
    "cpu_offload_gb": "weights are not offloaded",
    "max_seq_len_to_capture": "CUDA graphs are of decode steps, whatever the lengths; enforce_eager=True makes none",
    "max_logprobs": "logprobs have no limit",
    "disable_log_stats": "nothing is logged but to the logger 'nanovllm'",
    "distributed_executor_backend": "tensor_parallel_size starts processes on this machine",
    "pipeline_parallel_size": "use tensor_parallel_size",
}


SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "vocab_size",
)  # fmt: skip


@dataclass(slots=True)
class Config:
    """Settings of an engine: what `LLM` takes. TypeError or ValueError if one is wrong for model or device."""

    model: str | Path  # a Hugging Face checkpoint directory, or an `owner/name` id of the hub
    # Most tokens computed in a step, if not more sequences run; a longer prompt is computed in chunks. None: 16384, on
    # a CPU 1024.
    max_num_batched_tokens: int | None = None
    max_num_seqs: int = 512  # most sequences that run at the same time
    max_model_len: int = 4096  # most tokens of a sequence, prompt included; lowered to what the model supports
    gpu_memory_utilization: float = 0.9  # share of a GPU's memory to use, in (0, 1]
    tensor_parallel_size: int = 1  # processes that share the model, 1 to 8; on CUDA each has a GPU
    # Replicas of the model that share the requests, 1 to 64: processes, each with its GPUs or its share of the cores.
    data_parallel_size: int = 1
    # Seconds, at most 1800, for which no tensor-parallel rank makes progress in a step until the one that hangs is
    # ended.
    worker_timeout: float = 60.0
    # Decode without CUDA graphs, which take some seconds of start-up, and without a CPU's recordings.
    enforce_eager: bool = False
    # Tokens per block of the KV cache, also the unit of prefix caching. None: 64, or 256 where FlashAttention 2 takes
    # no smaller.
    kvcache_block_size: int | None = None
    # Blocks of the KV cache. -1: on a GPU what `gpu_memory_utilization` leaves, on a CPU half of the memory available
    # (to a container: within its limit) but at most 4 GiB, and nowhere more than `max_num_seqs` sequences of
    # `max_model_len`.
    num_kvcache_blocks: int = -1
    # Of keys and values. "auto": the model's. "int8", on a CPU that the C++ kernels are for, in bfloat16: rounded, each
    # token's keys or values of a head with a scale; the same memory holds nearly twice as many.
    kv_cache_dtype: str = "auto"
    hf_config: PretrainedConfig | None = None  # the model's configuration; read from the checkpoint by default
    eos: int | Sequence[int] | None = None  # token ids that end a completion; read from the checkpoint by default
    # Of weights and activations: "float32", "bfloat16" or "float16". "auto": the checkpoint's; but 16 bits are bfloat16
    # on a CPU that the C++ kernels are for, float32 on another, and float16 on a GPU that is slow in bfloat16.
    dtype: str | torch.dtype = "auto"
    device: str | torch.device = "auto"  # "cuda" or "cpu"; "auto": CUDA if there is a GPU
    # "flash_attn" (the package, FA3 or FA2), "triton" (ours), "torch_varlen" (PyTorch's own, 2.13) or "cpu" (C++ for
    # bfloat16 on a CPU that has what it needs, else plain PyTorch, on any device). "auto": the first that works here.
    attention_backend: str = "auto"
    # "auto": the checkpoint's safetensors. "dummy": random weights from config.json alone, for benchmarks.
    load_format: str = "auto"
    # What to make, while loading, of weights that the checkpoint has in 16 or 32 bits. "int8": each output channel with
    # a scale. "int4": each 128 inputs of an output with a scale and a zero point, embeddings as for int8.
    quantization: str | None = None
    # Most tokens, at most 64, to guess of a sequence by what came before, which are checked in one step; 0: none.
    # Outputs are the same, and sooner where texts repeat themselves or the prompt.
    speculative_tokens: int = 0
    seed: int = 0  # of the sampling and of dummy weights
    # A request's tokens and log-probabilities are the same, bit for bit, whatever runs beside it, or an error says why
    # not here.
    batch_invariant: bool = False
    model_path: Path = field(init=False)
    model_class: type = field(init=False)  # of `nanovllm.models`, or from outside
    weight_format: Format = field(init=False)  # of the checkpoint's linear layers
    eos_token_ids: frozenset[int] = field(init=False)
    chunk_tokens: int = field(init=False)  # of a prompt beside sequences that decode, see `Scheduler`

    def __post_init__(self) -> None:
        self.device = resolve_device(str(self.device))
        if self.max_num_batched_tokens is None:
            self.max_num_batched_tokens = default_batched_tokens(self.device)
        self.chunk_tokens = default_chunk_tokens(self.device)
        self._check_ranges()
        self.model_path = resolve_model(self.model)
        if self.hf_config is None:
            self.hf_config = read_hf_config(self.model_path)
        described = self.hf_config.architectures, self.hf_config.model_type
        self.model_class = MODELS[supported_architecture(*described, self.model_path)]
        with reading(self.model_path / "config.json"):
            self.weight_format = read_format(getattr(self.hf_config, "quantization_config", None))
        if self.quantization is not None and not self.weight_format.is_plain:
            raise ValueError(f"quantization={self.quantization!r} of a checkpoint that is quantised: leave it out")
        if self.batch_invariant:
            self._check_invariance()
        check_parallel_size(self.tensor_parallel_size, self.data_parallel_size, self.hf_config, self.device)
        with reading(self.model_path / "config.json"):
            self.max_model_len = min(self.max_model_len, max_position(self.hf_config))
            self._fit_window()
        name = str(self.dtype).removeprefix("torch.")
        if name != "auto":
            self.dtype = DTYPES[name]
        else:
            stored = getattr(self.hf_config, "dtype" if hasattr(self.hf_config, "dtype") else "torch_dtype", None)
            stored = DTYPES.get(str(stored).removeprefix("torch."), torch.bfloat16)
            is_compiled = self.device.type == "cpu" and load_kernels() is not None
            self.dtype = suitable_dtype(stored, self.device, is_compiled)
        if self.kv_cache_dtype == "int8":
            self._check_cache()
        with reading(self.model_path / "generation_config.json") if self.eos is None else nullcontext():
            eos = self._read_eos() if self.eos is None else self.eos
            self.eos_token_ids = frozenset([eos] if isinstance(eos, int) else eos)
            for token_id in self.eos_token_ids:
                check_int("eos", token_id)

    def to_send(self) -> "Config":
        """A copy for another process. Our models read attributes alone of `hf_config`; a class of transformers' would
        import it there, and all of its models, which takes longer than everything else of a start.
        """
        theirs = copy.copy(self)
        if self.model_class.__module__.startswith("nanovllm.models."):
            names = getattr(self.hf_config, "attribute_map", ())  # which it has no longer if it was sent before
            aliases = {name: getattr(self.hf_config, name, None) for name in names}
            theirs.hf_config = SimpleNamespace(**(vars(self.hf_config) | aliases))
        return theirs

    @property
    def max_decode_tokens(self) -> int:
        """Most tokens of a step in which all sequences decode, with their guesses."""
        most = max(self.max_num_seqs, min(self.max_num_batched_tokens, MAX_GUESSING))
        return min(self.max_num_seqs * (1 + self.speculative_tokens), most)

    def _check_ranges(self) -> None:
        for name in ("max_num_batched_tokens", "max_num_seqs", "max_model_len"):
            check_int(name, getattr(self, name), 1)
        if self.kvcache_block_size is not None:
            check_int("kvcache_block_size", self.kvcache_block_size, 1)
        check_int("tensor_parallel_size", self.tensor_parallel_size, 1, 8)
        check_int("data_parallel_size", self.data_parallel_size, 1, 64)
        check_int("seed", self.seed)
        check_int("speculative_tokens", self.speculative_tokens, 0, 64)
        check_int("num_kvcache_blocks", self.num_kvcache_blocks, -1)
        if self.num_kvcache_blocks == 0:
            raise ValueError("num_kvcache_blocks must be positive, or -1 to fill the memory budget, got 0")
        check_float("gpu_memory_utilization", self.gpu_memory_utilization, 0, 1, open_low=True)
        check_float("worker_timeout", self.worker_timeout, 0, 1800, open_low=True)
        check_bool("enforce_eager", self.enforce_eager)
        check_bool("batch_invariant", self.batch_invariant)
        check_choice("dtype", str(self.dtype).removeprefix("torch."), ["auto", *DTYPES])
        check_choice("attention_backend", self.attention_backend, ["auto", *BACKENDS])
        check_choice("kv_cache_dtype", self.kv_cache_dtype, ["auto", "int8"])
        check_choice("load_format", self.load_format, ["auto", "dummy"])
        check_choice("quantization", self.quantization, [None, "int8", "int4"])

    def _check_invariance(self) -> None:
        """What the runner does not check: collectives, and whose attention is asked for."""
        if self.tensor_parallel_size > 2:  # the order in which more ranks' sums are added up depends on how many
            raise ValueError(
                f"batch_invariant=True and tensor_parallel_size={self.tensor_parallel_size}: sums of more than two "
                "ranks depend on the batch; use at most 2, and data_parallel_size for more GPUs"
            )
        is_quantised = self.quantization is not None or not self.weight_format.is_plain
        if is_quantised and self.device.type == "cuda":
            raise ValueError("batch_invariant=True is not for quantised weights on a GPU: leave it out")
        if self.device.type == "cuda" and getattr(self.hf_config, "num_experts_per_tok", 0):
            raise ValueError("batch_invariant=True is not for mixtures of experts on a GPU: leave it out")
        if self.device.type == "cuda" and self.attention_backend not in ("auto", "triton"):
            raise ValueError(
                f"batch_invariant=True and attention_backend={self.attention_backend!r}, whose results depend on the "
                "batch; use 'auto' or 'triton'"
            )

    def _check_cache(self) -> None:
        head_dim = self.hf_config.head_dim
        if self.device.type != "cpu" or not has_kernels(torch.empty(0, dtype=self.dtype), head_dim=head_dim):
            raise ValueError(
                f"kv_cache_dtype='int8' needs a CPU and {NEEDS}; here are device={self.device.type!r}, {self.dtype}, "
                f"head_dim={head_dim}: leave kv_cache_dtype out"
            )

    def _fit_window(self) -> None:
        """Within a sliding window attention sees all that came before, which is what there is here."""
        hf_config = self.hf_config
        window = getattr(hf_config, "sliding_window", None) if getattr(hf_config, "use_sliding_window", True) else None
        if window is not None and window < self.max_model_len:
            warnings.warn(
                f"max_model_len={self.max_model_len} is lowered to {window}: of longer sequences the model's attention "
                "sees only that many tokens, its sliding window, which is not supported",
                stacklevel=2,
            )
            self.max_model_len = window

    def _read_eos(self) -> int | Sequence[int]:
        """The ids in generation_config.json, else in config.json; none is an empty list."""
        eos = None
        if (self.model_path / "generation_config.json").is_file():
            from transformers import GenerationConfig

            eos = GenerationConfig.from_pretrained(self.model_path).eos_token_id
        if eos is None:
            eos = getattr(self.hf_config, "eos_token_id", None)
        return [] if eos is None else eos


def known_fields(settings: dict[str, object]) -> dict[str, object]:
    """Those that are fields of `Config`; a `UserWarning` of each other one, for who called the engine's constructor."""
    known = [f.name for f in fields(Config) if f.init and f.name != "model"]
    for name in settings:
        if name not in known:
            nearest = nearest_name(name, known)
            advice = VLLM_SETTINGS.get(name) or (f"the nearest is {nearest!r}" if nearest else "")
            message = f"LLM ignores the unknown setting {name!r}"
            warnings.warn(f"{message}; {advice}" if advice else message, stacklevel=3)
    return {name: value for name, value in settings.items() if name in known}


def resolve_model(model: str | Path) -> Path:
    """The directory of a checkpoint: `model` itself, or the hub's `owner/name` in huggingface_hub's cache.

    ValueError if it is neither, or not in the cache while the hub cannot be reached.
    """
    path, name = Path(model).expanduser(), f"model={str(model)!r}"
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        raise ValueError(f"{name} is not a checkpoint directory. {GGUF_ADVICE}")
    if path.is_file():
        raise ValueError(f"{name} is a file; pass the directory that it is in, {str(path.parent)!r}")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(model)):  # an owner begins with no dot, as relative paths do
        raise ValueError(f"{name} is neither a directory nor an 'owner/name' id of the Hugging Face hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(str(model), allow_patterns=CHECKPOINT_FILES))
    except (OSError, HFValidationError) as error:
        if path.parent.is_dir():
            raise ValueError(
                f"{name} does not exist in the directory {str(path.parent)!r}, and as an id of the Hugging Face hub it "
                f"could not be fetched: {error}"
            ) from error
        raise ValueError(
            f"{name} is not a directory and could not be fetched from the Hugging Face hub. Download it "
            f"where there is a network with `hf download {model}` (or `huggingface-cli download {model}`), or pass "
            f"the path of a local copy. The hub said: {error}"
        ) from error


def read_hf_config(path: Path) -> PretrainedConfig:
    """A checkpoint's configuration; ValueError if it is missing, damaged or not supported."""
    file = path / "config.json"
    if not file.is_file():
        advice = f". {GGUF_ADVICE}" if any(path.glob("*.gguf")) or "gguf" in str(path).lower() else ""
        raise ValueError(f"{path} has no config.json, so it is not a Hugging Face checkpoint directory{advice}")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file} is damaged: it has {reprlib.repr(raw)} instead of an object")
    # Before transformers is asked, which may not know it either.
    supported_architecture(raw.get("architectures"), raw.get("model_type"), path)
    from transformers import AutoConfig

    with reading(file):
        hf_config = AutoConfig.from_pretrained(path)
        for name in SIZES:
            check_int(name, getattr(hf_config, name), 1, 2**31 - 1)
        if getattr(hf_config, "head_dim", None) is None:
            hf_config.head_dim = hf_config.hidden_size // hf_config.num_attention_heads
        return hf_config


def supported_architecture(architectures: list[str] | None, model_type: str | None, path: Path) -> str:
    """The first of a checkpoint's architectures that there is a model for; ValueError if there is none."""
    for name in architectures if isinstance(architectures, list) else []:
        if isinstance(name, str) and name in MODELS:
            return name
    like = [name for name in MODELS if name.lower() == f"{str(model_type).replace('_', '')}forcausallm"]
    advice = f". Its model_type {model_type!r} is that of {like[0]}: name that if it is the same" if like else ""
    raise ValueError(f"{path} is a model of architecture {architectures}; supported are {sorted(MODELS)}{advice}")


def check_parallel_size(size: int, num_replicas: int, hf_config: PretrainedConfig, device: torch.device) -> None:
    """Raises ValueError unless a model can be split over `size` ranks, and each of all replicas has a GPU if on any.

    KV heads may be fewer than the ranks, several of which then hold the same one.
    """
    heads, kv_heads, width = hf_config.num_attention_heads, hf_config.num_key_value_heads, hf_config.intermediate_size
    width = math.gcd(width, getattr(hf_config, "moe_intermediate_size", None) or width)
    fitting = [n for n in range(1, 9) if heads % n == width % n == 0 and 0 in (kv_heads % n, n % kv_heads)]
    if size not in fitting:
        raise ValueError(
            f"tensor_parallel_size={size} does not divide the model's num_attention_heads={heads}, "
            f"num_key_value_heads={kv_heads} (or the reverse) and intermediate_size={width}; use one of {fitting}"
        )
    num_gpus, needed = torch.cuda.device_count(), size * num_replicas
    if needed > 1 and device.type == "cuda" and num_gpus < needed:
        sizes = [f"tensor_parallel_size={size}"] + [f"data_parallel_size={num_replicas}"] * (num_replicas > 1)
        how_many = f"{needed} GPUs" if num_replicas > 1 else "as many GPUs"
        raise ValueError(f"{' and '.join(sizes)} needs {how_many}; this machine has {num_gpus}")


def max_position(hf_config: PretrainedConfig) -> int:
    """The longest sequence that a model supports, in tokens, with its rope scaling."""
    settings = rope_settings(hf_config)
    original = settings.get("original_max_position_embeddings")
    scaled = int(original * settings["factor"]) if original and settings.get("factor") else 0
    return max(hf_config.max_position_embeddings, scaled)
