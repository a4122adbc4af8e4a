"""Small random models of every family, built from configurations, and the adapters whose values are perturbed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor, nn

COMMON = {"vocab_size": 60, "num_labels": 3, "pad_token_id": 1}
WIDE = {**COMMON, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
ENCODER = {**WIDE, "max_position_embeddings": 32}
DECODER = {**ENCODER, "bos_token_id": 2, "eos_token_id": 3}
GROUPED = {**DECODER, "num_key_value_heads": 2}

# fmt: off
# family -> (class, its sizes, attention maps for LoRA and IA3, feed-forward maps for IA3)
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str], list[str]]] = {
    "bert": ("Bert", ENCODER, ["query", "value"], ["output.dense"]),
    "roberta": ("Roberta", ENCODER, ["query", "value"], ["output.dense"]),
    "electra": ("Electra", {**ENCODER, "embedding_size": 12}, ["query", "value"], ["output.dense"]),
    "albert": ("Albert", {**ENCODER, "embedding_size": 12}, ["query", "value"], ["ffn_output"]),
    "distilbert": (
        "DistilBert",
        {**COMMON, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 32},
        ["q_lin", "v_lin"],
        ["lin2"],
    ),
    "deberta-v2": (
        "DebertaV2",
        {**ENCODER, "relative_attention": True,
         "pos_att_type": ["c2p", "p2c"], "position_buckets": 8, "type_vocab_size": 0},
        ["query_proj", "value_proj"],
        ["output.dense"],
    ),
    "modernbert": ("ModernBert", {**DECODER, "global_attn_every_n_layers": 2,
      "local_attention": 6, "cls_token_id": 2, "sep_token_id": 3}, ["Wqkv"], ["Wo"]),
    "opt": (
        "OPT",
        {**DECODER, "ffn_dim": 24, "word_embed_proj_dim": 16},
        ["q_proj", "v_proj"],
        ["fc2"],
    ),
    "gpt2": ("GPT2", {**DECODER, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}, ["c_attn"],
        ["mlp.c_proj"]),
    "gpt-neox": ("GPTNeoX", DECODER, ["query_key_value"], ["dense_4h_to_h"]),
    "llama": ("Llama", GROUPED, ["q_proj", "v_proj"], ["down_proj"]),
    "qwen2": ("Qwen2", GROUPED, ["q_proj", "v_proj"], ["down_proj"]),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 4}, ["q_proj", "v_proj"], ["down_proj"]),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 6}, ["q_proj", "v_proj"], ["down_proj"]),
    "gemma": ("Gemma", {**GROUPED, "head_dim": 4}, ["q_proj", "v_proj"], ["down_proj"]),
    "gemma2": ("Gemma2", {**GROUPED, "head_dim": 4, "sliding_window": 6}, ["q_proj", "v_proj"], ["down_proj"]),
    "phi": ("Phi", DECODER, ["q_proj", "v_proj"], ["fc2"]),
    "phi3": ("Phi3", GROUPED, ["qkv_proj"], ["down_proj"]),
    "t5-encoder": (
        "T5",
        {**COMMON, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4,
         "feed_forward_proj": "gated-gelu"},
        ["q", "v"],
        ["wo"],
    ),
    "bloom": ("Bloom", {**DECODER, "n_layer": 2, "n_head": 4}, ["query_key_value"], ["dense_4h_to_h"]),
    "gptj": ("GPTJ", {**DECODER, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32,
         "rotary_dim": 4}, ["q_proj", "v_proj"], ["fc_out"]),
}
# fmt: on


def base(family: str, **changes: Any) -> nn.Module:
    """A 2-layer model of the family for classification, float64, evaluation mode, attention as it is by default."""
    name, sizes, *_ = FAMILIES[family]
    config = getattr(hf, f"{name}Config")(**{**sizes, **changes})
    head = "EncoderModel" if family == "t5-encoder" else "ForSequenceClassification"
    return enliven(getattr(hf, f"{name}{head}")(config).double().eval())


def enliven(model: nn.Module) -> nn.Module:
    """Larger random weights than the initial ones, so that every derivative is far from zero."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def lora(model: nn.Module, family: str) -> nn.Module:
    config = LoraConfig(r=2, lora_alpha=2, target_modules=FAMILIES[family][2], fan_in_fan_out=family == "gpt2")
    return enliven(get_peft_model(model, config))


def ia3(model: nn.Module, family: str) -> nn.Module:
    _, _, attention, feed = FAMILIES[family]
    config = IA3Config(target_modules=attention + feed, feedforward_modules=feed, fan_in_fan_out=family == "gpt2")
    return enliven(get_peft_model(model, config))


def biases(model: nn.Module, family: str) -> nn.Module:
    return only(model, lambda name: "bias" in name or "norm" in name.lower())


def everything(model: nn.Module, family: str) -> nn.Module:
    return only(model, lambda name: True)


def only(model: nn.Module, chosen: Callable[[str], bool]) -> nn.Module:
    for name, p in model.named_parameters():
        p.requires_grad_(chosen(name))
    return model


ADAPTERS = {"lora": lora, "ia3": ia3, "biases": biases, "full": everything}


def batch(family: str, padded: bool = True) -> dict[str, Tensor]:
    """Three rows of tokens, one of them padded on the right."""
    ids = torch.randint(4, 60, (3, 11))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 7:] = 0
        ids[1, 7:] = 1
    made = {"input_ids": ids, "attention_mask": mask}
    return made if family == "t5-encoder" else {**made, "labels": torch.tensor([0, 2, 1])}


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[dict[str, Tensor]], Tensor]:
    """params -> loss; for an encoder without a head, a fixed nonlinear function of its hidden states."""

    def loss(params: dict[str, Tensor]) -> Tensor:
        out = torch.func.functional_call(model, params, (), inputs)
        return out.last_hidden_state.square().mean() if "labels" not in inputs else out.loss

    return loss


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}
