"""vLLM 0.32.0 without its package: names, signatures and rules of what is used of it, over our reference engine.

It keeps what vLLM keeps: weights of an adapter by its id, keys and values by its name. What it is called with goes to
the file that the environment names in STAND_IN_CALLS.
"""

import json
import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TypedDict

import torch

from ftlib.adapters import peft_format
from ftlib.generation import ReferenceEngine
from ftlib.generation import SamplingParams as Ours
from ftlib.models import from_pretrained

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def told(call, /, **given):
    if "STAND_IN_CALLS" in os.environ:
        with open(os.environ["STAND_IN_CALLS"], "a") as file:
            file.write(json.dumps({"call": call, **given}, default=str) + "\n")


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


@dataclass(kw_only=True)
class SamplingParams:
    """The fields that text as input does not need."""

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    flat_logprobs: bool = False
    detokenize: bool = True

    def __post_init__(self):
        assert self.temperature == 0 or (0.01 <= self.temperature <= 2 and self.n >= 1 and self.max_tokens >= 1)
        assert self.seed is not None and 0 <= self.seed < 2**63
        assert all(isinstance(token, int) for token in self.stop_token_ids)

    def ours(self, keys):
        """The same for our engines, with draws from `keys`."""
        kind = type("Keyed", (Ours,), {"key": lambda self, number: keys[number]})
        cut = (self.temperature, self.top_p, self.top_k, self.min_p)
        return kind(self.max_tokens, *cut, frozenset(self.stop_token_ids), logprobs=True)


class Logprob(SimpleNamespace):
    """`logprob`, and more that is not used."""


class LLMEngine:
    def __init__(self, llm):
        self.llm, self.held = llm, {}

    def add_lora(self, lora_request):
        assert self.llm.enable_lora and not self.llm.asleep
        if lora_request.lora_int_id not in self.held:  # else it is loaded, and not read again
            self.held = {lora_request.lora_int_id: self.llm.read(lora_request.lora_path)}  # max_loras = 1
        told("add_lora", id=lora_request.lora_int_id, name=lora_request.lora_name)
        return True

    def remove_lora(self, lora_id):
        told("remove_lora", id=lora_id)
        return self.held.pop(lora_id, None) is not None


class LLM:
    def __init__(
        self, model, *, tokenizer=None, skip_tokenizer_init=False, trust_remote_code=False, tensor_parallel_size=1,
        dtype="auto", quantization=None, revision=None, seed=0, gpu_memory_utilization=0.92, enforce_eager=False,
        enable_lora=False, max_loras=1, max_lora_rank=16, max_cpu_loras=None, lora_dtype="auto", max_model_len=None,
        max_num_seqs=None, enable_sleep_mode=False, logprobs_mode="raw_logprobs", generation_config="auto",
        enable_prefix_caching=None, disable_log_stats=True,
    ):  # fmt: skip
        told("LLM", **{key: value for key, value in locals().items() if key != "self"})
        assert max_lora_rank in (1, 8, 16, 32, 64, 128, 256, 320, 512) and 0 < gpu_memory_utilization <= 1
        assert not enable_lora or dtype != "float32" or "STAND_IN_FP32" in os.environ, "no kernels for it"
        assert logprobs_mode in ("raw_logprobs", "processed_logprobs") and skip_tokenizer_init
        self.folder, self.dtype, self.rank = model, DTYPES[dtype], max_lora_rank
        self.enable_lora, self.sleeps, self.mode, self.longest = (
            enable_lora, enable_sleep_mode, logprobs_mode, max_model_len
        )  # fmt: skip
        self.asleep, self.names = False, {}
        self.base, self.llm_engine = from_pretrained(model, dtype=self.dtype), LLMEngine(self)

    def read(self, folder):
        """The base under the adapter in a folder."""
        made = from_pretrained(self.folder, dtype=self.dtype)
        peft_format.load(made, folder)
        config = peft_format.read_config(peft_format.Path(folder))
        assert max([config["r"], *config["rank_pattern"].values()]) <= self.rank
        return made.eval()

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        assert method == "reload_weights" and not args and set(kwargs) == {"weights_path"} and not self.asleep
        told(method)
        self.fresh, self.base = False, from_pretrained(kwargs["weights_path"], dtype=self.dtype)
        return [None]

    def reset_prefix_cache(self, reset_running_requests=False, reset_connector=False):
        self.fresh = True
        return True

    def sleep(self, level=1, mode="abort"):
        assert self.sleeps and not self.asleep and level == 1
        self.asleep = True
        told("sleep")

    def wake_up(self, tags=None):
        assert self.asleep and tags is None
        self.asleep = False
        told("wake_up")
        return True

    def generate(
        self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None, priority=None,
        tokenization_kwargs=None, mm_processor_kwargs=None,
    ):  # fmt: skip
        assert not self.asleep and len(prompts) == len(sampling_params) and not use_tqdm
        assert all(params.ignore_eos and not params.detokenize and params.n == 1 for params in sampling_params)
        told("generate", requests=len(prompts), lora=lora_request and lora_request.lora_int_id)
        if lora_request is None:
            model = self.base
            assert getattr(self, "fresh", True), "keys and values of older weights"
        else:
            model = self.llm_engine.held[lora_request.lora_int_id]
            kept = self.names.setdefault(lora_request.lora_name, model)
            assert kept is model, "keys and values of another adapter of this name"
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        assert all(len(prompt) < self.longest for prompt in ids)
        keys = [(params.seed >> 32, params.seed & 0xFFFFFFFF) for params in sampling_params]
        assert len(set(keys)) == len(keys), "two requests with the same draws"
        drawn = ReferenceEngine(model).generate(ids, sampling_params[0].ours(keys))
        pairs = zip(ids, drawn, sampling_params, strict=True)
        return [SimpleNamespace(outputs=[self._output(model, prompt, done, p)]) for prompt, (done,), p in pairs]

    @torch.no_grad()
    def _output(self, model, prompt, done, params):
        """A CompletionOutput; vLLM's lengths are cut at max_model_len."""
        kept = done.token_ids[: self.longest - len(prompt)]
        scores = done.logprobs[: len(kept)]
        if self.mode == "raw_logprobs":
            rows = model.logits(torch.tensor([[*prompt, *kept]]))[0, len(prompt) - 1 : -1].log_softmax(-1)
            scores = rows[torch.arange(len(kept)), torch.tensor(kept)].tolist()
        finish = done.finish_reason if len(kept) == len(done.token_ids) else "length"
        logprobs = None
        if params.logprobs is not None:
            logprobs = [{token: Logprob(logprob=score)} for token, score in zip(kept, scores, strict=True)]
        return SimpleNamespace(token_ids=kept, logprobs=logprobs, finish_reason=finish)
