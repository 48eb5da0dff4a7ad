"""The documentation's formula: what one process hands to sdsopt's collectives in a step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """The shapes of a pair: A (rank, n), B (m, rank)."""

    m: int
    n: int
    rank: int


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def rows_of(rank: int, size: int, process: int) -> int:
    chunk = ceil(rank, size)
    return min(max(rank - process * chunk, 0), chunk)


def handed_over(
    pairs: list[Pair], correction: str, size: int, process: int, itemsize: int, columns: bool
) -> list[tuple[str, int]]:
    """The collectives of one step, with the bytes that a process hands over, for factors cut among `size` processes.

    Args:
        pairs: The shapes.
        correction: "sds", "scaled" or "sds-split".
        size: w, the number of processes.
        process: Which.
        itemsize: b, the bytes of a parameter's element.
        columns: Whether A is cut across its columns (`sdsopt.shard_placements`), else across its rank.
    """
    rank_cut = [p for p in pairs if not (columns and p.n % size == 0)]
    out = sum(rows_of(p.rank, size, process) * size * ceil(p.n, size) * itemsize for p in rank_cut)
    back = sum(p.rank * ceil(p.n, size) * itemsize for p in rank_cut)
    grams = sum(2 * p.rank**2 * 8 for p in pairs) + 8 * len(rank_cut)
    lengths = sum(6 * 8 for _ in pairs)

    turns = bool(rank_cut)
    step = [("all_to_all_single", 2 * out)] * turns + [("all_reduce", grams)]
    step += [("all_to_all_single", back)] * turns
    if correction == "sds-split":
        step += [("all_to_all_single", out)] * turns + [("all_reduce", lengths)] + [("all_to_all_single", back)] * turns
    return step


def llama_8b(rank: int) -> list[Pair]:
    """Adapters on all linear layers of the 32 blocks of Llama 3 8B."""
    hidden, key_value, intermediate = 4096, 1024, 14336
    block = [
        (hidden, hidden),
        (key_value, hidden),
        (key_value, hidden),
        (hidden, hidden),
        (intermediate, hidden),
        (intermediate, hidden),
        (hidden, intermediate),
    ]
    return [Pair(m, n, rank) for _ in range(32) for m, n in block]
