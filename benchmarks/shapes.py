"""The shapes that memory is measured at: configurations in code, no weights and no network. They cost nothing.

    from shapes import NAMES, config
    config("llama2-7b")            # transformers' LlamaConfig of that model

Memory and time of a step do not depend on the values, so random ones stand in for the pretrained: see random_store of
spryfl.packing. The numbers are those of the models' own config.json.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tokenizers
import transformers
from transformers import PretrainedConfig


class Shape(NamedTuple):
    """One model's shape."""

    paper: str  # as Spry's memory figure calls it (arXiv 2405.15551); empty where it does not have it
    kind: str  # transformers' configuration class
    values: dict[str, Any]


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

NAMES: dict[str, Shape] = {
    "roberta-large": Shape(
        "RoBERTa Large",
        "RobertaConfig",
        {
            "vocab_size": 50265,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "layer_norm_eps": 1e-5,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
    ),
    "llama2-7b": Shape(
        "Llama2-7B",
        "LlamaConfig",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
    ),
    "opt-6.7b": Shape(
        "OPT6.7B",
        "OPTConfig",
        {
            "vocab_size": 50272,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "ffn_dim": 16384,
            "max_position_embeddings": 2048,
            "word_embed_proj_dim": 4096,
        },
    ),
    "opt-13b": Shape(
        "OPT13B",
        "OPTConfig",
        {
            "vocab_size": 50272,
            "hidden_size": 5120,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "ffn_dim": 20480,
            "max_position_embeddings": 2048,
            "word_embed_proj_dim": 5120,
        },
    ),
    "llama3.2-1b": Shape(
        "",
        "LlamaConfig",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _LLAMA3_ROPE,
            "tie_word_embeddings": True,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
    ),
    "qwen2.5-0.5b": Shape(
        "",
        "Qwen2Config",
        {
            "vocab_size": 151936,
            "hidden_size": 896,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "tie_word_embeddings": True,
            "bos_token_id": 151643,
            "eos_token_id": 151643,
        },
    ),
}


def config(name: str, **changes: Any) -> PretrainedConfig:
    """The configuration of a shape; `changes` stand over it, for example num_hidden_layers=2."""
    if name not in NAMES:
        raise ValueError(f'shape "{name}" is unknown. Possible: {", ".join(NAMES)}.')
    shape = NAMES[name]
    return getattr(transformers, shape.kind)(**{**shape.values, **changes})


def tokenizer(size: int = 1000) -> Any:
    """A tokenizer of so many numbers as words, so that a random model can be opened and run like any other."""
    words = {"[PAD]": 0, "[UNK]": 1, **{str(i): i for i in range(2, size)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")
