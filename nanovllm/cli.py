"""The `nanovllm` command: answers on the terminal, a chat, and jobs over batch files."""

import argparse
import json
import os
import re
import shlex
import sys
from contextlib import closing
from dataclasses import Field, fields, replace
from pathlib import Path
from time import perf_counter

from nanovllm import LLM, GenerationError, SamplingParams, __version__
from nanovllm.config import Config
from nanovllm.outputs import RequestOutput
from nanovllm.utils.comments import field_comments

DEMO_MODEL = Path("assets/nano-qwen3")  # inside the repository
HELP_WIDTH = 26  # of the options' names; what they mean stands beside that
ENGINE, SAMPLING = "engine ", "sampling "  # begin the names of parsed options: both have a `seed`
RAISES = TypeError, ValueError  # of a user's mistake
CHAT_COMMANDS = """\
/reset          begin a new conversation
/system TEXT    set the system message, or with no text none
/exit, Ctrl-D   end
Ctrl-C          end an answer"""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command. Returns the exit code: 2 for a user's mistake, 130 after Ctrl-C."""
    parser = _make_parser()
    args, others = parser.parse_known_args(arguments)
    options = others[: others.index("--")] if "--" in others else others
    if others and (not hasattr(args, "prompts") or any(text.startswith("-") for text in options)):
        parser.error(f"there is no option or argument {' '.join(others)}; `nanovllm COMMAND -h` lists what there is")
    if others:  # prompts that come after an option
        args.prompts += [text for text in others if text != "--"]
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who reads the answers has enough, as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (*RAISES, GenerationError) as error:
        _complain(error)
        return 1 if isinstance(error, GenerationError) else 2


def _complain(error: Exception) -> None:
    print(f"nanovllm: error: {error}", file=sys.stderr)


# ---- options


def _make_parser() -> argparse.ArgumentParser:
    about = "LLM inference, offline. `nanovllm COMMAND -h` says more."
    parser = argparse.ArgumentParser("nanovllm", description=about, formatter_class=_formatter)
    parser.add_argument("--version", action="version", version=f"nanovllm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = _add_command(commands, "generate", "[MODEL [PROMPT ...]]", _generate, "complete prompts")
    _add_model(command, "model", nargs="?")
    command.add_argument("prompts", nargs="*", metavar="PROMPT", help="(default: the lines of standard input)")
    command.add_argument("--chat", action="store_true", help="prompts are messages to answer, by the chat template")
    command.add_argument("--json", action="store_true", help="print each answer, with all that is known, as a line")
    _add_fields(command)

    command = _add_command(commands, "chat", "[MODEL]", _chat, "chat in the terminal", CHAT_COMMANDS)
    _add_model(command, "model", nargs="?")
    _add_fields(command, "defaults are what the checkpoint recommends, else:", max_tokens=None)

    text = "answer files of requests, or the rest of them"
    command = _add_command(commands, "run-batch", "-i FILE ... -o FILE [--model MODEL]", _run_batch, text)
    text = (
        'requests, one a line, in OpenAI\'s batch format or as {"prompt": ...}; patterns, .gz and .zst too; - is stdin'
    )
    command.add_argument("-i", "--input", nargs="+", action="extend", required=True, metavar="FILE", help=text)
    command.add_argument("-o", "--output", required=True, metavar="FILE", help="answers are appended; - is stdout")
    _add_model(command, "--model")
    command.add_argument("--in-order", action="store_true", help="answers in the order of the requests")
    command.add_argument("--force", action="store_true", help="go on although model, settings or input have changed")
    command.add_argument("--summary", metavar="FILE", help="write counts and rates, as JSON")
    text = "run on a Ray cluster, this machine's if there is no address"
    command.add_argument("--ray", nargs="?", const="auto", metavar="ADDRESS", help=text)
    command.add_argument("--min-replicas", type=int, default=1, metavar="N", help="on Ray (default: 1)")
    command.add_argument("--max-replicas", type=int, metavar="N", help="on Ray (default: as many as fit)")
    _add_fields(command, "of requests that do not say", max_tokens=None)
    return parser


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=HELP_WIDTH)


