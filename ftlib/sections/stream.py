"""Text that is read while it is trained on."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Shares of the sources from a step on; between two points they change linearly."""

    step: int  # optimizer step, from 1
    weights: dict[str, float]  # name of a source -> its weight; sources that are not named keep their own

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError("step: must be at least 1")
        if not self.weights or min(self.weights.values()) < 0:
            raise ValueError("weights: at least one, and none negative")


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Sources without an end, tokenised on the fly. A weight (data.sources) is then a share of the tokens; documents
    fill rows to the last token and go on in the next one, so data.overlong does not apply."""

    buffer: int = 16_384  # rows of a source that are shuffled among each other, over all devices
    workers: int = 2  # processes that read and tokenise for each device; 0: a thread
    max_documents: int = 64  # of a packed row; a row of more, shorter ones is closed early
    cache_gib: float = 16.0  # room on each machine for pieces of remote files (in $FTLIB_CACHE), read as they come
    mix: tuple[Mix, ...] = ()  # shares at some steps, from the sources' weights on; between them a straight line

    def __post_init__(self) -> None:
        if self.buffer < 1 or self.max_documents < 1:
            raise ValueError("buffer and max_documents: must be at least 1")
        if self.workers < 0:
            raise ValueError("workers: must not be negative")
        if not 0 < self.cache_gib < float("inf"):
            raise ValueError("cache_gib: must be above 0")
        steps = [point.step for point in self.mix]
        if steps != sorted(set(steps)):
            raise ValueError("mix: steps must rise")
