"""The engine: requests join and leave a running batch; keys and values lie in pages (Kwon et al. 2023, 2309.06180)."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from ftlib.errors import UserError
from ftlib.generation.gathered import Gathered
from ftlib.generation.merged import Merged
from ftlib.generation.pages import PAGE, Pool, PromptLayout, pages_of
from ftlib.generation.params import Completion, SamplingParams
from ftlib.generation.requests import Prefix, Request
from ftlib.generation.rows import Rows
from ftlib.generation.steps import Graphs, eager, graphs_serve, sharded, switched, uncompiled
from ftlib.layers.batch import Batch
from ftlib.models import LanguageModel

PREFILL_TOKENS = 8192  # of prompts, padding included, in one forward


def token_bytes(model: LanguageModel) -> int:
    """Memory of one token's keys and values."""
    mixers = [layer.mixer for layer in model.arch.layers]
    return sum(2 * mixer.kv_heads * mixer.head_dim for mixer in mixers) * model.lm_head.weight.element_size()


def token_room(model: LanguageModel, wanted: int) -> int:
    """How many tokens of keys and values a server should hold: `wanted`, or what 4/5 of a GPU's free memory takes, or
    2 GiB on a CPU."""
    device = model.lm_head.weight.device
    room = free_memory(device) * 4 // 5 if device.type == "cuda" else 2 << 30
    return max(2 * PAGE, min(wanted, room // token_bytes(model)))


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that could be taken, what torch holds in reserve included."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


class Engine:
    """Draws completions with the given model's own weights, adapters as they are switched.

    At most `max_batch` requests run at once, over a pool of keys and values of `max_tokens`; None: what the requests at
    hand may need, and on a GPU no more than half of its free memory. A request that finds no page any more is put off,
    and its tokens are computed again later. `compile`: where they serve, decode steps are replayed as CUDA graphs
    ("graphs"), of blocks that are compiled first ("auto": a wait of its own, for long runs), or nothing is ("off").
    `adapter`: "merged" draws from a side copy of the weights under adapter `policy`, with it folded in, brought up to
    date by `refresh`: fewer products a step, memory for the copy, and switching adapters has no effect. "gathered": the
    same of a model that processes share, all of it in each, so that each draws for itself; making and `refresh` are
    collective.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_batch: int = 256,
        max_tokens: int | None = None,
        compile: Literal["auto", "graphs", "off"] = "auto",
        adapter: Literal["live", "merged", "gathered"] = "live",
    ) -> None:
        copies = {"live": None, "merged": Merged, "gathered": Gathered}
        self.merged = copies[adapter] and copies[adapter](model)
        self.model = model if self.merged is None else self.merged.model
        self.max_batch, self.max_tokens, self.compile = max_batch, max_tokens, compile
        self.pool: Pool | None = None
        self.graphs: Graphs | None = None
        self.replays = False  # whether steps are replays of graphs
        self.waiting: deque[Request] = deque()
        self.live: list[Request] = []
        self.preempted = 0  # how often a request had to be put off
        self.chunk = 8 if self.device.type == "cuda" else 1  # steps between two looks at what was drawn

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @property
    def longest(self) -> int | None:
        """Most tokens of prompt and completion together that fit; None: nothing says."""
        return None if self.max_tokens is None else (self.max_tokens // PAGE - 1) * PAGE

    @property
    def busy(self) -> bool:
        """Whether any request is not done."""
        return bool(self.waiting or self.live)

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        n: int = 1,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[Completion]]:
        """`n` completions of each prompt (token ids); the draws of one depend on (seed, its number) alone.

        Completion `copy` of prompt `i` is number i * n + copy. `on_token(number, token)` hears of each token.
        """
        requests: list[Request] = []
        hear = (lambda request, token: on_token(numbers[request], token)) if on_token else None
        for i, prompt in enumerate(prompts):
            requests += self.submit(prompt, params, n, first=i * n, on_token=hear)
        numbers = {request: number for number, request in enumerate(requests)}
        try:
            with self._evaluating():
                while self.busy:
                    self._step()
        except BaseException:  # Ctrl-C may come anywhere
            self.clear()
            raise
        done = [request.completion for request in requests]
        return [done[i * n : (i + 1) * n] for i in range(len(prompts))]

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        n: int = 1,
        first: int = 0,
        on_token: Callable[[Request, int], None] | None = None,
    ) -> list[Request]:
        """Queue `n` completions of a prompt, numbers `first` and on for their draws. `step` works on them."""
        if not prompt:
            raise UserError("an empty prompt has no last token to continue from", fix="start it with the BOS token")
        prefix = Prefix(list(prompt), n)
        queued = [Request(prefix.ids, params, params.key(first + copy), prefix, on_token) for copy in range(n)]
        if self.longest is not None and len(prompt) + params.max_new_tokens > self.longest:
            raise UserError(
                f"{len(prompt)} prompt tokens and {params.max_new_tokens} new ones do not fit {self.max_tokens} tokens "
                "of keys and values",
                fix="fewer new tokens, or more memory for the engine",
            )
        self.waiting += queued
        return queued

    def abort(self, request: Request) -> None:
        """Forget a request, wherever it is; nothing happens if it is done."""
        if request in self.waiting:
            self.waiting.remove(request)
            self._leave(request.prefix)
        elif request in self.live:
            self.live.remove(request)
            self.pool.drop(request.pages)

    def step(self) -> None:
        """Let waiting requests in, and draw the next tokens of all that run."""
        with self._evaluating():
            self._step()

    def clear(self) -> None:
        """Forget every request, in whatever state an error left it."""
        self.waiting.clear()
        self.live.clear()
        self.pool = self.graphs = None

    def release(self) -> None:
        """Give the memory of keys and values back; the next step takes it again. Nothing may be running."""
        if self.busy:
            raise RuntimeError("the engine is at work")
        self.clear()

    def close(self) -> None:
        """Forget everything: the last call. There is no process to end."""
        self.clear()

    def refresh(self) -> None:
        """The trainer changed weights: what was computed with the old ones is computed again."""
        if self.merged is not None:
            self.merged.refresh()
        for request in reversed(self.live):
            self._put_off(request)
        for request in self.waiting:
            self._forget(request.prefix)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Without gradients and dropout; every module is left in the mode it was in."""
        training = [module for module in self.model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True

    def _step(self) -> None:
        if not self.live:
            self._prepare()
        if not self._admit() and not self.live and self.waiting:
            raise RuntimeError("nothing runs and nothing can start: pages were lost")
        if self.live:
            self._advance()

    def _prepare(self) -> None:
        """While nothing runs: a pool large enough for what waits, within the limits, and graphs that still hold."""
        self.replays = self.compile != "off" and graphs_serve(self.model)
        if self.graphs is not None and self.graphs.adapters != switched(self.model):
            self.graphs = None
        if not self.waiting:
            return
        longest = max(request.most_pages for request in self.waiting)
        wanted = longest * min(self.max_batch, len(self.waiting))
        if self.max_tokens is not None:
            wanted = self.max_tokens // PAGE
        if self.pool is not None and self.pool.pages >= wanted:
            return
        for request in self.waiting:
            self._forget(request.prefix)
        self.pool = self.graphs = None  # its memory is free before the next is made
        self.pool = Pool(wanted if self.max_tokens is not None else max(longest, min(wanted, self._affordable())))

    def _affordable(self) -> int:
        """Pages that fit half of the device's free memory."""
        if self.device.type != "cuda" or sharded(self.model):
            return 1 << 40  # processes that share a model must agree on the number
        return free_memory(self.device) // 2 // (token_bytes(self.model) * PAGE)

    def _admit(self) -> bool:
        """Start waiting requests while there are rows and pages for them; whether any was started."""
        fresh: list[Request] = []
        new: list[Prefix] = []
        while self.waiting and (running := len(self.live) + len(fresh)) < self.max_batch:
            prefix = self.waiting[0].prefix
            need = 1 + (pages_of(len(prefix.ids)) if prefix.pages is None else 0)
            if need + running > len(self.pool.free):  # each that runs will soon ask for one more
                if running or not self._forget_idle(prefix):
                    break
                continue
            if self.waiting[0].most_pages > self.pool.pages:
                break  # the pool is made anew when all have left
            if prefix.pages is None:
                prefix.pages = self.pool.take(pages_of(len(prefix.ids)))
                new.append(prefix)
            fresh.append(self.waiting.popleft())
            self._fork(fresh[-1])
        self._prefill(new)
        if fresh:
            self._start(fresh)
        return bool(fresh)

    def _fork(self, request: Request) -> None:
        """Go on from the prefix: its full pages are shared, the last one is the request's own."""
        prefix = request.prefix
        prefix.waiting -= 1
        if prefix.waiting == 0:
            request.pages = prefix.pages
        elif len(prefix.ids) % PAGE == 0:
            request.pages = self.pool.share(prefix.pages)
        else:
            request.pages = [*self.pool.share(prefix.pages[:-1]), *self.pool.take(1)]

    def _prefill(self, prefixes: list[Prefix]) -> None:
        """Keys, values and the last hidden state of each prefix, in as few forwards as the budget allows."""
        prefixes = sorted(prefixes, key=lambda prefix: len(prefix.ids))
        start = 0
        while start < len(prefixes):
            end = start + 1
            while end < len(prefixes) and (end + 1 - start) * len(prefixes[end].ids) <= PREFILL_TOKENS:
                end += 1
            self._forward(prefixes[start:end])
            start = end

    def _forward(self, prefixes: list[Prefix]) -> None:
        sequences = [prefix.ids for prefix in prefixes]
        layout = PromptLayout.of(self.pool, sequences, [prefix.pages for prefix in prefixes], self.device)
        ids = torch.zeros(layout.shape, dtype=torch.int64)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
        ids = ids.to(self.device)
        positions = torch.arange(layout.shape[1], device=self.device).expand(layout.shape)
        with uncompiled(self.model):
            hidden = self.model(Batch(ids, torch.full_like(ids, -100), positions, layout, target_tokens=0))
        for row, prefix in enumerate(prefixes):
            prefix.hidden = hidden[row, len(prefix.ids) - 1].clone()

    def _start(self, fresh: list[Request]) -> None:
        """The first token of requests whose prefixes are computed."""
        pairs = []
        for request in fresh:
            own, shared = request.pages, request.prefix.pages
            if own[-1] != shared[-1]:
                pairs.append((shared[-1], own[-1]))
        self.pool.copy(pairs)
        hidden = torch.stack([request.prefix.hidden for request in fresh])
        tokens, logprobs = Rows.of(fresh, max(len(r.pages) for r in fresh), self.device).draw(self.model.head(hidden))
        self.live += fresh
        for request, token, logprob in zip(fresh, tokens.tolist(), logprobs.tolist(), strict=True):
            request.append(token, logprob)
            self._settle(request)

    def _advance(self) -> None:
        """A chunk of decode steps for all that run."""
        steps = min(self.chunk, max(r.params.max_new_tokens - len(r.token_ids) for r in self.live))
        for request in list(self.live):
            if request in self.live:
                self._grow(request, steps)
        running = list(self.live)
        width = pages_of(max(r.length for r in running) + steps)
        if self.replays:
            self.graphs = self.graphs or Graphs(self.model, self.pool, self.max_batch, self.compile == "auto")
            tokens, logprobs = self.graphs.run(running, steps, width)
        else:
            tokens, logprobs = eager(self.model, self.pool, running, steps, width)
        for request, own, scores in zip(running, tokens, logprobs, strict=True):
            for token, logprob in list(zip(own, scores, strict=True))[: self._usable(request, steps)]:
                request.append(token, logprob)
                if request.finish_reason:
                    break
            self._settle(request)

    def _usable(self, request: Request, steps: int) -> int:
        """How many of the next draws are meant: not past its end, nor past the length where its cache is void."""
        left = request.params.max_new_tokens - len(request.token_ids)
        turn = self.model.arch.long_after
        if turn is not None and request.length <= turn:
            left = min(left, turn + 1 - request.length)
        return min(steps, left)

    def _grow(self, request: Request, steps: int) -> None:
        """Pages for the tokens that the next steps write; others make room if they must."""
        missing = pages_of(request.length - 1 + self._usable(request, steps)) - len(request.pages)
        while missing > len(self.pool.free) and request in self.live:
            if not self._forget_idle():
                self.preempted += 1
                self._put_off(self.live[-1])
        if missing > 0 and request in self.live:
            request.pages += self.pool.take(missing)

    def _forget_idle(self, but: Prefix | None = None) -> bool:
        """Give up the youngest prefix that only waits for rows; whether there was one."""
        for request in reversed(self.waiting):
            if request.prefix.pages is not None and request.prefix is not but:
                self._forget(request.prefix)
                return True
        return False

    def _settle(self, request: Request) -> None:
        """After new tokens: leave the batch if it is done, or start over where LongRoPE turns everything anew."""
        turn = self.model.arch.long_after
        if request.finish_reason:
            self.live.remove(request)
            self.pool.drop(request.pages)
        elif turn is not None and request.length == turn + 1:
            self._put_off(request)

    def _put_off(self, request: Request) -> None:
        """Back to the head of the queue; all its tokens are the prefix it will go on from."""
        self.live.remove(request)
        self.pool.drop(request.pages)
        request.pages = []
        request.prefix = Prefix([*request.prompt, *request.token_ids], 1)
        self.waiting.appendleft(request)

    def _leave(self, prefix: Prefix) -> None:
        """One request less will go on from a prefix."""
        prefix.waiting -= 1
        if prefix.waiting == 0:
            self._forget(prefix)

    def _forget(self, prefix: Prefix) -> None:
        """Give a waiting prefix's pages back; it is computed again when it is needed."""
        if prefix.pages is not None:
            self.pool.drop(prefix.pages)
        prefix.pages = prefix.hidden = None
