"""Makes `quantised/NAME/`: tiny random Llamas as real tools publish them, and what they compute.

Run where the tools are, which do not all live in one environment (jaxinfer need not be there):

    python tests/goldens/make_quantised.py make [NAME ...]   llmcompressor, bitsandbytes: ct-, bnb-
    python tests/goldens/make_quantised.py golden [NAME ...] auto-round: gptq-, awq-, fp8-
                                                             gptqmodel: gptqmodel-

AutoRound's GPTQ and AWQ are read by gptqmodel, its FP8 by transformers.

Beside each checkpoint, `golden.safetensors`: `tokens` int32 [B, T], `logits` float32 [B, T, V] of
the forward with the dequantised weights in float32, as the tool itself dequantises them.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent / "quantised"
CONFIG: dict[str, Any] = {
    "vocab_size": 139, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
TOKENS = torch.randint(0, 139, (2, 40), generator=torch.Generator().manual_seed(1))


def base(dtype: torch.dtype = torch.float16, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG | changes))
    for name, p in model.named_parameters():
        if p.ndim == 2:  # Hugging Face's 0.02 gives logits near zero
            torch.nn.init.normal_(p, std=1.0 if "embed" in name else p.shape[1] ** -0.5)
    return model.to(dtype).eval()


def words() -> Any:
    """A tokenizer, which the tools want to have."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    level = models.WordLevel({str(i): i for i in range(139)}, unk_token="0")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(level),
        pad_token="0",
        eos_token="1",
        bos_token="2",
        unk_token="0",
    )


def write_golden(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    dense = base(torch.float32)
    with torch.no_grad():
        for name, p in dense.named_parameters():
            p.copy_(weights[name].to(torch.float32).reshape(p.shape))
        logits = dense(TOKENS).logits
    tensors = {"tokens": TOKENS.to(torch.int32), "logits": logits.contiguous()}
    save_file(tensors, folder / "golden.safetensors")


# -- compressed-tensors ---------------------------------------------------------------------------


def calibration() -> Any:
    from datasets import Dataset

    rows = torch.randint(0, 139, (8, 64), generator=torch.Generator().manual_seed(2)).tolist()
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 64] * 8})


def compressed(recipe: Callable[[], Any], data: bool = False) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from llmcompressor import oneshot

        plain = folder / "plain"
        base(torch.bfloat16).save_pretrained(plain)
        model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
        kwargs: dict[str, Any] = {}
        if data:
            kwargs = {
                "dataset": calibration(), "num_calibration_samples": 8, "max_seq_length": 64,
            }  # fmt: skip
        oneshot(model=model, recipe=recipe(), processor=words(), **kwargs)
        model.save_pretrained(folder, save_compressed=True)

    return make


def modifier(scheme: Any, ignore: tuple[str, ...] = ("lm_head",)) -> Callable[[], Any]:
    def recipe() -> Any:
        from llmcompressor.modifiers.quantization import QuantizationModifier

        return QuantizationModifier(targets="Linear", scheme=scheme, ignore=list(ignore))

    return recipe


