"""Lightning: `configure_optimizers` returns the wrapped optimizer, and the Trainer does the rest.

Run it: `pip install 'sdsopt[peft]' lightning`, then `python examples/lightning_module.py`. It needs neither data nor a
download.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import sdsopt
from sdsopt import SDSPreconditioner


# docs: module
class LoRAModule(LightningModule):
    """Builds the adapter before `configure_optimizers` wraps the optimizer."""

    def __init__(self, correction: str | None) -> None:
        super().__init__()
        self.correction = correction
        config = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
        )
        self.model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear"))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        if self.correction is not None:
            optimizer = SDSPreconditioner(optimizer, self.model, self.correction)
        return [optimizer], [CosineAnnealingLR(optimizer, T_max=4)]  # on the wrapper: Lightning insists


# docs: end


def build_trainer(folder: str) -> Trainer:
    return Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=4,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        callbacks=[ModelCheckpoint(folder, "{epoch}", save_top_k=-1, enable_version_counter=False)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def build_batches() -> Any:
    tokens = torch.arange(64).repeat(32, 1) % 16  # a pattern to learn
    return DataLoader(tokens, batch_size=4)  # pyright: ignore[reportArgumentType]  # a tensor is a dataset


def fit(module: LoRAModule, folder: str, resume: str | None = None) -> None:
    build_trainer(folder).fit(module, build_batches(), ckpt_path=resume)


def fit_in_backward(module: LoRAModule, folder: str) -> None:
    trainer, batches = build_trainer(folder), build_batches()
    # docs: hooks
    with sdsopt.attach(module):
        trainer.fit(module, batches)
    # docs: end


def build(correction: str | None) -> LoRAModule:
    torch.manual_seed(0)
    return LoRAModule(correction)


def main(correction: str = "sds") -> tuple[LoRAModule, LoRAModule, LoRAModule]:
    with TemporaryDirectory() as folder:
        whole, resumed, hooked = build(correction), build(correction), build(None)
        fit(whole, folder)
        fit(resumed, folder, str(Path(folder) / "epoch=1.ckpt"))
        # Or in backward, whatever optimizer the module configures; then gradient_clip_val sees corrected gradients.
        fit_in_backward(hooked, folder)
    return whole, resumed, hooked


if __name__ == "__main__":
    main()
