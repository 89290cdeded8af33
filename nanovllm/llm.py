"""The facade that users import. Conveniences that need no engine state live here."""

from nanovllm.engine.llm_engine import LLMEngine


class LLM(LLMEngine):
    """A model, ready to generate. See `LLMEngine` for the methods and `Config` for the keyword arguments.

    Example:
        >>> llm = LLM("assets/nano-qwen3")
        >>> llm.generate(["Hello"], SamplingParams(temperature=0))[0]["text"]
    """
