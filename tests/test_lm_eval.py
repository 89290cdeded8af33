"""The adapter for lm-evaluation-harness, through the harness itself and beside its own `hf` model."""

import json
import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from helpers import DEMO_MODEL
from nanovllm.outputs import Record

os.environ["HF_DATASETS_OFFLINE"] = "1"
is_missing = any(find_spec(name) is None for name in ("lm_eval", "accelerate"))  # which its `hf` model needs
pytestmark = pytest.mark.skipif(is_missing, reason="lm_eval or accelerate is not installed: requirements-lm-eval.txt")

MAX_LENGTH = 96  # tokens, less than the longest text has
ADDENDS = [(3, 4), (17, 25), (100, 250), (8, 9), (31, 6)]
SUMS = [{"question": f"what is {a} + {b}?", "sum": f"{a} + {b} = {a + b}."} for a, b in ADDENDS]
LONG = [*SUMS, {"question": "sort 42, 7, 93, 15. " * 9 + "what is 8 + 9?", "sum": "8 + 9 = 17."}]  # too long
CHOICES = [
    {"question": "user: who are you?\nassistant: I am ", "choices": ["nano-qwen3", "a small language", "prime", "7"]},
    {"question": "3 + 4 =", "choices": ["7", "8 or 9", "11", "the sum"]},
    {"question": "", "choices": ["Hello", " Hello", "list all prime numbers", "42"]},
    {"question": "sort 42, 7, 93, 15. " * 9, "choices": ["7, 15, 42, 93", "93", "42, 7", "1"]},
]  # fmt: skip
PRIMES = ", ".join(str(n) for n in range(2, 98) if all(n % i for i in range(2, n)))
TEXTS = ["I am nano-qwen3.", f"The prime numbers within 100 are: {PRIMES}.", " ".join(row["sum"] for row in SUMS * 4)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("tasks")

    def task(name: str, rows: list[dict], **fields: object) -> dict:
        path = folder / f"{name}.json"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        files = {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")}
        return {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"} | fields

    choices = [row | {"answer": i % 4} for i, row in enumerate(CHOICES)]
    metrics = [{"metric": name} for name in ("acc", "acc_norm")]
    generation = {"until": [" =", "\n\n"], "max_gen_toks": 24, "do_sample": False}
    return [
        task(
            "choices", choices, output_type="multiple_choice", doc_to_text="{{question}}",
            doc_to_choice="{{choices}}", doc_to_target="{{answer}}", metric_list=metrics, target_delimiter="",
        ),
        task(
            "sums", SUMS, output_type="generate_until", doc_to_text="{{question}}", doc_to_target="{{sum}}",
            generation_kwargs=generation | {"until": ["\n\n"]}, metric_list=[{"metric": "exact_match"}],
        ),
        task(
            "starts", LONG, output_type="generate_until", doc_to_text="{{question}}", doc_to_target="{{sum}}",
            generation_kwargs=generation, metric_list=[{"metric": "exact_match"}],
        ),
        task(
            "texts", [{"text": text} for text in TEXTS], output_type="loglikelihood_rolling", doc_to_text="",
            doc_to_target="{{text}}", metric_list=[{"metric": name} for name in ("word_perplexity", "bits_per_byte")],
        ),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def models() -> Iterator[tuple[object, object]]:
    """Ours, by the name that the harness knows it by, and its own."""
    from lm_eval.api.registry import get_model

    import nanovllm.lm_eval  # noqa: F401

    ours = get_model("nanovllm").create_from_arg_string(
        f"pretrained={DEMO_MODEL},dtype=float32,max_length={MAX_LENGTH},num_kvcache_blocks=100,kvcache_block_size=16",
        {"batch_size": 4, "max_batch_size": None, "device": "cuda:0"},  # the command line's default
    )
    theirs = get_model("hf")(
        pretrained=str(DEMO_MODEL), dtype="float32", max_length=MAX_LENGTH, batch_size=4, device="cpu"
    )
    yield ours, theirs
    ours.llm.exit()


@pytest.mark.parametrize("is_chat", [False, True])
def test_all_kinds_of_requests_come_out_as_from_the_harness_own_model(tasks, models, is_chat):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    settings = {"num_fewshot": 0, "apply_chat_template": is_chat, "bootstrap_iters": 0, "log_samples": True}
    manager = TaskManager(include_defaults=False)
    ours, theirs = (simple_evaluate(model, tasks=tasks, task_manager=manager, **settings) for model in models)
    for task in ("choices", "sums", "starts", "texts"):
        for metric, value in theirs["results"][task].items():
            assert ours["results"][task][metric] == (pytest.approx(value, rel=1e-4) if type(value) is float else value)
        samples, references = ours["samples"][task], theirs["samples"][task]
        assert len(samples) == len(references) > 2
        for sample, reference in zip(samples, references, strict=True):
            if task in ("sums", "starts"):
                assert sample["resps"] == reference["resps"]
            elif task == "texts":
                assert sample["resps"][0][0] == pytest.approx(reference["resps"][0][0], abs=1e-2)
            else:
                for [(logprob, is_greedy)], [(expected, expected_greedy)] in zip(
                    sample["resps"], reference["resps"], strict=True
                ):
                    assert logprob == pytest.approx(expected, abs=1e-3) and is_greedy == expected_greedy
    if is_chat:
        assert ours["results"]["sums"]["exact_match,none"] == 1.0
        assert all("=" not in sample["resps"][0][0] for sample in ours["samples"]["starts"])


def instance(*arguments: object) -> object:
    from lm_eval.api.instance import Instance

    return Instance("generate_until", {}, arguments, 0)


def test_a_prompt_that_is_too_long_loses_its_beginning(models, monkeypatch):
    model, given = models[0], []
    outputs = [Record(text="an answer")]
    monkeypatch.setattr(model.llm, "generate", lambda *call, use_tqdm: given.extend(call) or outputs)
    options = {"max_gen_toks": 24, "temperature": 0.5, "top_p": 0.9}
    assert model.generate_until([instance(TEXTS[2], options)]) == ["an answer"]
    [prompt], [params] = given
    assert prompt == model.tok_encode(TEXTS[2])[24 - MAX_LENGTH :] and len(prompt) == MAX_LENGTH - 24
    assert (params.max_tokens, params.temperature, params.top_p) == (24, 0.5, 0.9)
    with pytest.raises(ValueError, match="max_gen_toks=96 leaves no room for a prompt: max_length=96"):
        model.generate_until([instance("Hello", {"max_gen_toks": MAX_LENGTH})])


def test_of_thoughts_and_an_answer_the_answer_counts(models, monkeypatch):
    model = models[0]
    monkeypatch.setattr(model, "think_end_token", "=")
    prompt = model.apply_chat_template([{"role": "user", "content": "what is 3 + 4?"}])
    assert model.generate_until([instance(prompt, {"until": [" +", "."], "max_gen_toks": 24})]) == ["7"]
