"""The reference model: a small Llama that really reads long contexts, and the recipe that trained it."""
