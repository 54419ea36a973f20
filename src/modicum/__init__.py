"""modicum: a language model's KV cache under a hard memory budget."""
