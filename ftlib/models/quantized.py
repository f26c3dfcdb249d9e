"""Quantized checkpoints as published, read as the plain weights they stand for.

Each format is one function that turns its tensors into matrices [out, in]; nothing else in the library knows them.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ftlib.errors import UserError
from ftlib.models.weights import Weights

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class Dequantized(Weights):
    """A checkpoint whose quantized tensors look like plain ones: `make[key]()` is the whole of one, float32."""

    def __init__(self, raw: Weights) -> None:
        super().__init__(dict(raw.files), dict(raw.shapes))
        self.raw = raw
        self.make: dict[str, Callable[[], Tensor]] = {}

    def replace(self, key: str, shape: tuple[int, ...], parts: list[str], make: Callable[[], Tensor]) -> None:
        """Tensors `parts` are not seen any more; `key` of `shape` is, made by `make`."""
        file = self.raw.files[parts[0]]
        for part in parts:
            self.files.pop(part, None), self.shapes.pop(part, None)
        self.files[key], self.shapes[key], self.make[key] = file, shape, make

    def read(self, key: str, index: tuple[slice, ...] = ()) -> Tensor:
        if key not in self.make:
            return self.raw.read(key, index)
        return self.make[key]()[index]


def dequantized(weights: Weights, config: dict | None, where: Path | str) -> Weights:
    """`weights` as plain ones. `config`: the `quantization_config` of config.json, None for plain checkpoints."""
    if config is None:
        return weights
    method = config.get("quant_method")
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"
    if method not in METHODS:
        fix = f"supported: {', '.join(METHODS)}; or use the checkpoint it was made from"
        raise UserError(f"quant_method {method!r} is not supported", where=str(where), fix=fix)
    out = Dequantized(weights)
    try:
        METHODS[method](out, config)
    except KeyError as error:
        raise UserError(f"quantized by {method}, but {error.args[0]!r} is missing", where=str(where)) from None
    return out


def _fp8(out: Dequantized, config: dict) -> None:
    """DeepSeek's layout: float8 [out, in], and a scale for each block of rows and columns, or one for the whole."""
    block = config.get("weight_block_size")
    for key in [key for key in out.raw.files if key.endswith("weight_scale_inv")]:
        name = key.removesuffix("_scale_inv")

        def make(name: str = name, key: str = key) -> Tensor:
            return from_fp8(out.raw.read(name), out.raw.read(key), block)

        unused = [f"{name.removesuffix('weight')}{other}" for other in ("activation_scale", "input_scale")]
        out.replace(name, out.raw.shapes[name], [name, key, *unused], make)


def from_fp8(weight: Tensor, scale: Tensor, block: list[int] | None) -> Tensor:
    """weight [..., out, in] float8; scale [..., out / block, in / block], or anything that broadcasts."""
    wide, scale = weight.float(), scale.float()
    if block is not None and scale.ndim >= 2:
        rows, columns = block
        scale = scale.repeat_interleave(rows, -2).repeat_interleave(columns, -1)
        scale = scale[..., : wide.shape[-2], : wide.shape[-1]]
    elif scale.ndim == wide.ndim - 1 > 0:
        scale = scale[..., None]
    return wide * scale


def _mxfp4(out: Dequantized, config: dict) -> None:
    for key in [key for key in out.raw.files if key.endswith("_blocks")]:
        name = key.removesuffix("_blocks")
        experts, rows, groups, half = out.raw.shapes[key]

        def make(name: str = name) -> Tensor:
            return from_mxfp4(out.raw.read(f"{name}_blocks"), out.raw.read(f"{name}_scales")).mT

        out.replace(name, (experts, groups * half * 2, rows), [key, f"{name}_scales"], make)


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks uint8 [..., groups, 16], two FP4 values a byte, the low half first; scales uint8 [..., groups], exponents
    with bias 127. Returns [..., groups * 32]. (OCP Microscaling Formats 1.0)"""
    values = torch.tensor(FP4)[torch.stack((blocks & 15, blocks >> 4), -1).long()].flatten(-2)
    return torch.ldexp(values, scales[..., None].int() - 127).flatten(-2)


def _bitsandbytes(out: Dequantized, config: dict) -> None:
    for key in [key for key in out.raw.files if ".quant_state.bitsandbytes__" in key]:
        name = key.partition(".quant_state.")[0]
        state = json.loads(bytes(out.raw.read(key).tolist()))
        others = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
        parts = [name, key, *(f"{name}.{part}" for part in others)]

        def make(name: str = name, state: dict = state) -> Tensor:
            absmax = out.raw.read(f"{name}.absmax")
            if "nested_offset" in state:
                levels, scales = out.raw.read(f"{name}.nested_quant_map"), out.raw.read(f"{name}.nested_absmax")
                scales = scales.repeat_interleave(state["nested_blocksize"])[: absmax.numel()]
                absmax = levels[absmax.long()] * scales + state["nested_offset"]
            levels = out.raw.read(f"{name}.quant_map")
            return from_blocks_of_4bit(out.raw.read(name), levels, absmax, state["blocksize"], state["shape"])

        out.replace(name, tuple(state["shape"]), parts, make)
    for key in [key for key in out.raw.files if key.endswith(".SCB")]:
        name = key.removesuffix("SCB") + "weight"

        def whole(name: str = name, key: str = key) -> Tensor:
            return out.raw.read(name).float() * (out.raw.read(key).float() / 127)[:, None]

        out.replace(name, out.raw.shapes[name], [name, key, f"{name}_format"], whole)


def from_blocks_of_4bit(packed: Tensor, levels: Tensor, absmax: Tensor, block: int, shape: list[int]) -> Tensor:
    """packed uint8, two codes a byte, the high half first; levels [16]; absmax [blocks] over flattened weights."""
    codes = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), -1).flatten().long()
    values = levels.float()[codes]
    scale = absmax.float().repeat_interleave(block)[: values.numel()]
    return (values * scale).view(shape)


def _awq(out: Dequantized, config: dict) -> None:
    for name, parts in _packed(out, ("qweight", "qzeros", "scales")):
        inputs, packed = out.raw.shapes[parts[0]]

        def make(parts: list[str] = parts) -> Tensor:
            return from_awq(*(out.raw.read(part) for part in parts))

        out.replace(name, (packed * 8, inputs), parts, make)


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales [groups, out]. Returns [out, in]."""
    order = torch.tensor((0, 4, 1, 5, 2, 6, 3, 7))  # where the value of each output lies in its int32
    codes, zeros = (unpack(t, 4)[..., order].flatten(-2) for t in (qweight, qzeros))
    group = len(codes) // len(scales)
    zeros, scales = (t.repeat_interleave(group, 0) for t in (zeros, scales.float()))
    return ((codes - zeros) * scales).T


