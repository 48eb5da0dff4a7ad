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


# An estimate, not a measurement: what a message costs at least, and what a process sends in a second.
MESSAGE_SECONDS = 5e-6
BYTES_PER_SECOND = 50e9


def seconds(calls: list[tuple[str, int]], size: int) -> float:
    """How long the collectives take by the usual model: trees for all-reduces, one message to each other process."""
    messages = {"all_reduce": 2 * (size - 1).bit_length(), "all_to_all_single": size - 1}
    volume = {"all_reduce": 2, "all_to_all_single": 1}
    return sum(MESSAGE_SECONDS * messages[name] + volume[name] * sent / BYTES_PER_SECOND for name, sent in calls)


def plan_table() -> str:
    """The documentation's plan for 1,024 GPUs: Llama 3 8B in bfloat16 with adapters of rank 16 on all linear layers."""
    lines = [
        "| sharded over | correction | A cut across | collectives | MB handed over | estimate |",
        "|---|---|---|---|---|---|",
    ]
    for size, name in ((1024, "1024 processes"), (8, "8, in 128 replicas")):
        for correction in ("sds", "sds-split"):
            for columns in (False, True):
                calls = handed_over(llama_8b(16), correction, size, 0, 2, columns)
                sent = sum(size for _, size in calls) / 1e6
                cut = "columns" if columns else "rank"
                estimate = f"{1e3 * seconds(calls, size):.1f} ms"
                lines.append(f"| {name} | `{correction}` | {cut} | {len(calls)} | {sent:.1f} | {estimate} |")
    return "\n".join(lines)
