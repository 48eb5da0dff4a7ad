"""kohya's sd-scripts: a network module that creates any other's network, and has its gradients corrected.

The scripts import the network module by name, and hand the optimizer nothing but parameters:

    accelerate launch train_network.py … --network_module sdsopt.integrations.kohya --network_args base=networks.lora

corrects with "sds" in backward, whatever `--optimizer_type` is. To correct at the optimizer instead, leave it to that:

    … --network_args correction=none --optimizer_type sdsopt.SDSAdamW --optimizer_args "correction='sds-split'"
"""

from __future__ import annotations

import importlib
from typing import Any

from sdsopt.hooks import attach
from sdsopt.pairs import link

# The names and the open argument lists are what the scripts call.


def create_network(*args: Any, base: str = "networks.lora", correction: str = "sds", **options: Any) -> Any:
    """Creates the base module's network, which is corrected from when it is applied to the model.

    Args:
        *args: As the scripts give them, passed on.
        base: The network module to use, such as `networks.lora_flux` or `lycoris.kohya`.
        correction: Name of a correction for `attach`. "none" attaches none: the optimizer shall be one of sdsopt's,
            which finds the linked network.
        **options: Passed on.
    """
    return _corrected(importlib.import_module(base).create_network(*args, **options), correction)


def create_network_from_weights(
    *args: Any, base: str = "networks.lora", correction: str = "sds", **options: Any
) -> Any:
    """Does the same for the network of a file of weights, and returns that file's content too."""
    network, weights = importlib.import_module(base).create_network_from_weights(*args, **options)
    return _corrected(network, correction), weights


def _corrected(network: Any, correction: str) -> Any:
    apply_to = network.apply_to

    def apply_and_correct(*args: Any, **options: Any) -> None:
        apply_to(*args, **options)  # only this makes the LoRA layers children of the network
        link(network)
        if correction != "none":
            attach(network, correction)

    network.apply_to = apply_and_correct
    return network
