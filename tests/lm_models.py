"""Tiny models of every family, with random weights, for tests of what language models share."""

from typing import Any

SIZE: dict[str, Any] = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA: dict[str, Any] = {**SIZE, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
                         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
#: Configurations of transformers as plain data.
TINY: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **LLAMA},
    "qwen2": {"model_type": "qwen2", **LLAMA, **WINDOW},
    "gpt2": {"model_type": "gpt2", **SIZE, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"model_type": "opt", **SIZE, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
            "word_embed_proj_dim": 8, "max_position_embeddings": 64, "dropout": 0.0},
    "bert": {"model_type": "bert", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
             "num_attention_heads": 4, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
             "attention_probs_dropout_prob": 0.0},
    "t5": {"model_type": "t5", "vocab_size": 40, "d_model": 16, "d_ff": 24, "d_kv": 4, "num_layers": 2, "num_heads": 4,
           "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 1},
}  # fmt: skip
