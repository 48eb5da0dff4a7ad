"""Ten tiny transformers with LoRA adapters, built offline, with a batch for each.

``MODELS[name]()`` returns ``(model, batch)``: a seeded ``PeftModel`` in training mode without dropout, whose LoRA
factors are all non-zero, and keyword arguments with which ``model(**batch).loss`` is a scalar.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers as hf
from torch import Tensor, nn

Batch = dict[str, Tensor]
TinyModel = Callable[[], tuple[peft.PeftModel, Batch]]

VOCABULARY = 64
HIDDEN = 16
RANK = 4

# What nearly all decoder configurations have in common.
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def llama() -> tuple[peft.PeftModel, Batch]:
    return _adapted(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)), target_modules="all-linear"), _tokens()


def qwen3() -> tuple[peft.PeftModel, Batch]:
    return _adapted(lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER)), target_modules=ATTENTION), _tokens()


def gemma() -> tuple[peft.PeftModel, Batch]:
    """With an adapter on the embedding as well."""
    targets = [*ATTENTION, "embed_tokens"]
    config = hf.GemmaConfig(**DECODER, tie_word_embeddings=False)
    return _adapted(lambda: hf.GemmaForCausalLM(config), target_modules=targets), _tokens()


def mistral() -> tuple[peft.PeftModel, Batch]:
    return _adapted(lambda: hf.MistralForCausalLM(hf.MistralConfig(**DECODER)), use_rslora=True), _tokens()


def gpt2() -> tuple[peft.PeftModel, Batch]:
    """Its Conv1D layers store the weight transposed."""
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=HIDDEN, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    targets = ["c_attn", "c_proj", "c_fc"]
    return _adapted(lambda: hf.GPT2LMHeadModel(config), target_modules=targets, fan_in_fan_out=True), _tokens()


def bert() -> tuple[peft.PeftModel, Batch]:
    """A classifier, whose head is trained beside the adapters."""
    config = hf.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=3,
    )
    model = _adapted(
        lambda: hf.BertForSequenceClassification(config), target_modules=["query", "value"], task_type="SEQ_CLS"
    )
    return model, {"input_ids": _ids(), "labels": torch.tensor([0, 2])}


def t5() -> tuple[peft.PeftModel, Batch]:
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return _adapted(lambda: hf.T5ForConditionalGeneration(config), target_modules=["q", "v", "wo"]), _tokens()


def vit() -> tuple[peft.PeftModel, Batch]:
    """With an adapter on the patch embedding, a convolution."""
    config = hf.ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_channels=3,
        num_labels=3,
    )
    model = _adapted(
        lambda: hf.ViTForImageClassification(config), target_modules=["projection", *_linears(hf.ViTModel(config))]
    )
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return model, {"pixel_values": pixels, "labels": torch.tensor([0, 2])}


def whisper() -> tuple[peft.PeftModel, Batch]:
    """Speech to text. PEFT cannot adapt its convolutions: the encoder reads their ``stride``, which a wrapper hides."""
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_mel_bins=8,
        max_source_positions=8,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = _adapted(lambda: hf.WhisperForConditionalGeneration(config), target_modules=["q_proj", "v_proj", "fc1"])
    features = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    return model, {"input_features": features, "labels": _ids()}


def qwen3_moe() -> tuple[peft.PeftModel, Batch]:
    """Adapters on attention and, through ``target_parameters``, on both stacked expert weights."""
    config = hf.Qwen3MoeConfig(
        **DECODER, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1
    )
    model = _adapted(
        lambda: hf.Qwen3MoeForCausalLM(config),
        target_modules=ATTENTION,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    return model, _tokens()


MODELS: dict[str, TinyModel] = {
    "llama": llama,
    "qwen3": qwen3,
    "gemma": gemma,
    "mistral": mistral,
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
    "vit": vit,
    "whisper": whisper,
    "qwen3_moe": qwen3_moe,
}


def unet() -> nn.Module:
    """A diffusion model with adapters on linear layers and on convolutions; needs diffusers."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ).requires_grad_(False)
        targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
        model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    return model


def text_encoder() -> nn.Module:
    """CLIP's, with adapters, as wide as the `unet` wants it."""
    config = hf.CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.CLIPTextModel(config).requires_grad_(False)
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return model


def _adapted(build: Callable[[], nn.Module], **config: Any) -> peft.PeftModel:
    # Forked, so that building a model leaves a test's own random numbers as they were.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = build()
        for module in base.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        # Standard initialisation has B = 0, where half of the gradients vanish.
        options = {"r": RANK, "lora_alpha": 8, "init_lora_weights": False, **config}
        return peft.get_peft_model(base, peft.LoraConfig(**options)).train()


def _linears(model: nn.Module) -> list[str]:
    return sorted({name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)})


def _ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(1))


def _tokens() -> Batch:
    return {"input_ids": _ids(), "labels": _ids()}
