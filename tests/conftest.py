"""One thread: the tests' models are so small that a second one costs more than it computes."""

import os
from pathlib import Path

import pytest
import torch

SLOW_FILES = {
    "test_attention_compiled.py",
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
    "outlives_one",
    "no_port_is_open_beyond",
    "no_port_is_open_for",
    "in_a_terminal",
    "in_a_pipe",
)

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():  # before anything imports triton: kernels run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in SLOW_FILES or any(name in item.name for name in SLOW_NAMES):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    """A random model's path, and transformers' model of it: fewer KV heads than four ranks, and a vocabulary that
    divides by neither two nor four.
    """
    from helpers import save_model  # which imports what must find the settings above

    path = tmp_path_factory.mktemp("model")
    return path, save_model(path)
