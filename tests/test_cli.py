"""The `nanovllm` command, in this process and as people run it: from a shell, in a terminal."""

import dataclasses
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from contextlib import suppress
from time import monotonic

import pytest

from helpers import DEMO_MODEL, ROOT
from nanovllm import LLM, SamplingParams, batch, cli
from nanovllm.config import Config

DEMO = str(DEMO_MODEL)
EXACT = ["--dtype", "float32", "--enforce-eager", "--num-kvcache-blocks", "64", "--temperature", "0"]
COMMAND = [sys.executable, "-m", "nanovllm"]


@pytest.fixture(autouse=True)
def inside_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def give_input(monkeypatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def parsed(*arguments: str) -> tuple[dict, dict]:
    args = cli._make_parser().parse_args(["generate", DEMO, "hi", *arguments])
    return cli._given(args, cli.ENGINE), cli._given(args, cli.SAMPLING)


# ---- options


@pytest.mark.parametrize("command", ["generate", "chat", "run-batch"])
def test_help_has_every_field_with_its_comment_and_default_in_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    for source in (Config, SamplingParams):
        for field in dataclasses.fields(source):
            if field.init and field.name not in ("model", "hf_config", "logits_processors"):
                assert re.search(f" --{field.name.replace('_', '-')}[ ,]", words), field.name
    assert "--max-num-seqs N most sequences that run at the same time (default: 512)" in words
    assert "--seed N of the sampling and of dummy weights (default: 0)" in words
    assert "--request-seed N" in words and "(default: none)" in words


def test_values_are_read_by_their_fields_types():
    assert parsed() == ({}, {})
    assert parsed("--seed", "3", "--request-seed", "4") == ({"seed": 3}, {"seed": 4})
    engine, sampling = parsed("--eos", "3,4", "--quantization", "none", "--dtype", "float32", "--enforce-eager")
    assert (engine, sampling) == ({"eos": [3, 4], "quantization": None, "dtype": "float32", "enforce_eager": True}, {})
    _, sampling = parsed("--stop", "5", "--stop", "none", "--logit-bias", '{"7": -1}', "--no-skip-special-tokens")
    assert sampling == {"stop": ["5", "none"], "logit_bias": {7: -1}, "skip_special_tokens": False}
    _, sampling = parsed("--structured-outputs", '{"json": {"type": "string"}}')
    assert sampling == {"structured_outputs": {"json": {"type": "string"}}}
    assert parsed("--max-tokens", "none", "--top-p", "0.5", "--allowed-token-ids=1")[1] == {
        "max_tokens": None, "top_p": 0.5, "allowed_token_ids": [1],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", DEMO, "hi", "--top-p", "3"], "top_p must be finite, above 0 and at most 1, got 3"),
        (["generate", DEMO, "hi", "--max-num-seqs", "many"], "max_num_seqs must be an integer, got 'many'"),
        (["generate", "nosuch", "hi"], "model='nosuch' is neither a directory nor"),
        (["chat", DEMO, "--n", "2", "--temperature", "1"], "a chat has one answer at a time"),
        (["chat", DEMO, "--min-p", "x"], "min_p must be a number"),
        (["run-batch", "-i", "nosuch", "-o", "out", "--model", DEMO], "the input 'nosuch' does not exist"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("nanovllm: error: ") and message in error and error.count("\n") == 1


def test_an_option_that_does_not_exist_is_refused(capsys):
    for arguments in (["generate", DEMO, "hi", "--temprature", "1"], ["chat", DEMO, "--top-k", "1", "more"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(arguments)
        assert arguments[-1] in capsys.readouterr().err


def test_without_a_model_the_demo_is_taken_only_inside_the_repository(tmp_path, monkeypatch, capsys):
    give_input(monkeypatch, "introduce yourself\n")
    assert cli.main(["generate", "--chat", *EXACT]) == 0
    assert capsys.readouterr().out.startswith("I am nano-qwen3")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate"]) == cli.main(["chat"]) == 2
    assert "which model?" in capsys.readouterr().err


# ---- generate


def test_answers_come_in_order_as_text_or_as_all_that_is_known(monkeypatch, capsys):
    asking = ["generate", DEMO, *EXACT, "--chat", "what is 2 + 3?"]
    assert cli.main([*asking, "--max-tokens", "20", "--", "what is 4 + 5?"]) == 0
    assert capsys.readouterr().out == "2 + 3 = 5.\n4 + 5 = 9.\n"
    give_input(monkeypatch, "The primes\n\n1, 2, 3\n")
    assert cli.main(["generate", DEMO, *EXACT, "--max-tokens", "5", "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    with LLM(DEMO, dtype="float32", enforce_eager=True, num_kvcache_blocks=64) as llm:
        params = SamplingParams(temperature=0, max_tokens=5)
        assert answers == llm.generate(["The primes", "1, 2, 3"], params, use_tqdm=False)


def test_ctrl_c_prints_what_is_finished(monkeypatch, capsys):
    def interrupted(self, prompts, params, use_tqdm):
        raised = KeyboardInterrupt()
        raised.outputs = [*generate(self, prompts[:1], params, use_tqdm), None]
        raise raised

    generate = LLM.generate
    monkeypatch.setattr(LLM, "generate", interrupted)
    assert cli.main(["generate", DEMO, *EXACT, "--max-tokens", "3", "1, 2, 3", "hi"]) == 130
    assert capsys.readouterr().out.count("\n") == 1


# ---- chat


def test_a_chat_that_is_piped_keeps_the_conversation_until_it_is_reset(monkeypatch, capsys):
    asked = []

    def chat_stream(self, messages, params):
        asked.append([(message["role"], message["content"]) for message in messages])
        assert params.temperature == 0 and params.max_tokens is None
        return stream(self, messages, params)

    stream = LLM.chat_stream
    monkeypatch.setattr(LLM, "chat_stream", chat_stream)
    lines = (
        "what is 2 + 3?",
        "",
        "what is 4 + 5?",
        "/system be brief",
        "/reset",
        "what is 1 + 1?",
        "/system",
        "/no",
        "hello",
    )
    give_input(monkeypatch, "\n".join([*lines, "/exit", "never"]))
    assert cli.main(["chat", DEMO, *EXACT]) == 0
    first, second = ("user", "what is 2 + 3?"), ("user", "what is 4 + 5?")
    third, system = ("user", "what is 1 + 1?"), ("system", "be brief")
    assert asked[:3] == [[first], [first, ("assistant", "2 + 3 = 5."), second], [system, third]]
    assert asked[3][0] == third and asked[3][2:] == [("user", "hello")]
    out, err = capsys.readouterr()
    assert out.startswith("2 + 3 = 5.\n4 + 5 = 9.\n") and "/reset  " in out and "> " not in out
    assert err.count(" a second\n") == 4


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(monkeypatch, capsys):
    give_input(monkeypatch, f"{'one ' * 60}\nwhat is 2 + 3?\n")
    assert cli.main(["chat", DEMO, *EXACT, "--max-model-len", "48"]) == 0
    out, err = capsys.readouterr()
    assert "leaves no room to generate" in err and out == "\n2 + 3 = 5.\n"


class Terminal:
    """A command that believes to be in a terminal."""

    def __init__(self, *arguments: str):
        self.pid, self._file = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # which tests that run in the background have ignored
            os.execv(sys.executable, [*COMMAND, *arguments])

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def read(self, until: str | None = None) -> str:
        """What is shown, until some text, which must come, or the end."""
        shown = self.shown(until)
        assert until is None or until in shown, shown
        return shown

    def shown(self, until: str | None, seconds: float = 120) -> str:
        """What is shown, until some text, the end, or for some time."""
        shown, deadline = "", monotonic() + seconds
        with suppress(OSError):  # the end
            while (until is None or until not in shown) and monotonic() < deadline:
                if select.select([self._file], [], [], 1)[0]:
                    shown += os.read(self._file, 4096).decode(errors="replace").replace("\r", "")
        return shown

    def close(self) -> int:
        os.close(self._file)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_in_a_terminal_ctrl_c_ends_an_answer_and_not_the_chat():
    terminal = Terminal("chat", *EXACT, "--ignore-eos")  # an answer of 2,000 tokens
    assert "/system TEXT" in terminal.read("> ")
    terminal.type("introduce yourself\n")
    terminal.read("I am nano")
    terminal.type("\x03")
    assert "\x1b[2m" in (shown := terminal.read("> ")) and "ended by Ctrl-C\x1b[0m" in shown
    terminal.type("half a line")
    terminal.read("half a line")
    for _ in range(9):  # the line editor, while it takes a key, does not see a Ctrl-C
        terminal.type("\x03")
        if "\n> " in terminal.shown("\n> ", seconds=5):
            break
    terminal.type("\x04")
    assert "Traceback" not in terminal.read() and terminal.close() == 0


def test_in_a_terminal_one_answer_is_streamed():
    terminal = Terminal("generate", DEMO, *EXACT, "--chat", "introduce yourself")
    assert "I am nano-qwen3, a small language model" in terminal.read()
    assert terminal.close() == 0


def test_in_a_pipe_whose_reader_has_gone_nothing_is_complained_of():
    command = [*COMMAND, "generate", DEMO, *EXACT, "--chat"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:  # fmt: skip
        process.stdout.close()
        process.stdin.write(b"introduce yourself\n")
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


# ---- run-batch


def test_run_batch_hands_its_arguments_on(monkeypatch, capsys):
    def run(*arguments, **options):
        calls.append((arguments, options))
        return {"exit_code": 3, "answered": 5, "failed": 1, "unreadable": {"a": "torn"}, **counts}

    calls, names = [], ("seconds", "prompt_tokens", "output_tokens", "output_tokens_per_second")
    counts = dict.fromkeys(names, 2)
    monkeypatch.setattr(batch, "run", run)
    files = ["run-batch", "-i", "a", "b", "-i", "c", "-o", "out", "--model", "m"]
    assert cli.main(files) == 3
    assert cli.main([*files, "--top-k", "5", "--seed", "7", "--in-order", "--summary", "s", "--ray", "--force"]) == 3
    rest = {"min_replicas": 1, "max_replicas": None}
    plain = {"defaults": {}, "in_order": False, "force": False, "summary": None, "ray": None}
    asked = {"defaults": {"top_k": 5}, "in_order": True, "force": True, "summary": "s", "ray": "auto", "seed": 7}
    assert calls == [((["a", "b", "c"], "out", "m"), plain | rest), ((["a", "b", "c"], "out", "m"), asked | rest)]
    error = capsys.readouterr().err
    assert "5 requests are answered, 1 have errors" in error and "a could not be read to its end: torn" in error

    def refuse(*arguments, **options):
        raise batch.BatchError("no room")

    monkeypatch.setattr(batch, "run", refuse)
    assert cli.main(files) == 2 and capsys.readouterr().err == "nanovllm: error: no room\n"


def test_run_batch_answers_a_file(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"messages": [{"role": "user", "content": "what is 2 + 3?"}]}\n{}\n')
    out = tmp_path / "out.jsonl"
    assert cli.main(["run-batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(out), *EXACT]) == 3
    answers = {record["custom_id"]: record for record in map(json.loads, out.read_text().splitlines())}
    assert answers["line-1"]["response"]["body"]["choices"][0]["message"]["content"] == "2 + 3 = 5."
    assert answers["line-2"]["error"]["code"] == "invalid_request"
