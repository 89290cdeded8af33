"""nanovllm: offline LLM inference that one person can read in an afternoon."""

from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]
