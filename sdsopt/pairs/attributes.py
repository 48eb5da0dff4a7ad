"""Reading a module's own attributes, without the `__getattr__` by which FSDP, PEFT and compile forward to others."""

from __future__ import annotations

from torch import nn


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """Returns the parameter that the module itself registered under this name."""
    return vars(module)["_parameters"].get(name)


def own_module(module: nn.Module, name: str) -> nn.Module | None:
    """Returns the child that the module itself registered under this name."""
    return vars(module)["_modules"].get(name)


def own_weight(module: nn.Module, name: str) -> nn.Parameter | None:
    """Returns the weight of the child of this name."""
    child = own_module(module, name)
    return None if child is None else own_parameter(child, "weight")
