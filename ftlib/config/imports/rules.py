"""What can become of a key: another key, nothing because it holds anyway, or nothing because we have no such thing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ftlib.errors import UserError


@dataclass(frozen=True)
class Rule:
    """`to`: our key ("" where there is none). `convert` turns the value (ValueError: why it cannot be).

    `lost`: the key has no equivalent, and `note` says why or what to do instead; a value in `same` asks for nothing.
    """

    to: str = ""
    convert: Callable[[Any], Any] = lambda value: value
    note: str = ""
    lost: bool = False
    same: tuple[Any, ...] = ()


def to(key: str, convert: Callable[[Any], Any] = lambda value: value, note: str = "") -> Rule:
    """Becomes our `key`."""
    return Rule(key, convert, note)


def holds(note: str) -> Rule:
    """Needs no key here: `note` says why."""
    return Rule(note=note)


def lost(note: str, *same: Any) -> Rule:
    """Has no equivalent, but where its value is one of `same`, with which nothing is lost."""
    return Rule(note=note, lost=True, same=same)


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
            if not isinstance(at.get(part), dict):  # a section that was switched off
                at[part] = {}
            at = at[part]
        at[last] = value

    def default(self, key: str, value: Any) -> None:
        """What the other library does where its key is left out and ours, left out, would do something else."""
        missing = object()
        if self.get(key, missing) is missing:
            self.set(key, value)
            self.absent.append(key)

    def drop(self, key: str) -> None:
        """Take a dotted key out, with the sections that it leaves empty."""
        path, _, last = key.rpartition(".")
        section = self.get(path, {}) if path else self.config
        if isinstance(section, dict) and last in section:
            del section[last]
            if path and not section:
                self.drop(path)

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
    decided = {key: value for key, value in theirs.items() if key not in library.together}
    apply(library.rules, decided, made, ignore=("__", *library.ignore))
    try:
        library.finish(theirs, made)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        fix = f"mend it until {library.name} itself reads the file, or leave its key out"
        raise UserError(f"a value is of no kind that {library.name} takes ({error})", fix=fix) from error
    have = set(known(made.recipe))
    for key in _misfits(made.config, have):
        named = next((name for name, rule in library.rules.items() if rule.to == key and name in decided), key)
        made.lost.append((named, f"{made.recipe} has no key {key}"))
        made.drop(key)
    _without_rows(made)
    missing = object()
    if written := [key for key in made.absent if made.get(key, missing) is not missing]:
        made.notes.append(f"left out there, written here since our defaults differ: {', '.join(written)}")
    return made


def _without_rows(made: Imported) -> None:
    """What looks at rows that are not there is left out, for a recipe refuses it."""
    if not made.get("data.sources"):
        made.notes.append("no rows are named: write data.sources")
    look, missing = ["eval.patience", "checkpoint.keep_best"], "eval.every"
    if not made.get("data.eval"):
        look, missing = ["eval.every", *look], "data.eval"
    if (asked := [key for key in look if made.get(key)]) and not made.get(missing):
        made.notes.append(f"{', '.join(asked)}: left out, since there is no {missing}")
        for key in asked:
            made.drop(key)


def apply(rules: Mapping[str, Rule], theirs: Mapping[str, Any], made: Imported, prefix: str = "",
          ignore: tuple[str, ...] = ()) -> None:  # fmt: skip
    """What each key alone decides; `prefix` is put before the names of keys in what is said about them."""
    for key, value in theirs.items():
        rule = rules.get(key)
        asked = not (value is None or value is False or value in ("", [], {}))
        if rule is None:
            if asked and not (ignore and key.startswith(ignore)):
                made.lost.append((prefix + key, "not a key that is known here"))
        elif rule.lost:
            if asked and value != 0 and value not in rule.same:
                made.lost.append((prefix + key, rule.note))
        elif not rule.to:
            if asked:
                made.held.append((prefix + key, rule.note))
        elif value is not None:
            try:
                found = rule.convert(value)
            except (ValueError, TypeError) as error:
                made.lost.append((prefix + key, str(error)))
                continue
            if found is not None:
                made.set(rule.to, found)


def _misfits(config: Mapping[str, Any], have: set[str], prefix: str = "") -> list[str]:
    """Keys that the recipe does not have; of a section that it does not have at all, each key that was set."""
    found = []
    for name, value in config.items():
        key = prefix + name
        inner = any(known.startswith(f"{key}.") for known in have) or (not prefix and key not in have)
        opens = inner and isinstance(value, dict) and value
        found += _misfits(value, have, f"{key}.") if opens else [] if key in have else [key]
    return found


def rows_of(made: Imported, micro: Any, accumulation: Any) -> None:
    """batch.rows counts all devices: what one device did per step, and a note for more of them."""
    micro, accumulation = int(micro or 1), accumulation if isinstance(accumulation, int) else 1
    made.set("batch.micro_rows", micro)
    made.set("batch.rows", micro * accumulation)
    made.notes.append(f"batch.rows {micro * accumulation} is for one device: multiply it by their number")


def steps_or_share(value: Any) -> int | float:
    """A number of steps, or a share of the run's, which stays one."""
    number = float(value)
    if number < 0 or (number > 1 and number % 1):
        raise ValueError(f"{value!r} is neither a number of steps nor a share of the run")
    return number if 0 < number < 1 else int(number)


