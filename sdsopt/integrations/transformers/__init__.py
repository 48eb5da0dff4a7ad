"""Hugging Face's Trainer and those built on it (TRL, Axolotl, LLaMA-Factory, ms-swift)."""

from sdsopt.integrations.transformers.callback import SDSCallback
from sdsopt.integrations.transformers.factory import SDSOptimizerFactory

__all__ = ["SDSCallback", "SDSOptimizerFactory"]
