"""What can become of a key: another key, nothing because it holds anyway, or nothing because we have no such thing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rule:
    """`to`: our key ("" where there is none). `convert` turns the value (ValueError: why it cannot be).

    `lost`: the key has no equivalent, and `note` says why or what to do instead.
    """

    to: str = ""
    convert: Callable[[Any], Any] = lambda value: value
    note: str = ""
    lost: bool = False


def to(key: str, convert: Callable[[Any], Any] = lambda value: value, note: str = "") -> Rule:
    """Becomes our `key`."""
    return Rule(key, convert, note)


def holds(note: str) -> Rule:
    """Needs no key here: `note` says why."""
    return Rule(note=note)


def lost(note: str) -> Rule:
    """Has no equivalent."""
    return Rule(note=note, lost=True)


def choice(**values: Any) -> Callable[[Any], Any]:
    """A converter of names; any other name is an error that lists them."""

    def convert(value: Any) -> Any:
        key = str(value).lower()
        if key not in values:
            raise ValueError(f"{value!r} has no equivalent (those that have: {', '.join(values)})")
        return values[key]

    return convert


def listed(value: Any) -> list[Any]:
    """A list, also where the other library takes one item or a comma-separated text."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]


@dataclass
class Imported:
    """A recipe, its config as nested dicts, and what could not be said in it: (their key, why)."""

    recipe: str
    config: dict[str, Any] = field(default_factory=dict)
    lost: list[tuple[str, str]] = field(default_factory=list)
    held: list[tuple[str, str]] = field(default_factory=list)  # needs no key here, and why
    notes: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)  # keys written because leaving them out means something else there

    def set(self, key: str, value: Any) -> None:
        """Set a dotted key."""
        at = self.config
        *path, last = key.split(".")
        for part in path:
            at = at.setdefault(part, {})
        at[last] = value

    def default(self, key: str, value: Any) -> None:
        """What the other library does where its key is left out and ours, left out, would do something else."""
        missing = object()
        if self.get(key, missing) is missing:
            self.set(key, value)
            self.absent.append(key)

    def get(self, key: str, default: Any = None) -> Any:
        """A dotted key, or `default`."""
        at: Any = self.config
        for part in key.split("."):
            if not isinstance(at, dict) or part not in at:
                return default
            at = at[part]
        return at


@dataclass(frozen=True)
class Library:
    """`marks`: keys that only its configs have. `finish` does what one key alone does not decide, and names the recipe.

    Keys in `together` are read by `finish`; the text beside each is what the table says.
    """

    name: str
    marks: tuple[str, ...]
    rules: Mapping[str, Rule]
    together: Mapping[str, str]
    finish: Callable[[dict[str, Any], Imported], None]
    ignore: tuple[str, ...] = ()  # prefixes of keys that decide nothing here


def convert(library: Library, theirs: dict[str, Any], known: Callable[[str], list[str]]) -> Imported:
    """Our config for one of `library`'s. `known(recipe)` lists the keys that a recipe of ours has."""
    made = Imported(recipe="")
    for key, value in theirs.items():
        rule = library.rules.get(key)
        unset = value is None or value is False or value == "" or value == []
        if rule is None:
            ignored = key in library.together or key.startswith(("__", *library.ignore))
            if not ignored and not unset:
                made.lost.append((key, "not a key that is known here"))
        elif rule.lost:
            if not unset and value != 0:
                made.lost.append((key, rule.note))
        elif not rule.to and not unset:
            made.held.append((key, rule.note))
        elif rule.to and value is not None:
            try:
                found = rule.convert(value)
            except (ValueError, TypeError) as error:
                made.lost.append((key, str(error)))
                continue
            if found is not None:
                made.set(rule.to, found)
    library.finish(theirs, made)
    if made.absent:
        made.notes.append(f"left out there, written here since our defaults differ: {', '.join(made.absent)}")
    have = known(made.recipe)
    for key in _leaves(made.config):
        generic = key.split("[")[0]
        if generic not in have:
            made.lost.append((next((k for k, r in library.rules.items() if r.to == key), key),
                              f"{made.recipe} has no key {key}"))  # fmt: skip
            _drop(made.config, key)
    return made


