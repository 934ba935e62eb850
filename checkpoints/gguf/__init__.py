"""GGUF, the format of llama.cpp: one file with weights, config and tokenizer."""

from checkpoints.gguf.load import load_gguf, stored_sizes
from checkpoints.gguf.model import read_config, tokenizer_fields
from checkpoints.gguf.reader import open_gguf

__all__ = ["load_gguf", "open_gguf", "read_config", "stored_sizes", "tokenizer_fields"]
