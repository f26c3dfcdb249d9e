"""Faults that were planted in attention and went unseen where no GPU is: a window of the packed kernel that is one too
wide, one that rows of a whole document each do not have, and FlashAttention-4 where it was not measured."""

import pytest
import torch
from unit.test_attention_backends import flash_backward, flash_forward, operands

from ftlib.kernels import varlen_attention as varlen
from ftlib.layers import attention
from ftlib.layers.attention import attend, choose_backend
from ftlib.layers.batch import Layout

ENDS = {"packed": [0, 9, 16, 20, 32, 32], "dense": [0, 16, 32]}


@pytest.mark.parametrize("window", [1, 2, 5])
def test_the_kernel_is_told_what_a_query_sees(window):
    """FlashAttention's query i looks at keys i - left to i + right."""
    told = varlen._window(window)
    left, right = told["window_size_left"], told["window_size_right"]
    assert [key for key in range(20) if 10 - left <= key <= 10 + right] == list(range(11 - window, 11))
    assert varlen._window(0) == {}


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("ends", ENDS)
def test_a_window_without_sinks(monkeypatch, ends, window):
    """One query and head at a time, in float64."""
    monkeypatch.setattr(varlen, "_forward", flash_forward)
    monkeypatch.setattr(varlen, "_backward", flash_backward)
    q, k, v, _ = (t.detach() for t in operands())
    layout = Layout.packed(torch.tensor(ENDS[ends], dtype=torch.int32), 16, (2, 16))
    layout.prepare("varlen", {window})
    found = attend(q, k, v, layout, backend="varlen", window=window)
    for at in range(32):
        start = max(end for end in ENDS[ends] if end <= at)
        first = start if window is None else max(start, at - window + 1)
        keys, values = (t.flatten(0, 1)[first : at + 1] for t in (k, v))
        for head in range(4):
            weights = (keys[:, head // 2] @ q.flatten(0, 1)[at, head] / 8**0.5).softmax(0)
            wanted = weights @ values[:, head // 2]
            torch.testing.assert_close(found.flatten(0, 1)[at, head], wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("capability", "dtype", "dims", "softcap", "chosen"),
    [
        ((9, 0), torch.bfloat16, {64, 128}, False, "flash4"),
        ((9, 0), torch.float16, {64, 128}, False, "varlen"),
        ((9, 0), torch.bfloat16, {96}, False, "varlen"),
        ((10, 0), torch.bfloat16, {128}, False, "varlen"),
        ((9, 0), torch.bfloat16, {128}, True, "flash4"),
        ((9, 0), torch.float16, {128}, True, "flex"),
        ((9, 0), torch.float32, {128}, False, "sdpa"),
    ],
)
def test_flash4_is_chosen_where_it_was_measured(capability, dtype, dims, softcap, chosen, monkeypatch):
    """On machines that could run it anyway."""
    monkeypatch.setattr(attention, "flash4_refusal", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert choose_backend("auto", torch.device("cuda"), dtype, softcap=softcap, head_dims=dims) == chosen