def _add_command(commands: object, name: str, usage: str, run: object, text: str, epilog: str = "") -> object:
    usage, about = f"nanovllm {name} {usage} [options]", f"{text[0].upper()}{text[1:]}."
    options = {"usage": usage, "description": about, "formatter_class": _formatter, "allow_abbrev": False}
    command = commands.add_parser(name, help=text, epilog=epilog, **options)
    command.set_defaults(run=run)
    return command


def _add_model(command: argparse.ArgumentParser, name: str, **options: object) -> None:
    text = (
        "a checkpoint directory, or an owner/name of the Hugging Face hub (default: in the repository its demo model)"
    )
    command.add_argument(name, metavar="MODEL", help=text, **options)


def _add_fields(command: argparse.ArgumentParser, about: str | None = None, **defaults: object) -> None:
    """An option for every field of `SamplingParams` and `Config`. One not given leaves no trace; see `_given`."""
    sampling, engine = command.add_argument_group("sampling", about), command.add_argument_group("engine")
    for group, source, prefix in ((sampling, SamplingParams, SAMPLING), (engine, Config, ENGINE)):
        comments = field_comments(source)
        for field in fields(source):
            if field.init and field.name not in ("logits_processors", "model", "hf_config"):
                name = "request_seed" if prefix + field.name == f"{SAMPLING}seed" else field.name
                default = defaults.get(field.name, field.default)
                text = comments[field.name] + ("" if isinstance(default, bool) else f" (default: {default})")
                text = text.replace("None", "none").replace("%", "%%").replace("`", "")
                options = {"dest": prefix + field.name, "default": argparse.SUPPRESS, "help": text}
                group.add_argument(f"--{name.replace('_', '-')}", **options, **_kind(field))


def _kind(field: Field) -> dict[str, object]:
    """How an option is read. Whether its value is a right one is left to `Config` and `SamplingParams`."""
    kind = getattr(field.type, "__name__", "") if field.type in (bool, int, float) else str(field.type)
    if kind == "bool":
        return {"action": argparse.BooleanOptionalAction if field.default else "store_true"}
    if "Sequence[str]" in kind:
        return {"action": "append", "metavar": "TEXT"}
    if "Sequence[int]" in kind:
        return {"type": _token_ids, "metavar": "ID,ID,..."}
    metavar = "JSON" if "dict" in kind else "N" if "int" in kind else "X" if "float" in kind else "NAME"
    return {"type": _value, "metavar": metavar}


def _value(text: str) -> object:
    """A number, a list or an object as JSON has them, "none", or a name."""
    try:
        value = None if text.lower() == "none" else json.loads(text)
    except ValueError:
        return text
    is_by_id = isinstance(value, dict) and all(re.fullmatch(r"-?\d+", key) for key in value)
    return {int(key): each for key, each in value.items()} if is_by_id else value


def _token_ids(text: str) -> list[int]:
    return [int(token_id) for token_id in text.split(",")]


def _given(args: argparse.Namespace, prefix: str) -> dict[str, object]:
    return {name.removeprefix(prefix): value for name, value in vars(args).items() if name.startswith(prefix)}


def _model(args: argparse.Namespace) -> str:
    if args.model is None and not (DEMO_MODEL / "config.json").is_file():
        raise ValueError(
            "which model? Name a checkpoint directory or an 'owner/name' of the Hugging Face hub, such as "
            "Qwen/Qwen3-0.6B (only inside nanovllm's repository there is a default, its demo model)"
        )
    return args.model or str(DEMO_MODEL)


# ---- generate


def _generate(args: argparse.Namespace) -> int:
    model, params = _model(args), SamplingParams(**_given(args, SAMPLING))
    if not args.prompts and sys.stdin.isatty():
        raise ValueError("there is no prompt: give some after the model, or lines on standard input")
    prompts = args.prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    with LLM(model, **_given(args, ENGINE)) as llm:
        if args.chat:
            prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
        if len(prompts) == params.n == 1 and sys.stdout.isatty() and not args.json:
            for piece in (llm.chat_stream if args.chat else llm.generate_stream)(prompts, params):
                print(piece.text, end="", flush=True)
            print()
            return 0
        is_shown = sys.stderr.isatty()
        try:
            _show((llm.chat if args.chat else llm.generate)(prompts, params, use_tqdm=is_shown), args.json)
        except (KeyboardInterrupt, GenerationError) as error:
            _show([output for output in getattr(error, "outputs", ()) if output], args.json)
            raise
    return 0


