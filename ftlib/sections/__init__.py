"""Every shared section of a recipe's config: the one reference for what a key means (`tune help config`)."""

from ftlib.sections.data import Batch, Data, Source
from ftlib.sections.diffusion import Diffusion
from ftlib.sections.distill import Distill
from ftlib.sections.dpo import Dpo
from ftlib.sections.lora import Lora, Relora
from ftlib.sections.loss import Loss, Mtp
from ftlib.sections.model import Model, Tokenizer
from ftlib.sections.optim import Optim, Schedule
from ftlib.sections.quant import Qat, Rounding
from ftlib.sections.reward import Reward
from ftlib.sections.run import Checkpoint, Eval, Log, Memory, Parallel
from ftlib.sections.sizes import Context, Init, Sizes
from ftlib.sections.stream import Stream
from ftlib.sections.texts import Texts
from ftlib.sections.train import Lisa, Train

__all__ = [
    "Batch", "Checkpoint", "Context", "Data", "Diffusion", "Distill", "Dpo", "Eval", "Init", "Lisa", "Log", "Lora",
    "Loss", "Memory", "Model", "Mtp", "Optim", "Parallel", "Qat", "Relora", "Reward", "Rounding", "Schedule", "Sizes",
    "Source", "Stream", "Texts", "Tokenizer", "Train",
]
