"""Makes `gguf/NAME.gguf` and `gguf/NAME.safetensors`: tiny models whose tensors are of every type.

Run where torch, transformers and gguf are (jaxinfer need not be there):

    python tests/goldens/make_gguf.py [NAME ...]

`llamacpp-…` are quantised by llama.cpp (llama-cpp-python must be there). In the others, types that
the gguf package quantises are made by it; of the rest blocks are random bytes with scales that
keep the weights of a likely size. The golden holds `tokens` int32 [B, T] and `logits`
float32 [B, T, V]: what transformers computes of the file, dequantised in float32.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM

HERE = Path(__file__).parent / "gguf"
V, E, F, H, K, D = 139, 256, 256, 2, 1, 128  # transformers takes no other D of Qwen3
RANDOM = np.random.default_rng(0)
# The bytes of a block that hold float16 scales.
HALVES = {
    Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2),
    Type.Q6_K: (208,), Type.IQ4_NL: (0,), Type.IQ4_XS: (0,),
}  # fmt: skip
LEGACY = {
    "attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q5_0", "attn_output": "Q5_1",
    "ffn_gate": "Q8_0", "ffn_up": "F16", "ffn_down": "BF16", "token_embd": "Q8_0",
    "output": "Q4_0",
}  # fmt: skip
K_QUANTS = {
    "attn_q": "Q2_K", "attn_k": "Q3_K", "attn_v": "Q4_K", "attn_output": "Q5_K",
    "ffn_gate": "Q6_K", "ffn_up": "IQ4_NL", "ffn_down": "IQ4_XS", "token_embd": "Q6_K",
}  # fmt: skip
MIXED = {
    "attn_q": "Q4_K", "attn_k": "Q4_K", "attn_v": "Q6_K", "attn_output": "Q4_K",
    "ffn_gate": "Q4_K", "ffn_up": "Q4_K", "ffn_down": "Q6_K", "token_embd": "Q4_K",
    "output": "Q6_K",
}  # fmt: skip
TIED = {name: kind for name, kind in MIXED.items() if name != "output"}
MODELS: dict[str, tuple[str, dict[str, str]]] = {
    "llama-legacy": ("llama", LEGACY),
    "llama-k-tied": ("llama", K_QUANTS),
    "qwen2-q4_k_m": ("qwen2", MIXED),
    "qwen3-q4_k_m": ("qwen3", MIXED),
    "gemma-q4_k_m": ("gemma", TIED),
    "gemma2-q4_k_m": ("gemma2", TIED),
    "gemma3-q4_k_m": ("gemma3", TIED),
}


# By llama.cpp's number of a file's type.
LLAMACPP = {"q4_k_m": 15, "q2_k": 10, "iq4_xs": 30}


def quantise(path: Path, ftype: int) -> None:
    import llama_cpp

    source = path.with_suffix(".f32")
    write(source, "llama", dict.fromkeys(LEGACY, "F32"))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = ftype
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), params) == 0
    source.unlink()


def blocks(shape: tuple[int, int], kind: Type, std: float) -> np.ndarray:
    """Random weights as bytes: uint8 [rows, bytes of a row]."""
    values = RANDOM.normal(0, std, shape).astype(np.float32)
    if kind not in HALVES:
        return gguf.quants.quantize(values, kind)
    of, size = gguf.GGML_QUANT_SIZES[kind]
    raw = RANDOM.integers(0, 256, (shape[0] * shape[1] // of, size), np.uint8)
    for at in HALVES[kind]:
        raw[:, at : at + 2] = np.full((len(raw), 1), 1, np.float16).view(np.uint8)
    spread = gguf.quants.dequantize(raw.reshape(shape[0], -1), kind).std()
    for at in HALVES[kind]:
        scale = std / spread * RANDOM.uniform(0.8, 1.2, (len(raw), 1))
        raw[:, at : at + 2] = scale.astype(np.float16).view(np.uint8)
    return raw.reshape(shape[0], -1)


def write(path: Path, arch: str, types: dict[str, str]) -> None:
    w = gguf.GGUFWriter(path, arch)
    gemma, newer = arch.startswith("gemma"), arch in ("gemma2", "gemma3")
    D = 256 if gemma else 128
    layers = 2 if newer else 1
    w.add_context_length(256)
    w.add_embedding_length(E)
    w.add_block_count(layers)
    w.add_feed_forward_length(F)
    w.add_head_count(H)
    w.add_head_count_kv(K)
    w.add_key_length(D)
    w.add_value_length(D)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(10000.0)
    w.add_rope_dimension_count(D)
    w.add_vocab_size(V)
    if newer:
        w.add_sliding_window(16)
    if arch == "gemma2":
        w.add_attn_logit_softcapping(50.0)
        w.add_final_logit_softcapping(30.0)

    def matrix(name: str, at: str, rows: int, columns: int) -> None:
        if name not in types:
            return
        kind = Type[types[name]]
        std = 1.0 if name == "token_embd" else columns**-0.5
        raw = blocks((rows, columns), kind, std)
        w.add_tensor(f"{at}{name}.weight", raw, raw_dtype=kind)

    def vector(name: str, size: int, mean: float) -> None:
        w.add_tensor(name, RANDOM.normal(mean, 0.1, size).astype(np.float32))

    matrix("token_embd", "", V, E)
    matrix("output", "", V, E)
    vector("output_norm.weight", E, 1)

    def block(at: str) -> None:
        for name, rows in {"q": H * D, "k": K * D, "v": K * D}.items():
            matrix(f"attn_{name}", at, rows, E)
            if arch == "qwen2":
                vector(f"{at}attn_{name}.bias", rows, 0)
        if arch in ("qwen3", "gemma3"):
            vector(f"{at}attn_q_norm.weight", D, 1)
            vector(f"{at}attn_k_norm.weight", D, 1)
        matrix("attn_output", at, E, H * D)
        matrix("ffn_gate", at, F, E)
        matrix("ffn_up", at, F, E)
        matrix("ffn_down", at, E, F)
        vector(f"{at}attn_norm.weight", E, 1)
        vector(f"{at}ffn_norm.weight", E, 1)
        if newer:
            vector(f"{at}post_attention_norm.weight", E, 1)
            vector(f"{at}post_ffw_norm.weight", E, 1)

    for layer in range(layers):
        block(f"blk.{layer}.")
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        HERE, gguf_file=path.name, dtype=torch.float32,
        attn_implementation="eager",  # others leave out soft-caps
    )  # fmt: skip


def gemma(path: Path) -> Any:
    """Gemma 1, of which transformers reads no GGUF: its tensors by hand."""
    config = GemmaConfig(
        vocab_size=V, hidden_size=E, intermediate_size=F, num_hidden_layers=1, rms_norm_eps=1e-5,
        num_attention_heads=H, num_key_value_heads=K, head_dim=256, max_position_embeddings=256,
    )  # fmt: skip
    model = GemmaForCausalLM(config).to(torch.float32)
    names = {
        "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    state = {}
    for tensor in gguf.GGUFReader(path).tensors:
        own = tensor.name.removesuffix(".weight").removeprefix("blk.0.")
        values = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        at = "model.layers.0." if tensor.name.startswith("blk.") else "model."
        state[f"{at}{names[own]}.weight"] = values - int("norm" in own)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"], missing
    assert not unexpected, unexpected
    model.tie_weights()
    return model


def main() -> None:
    HERE.mkdir(exist_ok=True)
    tokens = torch.randint(0, V, (2, 40), generator=torch.Generator().manual_seed(1))
    for name in sys.argv[1:] or [*MODELS, *(f"llamacpp-{kind}" for kind in LLAMACPP)]:
        path = HERE / f"{name}.gguf"
        if name in MODELS:
            write(path, *MODELS[name])
        else:
            quantise(path, LLAMACPP[name.removeprefix("llamacpp-")])
        model: Any = gemma(path) if name.startswith("gemma-") else load(path)
        with torch.no_grad():
            logits = model.eval()(tokens).logits.to(torch.float32)
        golden = {"tokens": tokens.to(torch.int32), "logits": logits.contiguous()}
        save_file(golden, HERE / f"{name}.safetensors")
        print(
            name, path.stat().st_size, float(logits.std()), type(model.model.layers[0].mlp.up_proj)
        )


if __name__ == "__main__":
    main()
