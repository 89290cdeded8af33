"""A user's script, for the type checker alone: what it must know of each export, and what it must object to.

Where it does not object, the comment that expects it to is an error itself.
"""

from pathlib import Path

from typing_extensions import assert_type

import nanovllm
from nanovllm import LLM, BeamSearchParams, GenerationError, SamplingParams, StructuredOutputs
from nanovllm.outputs import BeamOutput, RequestOutput, Score, StreamDelta


def use() -> None:
    assert_type(nanovllm.__version__, str)
    params = SamplingParams(temperature=0, stop="END", structured_outputs=StructuredOutputs(choice=["yes", "no"]))
    SamplingParams(temprature=0)  # type: ignore[call-arg]
    SamplingParams(max_tokens="many")  # type: ignore[arg-type]
    StructuredOutputs(choice=3)  # type: ignore[arg-type]
    BeamSearchParams(beam_width="wide")  # type: ignore[arg-type]

    with LLM(Path("model"), max_num_seqs=8) as llm:
        assert_type(llm, LLM)
        LLM(8)  # type: ignore[arg-type]
        outputs = llm.generate(["a text", "another"], params)
        assert_type(llm.generate([[1, 2, 3], [4]]), list[RequestOutput])
        assert_type(llm.generate([{"prompt": "a text"}]), list[RequestOutput])
        assert_type(outputs, list[RequestOutput])
        assert_type(outputs[0].text, str)
        assert_type(outputs[0].outputs[0].token_ids, list[int])
        assert_type(outputs[0].cumulative_logprob, float | None)
        assert_type(llm.generate("a text", [params])[0].num_cached_tokens, int)
        llm.generate(3)  # type: ignore[arg-type]
        llm.generate("a text", temperature=0)  # type: ignore[call-arg]

        messages = [{"role": "user", "content": "hello"}]
        assert_type(llm.chat(messages, chat_template_kwargs={"enable_thinking": False}), list[RequestOutput])
        assert_type(llm.chat([messages, messages], params), list[RequestOutput])
        for delta in llm.chat_stream(messages):
            assert_type(delta, StreamDelta)
        for output in llm.generate_unordered(f"text {i}" for i in range(3)):
            assert_type(output.index, int)
        assert_type(llm.beam_search("a text", BeamSearchParams(beam_width=2)), list[BeamOutput])
        assert_type(llm.score("a text", [["one", "two"]]), list[Score | list[Score]])
        assert_type(llm.default_sampling_params(), SamplingParams)

    try:
        llm.generate("a text")
    except GenerationError as error:
        assert_type(error.outputs, list[RequestOutput])
