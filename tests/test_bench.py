"""The benchmark's workload and floor are what its text says, and every way to call it works. No timings are tested."""

import importlib.util
import json
import subprocess
import sys
from argparse import Namespace
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from helpers import DEMO_MODEL, ROOT, make_config, save_model

sys.path.insert(0, str(ROOT))

import bench
from benchmarks import checkpoint, machine, parts, sampling, structured
from benchmarks.model_cost import ModelCost
from benchmarks.shared_prefix import SUFFIX_LEN
from benchmarks.workload import CLASSIC, SMALL, Workload, lengths_of, make_workload
from nanovllm.kernels import cpu as cpu_kernels

TINY = ["--num-seqs", "3", "--max-input-len", "40", "--max-output-len", "34", "--max-model-len", "128"]
PER_ENGINE = ["prompt tokens", "output tokens", "time", "output", "total", "peak memory", "floor", "of the floor"]


@pytest.fixture
def tiny_model(tmp_path, monkeypatch):
    """Options for a directory with a config.json and nothing else, on a machine whose rates are known."""
    monkeypatch.setattr(machine, "measure_flop_rate", lambda dtype, device: 1e11)
    monkeypatch.setattr(machine, "measure_bandwidth", lambda device: 1e10)
    make_config(architectures=["Qwen3ForCausalLM"]).save_pretrained(tmp_path)
    return ["--model", str(tmp_path), "--load-format", "dummy", "--device", "cpu"]


def figures_of(capsys, *argv: str) -> dict:
    bench.main([*argv, "--json"])
    [line] = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_classic_workload_has_the_published_totals():
    workload = make_workload(CLASSIC)
    assert len(workload.prompts) == len(workload.output_lens) == 256
    assert workload.prompt_tokens == 142_827
    assert workload.output_tokens == 133_966


def test_workload_depends_on_the_seed_alone():
    assert make_workload(SMALL) == make_workload(SMALL)
    assert make_workload(SMALL) != make_workload(SMALL, seed=1)
    assert max(map(max, make_workload(SMALL, vocab_size=307).prompts)) == 306


def floor_model():
    """96 parameters in its layer, 20 in its head, 8 bytes of bf16 cache a token, 16 FLOPs a query and key."""
    return make_config(
        num_hidden_layers=1, hidden_size=4, num_attention_heads=2, num_key_value_heads=1, head_dim=2,
        intermediate_size=3, vocab_size=5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flop_rate", "prefill", "decode"),
    [
        (1e3, (2 * 96 * 5 + 2 * 20 * 2 + 16 * (3 * 3 + 2 * 2) / 2) / 1e3, (2 * 116 + 16 * 4 + 2 * 116 + 16 * 5) / 1e3),
        (1e6, 2 * 116 / 1e3, (2 * 116 + 8 * 4 + 2 * 116 + 8 * 5) / 1e3),
    ],
    ids=["arithmetic-bound", "memory-bound"],
)
def test_floor_equals_a_computation_by_hand(flop_rate, prefill, decode):
    workload = Workload([[0] * 3, [0] * 2], [3, 1])
    floors = bench.floor_seconds(workload, ModelCost(floor_model(), 2), flop_rate, bandwidth=1e3, max_num_seqs=8)
    assert floors == pytest.approx((prefill, decode))


@pytest.mark.parametrize("max_num_seqs", [1, 2, 5, 100])
def test_decode_floor_equals_a_simulation(max_num_seqs):
    workload = make_workload(SMALL)
    waiting = [(len(prompt) + 1, n - 1) for prompt, n in zip(workload.prompts, workload.output_lens, strict=True)]
    running, expected = [], 0.0
    while waiting or running:
        while waiting and len(running) < max_num_seqs:
            running.append(waiting.pop(0))
        num_keys = sum(keys for keys, _ in running)
        expected += max((2 * 116 * len(running) + 16 * num_keys) / 1e4, (2 * 116 + 8 * num_keys) / 5e3)
        running = [(keys + 1, left - 1) for keys, left in running if left > 1]
    _, decode = bench.floor_seconds(workload, ModelCost(floor_model(), 2), 1e4, 5e3, max_num_seqs)
    assert decode == pytest.approx(expected)


def test_floor_of_single_tokens_has_no_decode():
    assert bench.floor_seconds(Workload([[0]], [1]), ModelCost(floor_model(), 2), 1e3, 1e3, 8)[1] == 0


