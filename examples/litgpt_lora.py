"""LitGPT's commands, with every LoRA model linked, so that an optimizer of sdsopt finds its pairs.

Run it: `pip install sdsopt litgpt`, then, with a checkpoint that `litgpt download` fetched,

    python examples/litgpt_lora.py finetune_lora CHECKPOINT --optimizer.class_path sdsopt.SDSAdamW \
        --optimizer.init_args.lr 2e-4
"""

from __future__ import annotations

from typing import Any

import litgpt.finetune.lora as finetune  # pyright: ignore[reportMissingImports]

import sdsopt


# docs: script
def link_models() -> None:
    """LitGPT freezes the base model once the LoRA layers are in place, and builds the optimizer after that."""
    freeze = finetune.mark_only_lora_as_trainable

    def freeze_and_link(model: Any, *arguments: Any) -> None:
        freeze(model, *arguments)
        sdsopt.link(model)

    finetune.mark_only_lora_as_trainable = freeze_and_link


def main() -> None:
    link_models()
    from litgpt.__main__ import main as litgpt  # pyright: ignore[reportMissingImports]

    litgpt()


if __name__ == "__main__":
    main()
# docs: end