def _show(outputs: list[RequestOutput], as_json: bool) -> None:
    for output in outputs:
        for line in [json.dumps(output)] if as_json else [completion.text for completion in output.outputs]:
            print(line)
    sys.stdout.flush()


# ---- chat


def _chat(args: argparse.Namespace) -> int:
    model, given = _model(args), _given(args, SAMPLING)
    if given.get("n", 1) != 1:
        raise ValueError("a chat has one answer at a time: leave --n out")
    SamplingParams(**given)  # a mistake is seen before the model is loaded
    with LLM(model, **_given(args, ENGINE)) as llm:
        params = replace(llm.default_sampling_params(), **{"max_tokens": None} | given)
        if sys.stdin.isatty():
            import readline  # noqa: F401 (which makes `input` an editor, with a history)

            print(f"{model}\n{CHAT_COMMANDS}\n")
        system, turns = [], []
        while (line := _read_line()) is not None:
            command, _, text = line.strip().partition(" ")
            if command == "/exit":
                break
            if command == "/reset":
                turns = []
            elif command == "/system":
                system = [{"role": "system", "content": text.strip()}] if text.strip() else []
            elif command.startswith("/"):
                print(CHAT_COMMANDS)
            elif command:
                turns = _answer(llm, params, system, [*turns, {"role": "user", "content": line}])
    return 0


def _read_line() -> str | None:
    """None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except KeyboardInterrupt:  # of what was being typed
        print()
        return ""
    except EOFError:
        print(end="\n" if sys.stdin.isatty() else "")
        return None


def _answer(llm: LLM, params: SamplingParams, system: list[dict], turns: list[dict]) -> list[dict]:
    """Streams an answer. Returns the conversation with it, also when Ctrl-C ends it; without the last turn if none."""
    start, times, num_tokens, text, end = perf_counter(), [], 0, "", None
    try:
        with closing(llm.chat_stream(system + turns, params)) as pieces:
            for piece in pieces:
                times.append(perf_counter())
                num_tokens += len(piece.token_ids)
                text, end = text + piece.text, piece.finish_reason
                print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        end = "Ctrl-C"
    except (*RAISES, GenerationError) as error:  # too long a conversation, mostly
        _complain(error)
    print()
    if not times:
        return turns[:-1]
    rate = (num_tokens - 1) / max(times[-1] - times[0], 1e-9)
    figures = f"{num_tokens} tokens, the first after {times[0] - start:.2f} s, then {rate:.1f} a second"
    figures += "" if end == "stop" else f"; ended by {end}"
    print(f"\033[2m{figures}\033[0m" if sys.stderr.isatty() else figures, file=sys.stderr, flush=True)
    return [*turns, {"role": "assistant", "content": text}]


# ---- run-batch


def _run_batch(args: argparse.Namespace) -> int:
    from nanovllm.batch import BatchError, run  # whose packages no other command needs

    names = "in_order", "force", "summary", "ray", "min_replicas", "max_replicas"
    options, settings = {name: getattr(args, name) for name in names}, _given(args, ENGINE)
    try:
        summary = run(args.input, args.output, _model(args), defaults=_given(args, SAMPLING), **options, **settings)
    except BatchError as error:
        _complain(error)
        return 2
    _tell(summary)
    return summary["exit_code"]


def _tell(summary: dict[str, object]) -> None:
    """What a job has come to."""
    text = "{answered} requests are answered, {failed} have errors; in {seconds:.1f} s {prompt_tokens} tokens in and "
    text += "{output_tokens} out, {output_tokens_per_second:.1f} a second"
    print(text.format(**summary), file=sys.stderr)
    for path, why in summary["unreadable"].items():
        print(f"{path} could not be read to its end: {why}", file=sys.stderr)
    if summary["exit_code"] == 130:
        print(f"interrupted; to go on: {shlex.join(['nanovllm', *sys.argv[1:]])}", file=sys.stderr)
