"""Which quantized layers keep the matrix that backward makes anew (`QuantizedLinear.recomputed`), by memory.recompute.

Fault that was planted and went unseen: all of them do, whatever the setting, and between forward and backward the whole
base lies there unpacked.
"""

import pytest
import torch

from ftlib import models
from ftlib.parallel import recompute
from ftlib.quant import QuantizedLinear, hold
from ftlib.sections import Memory


@pytest.mark.parametrize(
    ("setting", "again"), [("none", False), ("selective", False), ("except_attention", True), ("full", True)]
)
def test_only_blocks_that_are_computed_again_keep_the_matrix(setting, again):
    model = models.from_pretrained("ftlib:demo/model")
    assert hold(model, "int8") == 28
    for memory in (Memory(recompute="none" if again else "full"), Memory(recompute=setting)):  # from another one too
        recompute.use(model, memory, torch.device("cpu"))
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert [layer.recomputed for layer in layers] == [again] * 28
    if setting != "except_attention":
        recomputed = [block.recompute for block in model.model.layers]
        assert recomputed == [again or (setting == "selective" and i % 2 == 0) for i in range(len(recomputed))]