def _gptq(out: Dequantized, config: dict) -> None:
    bits = config.get("bits", 4)
    if bits not in (2, 4, 8):
        raise UserError(f"GPTQ with {bits} bits is not supported", fix="supported: 2, 4, 8")
    offset = 0 if config.get("checkpoint_format") == "gptq_v2" else 1  # the first version stores zero points less one
    for name, parts in _packed(out, ("qweight", "qzeros", "scales", "g_idx")):
        packed, outputs = out.raw.shapes[parts[0]]
        inputs = packed * 32 // bits

        def make(parts: list[str] = parts) -> Tensor:
            return from_gptq(*(out.raw.read(part) for part in parts), bits=bits, offset=offset)

        out.replace(name, (outputs, inputs), parts, make)


def from_gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, *, bits: int, offset: int) -> Tensor:
    """qweight int32 [in * bits / 32, out], qzeros int32 [groups, out * bits / 32], scales [groups, out], g_idx [in],
    the group of each input. Returns [out, in]."""
    codes = unpack(qweight.T, bits).flatten(-2)  # [out, in]
    zeros = unpack(qzeros, bits).flatten(-2) + offset
    group = g_idx.long()
    return (codes - zeros[group].T) * scales.float()[group].T


def _compressed(out: Dequantized, config: dict) -> None:
    """compressed-tensors: `weight_packed` (int32, the first value in the lowest bits, above zero by an offset) or
    `weight` (int8, float8), and a scale a tensor, a row or a group of inputs."""
    groups = list(config.get("config_groups", {}).values())
    forms = {group.get("format") or config.get("format") for group in groups}
    weights = [group["weights"] for group in groups]
    known = ("pack-quantized", "int-quantized", "float-quantized")
    wrong = [str(form) for form in forms if form not in known]
    wrong += ["zero points" for w in weights if not w.get("symmetric", True)]
    wrong += ["reordered inputs" for w in weights if w.get("actorder")]
    wrong += [f"{w['strategy']}s" for w in weights if w["strategy"] not in ("tensor", "channel", "group")]
    if wrong or not groups:
        raise UserError(f"compressed-tensors with {', '.join(wrong) or 'no groups'} is not supported")
    bits = weights[0]["num_bits"]
    for key in [key for key in out.raw.files if key.endswith(".weight_scale")]:
        name = key.removesuffix("_scale")
        parts = [part for part in (f"{name}_packed", name) if part in out.raw.files]

        def make(name: str = name, key: str = key, parts: list[str] = parts) -> Tensor:
            codes = out.raw.read(parts[0])
            if parts[0] != name:
                codes = (unpack(codes, bits).flatten(1) - 2 ** (bits - 1))[:, : out.raw.read(f"{name}_shape")[1]]
            return from_groups(codes, out.raw.read(key))

        shape = out.raw.shapes[parts[0]]
        if parts[0] != name:
            shape = tuple(out.raw.read(f"{name}_shape").tolist())
        out.replace(name, shape, [*parts, key, f"{name}_shape", f"{name}_g_idx"], make)


def from_groups(codes: Tensor, scales: Tensor) -> Tensor:
    """codes [out, in], scales [out, groups], [out, 1] or [1]. Returns [out, in]."""
    scales = scales.float().view(len(scales), -1)
    return (codes.float().unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Fields of `bits` bits of an int32 [...], the lowest first: [..., 32 / bits]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (packed[..., None] >> shifts) & (2**bits - 1)


def _packed(out: Dequantized, parts: tuple[str, ...]) -> list[tuple[str, list[str]]]:
    """(name of the plain weight, its tensors) of every layer that has a `qweight`."""
    layers = [key.removesuffix("qweight") for key in out.raw.files if key.endswith(".qweight")]
    return [(f"{layer}weight", [f"{layer}{part}" for part in parts]) for layer in layers]


METHODS: dict[str, Callable[[Dequantized, dict], None]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "bitsandbytes": _bitsandbytes,
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed,
}
