"""The layout of compressed-tensors 0.20, which vLLM computes with and transformers and we read."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ftlib.models import LanguageModel, keys
from ftlib.quant.qat import RoundedLinear
from ftlib.quant.schemes import SCHEMES
from ftlib.sections import Rounding

INPUTS = {
    "int4": None,
    "int8_int4": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    "fp8": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True},
}


def config(section: Rounding) -> dict:
    """`quantization_config` of config.json."""
    weights = {"symmetric": True, "dynamic": False}
    if SCHEMES[section.scheme].grouped:
        weights |= {"num_bits": 4, "type": "int", "strategy": "group", "group_size": section.inputs_a_scale}
    else:
        weights |= {"num_bits": 8, "type": "float", "strategy": "channel"}
    form = "pack-quantized" if SCHEMES[section.scheme].grouped else "float-quantized"
    group = {"targets": ["Linear"], "weights": weights, "input_activations": INPUTS[section.scheme], "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def packed(
    model: LanguageModel, section: Rounding, tensors: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Checkpoint keys and tensors of a model, each matrix that is rounded as its codes and scales."""
    names = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, RoundedLinear)]
    rounded = {piece.hf for piece in keys.plan(names, model.table).values()}
    for key, tensor in tensors:
        if key not in rounded:
            yield key, tensor
            continue
        codes, scales = SCHEMES[section.scheme].codes(tensor, section.inputs_a_scale)
        yield f"{key}_scale", scales
        if codes.dtype != torch.int8:
            yield key, codes
            continue
        yield f"{key}_packed", pack(codes)
        yield f"{key}_shape", torch.tensor(tensor.shape)


def pack(codes: Tensor) -> Tensor:
    """int8 [out, in] between -8 and 7 -> int32 [out, in / 8]: plus 8, the first in the lowest bits."""
    fields = (codes.long() + 8).unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)
    return fields.sum(-1).to(torch.int32)
