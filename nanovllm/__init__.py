"""nanovllm: offline LLM inference that one person can read, and trust with real work."""

from nanovllm.engine.beam_search import BeamSearchParams
from nanovllm.llm import LLM
from nanovllm.outputs import GenerationError
from nanovllm.sampling_params import SamplingParams
from nanovllm.structured_outputs import StructuredOutputs

__version__ = "0.1.0"
__all__ = ["LLM", "BeamSearchParams", "GenerationError", "SamplingParams", "StructuredOutputs", "__version__"]
