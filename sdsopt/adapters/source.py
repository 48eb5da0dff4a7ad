"""Which files an adapter is made of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

from sdsopt.adapters.config import AdapterConfig
from sdsopt.adapters.json_object import parse_object
from sdsopt.adapters.pickle_file import PICKLE_SUFFIXES, PickleFile
from sdsopt.adapters.safetensors_file import SafetensorsFile
from sdsopt.adapters.tensor_file import TensorFile
from sdsopt.errors import AdapterError

CONFIG = "adapter_config.json"
_PEFT = "adapter_model.safetensors"
_INDEX = "adapter_model.safetensors.index.json"
# Diffusers writes no configuration file.
_DIFFUSERS = "pytorch_lora_weights.safetensors"
_PICKLES = ("adapter_model.bin", "pytorch_lora_weights.bin")

_MAX_JSON_BYTES = 64 * 2**20


@final
@dataclass(frozen=True)
class Source:
    """The files of one adapter.

    Attributes:
        path: The folder or the file, without links.
        files: Where its tensors are, with each name in one file only.
        config: PEFT's configuration, if there is one.
    """

    path: Path
    files: tuple[TensorFile, ...]
    config: AdapterConfig | None

    @cached_property
    def owners(self) -> dict[str, TensorFile]:
        """The file of each tensor, by the tensor's name."""
        return {name: file for file in self.files for name in file.tensors}


def open_source(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> Source:
    """Finds an adapter's files and reads all of them but the tensors.

    Args:
        path: A folder with an adapter (PEFT's, a Trainer's checkpoint, diffusers'), or a single file of tensors.
        allow_pickle: Whether pickles may be loaded, with `weights_only=True`.

    Raises:
        AdapterError: There is no adapter, or a file is damaged, or it refers to files outside its folder.
        MissingExtraError: safetensors is not installed.
    """
    real = Path(os.path.realpath(path))
    if real.is_dir():
        return _folder(real, allow_pickle)
    if not real.exists():
        raise AdapterError(f"{path}: there is no such file or folder")
    if not real.is_file():
        raise AdapterError(f"{path} is neither a folder nor a regular file")
    if real.suffix == ".json":
        raise AdapterError(f"{path} describes an adapter; give the folder that it is in, {real.parent}")
    # A file that was taken out of a PEFT adapter's folder by name has its configuration beside it.
    beside = real.name in (_PEFT, _PICKLES[0]) and (real.parent / CONFIG).exists()
    return Source(real, (_tensors(real, allow_pickle),), _config(real.parent) if beside else None)


def member(folder: Path, name: str) -> Path:
    """Returns the regular file of this name in a folder.

    Raises:
        AdapterError: The name is a path, the file is missing, or it is a link that leads out of the folder.
    """
    if not name or Path(name).name != name or "\\" in name or name == "..":
        raise AdapterError(f"{folder} refers to {name!r:.200}, which is no plain file name; it is not to be trusted")
    path = folder / name
    if not os.path.isfile(path):  # noqa: PTH113  # Path.is_file raises on names that are too long
        raise AdapterError(f"{folder} has no regular file {name!r:.200}; fetch the adapter again")
    # The Hugging Face cache keeps snapshots/<revision>/ full of links into blobs/.
    allowed = folder.parent.parent if folder.parent.name == "snapshots" else folder
    if not Path(os.path.realpath(path)).is_relative_to(allowed):
        raise AdapterError(f"{path} is a link that leads out of its folder; put the file itself there if you trust it")
    return path


def _folder(folder: Path, allow_pickle: bool) -> Source:
    for name in (_PEFT, _DIFFUSERS, *_PICKLES):
        # A safetensors file or index comes before any pickle, as in PEFT.
        if name == _PICKLES[0] and (folder / _INDEX).exists():
            files: tuple[TensorFile, ...] = _shards(folder)
            break
        if (folder / name).exists():
            files = (_tensors(member(folder, name), allow_pickle),)
            break
    else:
        raise AdapterError(f"{folder} holds no adapter ({_PEFT}). {_elsewhere(folder)}")
    if files[0].path.name.startswith("pytorch_lora_weights"):
        return Source(folder, files, None)
    if not (folder / CONFIG).exists():
        raise AdapterError(
            f"{folder} has no {CONFIG}, without which the scaling is not known; to go on with a scaling of 1, give the "
            f"file: {files[0].path}"
        )
    return Source(folder, files, _config(folder))


def _config(folder: Path) -> AdapterConfig:
    path = member(folder, CONFIG)
    return AdapterConfig.parse(parse_object(_read_json(path), str(path)), str(path))


def _tensors(path: Path, allow_pickle: bool) -> TensorFile:
    if path.suffix not in PICKLE_SUFFIXES:
        return SafetensorsFile(path)
    if not allow_pickle:
        raise AdapterError(
            f"{path} is a pickle, which is not opened unless you say so. Prefer the adapter's safetensors file; or "
            "allow it (--allow-pickle, allow_pickle=True): it is then loaded with weights_only=True, which runs no code"
        )
    return PickleFile(path)


def _shards(folder: Path) -> tuple[TensorFile, ...]:
    path = member(folder, _INDEX)
    listed = parse_object(_read_json(path), str(path)).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise AdapterError(f"{path}: weight_map must be an object from tensors to file names; fetch the adapter again")
    weight_map: Mapping[str, Any] = listed
    files = tuple(SafetensorsFile(member(folder, name)) for name in dict.fromkeys(weight_map.values()))
    found = sorted((name, file.path.name) for file in files for name in file.tensors)
    if found != sorted(weight_map.items()):
        raise AdapterError(f"{path} does not list the tensors that its files hold; fetch the adapter again")
    return files


def _read_json(path: Path) -> bytes:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise AdapterError(f"{path} has {path.stat().st_size} bytes, which no adapter's description has")
    return path.read_bytes()


def _elsewhere(folder: Path) -> str:
    below = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if below:
        return f"There are adapters in {', '.join(map(str, below[:3]))}{', …' * (len(below) > 3)}: give one of these."
    tensors = sorted(path.name for path in folder.glob("*.safetensors"))
    if tensors:
        return f"If its factors are in one of its files, give that: {', '.join(tensors[:3])}."
    return "Give the folder that peft's save_pretrained or a Trainer wrote, or a .safetensors file."
