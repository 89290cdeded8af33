"""What SECURITY.md promises."""

import json
import os
import pickle
import shutil
import stat

import psutil
import pytest

from helpers import DEMO_MODEL, save_model
from nanovllm import LLM, SamplingParams
from nanovllm.batch.lines import LineError, parse_line
from nanovllm.kernels.cpu import build

SETTINGS = {"dtype": "float32", "device": "cpu", "num_kvcache_blocks": 16}


class Touch:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def listening() -> set[str]:
    """Addresses on which this process and its children wait for connections."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    connections = [c for process in processes for c in process.net_connections("inet")]
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}


def test_no_pickle_is_read_from_disk(tmp_path):
    save_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Touch(tmp_path / "was here")))
    with pytest.raises(ValueError, match="Only safetensors are loaded"):
        LLM(str(tmp_path), **SETTINGS)
    assert not (tmp_path / "was here").exists()
    pickle.loads((tmp_path / "model.pt").read_bytes()).close()
    assert (tmp_path / "was here").exists()  # it would have been


def test_no_code_of_a_checkpoint_runs(tmp_path):
    shutil.copytree(DEMO_MODEL, tmp_path, dirs_exist_ok=True)
    code = f"open({str(tmp_path / 'was here')!r}, 'w')\n"
    for name in ("configuration_x", "modeling_x", "tokenization_x"):
        (tmp_path / f"{name}.py").write_text(code)
    names = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    for file, auto_map in (
        ("config.json", names),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_x.X", None]}),
    ):
        stored = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps(stored | {"auto_map": auto_map}))
    with LLM(str(tmp_path), **SETTINGS) as llm:
        assert llm.generate(["sort: 2 1"], SamplingParams(max_tokens=2), use_tqdm=False)
    assert not (tmp_path / "was here").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__.os }}",
        "{% include '/etc/passwd' %}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_chat_templates_run_in_a_sandbox(template):
    with LLM(str(DEMO_MODEL), **SETTINGS) as llm:
        llm.tokenizer.chat_template = template
        with pytest.raises(ValueError, match="chat template refuses"):
            llm.chat([{"role": "user", "content": "hi"}], use_tqdm=False)


@pytest.mark.parametrize(
    "field", ["chat_template", "logits_processors", "model_path", "trust_remote_code", "tokenizer"]
)
@pytest.mark.parametrize("inside", [False, True])
def test_a_batch_file_is_data(field, inside):
    body = {"messages": [{"role": "user", "content": "hi"}]}
    value = "{{ 1 }}"
    body |= {"chat_template_kwargs": {field: value}} if inside and field == "chat_template" else {field: value}
    with pytest.raises(LineError, match=field):
        parse_line(json.dumps(body).encode(), 0)


def test_no_port_is_open():
    before = listening()
    with LLM(str(DEMO_MODEL), **SETTINGS) as llm:
        llm.generate(["sort: 2 1"], use_tqdm=False)
        assert listening() == before


def test_no_port_is_open_beyond_loopback_between_ranks(tmp_path):
    save_model(tmp_path)
    before = listening()
    with LLM(str(tmp_path), tensor_parallel_size=2, **SETTINGS) as llm:
        llm.generate([[5, 6]], use_tqdm=False)
        assert {address.removeprefix("::ffff:") for address in listening() - before} <= {"127.0.0.1", "::1"}
        directory = llm.model_runner.workers.rendezvous.parent
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700 and directory.stat().st_uid == os.getuid()


def test_no_port_is_open_for_replicas(tmp_path):
    save_model(tmp_path)
    before = listening()
    with LLM(str(tmp_path), data_parallel_size=2, **SETTINGS) as llm:
        llm.generate([[5, 6]] * 4, use_tqdm=False)
        assert listening() == before


def test_what_is_compiled_is_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_compile", lambda compiler, library: library)
    if not build._find_compiler():
        pytest.skip("no compiler")
    directory = build.build([]).parent
    assert directory.is_relative_to(tmp_path) and stat.S_IMODE(directory.stat().st_mode) == 0o700
    monkeypatch.setattr(build, "UID", os.getuid() + 1)  # so that it is somebody else's
    monkeypatch.setattr(build, "_directories", lambda: iter([directory]))
    with pytest.raises(RuntimeError, match="belongs to another user"):
        build.build([])
