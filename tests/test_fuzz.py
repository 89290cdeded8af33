"""Whatever comes from outside, nothing but the documented errors come out. `HYPOTHESIS_PROFILE=long` looks longer."""

import json
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from helpers import DEMO_MODEL, save_model
from nanovllm import LLM, SamplingParams
from nanovllm.config import Config

OPTIONS = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("short", max_examples=60, **OPTIONS)
settings.register_profile("long", max_examples=20_000, **OPTIONS)
settings.load_profile(__import__("os").environ.get("HYPOTHESIS_PROFILE", "short"))

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [field for field in SamplingParams.__dataclass_fields__ if field != "logits_processors"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    return path


@pytest.fixture(scope="module")
def llm():
    with LLM(str(DEMO_MODEL), dtype="float32", device="cpu", num_kvcache_blocks=32, max_num_seqs=4) as llm:
        yield llm


@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
def test_sampling_params_that_are_accepted_run(llm, values):
    try:
        params = SamplingParams(**values)
    except (TypeError, ValueError):
        return
    if params.n > 4 or (params.max_tokens or 9999) > 8 or params.logprobs == -1:
        return  # a long time, which is no error
    try:
        [output] = llm.generate(["sort: 2 1"], params, use_tqdm=False)
    except (TypeError, ValueError):
        return
    assert output.finish_reason in ("stop", "length")


@given(st.lists(VALUES, max_size=4))
def test_prompts(llm, prompts):
    try:
        llm.generate(prompts, SamplingParams(max_tokens=2), use_tqdm=False)
    except (TypeError, ValueError):
        return


MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | VALUES, "content": VALUES},
    optional={"tool_calls": VALUES, "name": VALUES, "x": VALUES},
)


@given(st.lists(st.lists(MESSAGES, max_size=3) | MESSAGES | VALUES, max_size=3))
@example([[{"role": "user", "content": "{{ ''.__class__ }}"}]])
def test_chat_messages(llm, conversations):
    try:
        llm.chat(conversations, SamplingParams(max_tokens=2), use_tqdm=False)
    except (TypeError, ValueError):
        return


@given(st.dictionaries(st.sampled_from([*Config.__dataclass_fields__]), VALUES, max_size=2))
def test_settings(model, values):
    try:
        Config(**{"model": str(model), "device": "cpu"} | {k: v for k, v in values.items() if k != "hf_config"})
    except (TypeError, ValueError):
        return


def opens_or_is_refused(path: Path, **settings) -> None:
    """An engine of the checkpoint, which is removed."""
    try:
        LLM(str(path), device="cpu", num_kvcache_blocks=4, max_model_len=64, **settings).exit()
    except (TypeError, ValueError):
        pass
    finally:
        shutil.rmtree(path)


@given(st.data())
def test_a_checkpoints_config(model, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("config")
    stored = json.loads((model / "config.json").read_text())
    names = data.draw(st.lists(st.sampled_from([*stored, "rope_scaling", "quantization_config"]), max_size=3))
    for name in names:
        stored[name] = data.draw(JSON)
    (path / "config.json").write_text(json.dumps(stored))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": data.draw(JSON)}))
    opens_or_is_refused(path, load_format="dummy")


@given(st.data())
def test_a_safetensors_file(model, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("weights")
    shutil.copytree(model, path, dirs_exist_ok=True)
    file = path / "model.safetensors"
    raw = bytearray(file.read_bytes())
    (size,) = struct.unpack("<Q", raw[:8])
    what = data.draw(st.sampled_from(["flip", "cut", "header", "name"]))
    if what == "flip":
        for place in data.draw(st.lists(st.integers(0, 8 + size - 1), min_size=1, max_size=4)):
            raw[place] ^= data.draw(st.integers(1, 255))
    elif what == "cut":
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    else:
        header = json.loads(raw[8 : 8 + size])
        name = data.draw(st.sampled_from(sorted(header)))
        if what == "header":
            header[name] = data.draw(JSON)
        else:
            header[data.draw(st.text(max_size=8))] = header.pop(name)
        text = json.dumps(header).encode()
        raw[: 8 + size] = struct.pack("<Q", len(text)) + text
    file.write_bytes(raw)
    opens_or_is_refused(path, dtype="float32")