def held_out(size: Any) -> int | float | None:
    """data.eval: a share below 1 or a number of rows; nothing where none are held out."""
    size = float(size)
    return (int(size) if size >= 1 else size) if size else None


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
        why = f"{value!r} has no equivalent; adamw is used instead, others: tune help config recipes/{made.recipe}.py"
        made.lost.append((key, why))
        ours, low = "adamw", None
    made.set("optim.name", ours)
    if low:
        made.set("optim.states", low)


def offload_states(made: Imported, key: str) -> None:
    """Offload of parameters, gradients and optimizer state: here the state alone waits in host memory."""
    if made.get("optim.name") in ("adamw", "lion", "ademamix"):
        made.set("optim.offload", True)
        made.notes.append(f"{key}: optim.offload keeps the optimizer's state in host memory; weights stay on the GPU")
    else:
        made.lost.append((key, f"optim.offload is for adamw, lion and ademamix, not {made.get('optim.name')}"))


SCHEDULES = {
    "cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine", "inverse_sqrt": "inverse_sqrt", "warmup_stable_decay": "wsd",
}  # fmt: skip


def schedule(value: Any) -> str:
    """A learning-rate schedule of Hugging Face's names."""
    if str(value).lower() not in SCHEDULES:
        ours = ", ".join(dict.fromkeys(SCHEDULES.values()))
        raise ValueError(f"{value!r} has no equivalent; the recipe's own is used instead (there are {ours})")
    return SCHEDULES[str(value).lower()]


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


def adapter(made: Imported, on: bool) -> None:
    """With an adapter or without: where the recipe has both, what is left out there is not what is left out here."""
    if not on:
        if made.get("model.quantize"):
            made.lost.append(("model.quantize", "only weights below an adapter are kept in few bits"))
            made.drop("model.quantize")
        if made.recipe in ("dpo", "reward"):
            made.set("lora", None)
        elif made.recipe == "grpo":
            made.drop("lora")
    elif made.recipe == "grpo":
        made.default("lora.rank", 16)
    elif made.recipe == "reward" and made.get("lora.modules_to_save"):
        made.set("lora.modules_to_save", list(dict.fromkeys([*made.get("lora.modules_to_save"), "score"])))
    if made.recipe in ("dpo", "grpo") and made.get("lora.dropout"):
        made.notes.append("lora.dropout: none where answers are compared with what another policy makes of them")
        made.drop("lora.dropout")


CONSTANTS = {  # that a loss reads; one that is not named reads beta alone
    "simpo": ("beta", "gamma"), "kto": ("beta", "desirable", "undesirable"), "orpo": (), "sft": (),
    "discopop": ("beta", "tau"),
    **dict.fromkeys(("cdpo", "robust", "exo_pair", "aot", "aot_unpaired"), ("beta", "label_smoothing")),
}  # fmt: skip


def preferences(made: Imported, loss: Any, weights: Any = None, **constants: Any) -> None:
    """The recipe of preferences with losses of ours and those constants that they read."""
    made.recipe = "dpo"
    given = {key: float(value) for key, value in constants.items() if value is not None}
    names = ["cdpo" if name == "sigmoid" and given.get("label_smoothing") else name for name in listed(loss)]
    terms = dict(zip(names, map(float, listed(weights)) if weights else [1.0] * len(names), strict=True))
    if names == ["orpo"]:
        terms = {"sft": 1.0 + given.pop("sft", 0.0), "orpo": given.pop("beta", 0.1)}
    made.set("dpo.loss", names[0] if list(terms.values()) == [1.0] else terms)
    read = set() if "kto" in terms else {"sft"}
    read |= {constant for name in terms for constant in CONSTANTS.get(name, ("beta",))}
    for key, value in given.items():
        if key in read and (value or key == "label_smoothing"):
            made.set(f"dpo.{key}", value)
        elif value:
            made.lost.append((f"dpo.{key}", f"{' and '.join(terms)} does not read it"))


def refused(key: str, value: Any, nearest: str) -> UserError:
    """A kind of training that none of our recipes is: a config for another one would not be an import."""
    return UserError(f"{key}: {value} is a kind of training that is not here", fix=f"the nearest is {nearest}")
