"""Safetensors into a model, one tensor at a time. Knows no architecture, no format and no process.

A weight has memory from the moment when its first tensor comes, and is turned into what it is computed with when it has
its last one: so of a model whose weights end up smaller, or elsewhere, there are never more than a few as they were.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

Index = slice | tuple[slice, ...]


class CheckpointTensor(Protocol):
    """What `safe_open(...).get_slice(name)` returns: indexing reads that part from the file and no more."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, index: Index) -> torch.Tensor: ...


class ShapeError(ValueError):
    """A checkpoint's tensor is not of the shape or dtype that the configuration says."""


class StoredWeight(Protocol):
    """See `nanovllm.layers.weight.Weight`; a module's attribute `weight` that is no parameter."""

    needed: Iterable[str]  # what its tensors are called in a checkpoint
    others: Iterable[str]  # what it may have beside these

    def choose_format(self, found: set[str]) -> None: ...

    def fill(self, noise: torch.Tensor) -> None: ...


Finish = Callable[[StoredWeight], None]  # called once with each weight that is filled
Target = tuple[nn.Module, str, str | None]  # a module, what it calls a tensor, the projection that it is of


def copy_weight(
    param: torch.Tensor, loaded: CheckpointTensor, full_shape: tuple[int, ...] | None = None,
    index: Index = slice(None), order: torch.Tensor | None = None
) -> None:  # fmt: skip
    """Copies `loaded[index]`, this rank's part, into a parameter or a view of it, converting dtype and device.

    Each m of it are brought in the [m] `order`. ShapeError unless all of `loaded` has the shape `full_shape`, by
    default that of `param`.
    """
    full_shape = tuple(param.shape) if full_shape is None else full_shape
    if tuple(loaded.get_shape()) != full_shape:
        raise ShapeError(f"has shape {list(loaded.get_shape())}, the configuration says {list(full_shape)}")
    param.data.copy_(in_order(loaded[index], order))


def in_order(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """The rows, of which each m are brought in the [m] `order`."""
    return x if order is None else x.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)


def load_model(
    model: nn.Module,
    path: Path,
    finish: Finish,
    show_progress: bool = True,
    before_each: Callable[[], None] = lambda: None,
) -> None:
    """Fills every parameter and weight of `model` exactly once from the safetensors files of a checkpoint directory.

    Args:
        model: Has `packed_modules` (name of a projection in the checkpoint -> name of the module that holds it) and
            `ignored_weights(name)` (whether the checkpoint's tensor is not wanted); its modules may have
            `load_weight(name, loaded, shard)`.
        before_each: Called before each tensor is read; may raise to stop.

    Raises:
        ValueError: A file is missing or damaged, or tensors are missing, unexpected or misshapen (all are listed).
    """
    files = _find_files(path)
    stored = [(file, name) for file in files for name in _tensor_names(file) if not model.ignored_weights(name)]
    found = Counter(name for _, name in stored)
    needed, others = _targets(model, found.keys())
    problems = [f"missing: {name}" for name in sorted(needed.keys() - found.keys())]
    problems += [f"unexpected: {name}" for name in sorted(found.keys() - needed.keys() - others.keys())]
    problems += [f"more than once: {name}" for name, count in sorted(found.items()) if count > 1]
    _raise_if_any(problems, path)
    num_missing = Counter(id(_weight_of(module)) for module, *_ in needed.values())
    is_quiet = len(files) == 1 or not show_progress
    for file, name in tqdm(stored, desc="Loading weights", unit="tensor", disable=is_quiet):
        target = needed.get(name) or others[name]
        before_each()
        try:
            _load(file, name, *target)
        except ShapeError as error:
            problems.append(f"misshapen: {name} in {file.name} {error}")
        weight = _weight_of(target[0])
        num_missing[id(weight)] -= name in needed
        if weight is not None and not num_missing[id(weight)] and name in needed and not problems:
            finish(weight)
    _raise_if_any(problems, path)


def _load(file: Path, name: str, module: nn.Module, own_name: str, shard: str | None) -> None:
    with safe_open(file, framework="pt") as tensors:  # opened for each, so that pages that were read are let go
        loaded = tensors.get_slice(name)
        if hasattr(module, "load_weight"):
            module.load_weight(own_name, loaded, shard)
        else:
            copy_weight(getattr(module, own_name), loaded)


def load_dummy(model: nn.Module, seed: int, finish: Finish) -> None:
    """Random weights, normal with standard deviation 0.02; norms are 1. The same seed gives the same weights."""
    generator, filled = torch.Generator().manual_seed(seed), set()
    dtype, size = next(model.parameters()).dtype, 2**20 + 7
    draws = torch.empty(2 * size, dtype=dtype).normal_(0, 0.02, generator=generator)

    def noise(count: int) -> torch.Tensor:
        # The same million of draws, from another one on and over and over: as good for timing, and far quicker.
        start = int(torch.randint(size, (), generator=generator))
        return draws[start : start + min(count, size)]

    for name, module in model.named_modules():
        weight = _weight_of(module)
        if weight is not None and id(weight) not in filled:
            weight.fill(noise(math.prod(weight.shape)))
            finish(weight)
            filled.add(id(weight))
        for _, param in module.named_parameters(recurse=False):
            param.data.copy_(torch.ones(param.shape) if "norm" in name else noise(param.numel()).view(param.shape))


def _find_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of the index, the single one, or all there are."""
    files = sorted(path.glob("model.safetensors")) or sorted(path.glob("*.safetensors"))
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{index} is damaged ({error!r}); download the checkpoint again") from error
    if not files:
        raise ValueError(
            f"{path} has no *.safetensors file. Only safetensors are loaded (never pickles); "
            "use load_format='dummy' for random weights"
        )
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{path} lacks the shards {missing} that its index names; download the checkpoint again")
    return files


def _tensor_names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}); download it again") from error


def _targets(model: nn.Module, found: Iterable[str]) -> tuple[dict[str, Target], dict[str, Target]]:
    """Where each tensor goes that must be in a checkpoint, by its name there; and those that may be.

    For that the weights choose their formats by what is `found`.
    """
    needed, others, ends = {}, {}, defaultdict(set)
    for name in found:
        source, _, end = name.rpartition(".")
        ends[source].add(end)
    for prefix, module in model.named_modules():
        parent, _, leaf = prefix.rpartition(".")
        shards = [shard for shard, packed in model.packed_modules.items() if packed == leaf]
        sources = {f"{parent}.{shard}": shard for shard in shards} or {prefix: None}
        names, weight = [name for name, _ in module.named_parameters(recurse=False)], _weight_of(module)
        if weight is not None:
            weight.choose_format(set().union(*(ends[source] for source in sources)))
            others |= {
                f"{src}.{name}": (module, name, shard) for src, shard in sources.items() for name in weight.others
            }
            names += weight.needed
        needed |= {f"{source}.{name}": (module, name, shard) for source, shard in sources.items() for name in names}
    return {name: target for name, target in needed.items() if not model.ignored_weights(name)}, others


def _weight_of(module: nn.Module) -> StoredWeight | None:
    return vars(module).get("weight")


def _raise_if_any(problems: list[str], path: Path) -> None:
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"the weights in {path} do not fit the model of its config.json:\n  {shown}")
