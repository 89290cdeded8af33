"""Completions with a structure: whatever the options, those that end by themselves have it."""

import json
import random
import re
import warnings
from contextlib import suppress
from itertools import pairwise

import jsonschema
import llguidance.numpy
import numpy as np
import pytest
from transformers import AutoTokenizer

from helpers import DEMO_MODEL, ROOT, save_model
from nanovllm import LLM, SamplingParams, StructuredOutputs
from nanovllm.engine import grammar as grammar_module
from nanovllm.engine import scheduler as scheduler_module
from nanovllm.engine.drafts import Drafter
from nanovllm.engine.grammar import MaskMaker
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels.cpu import load_kernels
from schemas import SCHEMAS, record, several, string, whole

SETTINGS = {"device": "cpu", "kvcache_block_size": 16}
PERSON = record(the_first_name=string(maxLength=20), the_age=whole(0, 150), tags=several({"enum": ["a", "b"]}))
PROMPTS = ["Who are you?", "Count: 1 2 3", "Sort: 5 3 1 9 8 2", "def area(a, b):\n    return a * b\n" * 4]


@pytest.fixture(scope="module")
def llm():
    with LLM(str(DEMO_MODEL), dtype="float32", num_kvcache_blocks=400, **SETTINGS) as llm:
        yield llm


@pytest.fixture
def always(monkeypatch):
    """As many guesses as there may be, whatever they cost."""
    monkeypatch.setattr(Drafter, "_best_counts", lambda self, chances, num_tokens: np.full(len(chances), self.most))


def generate(llm, prompts, *params, **settings):
    params = params or (SamplingParams(**{"max_tokens": 200, "seed": 0} | settings),)
    return llm.generate(prompts, list(params) if len(params) > 1 else params[0], use_tqdm=False)


def is_valid(schema: object, text: str) -> bool:
    kind = jsonschema.Draft202012Validator
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))
    return True


def is_prefix(llm, outputs: StructuredOutputs, token_ids: list[int]) -> bool:
    return llm.grammars.compile(outputs).matcher().try_consume_tokens(token_ids) == len(token_ids)


def steps(llm) -> int:
    return sum(llm.stats()["step_times"].values())


# ---- what holds whatever the options


CLOSING = '"}],:@.+Z-e'  # of which a model that knows no JSON needs to be told to close what it has opened


def options(rng: random.Random) -> dict[str, object]:
    """A few at a time."""
    mix = {
        "n": 2, "stop": ["}", ",", '"'], "presence_penalty": 1.0, "repetition_penalty": 1.3, "min_tokens": 30,
        "top_p": 0.9, "top_k": 40, "logprobs": 1, "ignore_eos": True, "stop_token_ids": [4, 93, 67],
        "bad_words": ["a", "}"], "include_stop_str_in_output": True,
    }  # fmt: skip
    chosen = rng.sample(sorted(mix), rng.randrange(4))
    return {name: mix[name] for name in chosen}


@pytest.mark.parametrize("settings", [{}, {"num_kvcache_blocks": 30, "speculative_tokens": 4}], ids=["roomy", "tight"])
@pytest.mark.filterwarnings("ignore:the sampling parameters forbid every token")
def test_every_completion_that_ends_by_itself_is_valid_and_others_are_beginnings(always, settings):
    rng, schemas = random.Random(0), list(SCHEMAS.values())
    with LLM(str(DEMO_MODEL), **SETTINGS | {"num_kvcache_blocks": 400} | settings) as llm:
        llm.scheduler.output_ratio = 0.0
        num_ended = num_cut = 0
        bias = {llm.tokenizer.convert_tokens_to_ids(letter): 12 for letter in CLOSING}
        for temperature in (0.7, 1.0, 2.0):
            common = {"max_tokens": 160, "logit_bias": bias}
            params = [
                SamplingParams(temperature, structured_outputs={"json": schema}, **common, **options(rng))
                for schema in schemas
            ]
            outputs = generate(llm, [rng.choice(PROMPTS) for _ in schemas], *params)
            for schema, p, output in zip(schemas, params, outputs, strict=True):
                for completion in output.outputs:
                    if completion.finish_reason == "stop":
                        assert is_valid(schema, completion.text)
                        num_ended += 1
                    else:
                        assert completion.finish_reason == "length"
                        assert is_prefix(llm, p.structured_outputs, completion.token_ids)
                        num_cut += 1
        stats = llm.stats()
    assert num_ended > 90 and num_cut > 0
    assert (stats["preemptions"] > 0) == ("num_kvcache_blocks" in settings)
    assert stats["cached_prompt_tokens"] > 0 and stats["blocks_used"] == 0


