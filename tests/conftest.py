"""One thread: the tests' models are so small that a second one costs more than it computes."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

SLOW_FILES = {
    "test_attention_compiled.py",
    "test_packaging.py",
    "test_ray.py",
    "test_replicas.py",
    "test_start_up_compiles.py",
    "test_tensor_parallel.py",
    "test_workers.py",
}
SLOW_NAMES = (
    "fit_each_architecture",
    "compiles_ahead_of_time",
    "held_out",
    "no_batch_compiles_anything",
    "killed_at_any_moment",
    "memory_does_not_grow",
    "no_port_is_open_beyond",
    "no_port_is_open_for",
    "in_a_terminal",
    "in_a_pipe",
    "ray_data_pipeline",
)

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_worker_niceness", "0")  # not 15, at which tests beside it leave Ray no time
if not torch.cuda.is_available():  # before anything imports triton: kernels run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in SLOW_FILES or any(name in item.name for name in SLOW_NAMES):
            item.add_marker(pytest.mark.slow)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:  # the instruction sets of this processor that there are kernels for
        from nanovllm.kernels.cpu.targets import TARGETS

        names = [target.name for target in TARGETS if target.is_supported()]
        metafunc.parametrize("target", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """One instruction set after the other, whose kernels are those that everything computes with meanwhile."""
    from nanovllm.kernels.cpu import load_kernels

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOVLLM_CPU_ISA", request.param)
        load_kernels.cache_clear()
        if load_kernels() is None:
            pytest.skip("no C++ compiler")
        assert load_kernels().target == request.param
        yield request.param
    load_kernels.cache_clear()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    """A random model's path, and transformers' model of it: fewer KV heads than four ranks, and a vocabulary that
    divides by neither two nor four.
    """
    from helpers import save_model  # which imports what must find the settings above

    path = tmp_path_factory.mktemp("model")
    return path, save_model(path)
