"""Fields, order and defaults of `vllm.lora.request.LoRARequest`, version 0.32.0."""

from dataclasses import dataclass


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False
    is_3d_lora_weight: bool = False

    def __post_init__(self):
        assert self.lora_int_id >= 1 and self.lora_path