def test_a_random_model_with_a_random_vocabulary_of_bytes_is_held_to_it(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    save_model(tmp_path, vocab_size=len(tokenizer) + 37, eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(tmp_path)
    outputs = {"json": record(a=string(maxLength=9), b=several(string(maxLength=3), 2))}
    with LLM(str(tmp_path), dtype="float32", num_kvcache_blocks=100, **SETTINGS) as llm:
        made = generate(llm, [[5, 6]] * 8, n=2, structured_outputs=outputs, seed=None, temperature=2.0)
        completions = [completion for output in made for completion in output.outputs]
    assert all(c.finish_reason == "stop" and is_valid(outputs["json"], c.text) for c in completions)
    assert any(not c.text.isascii() for c in completions)


@pytest.mark.skipif(load_kernels() is None, reason="no kernels for this processor, or no compiler")
def test_tokens_do_not_depend_on_how_many_come_in_a_step_nor_on_preemptions(always, monkeypatch):
    """Bit for bit: with certain tokens one by one and together, in parts, with guesses, and in a small cache."""
    monkeypatch.setattr("warnings.warn", lambda *args, **kwargs: None)
    names = ["nested", "comments", "long keys", "null union", "entities"]
    made, num_steps = [], []
    for most, settings in ((0, {}), (512, {}), (24, {}), (512, {"speculative_tokens": 5, "num_kvcache_blocks": 18})):
        monkeypatch.setattr(scheduler_module, "MOST_CERTAIN", most)
        with LLM(str(DEMO_MODEL), **SETTINGS | {"num_kvcache_blocks": 400} | settings) as llm:
            params = [
                SamplingParams(temperature, max_tokens=120, n=2, seed=3, structured_outputs={"json": SCHEMAS[name]})
                for name in names
                for temperature in (0.5, 1.5)
            ]
            llm.scheduler.output_ratio = 0.0  # admits too many
            outputs = generate(llm, PROMPTS[:2] * 5, *params)
            num_steps.append(steps(llm))
            assert (llm.stats()["preemptions"] > 0) == bool(settings)
            if settings:
                assert llm.stats()["decode_tokens"] > llm.stats()["output_tokens"] - 20  # guesses were made
        made.append([[(c.token_ids, c.text, c.finish_reason) for c in output.outputs] for output in outputs])
    assert made[0] == made[1] == made[2] == made[3]
    assert num_steps[1] < num_steps[0]


def test_what_is_certain_is_computed_together(llm):
    before = steps(llm)
    [output] = generate(llm, "x", structured_outputs={"json": SCHEMAS["long keys"]})
    assert output.finish_reason == "stop" and steps(llm) - before < len(output.token_ids) / 2
    [output] = generate(llm, "x", structured_outputs={"choice": ["the one and only answer"]}, logprobs=0)
    assert output.text == "the one and only answer"
    assert len(output.logprobs) == len(output.token_ids) and output.cumulative_logprob < -1  # of the model, unmasked
    assert steps(llm) - before < 40


def test_log_probabilities_are_the_models_own(llm):
    [output] = generate(llm, "Hello", structured_outputs={"regex": "[ab]{9,}"}, logprobs=1, max_tokens=5)
    assert set(output.text) <= {*"ab"} and max(entry["rank"] for entry in output.logprobs) > 50


def test_streamed_pieces_add_up(llm):
    params = SamplingParams(1.5, seed=1, max_tokens=200, structured_outputs={"json": PERSON}, stop=["nothing"])
    [output] = generate(llm, "Hello", params)
    pieces = list(llm.generate_stream("Hello", params))
    assert "".join(piece.text for piece in pieces) == output.text and is_valid(PERSON, output.text)
    assert [i for piece in pieces for i in piece.token_ids] == output.token_ids


def test_a_failed_step_changes_nothing(llm, monkeypatch):
    """The sequences wait again, and find their place in the grammar again, also where it was ahead of them."""
    params = SamplingParams(1.0, seed=4, max_tokens=100, structured_outputs={"json": PERSON})
    [expected] = generate(llm, "Hello", params)
    llm.add_request("Hello", params)
    outputs, count = [], 0
    while not outputs:
        count += 1
        place, name = [(llm.model_runner, "forward"), (llguidance.numpy, "fill_next_token_bitmask_par")][count % 2]
        with monkeypatch.context() as patch, suppress(ZeroDivisionError):
            patch.setattr(place, name, lambda *args: 1 / 0)
            outputs, _ = llm.step()  # which may need no mask
        if not outputs:
            outputs, _ = llm.step()
    assert count > 6 and outputs[0].token_ids == expected.token_ids


# ---- the forms


@pytest.mark.parametrize(
    "regex",
    [
        r"\d{3}-\d{4}", r"[A-Z]\w{2,9}", r"(yes|no)( maybe)?", r"^[^\W\d_]{4}$", r"\S{5}\s\D{3}", r"[^\s\d]{6}",
        r"a{2,}b*", r"#\[x\]\{1\}", r"(?i)abc|.", r"[\w.-]{1,5}@[a-z]+\.(com|org)", r"\W{3}",
    ],
)  # fmt: skip
def test_a_regular_expression_matches_for_python_too(llm, regex):
    [output] = generate(llm, "Hello", structured_outputs={"regex": regex}, n=16, temperature=2.0)
    ended = [completion.text for completion in output.outputs if completion.finish_reason == "stop"]
    assert len(ended) > 8 and all(re.fullmatch(regex, text) for text in ended)


def test_letters_and_spaces_that_only_one_of_both_takes_for_some_are_left_out(llm):
    def allows(regex, text):
        grammar = llm.grammars.compile(StructuredOutputs(regex=regex))
        return grammar.accepts(text)

    for text in ("\u0301", "²", "\x1c", "\x85", "é", "a", "0", "٣", " ", "\t", "\n"):
        for regex in (r"\w", r"\W", r"\s", r"\S", r"\d", r"\D", r"[^\w]", r"[^\W]", r"[^\s]", r"[^\S]", r"[^\d]", "."):
            assert not allows(regex, text) or re.fullmatch(regex, text), (regex, text)
    assert all(allows(r"\w", text) for text in "aZ09_") and allows(r"\W", "-") and allows(r"[^\w\s]", "é") is False


def test_choices_are_taken_as_they_are(llm):
    choice = ['a"b', "x\ny", r"\d+", "😀", "yes", "yes, but", "a|b", " (b) ", "[c]", "#-~&"]
    [output] = generate(llm, "Hello", structured_outputs={"choice": choice}, n=60, temperature=2.0)
    made = {completion.text for completion in output.outputs}
    assert made <= set(choice) and len(made) > 5
    assert {completion.finish_reason for completion in output.outputs} == {"stop"}


@pytest.mark.parametrize(
    "grammar",
    [
        'start: expr\nexpr: NUMBER | "(" expr OP expr ")"\nNUMBER: /[1-9][0-9]{0,2}/\nOP: "+" | "*"\n',
        'root ::= expr\nexpr ::= [1-9] [0-9]? | "(" expr ("+" | "*") expr ")"\n',
    ],
    ids=["lark", "gbnf"],
)
def test_a_grammar_is_followed(llm, grammar):
    [output] = generate(llm, "Hello", structured_outputs={"grammar": grammar}, n=16, temperature=1.5, seed=2)
    ended = [completion.text for completion in output.outputs if completion.finish_reason == "stop"]
    assert len(ended) > 8 and any("(" in text for text in ended)
    assert all(isinstance(eval(text), int) and re.fullmatch(r"[0-9()+*]+", text) for text in ended)


def test_json_without_a_schema(llm):
    for outputs, kinds in (({"json_object": True}, dict), ({"json": {}}, object)):
        [output] = generate(llm, "Hello", structured_outputs=outputs, n=20, temperature=2.0, max_tokens=60)
        ended = [completion.text for completion in output.outputs if completion.finish_reason == "stop"]
        assert ended and all(isinstance(json.loads(text), kinds) for text in ended)


def test_the_same_schema_may_be_a_dict_a_text_or_a_model_class(llm):
    pydantic = pytest.importorskip("pydantic")

    class City(pydantic.BaseModel, extra="forbid"):
        name: str = pydantic.Field(max_length=9)
        population: int | None = pydantic.Field(ge=0, le=999)

    schema = City.model_json_schema()
    forms = [StructuredOutputs(json=form) for form in (City, schema, json.dumps(schema))]
    assert forms[0] == forms[1] == forms[2] and len(set(forms)) == 1
    params = SamplingParams(temperature=2.0, structured_outputs=forms[0])
    [output] = llm.chat([{"role": "user", "content": "Hi"}], params, use_tqdm=False)
    assert City.model_validate_json(output.text)


def test_a_property_cannot_come_again_in_another_spelling(llm):
    grammar = llm.grammars.compile(StructuredOutputs(json={"properties": {"a": {"type": "integer"}}}))
    assert grammar.accepts('{"a":1,"b":"x"}') and not grammar.accepts('{"a":1,"a":"x"}')
    assert not grammar.accepts('{"\\u0061":"x"}')


def test_the_example_in_the_docs_extracts_records(llm):
    page = (ROOT / "docs" / "using.md").read_text()
    code = page.partition("## Structured outputs")[2].partition("```python\n")[2].partition("```")[0]
    assert "records = [" in code
    names = {"llm": llm}
    exec(code, names)
    assert all(is_valid(names["persons"], output.text) for output in names["outputs"])
    assert len(names["records"]) >= 2 and all(is_valid(names["person"], json.dumps(r)) for r in names["records"])


# ---- with other options


def test_ends_are_where_the_grammar_allows_them(llm):
    def run(**settings):
        [output] = generate(llm, "Hello", temperature=1.5, n=12, structured_outputs={"regex": "[ab]{3,40}"}, **settings)
        return [(c.text, c.token_ids, c.finish_reason, c.stop_reason) for c in output.outputs]

    all_eos = llm.config.eos_token_ids
    a, b = (llm.tokenizer.encode(letter)[0] for letter in "ab")
    free = run()
    assert all(3 <= len(text) <= 40 for text, *_ in free)
    assert any(ids[-1] in all_eos and len(text) < 40 for text, ids, *_ in free)
    assert {len(text) for text, *_ in run(ignore_eos=True)} == {40}  # as long as it may be
    assert all(len(ids) > 20 or len(text) == 40 for text, ids, *_ in run(min_tokens=20))
    stopped = run(stop_token_ids=[b])
    for text, ids, reason, stop in stopped:  # one that comes after three letters ends it, and is no part of it
        assert reason == "stop" and text == llm.tokenizer.decode(ids[:-1] if stop == b or ids[-1] in all_eos else ids)
        assert all(len(llm.tokenizer.decode(ids[:n])) < 3 for n, i in enumerate(ids[:-1]) if i == b)
        assert (stop == b) == (ids[-1] == b and len(text) < 40)
    assert any(stop == b for *_, stop in stopped) and any(b in ids[:-1] for _, ids, *_ in stopped)
    whole_tokens = [a, b]
    assert {len(text) for text, *_ in run(allowed_token_ids=whole_tokens)} == {40}  # without an end


def test_a_stop_string_ends_only_what_is_complete(llm):
    """JSON is not cut at a brace, and a text that may end anywhere is cut where it always was."""
    outputs = {"json": PERSON}
    [plain] = generate(llm, "Hello", structured_outputs=outputs)
    for include in (False, True):
        [output] = generate(
            llm, "Hello", structured_outputs=outputs, stop=["}", "a"], include_stop_str_in_output=include
        )
        assert output.text == plain.text and output.stop_reason == ("}" if include else None)
    [output] = generate(llm, "Hello", structured_outputs={"regex": "[ab]{4,60}"}, stop="ba", temperature=2.0, n=12)
    ended = [c.text for c in output.outputs if c.stop_reason == "ba"]
    assert len(ended) > 4 and all(len(text) >= 4 for text in ended)
    assert all("ba" not in text[4:] for text in ended) and any("ba" in text[:5] for text in ended)


@pytest.mark.parametrize(
    "settings",
    [
        {"logit_bias": {i: -100 for i in range(3, 300)}}, {"allowed_token_ids": [3]}, {"bad_words": ["{", '"', "}"]},
        {"logits_processors": [lambda ids, logits: logits.new_zeros(len(logits))]}, {"min_tokens": 150},
    ],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_what_others_allow_does_not_count_against_the_structure(llm, settings):
    with warnings.catch_warnings(action="ignore"):
        outputs = {"json": record(sentiment={"enum": ["good", "bad"]}, words=several({"enum": ["a", "b"]}, 1))}
        [output] = generate(llm, "Hello", structured_outputs=outputs, temperature=1.0, n=4, **settings)
    assert all(c.finish_reason == "stop" and is_valid(outputs["json"], c.text) for c in output.outputs)


def test_a_dead_end_is_an_error_of_the_request(llm):
    """A rule without an end; that the grammar allows nothing is not known before it is reached."""
    outputs = llm.generate(
        ["Hello", "Hello"],
        [SamplingParams(structured_outputs={"grammar": 'start: "a" b\nb: b "b"'}), SamplingParams(max_tokens=3)],
        use_tqdm=False,
        raise_on_error=False,
    )
    assert [output.finish_reason for output in outputs] == ["error", "length"]
    assert "cannot be followed to an end" in outputs[0].error


# ---- mistakes, and what is done once


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"json": {"type": "strin"}}, "structured_outputs.json is wrong or not supported: Invalid type: strin"),
        ({"json": {"type": "integer", "minimum": 2, "maximum": 1}}, "Unsatisfiable"),
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"type": "object", "minProperties": 2}}, "minProperties above 1"),
        ({"regex": "(a"}, "structured_outputs.regex is wrong.*unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"[^\s\S]"}, "structured_outputs.regex allows no text"),
        ({"grammar": "start: what"}, "unknown name"),
        ({"grammar": 'start: start "a"'}, "structured_outputs.grammar allows no text"),
        ({"grammar": "root ::= ("}, "GBNF"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_anything_runs(llm, outputs, message):
    before = llm.stats()["prompt_tokens"]
    params = [SamplingParams(), SamplingParams(structured_outputs=outputs)]
    with pytest.raises(ValueError, match=rf"(?s)prompts\[1\]: .*{message}"):
        llm.generate(["a", "b"], params, use_tqdm=False)
    assert llm.stats()["prompt_tokens"] == before


@pytest.mark.parametrize(
    ("outputs", "error", "message"),
    [
        ({}, ValueError, "exactly one of json, regex"),
        ({"json": {}, "regex": "a"}, ValueError, "got \\['json', 'regex'\\]"),
        ({"jsn": {}}, TypeError, "jsn"),
        ({"json": "{"}, ValueError, "structured_outputs.json is not JSON"),
        ({"json": "[]"}, TypeError, "must be a JSON schema"),
        ({"json": {"a": object()}}, TypeError, "structured_outputs.json is not JSON"),
        ({"regex": 5}, TypeError, "structured_outputs.regex must be a text"),
        ({"choice": "ab"}, TypeError, "must be a list of texts"),
        ({"choice": []}, ValueError, "must have texts"),
        ({"choice": ["a", ""]}, ValueError, "none of them empty"),
        ("a", TypeError, "must be a StructuredOutputs"),
    ],
)
def test_mistakes_are_seen_at_once(outputs, error, message):
    with pytest.raises(error, match=message):
        SamplingParams(structured_outputs=outputs)


def test_a_model_needs_a_tokenizer_and_the_package(tmp_path, llm, monkeypatch):
    save_model(tmp_path)
    params = SamplingParams(structured_outputs={"regex": "a"})
    with LLM(str(tmp_path), dtype="float32", num_kvcache_blocks=10, **SETTINGS) as plain:
        with pytest.raises(
            ValueError, match=r"prompts\[0\]: structured_outputs needs a model with a fast tokenizer.*no tokenizer"
        ):
            plain.generate([[5]], params, use_tqdm=False)
    monkeypatch.setitem(__import__("sys").modules, "llguidance.hf", None)
    fresh = grammar_module.Grammars(llm.config, llm.tokenizer)
    with pytest.raises(ImportError, match=r"pip install 'nanovllm\[structured\]'"):
        fresh.check(params.structured_outputs, "prompts[0]")


def test_grammars_are_compiled_once_and_the_latest_kept(llm, monkeypatch):
    compiled, grammar_class = [], grammar_module.Grammar
    monkeypatch.setattr(grammar_module, "Grammar", lambda *args: compiled.append(args) or grammar_class(*args))
    schemas = [record(**{f"key_{i}": whole(0, i)}) for i in range(3)]
    for _ in range(2):
        params = [SamplingParams(structured_outputs={"json": dict(schema)}) for schema in schemas for _ in range(4)]
        generate(llm, ["Hello"] * 12, *params)
    assert len(compiled) == 3
    monkeypatch.setattr(grammar_module, "MOST_GRAMMARS", 2)
    fresh = grammar_module.Grammars(llm.config, llm.tokenizer)
    for i, num_compiled in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):
        fresh.compile(StructuredOutputs(json=schemas[i]))
        assert len(compiled) == 3 + num_compiled


# ---- masks


def bits(mask: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def test_a_mask_is_what_the_grammar_allows_after_each_draft(llm):
    """Of two sequences, one with guesses; against the tokens tried one by one."""
    config, eos = llm.config, llm.tokenizer.eos_token_id
    grammar = llm.grammars.compile(StructuredOutputs(regex="[a-z]{2,4}( and then [0-9]+)?"))
    params = SamplingParams(structured_outputs={"regex": "x"})
    seqs = [Sequence(i, [5], params, config.eos_token_ids) for i in range(2)]
    for seq in seqs:
        seq.guide = grammar_module.Guide(grammar, seq)
        seq.guide.follow()
    guesses = tuple(llm.tokenizer.encode("ab and then 1", add_special_tokens=False))
    seqs[1].draft_ids = seqs[1].guide.foresee((*guesses, eos, 5), 9)
    assert seqs[1].draft_ids == guesses  # up to the end
    maker = MaskMaker(config.hf_config.vocab_size, 2)
    masks = maker.start(seqs, np.array([1, 1 + len(guesses)])).result()
    maker.close()
    rows = dict(zip(masks.rows, masks.allowed, strict=True))
    assert sorted([*rows, *masks.certain]) == list(range(2 + len(guesses)))
    for row, drafts in enumerate([(), *(guesses[:n] for n in range(len(guesses) + 1))]):
        matcher = grammar.matcher()
        assert matcher.consume_tokens(list(drafts))
        allowed = {i for i in range(len(llm.tokenizer)) if i != eos and matcher.validate_tokens([i])}
        if row in rows:
            assert bits(rows[row]) == allowed | ({eos} if matcher.is_accepting() else set())
        else:
            assert masks.certain[row] in allowed and not matcher.is_accepting()
    assert any(row in masks.certain for row in range(1, 2 + len(guesses)))  # of ' and then'
    assert all(seq.guide.plan for seq in seqs)
    for before, after in pairwise([seqs[1].guide.foresee((), 9)] * 2):
        assert before == after == ()  # the matcher is where it was