def test_default_model_has_the_size_of_qwen3_0_6b():
    model = make_config(**{name: value for name, value in checkpoint.QWEN3_0_6B.items() if name != "model_type"})
    _, decode = bench.floor_seconds(Workload([[0]], [2]), ModelCost(model, 2), float("inf"), 1.0, 8)
    assert decode == 2 * 596_048_896 + 2 * 114_688  # all but the final norm, 2 tokens cached
    assert ModelCost(model, 2, row_bytes=132).token_bytes == 114_688 * 132 / 256


def test_table_has_a_line_for_each_figure(tiny_model, capsys):
    bench.main([*tiny_model, *TINY])
    labels = [line[:16].rstrip() for line in capsys.readouterr().out.splitlines()]
    assert set(PER_ENGINE) < set(labels)
    assert {"prefill", "decode", "matrix product", "memory"} < set(labels)


@pytest.mark.parametrize("engine", ["nanovllm", "transformers"])
@pytest.mark.parametrize("temperature", ["0", "0.6"])
def test_engines_do_the_whole_workload(tiny_model, capsys, engine, temperature):
    figures = figures_of(capsys, *tiny_model, *TINY, "--engine", engine, "--temperature", temperature)
    workload = make_workload(lengths_of(Namespace(**figures)), vocab_size=307)
    assert figures["prompt_tokens"] == workload.prompt_tokens
    assert figures["output_tokens"] == workload.output_tokens
    assert figures["floor_seconds"] > 0 and figures["percent_of_floor"] > 0
    if engine == "nanovllm":
        assert figures["prefill_tokens"] == workload.prompt_tokens
        assert figures["decode_tokens"] == workload.output_tokens - 3


def test_transformers_runs_in_batches_of_max_num_seqs(tiny_model, capsys):
    figures = figures_of(capsys, *tiny_model, *TINY, "--engine", "transformers", "--max-num-seqs", "2")
    assert figures["num_seqs"] == 3


def test_openvino_needs_a_model_of_its_own(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "openvino_genai" or None)
    with pytest.raises(SystemExit):
        bench.main([*tiny_model, "--engine", "openvino"])
    assert "optimum-cli" in capsys.readouterr().err


def test_openvino_is_given_the_workload_and_the_settings(tmp_path, monkeypatch, capsys):
    """With stand-ins for the two modules, of which only the names that are used exist."""
    made = {}

    class Pipeline:
        def __init__(self, path, scheduler, device, properties):
            made.update(path=path, batched=scheduler.max_num_batched_tokens, properties=properties)

        def generate(self, prompts, params):
            made.update(prompts=[prompt.tolist() for prompt in prompts], params=params)
            return [SimpleNamespace(m_generation_ids=[[1] * param["max_new_tokens"]]) for param in params]

    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Tensor=lambda array: array))
    genai = {"SchedulerConfig": SimpleNamespace, "ContinuousBatchingPipeline": Pipeline, "GenerationConfig": dict}
    monkeypatch.setitem(sys.modules, "openvino_genai", SimpleNamespace(__spec__=object(), **genai))
    monkeypatch.setattr(machine, "measure_flop_rate", lambda dtype, device: 1e11)
    monkeypatch.setattr(machine, "measure_bandwidth", lambda device: 1e10)
    make_config(architectures=["Qwen3ForCausalLM"]).save_pretrained(tmp_path)
    (tmp_path / "openvino_model.xml").touch()
    argv = ["--engine", "openvino", "--model", str(tmp_path), *TINY, "--device", "cpu", "--dtype", "bfloat16"]
    figures = figures_of(
        capsys, *argv, "--max-num-batched-tokens", "2048", "--engine-args", '{"KV_CACHE_PRECISION": "f32"}'
    )
    workload = make_workload(lengths_of(Namespace(**figures)), vocab_size=307)
    assert made["prompts"] == [[prompt] for prompt in workload.prompts]
    assert [param["max_new_tokens"] for param in made["params"]] == workload.output_lens
    assert all(param["ignore_eos"] and param["temperature"] == 0.6 for param in made["params"])
    assert made["path"] == str(tmp_path) and made["batched"] == 2048
    assert made["properties"] == {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "f32"}


