"""What a GPU can do, as its compute capability tells."""

import torch

BF16 = (8, 0)  # Ampere: the first with bf16 and FlashAttention-2; a T4 has 7.5, a V100 7.0
FP8 = (8, 9)  # Ada: the first with 8-bit floats


def without_bf16(device: torch.device | int) -> str | None:
    """The compute capability of a GPU that has no bf16, which is emulated there; None of others and without a GPU."""
    on_gpu = isinstance(device, int) or device.type == "cuda"
    if not on_gpu or not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_capability(device)
    return None if found >= BF16 else ".".join(map(str, found))


def bf16_note(capability: str) -> str:
    """What such a GPU means for a run, and what to do."""
    return (
        f"a GPU of compute capability {capability} has no bf16 (8.0, Ampere, is the first): it is emulated, slowly, "
        "torch.compile does not take it, and attention is sdpa; set dtype=fp32, or at least memory.compile=false"
    )
