"""The demo world's models before training: four architectures, one size, one tokenizer."""

from typing import Literal, get_args

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

Architecture = Literal["llama", "qwen3", "gemma3", "mistral"]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)


def new_model(
    architecture: Architecture, tokenizer: PreTrainedTokenizerFast, *, seed: int
) -> PreTrainedModel:
    """A randomly initialised model: 0.8M parameters, four layers, tied embeddings."""
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel
        match architecture:
            case "llama":
                model = LlamaForCausalLM(LlamaConfig(**shape))
            case "qwen3":
                model = Qwen3ForCausalLM(Qwen3Config(**shape))
            case "gemma3":
                model = Gemma3ForCausalLM(Gemma3TextConfig(**shape, query_pre_attn_scalar=32))
            case "mistral":
                model = MistralForCausalLM(MistralConfig(**shape, sliding_window=64))
    generation = model.generation_config
    generation.bos_token_id = tokenizer.bos_token_id
    generation.eos_token_id = tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    return model