def test_llama_cpp_is_given_one_prompt_after_the_other(tmp_path, monkeypatch, capsys):
    """With a stand-in whose generator, like theirs, goes on for ever."""
    made = {"prompts": []}

    class Llama:
        def __init__(self, path, **options):
            made.update(path=path, options=options)

        def generate(self, prompt, temp, top_k, top_p, min_p):
            made["prompts"].append(prompt)
            assert (temp, top_k, top_p, min_p) == (0.6, 0, 1.0, 0.0)
            yield from count()

    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(__spec__=object(), Llama=Llama))
    monkeypatch.setattr(machine, "measure_flop_rate", lambda dtype, device: 1e11)
    monkeypatch.setattr(machine, "measure_bandwidth", lambda device: 1e10)
    make_config(architectures=["Qwen3ForCausalLM"]).save_pretrained(tmp_path)
    model = tmp_path / "model.gguf"
    argv = ["--engine", "llama_cpp", "--model", str(model), *TINY, "--device", "cpu", "--engine-args", '{"n_batch": 8}']
    with pytest.raises(SystemExit):
        bench.main(argv)
    assert "a --model FILE.gguf" in capsys.readouterr().err
    model.touch()
    figures = figures_of(capsys, *argv)
    workload = make_workload(lengths_of(Namespace(**figures)), vocab_size=307)
    assert made["prompts"][1:] == workload.prompts and figures["output_tokens"] == workload.output_tokens
    threads = {"n_threads": figures["threads"], "n_threads_batch": figures["threads"]}
    assert made["path"] == str(model) and made["options"].items() >= (threads | {"n_ctx": 128, "n_batch": 8}).items()


def test_saved_checkpoint_runs(tmp_path, monkeypatch, capsys):
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 307, "head_dim": 16}
    monkeypatch.setattr(checkpoint, "QWEN3_0_6B", checkpoint.QWEN3_0_6B | tiny | {"bos_token_id": 1, "eos_token_id": 2})
    monkeypatch.setattr(machine, "MEASURING_SECONDS", 0.01)
    bench.main(["--save-checkpoint", str(tmp_path)])
    argv = ["--model", str(tmp_path), "--num-seqs", "1", "--max-input-len", "40", "--max-output-len", "34"]
    assert figures_of(capsys, *argv, "--max-model-len", "128", "--device", "cpu")["dtype"] == "bfloat16"
    assert (tmp_path / "tokenizer.json").is_file()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a child's peak")
def test_peak_memory_is_that_of_the_largest_process():
    code = "x = bytearray(2 << 30); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        during = machine.peak_memory(torch.device("cpu"))
        child.communicate(b"\n")
    assert during > 2 << 30 and machine.peak_memory(torch.device("cpu")) < during


def test_real_weights_and_real_rates(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "MEASURING_SECONDS", 0.01)
    save_model(tmp_path)
    assert figures_of(capsys, "--model", str(tmp_path), *TINY, "--device", "cpu")["load_format"] == "auto"


def test_shared_prefix_is_computed_once(tiny_model, capsys):
    argv = ["--shared-prefix-len", "64", "--num-seqs", "5", "--kvcache-block-size", "16", "--num-kvcache-blocks", "64"]
    figures = figures_of(capsys, *tiny_model, *argv)
    assert figures["distinct_tokens_computed"] == 5 * (64 + SUFFIX_LEN)
    assert figures["shared_tokens_computed"] == 64 + 5 * SUFFIX_LEN
    assert figures["times_faster"] > 0


def test_structured_completions_take_fewer_steps_where_tokens_are_certain(capsys, monkeypatch):
    monkeypatch.setattr(structured, "ROUNDS", 1)
    model = ["--model", str(DEMO_MODEL), "--device", "cpu", "--num-seqs", "2", "--min-input-len", "4"]
    figures = figures_of(capsys, "--structured", *model)
    assert figures["together_steps"] < 0.7 * figures["single_steps"]
    assert figures["plain_ms"] > 0 and figures["structured_ratio"] > 0


