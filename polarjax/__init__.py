"""Batched decoding of language models in JAX, made cheaper by contextual sparsity."""
