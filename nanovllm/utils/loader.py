"""Safetensors into the parameters of a model, one tensor at a time. Knows no architecture and no process."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

INDEX_FILE = "model.safetensors.index.json"
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
    """Copies `loaded[index]` into `param`, converting dtype and device.

    Args:
        param: A parameter or a view of some of its rows.
        loaded: The tensor in the checkpoint.
        full_shape: Shape that `loaded` must have, by default that of `param`.
        index: The part that belongs to this rank.

    Raises:
        ShapeError: `loaded` has another shape.
    """
    full_shape = tuple(param.shape) if full_shape is None else full_shape
    if tuple(loaded.get_shape()) != full_shape:
        raise ShapeError(f"has shape {list(loaded.get_shape())}, the configuration says {list(full_shape)}")
    param.data.copy_(loaded[index])


def load_model(
    model: nn.Module,
    path: str | os.PathLike,
    show_progress: bool = True,
    before_each: Callable[[], None] = lambda: None,
) -> None:
    """Fills every parameter of `model` exactly once from the safetensors files of a checkpoint directory.

    Args:
        model: Has `packed_modules` (name of a projection in the checkpoint -> name of the module that holds it) and
            `ignored_weights(name)` (whether the checkpoint's tensor is not wanted); its modules may have
            `load_weight(name, loaded, shard)`.
        path: The directory.
        show_progress: Show a progress bar if there are several files.
        before_each: Called before each tensor is read; may raise to stop.

    Raises:
        ValueError: A file is missing or damaged, or tensors are missing, unexpected or misshapen (all are listed).
    """
    files = {file: [n for n in _tensor_names(file) if not model.ignored_weights(n)] for file in _find_files(Path(path))}
    found = [name for names in files.values() for name in names]
    targets = {name: target for name, target in _targets(model).items() if not model.ignored_weights(name)}
    problems = [f"missing: {name}" for name in sorted(targets.keys() - set(found))]
    problems += [f"unexpected: {name}" for name in sorted(set(found) - targets.keys())]
    problems += [f"more than once: {name}" for name in sorted({name for name in found if found.count(name) > 1})]
    _raise_if_any(problems, path)
    progress = tqdm(
        total=len(found), desc="Loading weights", unit="tensor", disable=len(files) == 1 or not show_progress
    )
    for file, names in files.items():
        for name in names:
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
            progress.update()
    progress.close()
    _raise_if_any(problems, path)


def load_dummy(model: nn.Module, seed: int) -> None:
    """Random weights, normal with standard deviation 0.02; norms are 1. The same seed gives the same weights."""
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if "norm" in name:
            param.data.fill_(1.0)
        else:
            # One row's worth of draws a thousand times over is as good as fresh ones for timing, and far quicker.
            noise = torch.empty(min(param.numel(), 2**20 + 7), dtype=param.dtype).normal_(0, 0.02, generator=generator)
            flat = param.data.view(-1)
            for start in range(0, flat.numel(), noise.numel()):
                part = flat[start : start + noise.numel()]
                part.copy_(noise[: part.numel()])


def _find_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of the index, the single one, or all there are."""
    if (path / INDEX_FILE).is_file():
        try:
            weight_map = json.loads((path / INDEX_FILE).read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{path / INDEX_FILE} is damaged ({error!r}); download the checkpoint again") from error
        files = [path / name for name in sorted(set(weight_map.values()))]
    elif (path / "model.safetensors").is_file():
        files = [path / "model.safetensors"]
    else:
        files = sorted(path.glob("*.safetensors"))
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
    return {name: target for prefix, module in model.named_modules() for name, target in _owned(model, prefix, module)}


def _owned(model: nn.Module, prefix: str, module: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str, str | None]]]:
    parent, _, leaf = prefix.rpartition(".")
    shards = [shard for shard, packed in model.packed_modules.items() if packed == leaf]
    for attribute, _ in module.named_parameters(recurse=False):
        if shards:
            yield from ((f"{parent}.{shard}.{attribute}", (module, attribute, shard)) for shard in shards)
        else:
            yield f"{prefix}.{attribute}", (module, attribute, None)


def _raise_if_any(problems: list[str], path: str | os.PathLike) -> None:
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"the weights in {path} do not fit the model of its config.json:\n  {shown}")
