"""Secrets never reach a config dump, a log or an error message."""

import re

HIDDEN = "<redacted>"

# The last word of a key decides: `hf_token` and `api_key` are secrets, `max_new_tokens` and `tokenizer` are not, and
# neither are `pad_token` and `mask_token`, which name one of a vocabulary, and `experts_per_token`, which is a number.
_SECRET_KEY = re.compile(
    r"(?:^|[_\-.])(?:(?<!pad_)(?<!mask_)(?<!per_)token|secret|key|apikey|password|passwd|authorization|credentials?)$",
    re.I,
)
_SECRET_VALUES = (
    (re.compile(r"\b(?:hf|ghp|gho|ghs|github_pat|glpat|xox[abpr]|sk|rk|pk)[_-][A-Za-z0-9_\-]{8,}"), HIDDEN),
    (re.compile(r"\bAKIA[A-Z0-9]{12,}"), HIDDEN),
    (re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=\-]{8,}"), rf"\1 {HIDDEN}"),
    (re.compile(r"(\w+://)[^/\s:@]*(?::[^/\s@]*)?@"), rf"\1{HIDDEN}@"),
    (re.compile(r"([?&](?:\w*(?:token|secret|key|password|signature))=)[^&\s]+", re.I), rf"\1{HIDDEN}"),
)


def is_secret_key(key: str) -> bool:
    """Whether the name of a key says that its value is a secret."""
    return bool(_SECRET_KEY.search(key))


def redact(text: str) -> str:
    """`text` with tokens of known shapes and credentials in URLs replaced."""
    for pattern, replacement in _SECRET_VALUES:
        text = pattern.sub(replacement, text)
    return text


def redact_tree(value: object, key: str = "") -> object:
    """A plain tree (dicts, lists, scalars) with every secret replaced: by the name of its key, or by its shape."""
    if isinstance(value, dict):
        return {name: redact_tree(item, key if is_secret_key(key) else str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [redact_tree(item, key) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if is_secret_key(key):
        return HIDDEN
    return redact(value) if isinstance(value, str) else value


def redact_override(text: str) -> str:
    """A `key=value` of the command line, fit to be shown."""
    key, sign, _ = text.partition("=")
    return f"{key}={HIDDEN}" if sign and is_secret_key(key) else redact(text)
