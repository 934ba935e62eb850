"""Whether PyTorch reads what `jaxinfer quantize` writes: run once in each of two environments.

    python tests/goldens/check_export.py write FOLDER     where jaxinfer is
    python tests/goldens/check_export.py read FOLDER      where torch and compressed-tensors are

The first quantises the demo's draft by every method, and keeps the logits of the dequantised
weights; the second has transformers load and dequantise each, and prints how far off it is.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

METHODS = {
    "rtn": {}, "gptq": {}, "awq": {}, "rtn-8": {"method": "rtn", "bits": 8},
    "gptq-asym": {"method": "gptq", "symmetric": False}, "int8": {}, "smoothquant": {}, "fp8": {},
    "gptq-order": {"method": "gptq", "act_order": True},
    "int8-static": {"method": "int8", "activations": "static"},
    "fp8-static": {"method": "fp8", "activations": "static", "scales": "tensor"},
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 4096, (2, 48))


def write(folder: Path) -> None:
    import jax
    import jax.numpy as jnp

    from checkpoints.load import load_params
    from jaxinfer import models
    from jaxinfer.cli.quantizing import QuantizeOptions, quantize
    from jaxinfer.models.families import read_config
    from jaxinfer.models.weights import declare
    from jaxinfer.quant import QuantisedMatrix, dequantise

    def dense(leaf: object) -> object:
        return dequantise(leaf) if isinstance(leaf, QuantisedMatrix) else leaf  # type: ignore

    for name, options in METHODS.items():
        chosen = {"method": name, "bits": 4, "group_size": 32, "symmetric": True} | options
        out = folder / name
        quantize(
            QuantizeOptions(
                model="demo-draft", out=out, data=Path(__file__), samples=4, length=64,
                **{"act_order": False} | chosen,
            ),  # type: ignore
            None,
        )  # fmt: skip
        config = read_config(out)
        params = load_params(out, declare(config), dtype=jnp.float32)
        params = jax.tree.map(dense, params, is_leaf=lambda x: isinstance(x, QuantisedMatrix))
        logits = models.apply(params, config, jnp.asarray(TOKENS)).logits
        np.save(folder / f"{name}.npy", np.asarray(logits))


def read(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    for name in METHODS:
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        model.hf_quantizer.compressor.decompress_model(model)
        for module in model.modules():  # weights alone: activations are not rounded here
            getattr(module, "__dict__", {}).pop("quantization_scheme", None)
            if isinstance(module, torch.nn.Linear):
                module.forward = torch.nn.Linear.forward.__get__(module)
        with torch.no_grad():
            got = model.eval()(torch.tensor(TOKENS)).logits.numpy()
        want = np.load(folder / f"{name}.npy")
        print(f"{name}: {np.abs(got - want).max() / np.abs(want).max():.1e} of max |logit|")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