def _leaves(config: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in config.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [prefix + key]
    return [key for key in found if not key.startswith(("lora.rank_pattern.", "lora.alpha_pattern."))]


def _drop(config: dict[str, Any], key: str) -> None:
    *path, last = key.split(".")
    for part in path:
        config = config[part]
    config.pop(last)


def rows_of(made: Imported, micro: Any, accumulation: Any) -> None:
    """batch.rows counts all devices: what one device did per step, and a note for more of them."""
    micro, accumulation = int(micro or 1), accumulation if isinstance(accumulation, int) else 1
    made.set("batch.micro_rows", micro)
    made.set("batch.rows", micro * accumulation)
    made.notes.append(f"batch.rows {micro * accumulation} is for one device: multiply it by their number")


def precision(value: Any) -> str:
    """A `bf16:` or `dtype:` switch as our dtype: bf16 that is switched off is fp32."""
    names = {"true": "bf16", "auto": "bf16", "bf16": "bf16", "bfloat16": "bf16", "full": "bf16", "false": "fp32",
             "fp32": "fp32", "float32": "fp32"}  # fmt: skip
    if str(value).lower() not in names:
        raise ValueError(f"{value!r} has no equivalent; bf16 is used, dtype: fp32 is there")
    return names[str(value).lower()]


def recompute(value: Any) -> str:
    """Gradient checkpointing as memory.recompute."""
    return "full" if value else "none"


def optimizer(made: Imported, key: str, value: Any) -> None:
    """One of our optimizers under any of its names; of AdamW also its low-bit and paged variants."""
    name = str(value).lower().replace("schedulefree", "schedule_free")
    known = ("schedule_free", "ademamix", "adafactor", "adamw", "lion", "muon", "dion")
    ours = next((one for one in known if one in name), None)
    low = next((bits for part, bits in {"8bit": "int8", "4bit": "int4", "fp8": "fp8"}.items() if part in name), None)
    if ours is None or any(part in name for part in ("apollo", "galore", "lomo")) or (low and ours != "adamw"):
        made.lost.append((key, f"{value!r} has no equivalent; adamw is used instead, others: tune help optim.name"))
        ours, low = "adamw", None
    made.set("optim.name", ours)
    if low:
        made.set("optim.states", low)


def schedule(value: Any) -> str:
    """A learning-rate schedule of Hugging Face's names."""
    names = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
    if str(value).lower() not in names:
        raise ValueError(f"{value!r} has no equivalent; cosine is used instead (linear and constant are there too)")
    return names[str(value).lower()]


def betas(theirs: Mapping[str, Any], made: Imported) -> None:
    """AdamW's, of which the second is 0.999 elsewhere."""
    first, second = theirs.get("adam_beta1"), theirs.get("adam_beta2")
    if first or second:
        made.set("optim.betas", [first or 0.9, second or 0.999])
    elif made.get("optim.name") != "adafactor":
        made.default("optim.betas", [0.9, 0.999])


def track(made: Imported, tracker: str) -> None:
    """Rows also go to `tracker`."""
    named = made.get("log.to", ["console"])
    if tracker not in named:
        made.set("log.to", [*named, tracker])


def roles(value: Any) -> list[str]:
    """Names of roles as ours."""
    names = {"assistant": "assistant", "gpt": "assistant", "model": "assistant", "user": "user", "human": "user",
             "system": "system", "tool": "tool"}  # fmt: skip
    return list(dict.fromkeys(choice(**names)(role) for role in listed(value)))


def prompts_too(on: Any) -> list[str] | None:
    """data.train_on where the whole conversation is trained."""
    return ["system", "user", "assistant", "tool"] if on else None


def preferences(made: Imported, loss: str, adapter: bool) -> None:
    """The recipe of preferences with a loss of ours."""
    made.recipe = "dpo"
    made.set("dpo.loss", loss)
    if loss == "simpo":
        made.default("dpo.beta", 0.1)
        made.default("dpo.gamma", 0.5)
    if not adapter:
        made.set("lora", None)
