"""What a model is shown of a document: its text piece by piece, and which pieces are trained."""

from typing import Protocol

from ftlib.data.documents import Documents


class Decoder(Protocol):
    """What this asks of a tokenizer."""

    def decode(self, ids: list[int]) -> str: ...


Shown = list[tuple[str, bool | float]]


def preview(documents: Documents, tokenizer: Decoder, index: int) -> Shown:
    """(text, trained) of document `index`, token by token; tokens that share a character are one piece.

    A token counts as trained if it is a target: the first of a document never is. In a document with weights other
    than 0 and 1, `trained` is the weight (of tokens that share a character the largest).
    """
    ids, trained = documents.masked(index)
    weights = documents.weighed(index)
    pieces: Shown = []
    done, start, text = 0, 0, ""
    for end in range(1, len(ids) + 1):
        # Decoded with a few tokens before them, for tokenizers whose space depends on what stands in front.
        before = tokenizer.decode(ids[start:done].tolist())
        text = tokenizer.decode(ids[start:end].tolist())[len(before) :]
        if text.endswith("\ufffd") and end < len(ids) and end - done < 8:
            continue  # half a character
        if weights is None:
            pieces.append((text, bool(trained[done:end].any() and end > 1)))
        else:
            pieces.append((text, float(weights[done:end].max()) if end > 1 else 0.0))
        start, done = max(0, done - 4), end
    return pieces


def merged(pieces: Shown) -> Shown:
    """Neighbours that are trained alike, or both not, as one piece."""
    joined: Shown = []
    for text, trained in pieces:
        if joined and joined[-1][1] == trained:
            joined[-1] = (joined[-1][0] + text, trained)
        else:
            joined.append((text, trained))
    return joined