def test_control_plane_needs_no_model(capsys):
    argv = ["--control-plane", "--num-seqs", "6", "--num-steps", "30", "--kvcache-block-size", "16", "--device", "cpu"]
    figures = figures_of(capsys, *argv)
    assert all(figures[f"{load}_all_us"] > figures[f"{load}_schedule_us"] > 0 for load in ("steady", "finishing"))
    bench.main(argv)
    labels = [line[:16].rstrip() for line in capsys.readouterr().out.splitlines()]
    assert labels[-7:-2] == ["schedule", "postprocess", "these two", "build tensors", "all"]
    assert labels[-2:] == ["bytes per step", "to other ranks"] and 0 < figures["steady_bytes"] < 16384


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-seqs", "0"], "positive"),
        (["--min-input-len", "9", "--max-input-len", "8"], "--min-input-len 9 exceeds --max-input-len 8"),
        (["--max-input-len", "4000", "--max-output-len", "4000"], "--max-model-len 4096"),
        (["--temperature", "-1"], "temperature"),
        (["--dtype", "int3"], "dtype"),
        (["--model", "no such directory"], "no such directory"),
        (["--load-format", "auto"], "--model"),
        (["--engine", "vllm"], "not installed"),
        (["--engine", "openvino"], "openvino_genai, which is not installed"),
        (["--engine", "llama_cpp"], "llama_cpp, which is not installed"),
        (["--engine-args", "{'a': 1}"], "--engine-args"),
        (["--engine-args", '{"a": 1}'], "not for nanovllm"),
    ],
)
def test_mistakes_are_explained(monkeypatch, capsys, argv, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit_info:
        bench.main([*argv, "--device", "cpu"])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(cpu_kernels.load_kernels() is None, reason="no kernels for this processor, or no compiler")
@pytest.mark.parametrize("options", [[], ["--kv-cache-dtype=int8", "--quantization=int4"]], ids=str)
def test_shares_of_time_add_up_and_attention_reads_all_keys(options, capsys, monkeypatch):
    monkeypatch.setattr(parts, "measure_rates", lambda config: (1e9, 1e9))
    lengths = [f"--{kind}-{what}-len={n}" for what, n in (("input", 9), ("output", 3)) for kind in ("min", "max")]
    call = cpu_kernels.call
    bench.main(["--parts", "--json", "--dtype=bfloat16", "--num-seqs=3", f"--model={DEMO_MODEL}", *lengths, *options])
    figures = json.loads(capsys.readouterr().out)
    assert cpu_kernels.call is call
    for phase in ("prefill", "decode"):
        shares = [figures[f"{phase} {part}"] for part in parts.PARTS]
        assert sum(shares) == pytest.approx(100) and all(share > 0 for share in shares)
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    row_bytes = config["head_dim"] + 4 if options else 2 * config["head_dim"]  # with a scale
    token_bytes = 2 * config["num_key_value_heads"] * row_bytes * config["num_hidden_layers"]
    seconds = figures["decode_seconds"] * figures["decode attention"] / 100
    num_keys = 3 * (10 + 11)  # in the two decode steps of each sequence
    assert figures["decode_attention_gbytes_per_s"] * 1e9 * seconds == pytest.approx(num_keys * token_bytes)


def test_each_option_of_the_sampling_is_measured(tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(sampling, "ROUNDS", 1)
    monkeypatch.setattr(sampling, "STEPS", 1)
    monkeypatch.setitem(sampling.OPTIONS, "allowed_token_ids", {"allowed_token_ids": [3, 4]})
    monkeypatch.setitem(sampling.OPTIONS, "logit_bias", {"logit_bias": {3: 1.0}})
    figures = figures_of(capsys, *tiny_model, "--sampling", "--num-seqs", "3")
    cases = [*(case for case in sampling.OPTIONS if case != "bad_words"), "all, mixed", "one has all"]  # no tokenizer
    assert all(figures[f"{case} ms"] > 0 and figures[f"{case} ratio"] > 0 for case in cases)
    bench.show(figures, sampling.REPORT)
    assert [line[:19].rstrip() for line in capsys.readouterr().out.splitlines()] == ["step", "temperature", *cases]


@pytest.mark.parametrize("arguments", [["--dtype", "float32"], ["--engine", "transformers"]])
def test_shares_of_time_are_for_our_kernels(arguments, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--parts", *arguments])
    assert "--parts is for" in capsys.readouterr().err


def test_the_timeline_is_written_in_the_format_that_the_name_asks_for(tiny_model, tmp_path, capsys):
    for name, start in (("steps.json", '{"traceEvents": ['), ("steps.svg", "<svg ")):
        figures_of(capsys, *tiny_model, *TINY, "--timeline", str(tmp_path / name))
        assert (tmp_path / name).read_text().startswith(start)
    for wrong in (["steps.png"], ["steps.svg", "--control-plane"], ["steps.svg", "--engine", "transformers"]):
        with pytest.raises(SystemExit):
            bench.main([*tiny_model, "--timeline", *wrong])
        assert "--timeline" in capsys.readouterr().err
