"""What scheduling costs: a decode step without a model, in microseconds and in bytes for other ranks."""

import pickle
import random
from argparse import Namespace
from time import perf_counter

import numpy as np

from benchmarks.workload import MAX_TOKEN_ID, Figures, lengths_of, make_workload
from nanovllm import SamplingParams
from nanovllm.engine.batch import BatchBuilder
from nanovllm.engine.batch_codec import BatchCodec
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.model_runner import make_inputs
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels.plain_attention import CPUAttention
from nanovllm.utils.device import resolve_device, upload

FINISH_INTERVAL = 4  # decode steps between one sequence's end and the next one's
LOADS = ("steady", "finishing")


def line(label: str, *names: str) -> tuple[str, str]:
    """Two columns for each load."""
    return label, "  ".join(f"{{{load}_{name}:7.0f}}" for load in LOADS for name in names)


REPORT = [
    ("load", "{num_seqs} sequences, {num_steps} decode steps, blocks of {kvcache_block_size}"),
    ("us per step", "    none finishes    one in {finish_interval} steps"),
    ("", " median     mean   median     mean"),
    *(line(part.replace("_", " "), f"{part}_us", f"{part}_us_mean")
      for part in ("schedule", "postprocess", "these_two", "build_tensors", "all")),
    ("bytes per step", " median     most   median     most"),
    line("to other ranks", "bytes", "bytes_max"),
]  # fmt: skip


def measure(args: Namespace) -> Figures:
    """Of a decode step, while no sequence finishes and while one often does: microseconds of its bookkeeping, and
    bytes that each further tensor-parallel rank is sent."""
    block_size = args.kvcache_block_size or CPUAttention.block_size
    figures: Figures = {"num_seqs": args.num_seqs, "num_steps": args.num_steps}
    figures |= {"kvcache_block_size": block_size, "finish_interval": FINISH_INTERVAL}
    for load in LOADS:
        *seconds, num_bytes = Bookkeeping(args, block_size, load == "steady").measure(args.num_steps).T
        schedule, build, postprocess = 1e6 * np.array(seconds)
        figures |= {f"{load}_bytes": float(np.median(num_bytes)), f"{load}_bytes_max": float(num_bytes.max())}
        parts = {"schedule": schedule, "postprocess": postprocess, "these_two": schedule + postprocess}
        for part, micros in (parts | {"build_tensors": build, "all": schedule + postprocess + build}).items():
            figures[f"{load}_{part}_us"] = float(np.median(micros))
            figures[f"{load}_{part}_us_mean"] = float(np.mean(micros))
    return figures


class Bookkeeping:
    """An engine but for its model: tokens are made up."""

    def __init__(self, args: Namespace, block_size: int, is_steady: bool):
        self.num_seqs, self.is_steady, self.temperature = args.num_seqs, is_steady, args.temperature
        self.device, self.rng = resolve_device(args.device), random.Random(args.seed)
        self.prompts = make_workload(lengths_of(args), args.seed).prompts
        self.longest = args.num_steps + 2 if is_steady else self.num_seqs * FINISH_INTERVAL
        max_blocks = -(-max(args.max_model_len, args.max_input_len + self.longest) // block_size)
        manager = BlockManager(self.num_seqs * (max_blocks + 1), block_size)
        self.scheduler = Scheduler(manager, self.num_seqs, args.max_num_batched_tokens)
        self.builder, self.codec = BatchBuilder(block_size, max_blocks), BatchCodec(block_size, max_blocks)
        for i in range(self.num_seqs):
            self.add(i, self.longest if is_steady else (i + 1) * FINISH_INTERVAL)

    def add(self, seq_id: int, max_tokens: int) -> None:
        params = SamplingParams(self.temperature, max_tokens, ignore_eos=True)
        prompt = self.prompts[seq_id % self.num_seqs]
        self.scheduler.add(Sequence(seq_id, prompt, params, rng_key=self.rng.getrandbits(64)))

    def measure(self, num_steps: int) -> np.ndarray:
        """[num_steps, 4], of decode steps alone; see `step`."""
        steps: list[tuple[float, float, float, int]] = []
        while len(steps) < num_steps:
            step = self.step()
            num_decoding = self.scheduler.num_decode_tokens
            if num_decoding == self.num_seqs or (not self.is_steady and num_decoding):
                steps.append(step)
            for seq in self.scheduler.finished:  # another one takes its place
                self.add(seq.seq_id + self.num_seqs, self.longest)
            self.scheduler.finished = []
        return np.array(steps)

    def step(self) -> tuple[float, float, float, int]:
        """Seconds of `schedule`, of building the tensors and of `postprocess`; bytes for another rank."""
        start = perf_counter()
        seqs = self.scheduler.schedule()
        scheduled = perf_counter()
        batch = self.builder.build(seqs)
        make_inputs(batch, self.device)
        upload([batch.temperatures, batch.uniforms], self.device)
        built = perf_counter()
        counts = [1] * len(seqs) if batch.num_sampled is None else batch.num_sampled.tolist()
        token_ids = [[self.rng.randint(0, MAX_TOKEN_ID)] * count for count in counts]
        sampled = perf_counter()
        self.scheduler.postprocess(seqs, self.scheduler.advance(seqs), token_ids)
        seconds = scheduled - start, built - scheduled, perf_counter() - sampled
        return *seconds, len(pickle.dumps(self.codec.encode(batch), 5))
