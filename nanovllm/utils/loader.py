"""Safetensors into the parameters of a model, one tensor at a time. Knows no architecture and no process.

A parameter on the meta device has memory from the moment when its first tensor comes, and is converted when it has its
last one: so of a model whose weights end up smaller, or elsewhere, there are never more than a few in their first form.
"""

import json
import mmap
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

Index = slice | tuple[slice, ...]
Place = tuple[nn.Module, str]  # of a parameter: the module and the attribute
Convert = Callable[[nn.Parameter, nn.Module], object]  # a filled parameter, a module it is of -> what takes its place


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
    model: nn.Module,
    path: Path,
    device: torch.device | str = "cpu",
    convert: Convert = lambda param, module: param,
    show_progress: bool = True,
    before_each: Callable[[], None] = lambda: None,
) -> None:
    """Fills every parameter of `model` exactly once from the safetensors files of a checkpoint directory.

    Args:
        model: Has `packed_modules` (name of a projection in the checkpoint -> name of the module that holds it) and
            `ignored_weights(name)` (whether the checkpoint's tensor is not wanted); its modules may have
            `load_weight(name, loaded, shard)`.
        device: Where parameters of the meta device get their memory.
        convert: Called once with each parameter that is filled.
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
    places, num_missing = _places(model), Counter(target[:2] for target in targets.values())
    is_quiet = len(files) == 1 or not show_progress
    for file, name in tqdm(stored, desc="Loading weights", unit="tensor", disable=is_quiet):
        module, attribute, shard = targets[name]
        before_each()
        _allocate(places[module, attribute], device)
        try:
            _load(file, name, module, attribute, shard)
        except ShapeError as error:
            problems.append(f"misshapen: {name} {error}")
        num_missing[module, attribute] -= 1
        if not num_missing[module, attribute] and not problems:
            _replace(places[module, attribute], convert)
    _raise_if_any(problems, path)


def _load(file: Path, name: str, module: nn.Module, attribute: str, shard: str | None) -> None:
    with safe_open(file, framework="pt") as tensors:  # opened for each, so that pages that were read are let go
        loaded = tensors.get_slice(name)
        if hasattr(module, "load_weight"):
            module.load_weight(attribute, loaded, shard)
        else:
            copy_weight(getattr(module, attribute), loaded)


def load_dummy(
    model: nn.Module, seed: int, device: torch.device | str = "cpu", convert: Convert = lambda param, module: param
) -> None:
    """Random weights, normal with standard deviation 0.02; norms are 1. The same seed gives the same weights.

    `device` and `convert` are as for `load_model`.
    """
    generator = torch.Generator().manual_seed(seed)
    places, buffer = _places(model), torch.empty(2**20 + 7, dtype=next(model.parameters()).dtype)
    for name, _ in list(model.named_parameters()):
        parent, _, attribute = name.rpartition(".")
        shared = places[model.get_submodule(parent), attribute]
        param = _allocate(shared, device)
        if "norm" in name:
            param.data.fill_(1.0)
        else:
            # One row's worth of draws a thousand times over is as good as fresh ones for timing, and far quicker.
            noise = buffer[: param.numel()].normal_(0, 0.02, generator=generator)
            for part in param.data.view(-1).split(noise.numel()):
                part.copy_(noise[: part.numel()])
        _replace(shared, convert)


def _places(model: nn.Module) -> dict[Place, list[Place]]:
    """Of each place of a parameter all places of the same one: a tied weight has two."""
    places = defaultdict(list)
    for module in model.modules():
        for attribute, param in module.named_parameters(recurse=False):
            places[param].append((module, attribute))
    return {place: shared for shared in places.values() for place in shared}


def _allocate(places: list[Place], device: torch.device | str) -> nn.Parameter:
    """The parameter there, which has memory on `device` if it had none."""
    param = getattr(*places[0])
    if param.is_meta:
        param = nn.Parameter(_empty_like(param, torch.device(device)), requires_grad=False)
        for place in places:
            setattr(*place, param)
    return param


def _empty_like(param: nn.Parameter, device: torch.device) -> torch.Tensor:
    """On a CPU in pages of its own, which the system has back once it is converted; malloc would often keep them."""
    if device.type != "cpu" or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty_like(param, device=device)
    pages = mmap.mmap(-1, param.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=param.dtype).view(param.shape)


def _replace(places: list[Place], convert: Convert) -> None:
    converted = convert(getattr(*places[0]), places[0][0])
    for place in places:
        delattr(*place)  # where there is a parameter nothing else can be set
        setattr(*place, converted)


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
