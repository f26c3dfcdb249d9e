"""Experimental: completions drawn by vLLM, an optional package (`pip install 'ftlib[vllm]'`), in a process of its own.

Names, types and defaults were read in the sources of vLLM 0.32.0, which wants torch 2.13.0. That process alone imports
it, for it changes the environment, generators and threads of the one it is in. What it cannot serve: ftlib.rl.by_vllm.
"""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ftlib.adapters import lora, peft_format
from ftlib.errors import UserError, about
from ftlib.generation.params import Completion, SamplingParams
from ftlib.generation.process import Worker, passing, serve
from ftlib.models import LanguageModel, save_pretrained
from ftlib.sections.rl import Rollout

VERSION = "0.32."  # what an installed one must begin with; `vllm` in pyproject.toml says the same
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what max_lora_rank may be
ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its core in that process, not in one more that nobody would end
    "VLLM_NO_USAGE_STATS": "1",  # no word to its makers
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    "TORCHELASTIC_USE_AGENT_STORE": "False",  # its process group is its own, whatever launched this run
}


class VllmEngine:
    """`generate`, `refresh` and `release` as `Engine` has them; the base is read from the folder `model` was read from.

    `longest`: most tokens of prompt and completion together, where vLLM cuts; `dtype`: as a recipe's config names it.
    An adapter is handed over in PEFT's format and drawn with live, rounded to `dtype`. Without one, all weights are
    handed over, in the folder layout that vLLM began with. Both pass through memory where there is room.
    """

    def __init__(self, model: LanguageModel, cfg: Rollout, longest: int, dtype: str) -> None:
        self.model, self.sleeps, self.asleep, self.stale = model, cfg.vllm_sleep, False, True
        self.adapted = any(True for _ in lora.adapted(model))
        # Log-probabilities: a trainer computes those of all tokens at the temperature. vLLM's raw ones are at
        # temperature 1; its processed ones at the temperature, of the tokens that top_k, top_p and min_p leave, which
        # are all in a rollout (`generate` refuses others). So the look at the first step and algorithm.correction mean
        # what they mean with our engine; what is left to them is two programs' rounding, in bf16 that of adapters too.
        options = {
            "model": str(model.source),
            "skip_tokenizer_init": True,  # token ids go in and come out
            "generation_config": "vllm",  # none of the folder's own settings
            "dtype": DTYPES[dtype],
            "max_model_len": longest,
            "max_num_seqs": cfg.max_batch,
            "gpu_memory_utilization": cfg.vllm_memory,
            "enable_sleep_mode": cfg.vllm_sleep,
            "logprobs_mode": "processed_logprobs",
        }
        if self.adapted:
            options |= {"enable_lora": True, "max_lora_rank": self._rank()}
        torch.cuda.empty_cache()  # vLLM takes its share of what is free
        with about("rollout.engine"):
            self.worker = Worker("ftlib.generation.vllm", options, env=ENV)

    def generate(self, prompts: list[list[int]], params: SamplingParams, n: int = 1) -> list[list[Completion]]:
        """`n` completions of each prompt; the draws of completion `copy` of prompt `i` depend on (seed, i * n + copy),
        and on vLLM's arithmetic, which changes a little with what else is in the batch."""
        if any(not prompt for prompt in prompts):
            raise UserError("an empty prompt has no last token to continue from", fix="start it with the BOS token")
        if params.truncates and params.logprobs:
            what = "vLLM's log-probabilities would be of the tokens that top_k, top_p and min_p leave, not of all"
            raise UserError(what, where="sampling", fix="leave them out, or set logprobs=False")
        if self.asleep:
            torch.cuda.empty_cache()
            self.worker.call("wake")
            self.asleep = False
        if self.stale:
            with passing(self._size()) as folder:
                self._write(folder)
                self.worker.call("load", folder)
            self.stale = False
        done = self.worker.call("generate", prompts, params, n)
        return [done[i * n : (i + 1) * n] for i in range(len(prompts))]

    def refresh(self) -> None:
        """The trainer changed weights: the next draws are with those of then."""
        self.stale = True

    def release(self) -> None:
        """Give memory back if the config asks for it (level 1: weights wait in host memory). What is drawn next is with
        the weights of then: the last may have been averages for an evaluation."""
        self.stale = True
        if self.sleeps and not self.asleep:
            self.worker.call("sleep")
            self.asleep = True

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self.worker.close()

    def _size(self) -> int:
        """Bytes that are handed over; an adapter that began inside of the weights is written with twice the rank."""
        if not self.adapted:
            return sum(p.nbytes for p in self.model.parameters())
        return 2 * sum(p.nbytes for p in self.model.parameters() if p.requires_grad)

    def _write(self, folder: str) -> None:
        if self.adapted:
            peft_format.save(self.model, folder, base=str(self.model.source))
        else:
            save_pretrained(self.model, folder)

    def _rank(self) -> int:
        """The smallest rank that vLLM keeps room for and that the adapter fits, as it is written."""
        with passing(self._size()) as folder:
            self._write(folder)
            config = peft_format.read_config(Path(folder))
        rank = max([config["r"], *config["rank_pattern"].values()])
        if rank > RANKS[-1]:
            what = f"vLLM takes adapters up to rank {RANKS[-1]}, and this one is written with {rank}"
            raise UserError(what, where="lora.rank, lora.rank_pattern", fix="lower it, or set rollout.engine=native")
        return next(room for room in RANKS if room >= rank)


