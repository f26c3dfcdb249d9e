"""Prompts -> completions, in one turn or several, as token ids with the log-probabilities they were drawn with."""

from collections.abc import Sequence

from ftlib.data.prompts import Prompt
from ftlib.generation import Engine, SamplingParams
from ftlib.generation.remote import RemoteEngine
from ftlib.generation.vllm import VllmEngine
from ftlib.rl.environments import Dialogues
from ftlib.rl.samples import Sample
from ftlib.sections.rl import Rollout
from ftlib.tokenizers import Tokenizer

TURNS, ROUNDS, RANKS = 64, 64, 1 << 16  # room for each in a seed
Place = tuple[int, int, int, int]  # (seed, step, round, rank)


class Rollouts:
    """`rollouts(prompts, n, place)` -> `n` samples of each prompt, those of one prompt side by side.

    `place` = (seed, step, round, rank) makes the draws: the same place gives the same completions, and no two places
    share draws. Sampling is from the whole distribution at the temperature; `greedy` is for evaluation.
    """

    age = 0  # updates between the weights that drew and those that learn

    def __init__(
        self, cfg: Rollout, engine: Engine | RemoteEngine | VllmEngine, tokenizer: Tokenizer, dialogues: Dialogues
    ) -> None:
        self.cfg, self.engine, self.tokenizer, self.dialogues = cfg, engine, tokenizer, dialogues

    def __call__(self, prompts: Sequence[Prompt], n: int, place: Place, greedy: bool = False) -> list[Sample]:
        """Groups are numbered from 0 in the order of `prompts`."""
        seed, step, number, rank = place
        seed = ((seed * 1_000_003 + step) * ROUNDS + number) * RANKS + rank
        samples = [Sample(prompt, group) for group, prompt in enumerate(prompts) for _ in range(n)]
        params = self._params(self.cfg.max_new_tokens, seed * TURNS, greedy)
        drawn = self.engine.generate([prompt.ids for prompt in prompts], params, n)
        for sample, done in zip(samples, (one for group in drawn for one in group), strict=True):
            sample.append(done.token_ids, done.logprobs)
            self._said(sample, done.token_ids, done.finish_reason)
        if self.dialogues.any:
            self._go_on(samples, seed * TURNS, greedy)
        return samples

    def begin(self, prompts: Sequence[Prompt], n: int, place: Place) -> None:
        """Nothing: what is asked is drawn when it is needed (`ftlib.rl.ahead` draws before)."""

    def settle(self) -> None:
        """Nothing is on its way."""

    def __enter__(self) -> "Rollouts":
        return self

    def __exit__(self, *ended: object) -> None:
        """End the process that draws, where it is not this one."""
        self.engine.close()

    def _go_on(self, samples: list[Sample], seed: int, greedy: bool) -> None:
        """Further turns of those that something answers."""
        for turn in range(1, self.dialogues.cfg.max_turns):
            going = [sample for sample in samples if sample.finish == "stop" and self._answered(sample)]
            if not going:
                return
            left = [self.cfg.max_new_tokens - len(sample.ids) for sample in going]
            prompts = [[*sample.prompt.ids, *sample.ids] for sample in going]
            drawn = self.engine.generate(prompts, self._params(max(left), seed + turn, greedy), 1)
            for sample, (done,), room in zip(going, drawn, left, strict=True):
                kept = done.token_ids[:room]
                sample.append(kept, done.logprobs[:room])
                self._said(sample, kept, done.finish_reason if len(kept) == len(done.token_ids) else "length")

    def _answered(self, sample: Sample) -> bool:
        """Let something answer the last turn; whether the model is to go on."""
        said, failed = self.dialogues.answer(sample)
        sample.calls += said is not None
        sample.failed_calls += failed
        if not said:
            sample.finish = "end"
            return False
        tail = self.dialogues.tail(self.tokenizer, sample, said)
        if len(sample.ids) + len(tail) >= self.cfg.max_new_tokens:
            sample.finish = "length"
            return False
        sample.messages += said
        sample.append(tail, None)
        return True

    def _said(self, sample: Sample, ids: list[int], finish: str) -> None:
        sample.finish = finish
        body = ids[:-1] if finish == "stop" else ids
        sample.messages.append({"role": "assistant", "content": self.tokenizer.decode(body)})

    def _params(self, room: int, seed: int, greedy: bool) -> SamplingParams:
        temperature = 0.0 if greedy else self.cfg.temperature
        return SamplingParams(room, temperature, stop_ids=self.tokenizer.stop_ids, seed=seed)
