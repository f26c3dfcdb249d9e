"""Order and packing: pure functions of lengths, seed and epoch, so that a position in the data is two integers."""

import numpy as np

_MASK = (1 << 64) - 1
_STEP, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def shuffled(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count), int64, that depends on `key` alone.

    SplitMix64 (Steele et al. 2014) of a counter, sorted: numpy promises no stable stream of random numbers across its
    versions, and a run that resumes after an upgrade must see the same order.
    """
    state = 0
    for part in key:
        state = _mix((state + _STEP + part) & _MASK)
    counter = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_STEP) + np.uint64(state)
    return np.argsort(_mix(counter), kind="stable")


def _mix(z: "int | np.ndarray") -> "int | np.ndarray":
    if isinstance(z, int):
        z = ((z ^ (z >> 30)) * _MIX1) & _MASK
        z = ((z ^ (z >> 27)) * _MIX2) & _MASK
        return z ^ (z >> 31)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX2)
    return z ^ (z >> np.uint64(31))


def pack(lengths: np.ndarray, seq_len: int, seed: int, epoch: int, max_documents: int | None = None) -> list[list[int]]:
    """Put every index of `lengths` (int [n], 1..seq_len) into one of few packs of at most `seq_len` tokens.

    Best fit, longest first (Johnson et al. 1974): a document goes where it leaves the least room. Equal lengths and the
    packs themselves are shuffled by (seed, epoch). `max_documents` closes a pack at that many.
    """
    if len(lengths) == 0:
        return []
    order = shuffled(len(lengths), seed, epoch)
    order = order[np.argsort(-lengths[order], kind="stable")]
    smallest, most = int(lengths.min()), max_documents or seq_len
    packs: list[list[int]] = []
    open_packs: list[list[int]] = [[] for _ in range(seq_len + 1)]  # by room left
    rooms = 0  # bit r is set while open_packs[r] holds a pack: the least room that fits is one shift away
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            members = open_packs[room].pop()
            if not open_packs[room]:
                rooms ^= 1 << room
        else:
            room, members = seq_len, []
            packs.append(members)
        members.append(index)
        room -= length
        if room >= smallest and len(members) < most:
            if not open_packs[room]:
                rooms |= 1 << room
            open_packs[room].append(members)
    return [packs[i] for i in shuffled(len(packs), seed, epoch, 1)]


def width(longest: int, seq_len: int, multiple: int) -> int:
    """Tokens of a row that holds one document of `longest` tokens: `multiple` x 1, 2, 3, 4, 6, 8, 12 …, or `seq_len`.

    Few sizes, as kernels are tuned and graphs recorded for each, of which none is half as long again as it has to be.
    """
    size = multiple
    while size < longest:
        size *= 2
    if size >= 4 * multiple and longest <= size // 4 * 3:
        size = size // 4 * 3
    return min(size, seq_len)


def share(rows: int, weight: float, seed: int, source: int, epoch: int) -> np.ndarray:
    """Which of a source's `rows` belong to an epoch, int64: about rows * weight of them.

    A source is read as an endless line of reshuffled passes, and each epoch takes the next rows * weight rows of it: so
    over a run every row is seen equally often (give or take one) and the shares of sources are exact, fractions too.
    """
    start, stop = round(epoch * rows * weight), round((epoch + 1) * rows * weight)
    if rows == 0 or start == stop:
        return np.empty(0, np.int64)
    passes = range(start // rows, (stop - 1) // rows + 1)
    line = np.concatenate([shuffled(rows, seed, source, number, 2) for number in passes])
    return line[start - passes[0] * rows : stop - passes[0] * rows]