def start(options: dict[str, Any]) -> Mapping[str, Callable[..., Any]]:
    """The other end: vLLM's offline engine, and what it answers."""
    import vllm
    from vllm.lora.request import LoRARequest

    llm, request = vllm.LLM(**options), None

    def load(folder: str) -> None:
        nonlocal request
        if not options.get("enable_lora"):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
            llm.reset_prefix_cache()
            return
        number = 1  # a new id and a new name each time: vLLM keeps weights by the one, keys and values by the other
        if request is not None:
            number = request.lora_int_id + 1
            llm.llm_engine.remove_lora(request.lora_int_id)
        request = LoRARequest(lora_name=f"policy-{number}", lora_int_id=number, lora_path=folder)
        if not llm.llm_engine.add_lora(request):  # read now: the folder goes away
            raise RuntimeError("vLLM did not take the adapter")

    def generate(prompts: list[list[int]], params: SamplingParams, n: int) -> list[Completion]:
        asked = [vllm.TokensPrompt(prompt_token_ids=prompt) for prompt in prompts for _ in range(n)]
        given = [vllm.SamplingParams(**sampling(params, number)) for number in range(len(asked))]
        outputs = llm.generate(asked, given, use_tqdm=False, lora_request=request)
        return [_completion(output.outputs[0], params) for output in outputs]

    return {"load": load, "generate": generate, "sleep": lambda: llm.sleep(level=1), "wake": llm.wake_up}


def sampling(params: SamplingParams, number: int) -> dict[str, Any]:
    """vLLM's parameters for completion `number`. Each is a request of its own: `n` of one request would have seeds in a
    row, the same for every prompt."""
    first, second = params.key(number)
    return {
        "n": 1,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "seed": (first << 32 | second) & (2**63 - 1),
        "stop_token_ids": sorted(params.stop_ids),
        "ignore_eos": True,  # stop_token_ids are all that stop
        "max_tokens": params.max_new_tokens,
        "logprobs": 0 if params.logprobs else None,  # 0: of the drawn token alone
        "detokenize": False,
    }


def _completion(output: Any, params: SamplingParams) -> Completion:
    """A vllm.outputs.CompletionOutput as ours; what stopped it is among its tokens."""
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a completion with {output.finish_reason!r}")
    ids = list(output.token_ids)
    scores = [at[token].logprob for token, at in zip(ids, output.logprobs, strict=True)] if params.logprobs else []
    return Completion(ids, scores, output.finish_reason)


if __name__ == "__main__":
    serve(sys.argv[1], start)
