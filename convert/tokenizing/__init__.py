"""Tokenizers of every source, as one `tokenizers.Tokenizer`."""
