"""Safetensors into the parameters of a model, one tensor at a time. Knows no architecture and no process."""

import json
from collections import Counter
from collections.abc import Callable
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

    def __getitem__(self, index: Index) -> torch.Tensor: ...


class ShapeError(ValueError):
    """A checkpoint's tensor does not have the shape that the configuration says."""


def copy_weight(
    param: torch.Tensor, loaded: CheckpointTensor, full_shape: tuple[int, ...] | None = None, index: Index = slice(None)
) -> None:
    """Copies `loaded[index]`, this rank's part, into a parameter or a view of it, converting dtype and device.

    ShapeError unless all of `loaded` has the shape `full_shape`, by default that of `param`.
    """
    full_shape = tuple(param.shape) if full_shape is None else full_shape
    if tuple(loaded.get_shape()) != full_shape:
        raise ShapeError(f"has shape {list(loaded.get_shape())}, the configuration says {list(full_shape)}")
    param.data.copy_(loaded[index])


def load_model(
    model: nn.Module, path: Path, show_progress: bool = True, before_each: Callable[[], None] = lambda: None
) -> None:
    """Fills every parameter of `model` exactly once from the safetensors files of a checkpoint directory.

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
    targets = {name: target for name, target in _targets(model).items() if not model.ignored_weights(name)}
    problems = [f"missing: {name}" for name in sorted(targets.keys() - found.keys())]
    problems += [f"unexpected: {name}" for name in sorted(found.keys() - targets.keys())]
    problems += [f"more than once: {name}" for name, count in sorted(found.items()) if count > 1]
    _raise_if_any(problems, path)
    is_quiet = len(files) == 1 or not show_progress
    for file, name in tqdm(stored, desc="Loading weights", unit="tensor", disable=is_quiet):
        module, attribute, shard = targets[name]
        before_each()
        try:
            with safe_open(file, framework="pt") as tensors:  # reopened so that pages already read are let go
                loaded = tensors.get_slice(name)
                if hasattr(module, "load_weight"):
                    module.load_weight(attribute, loaded, shard)
                else:
                    copy_weight(getattr(module, attribute), loaded)
        except ShapeError as error:
            problems.append(f"misshapen: {name} {error}")
    _raise_if_any(problems, path)


def load_dummy(model: nn.Module, seed: int) -> None:
    """Random weights, normal with standard deviation 0.02; norms are 1. The same seed gives the same weights."""
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if "norm" in name:
            param.data.fill_(1.0)
            continue
        # One row's worth of draws a thousand times over is as good as fresh ones for timing, and far quicker.
        noise = torch.empty(min(param.numel(), 2**20 + 7), dtype=param.dtype).normal_(0, 0.02, generator=generator)
        for part in param.data.view(-1).split(noise.numel()):
            part.copy_(noise[: part.numel()])


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


def _targets(model: nn.Module) -> dict[str, tuple[nn.Module, str, str | None]]:
    """Where each tensor of a checkpoint goes: its name -> (module, attribute, projection within the module)."""
    targets = {}
    for prefix, module in model.named_modules():
        parent, _, leaf = prefix.rpartition(".")
        sources = {f"{parent}.{shard}": shard for shard, packed in model.packed_modules.items() if packed == leaf}
        for attribute, _ in module.named_parameters(recurse=False):
            for source, shard in (sources or {prefix: None}).items():
                targets[f"{source}.{attribute}"] = module, attribute, shard
    return targets


def _raise_if_any(problems: list[str], path: Path) -> None:
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"the weights in {path} do not fit the model of its config.json:\n  {shown}")
