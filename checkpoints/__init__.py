"""Weights on disk: Hugging Face safetensors in and out, and trees saved with Orbax.

`load_params` streams a Hugging Face directory onto the devices and `write_hf` is its inverse;
`save` and `restore` keep a tree as it is, converted or quantised.
"""

from checkpoints.load import load_params
from checkpoints.safetensors_reader import open_checkpoint
from checkpoints.store import read_config, restore, save
from checkpoints.write import write_hf

__all__ = ["load_params", "open_checkpoint", "read_config", "restore", "save", "write_hf"]
