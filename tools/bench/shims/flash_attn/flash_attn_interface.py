"""Where flash-attn keeps its functions; `flash_attn_gpu`, its compiled half, is only looked for."""

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

flash_attn_gpu = flash_attn_varlen_func
__all__ = ["flash_attn_func", "flash_attn_gpu", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