def custom(weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> Callable[[], Any]:
    def recipe() -> Any:
        from llmcompressor.modifiers.quantization import QuantizationModifier

        group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
        if inputs:
            group["input_activations"] = inputs
        return QuantizationModifier(
            config_groups={"group_0": group},
            ignore=["lm_head", "re:.*layers.0.self_attn.v_proj"],
        )

    return recipe


def gptq_modifier() -> Any:
    from llmcompressor.modifiers.quantization import GPTQModifier

    return GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"], actorder="weight")


GROUP32 = {
    "num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32,
}  # fmt: skip

# -- bitsandbytes ---------------------------------------------------------------------------------


def bnb(**options: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from transformers import BitsAndBytesConfig

        plain = folder / "plain"
        base().save_pretrained(plain)
        model = AutoModelForCausalLM.from_pretrained(
            plain, device_map="cpu", dtype=torch.float16,
            quantization_config=BitsAndBytesConfig(**options),
        )  # fmt: skip
        shutil.rmtree(plain)
        model.save_pretrained(folder)

    return make


# -- auto-round: GPTQ and AWQ ---------------------------------------------------------------------


def rounded(format: str, **options: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from auto_round import AutoRound

        tuned = AutoRound(
            base(), words(), iters=0, device_map="cpu", disable_opt_rtn=True, **options
        )
        tuned.quantize()
        tuned.save_quantized(str(folder), format=format)

    return make


# -- gptqmodel ------------------------------------------------------------------------------------


def gptqmodel(**options: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

        plain = folder / "plain"
        base().save_pretrained(plain)
        words().save_pretrained(plain)
        model = GPTQModel.load(str(plain), QuantizeConfig(device="cpu", **options))
        rows = torch.randint(0, 139, (16, 64), generator=torch.Generator().manual_seed(2))
        model.quantize([{"input_ids": r, "attention_mask": torch.ones_like(r)} for r in rows],
                       batch_size=1, backend=BACKEND.TORCH)  # fmt: skip
        model.save(str(folder))

    return make


# -- what the tools dequantise --------------------------------------------------------------------


def read_compressed(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.hf_quantizer.compressor.decompress_model(model)
    return model.state_dict()


def read_fp8(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import FineGrainedFP8Config

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    ).state_dict()


def read_bnb(folder: Path) -> dict[str, torch.Tensor]:
    import bitsandbytes.functional as bf

    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32)
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None:
            continue
        if hasattr(weight, "quant_state"):
            weight.quant_state.dtype = torch.float32
            weight = bf.dequantize_4bit(weight.data, weight.quant_state)
        elif getattr(weight, "SCB", None) is not None:
            weight = weight.data.to(torch.float32) * weight.SCB[:, None] / 127
        found[name + ".weight"] = weight
    return found


def read_gptqmodel(folder: Path) -> dict[str, torch.Tensor]:
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    words().save_pretrained(folder)
    model = GPTQModel.load(
        str(folder), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16
    ).model
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "dequantize_weight"):
            module.scales = module.scales.to(torch.float32)
            found[name + ".weight"] = module.dequantize_weight().T
        elif hasattr(module, "qzeros"):
            found[name + ".weight"] = dequantize_gemm(
                module.qweight, module.qzeros, module.scales.to(torch.float32), 4, module.group_size
            ).T
    return load_file(folder / "model.safetensors") | found


MAKE: dict[str, Callable[[Path], None]] = {
    "ct-w4a16": compressed(modifier("W4A16")),
    "ct-w4a16-asym-ignored": compressed(custom(GROUP32)),
    "ct-w4a16-actorder": compressed(gptq_modifier, data=True),
    "ct-w8a16": compressed(modifier("W8A16")),
    "ct-w8a8-dynamic": compressed(modifier("W8A8")),
    "ct-w8a8-static": compressed(
        custom(
            {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "tensor",
                "dynamic": False,
            },
        ),
        data=True,
    ),
    "ct-fp8-dynamic": compressed(modifier("FP8_DYNAMIC")),
    "ct-fp8-static": compressed(modifier("FP8"), data=True),
    "ct-fp8-block": compressed(modifier("FP8_BLOCK")),
    "bnb-nf4": bnb(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bnb-nf4-double": bnb(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "bnb-fp4": bnb(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "bnb-int8": bnb(load_in_8bit=True),
    "gptq-w4g128": rounded("auto_gptq", bits=4, group_size=128, sym=True),
    "gptq-w8": rounded("auto_gptq", bits=8, group_size=-1, sym=True),
    "awq-w4g64": rounded("auto_awq", bits=4, group_size=64, sym=False),
    "fp8-block": rounded("fp8", scheme="FP8_BLOCK"),
    "gptqmodel-w4g32-desc_act-asym": gptqmodel(bits=4, group_size=32, desc_act=True, sym=False),
    "gptqmodel-w4g128-v2": gptqmodel(bits=4, group_size=128, sym=False, format="gptq_v2"),
    "gptqmodel-w8g128": gptqmodel(bits=8, group_size=128),
}
READ: dict[str, Callable[[Path], dict[str, torch.Tensor]]] = {
    "ct": read_compressed,
    "bnb": read_bnb,
    "fp8": read_fp8,
    "gptq": read_gptqmodel,
    "gptqmodel": read_gptqmodel,
    "awq": read_gptqmodel,
}
KEPT = {"config.json", "model.safetensors", "golden.safetensors"}


def _without_paths(path: Path) -> None:
    config = json.loads(path.read_text())
    config.get("quantization_config", {}).get("meta", {}).pop("offload_to_disk_path", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def main(what: str, names: list[str]) -> None:
    for name in names or list(MAKE):
        folder = HERE / name
        if what == "make":
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            MAKE[name](folder)
        else:
            write_golden(folder, READ[name.split("-")[0]](folder))
        for path in folder.iterdir():
            if path.name not in KEPT:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        _without_paths(folder / "config.json")
        print(name, sorted(p.name for p in folder.iterdir()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
