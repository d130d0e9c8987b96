#!/usr/bin/env python3
"""Holds logits of tiny/ids_N.bin against what transformers chose in float32. Needs no packages.

usage: compare_argmax.py LOGITS LEAST_SHARE MOST_MARGIN

LOGITS: float32 LE [N, vocab_size] by `longreach logits`. Fails where the argmax agrees at less than LEAST_SHARE of the N
positions, where a logit is not a number, and where it differs although transformers' best token was more than MOST_MARGIN
ahead of its next.
"""

import array
import pathlib
import sys

TINY = pathlib.Path(__file__).resolve().parent / "tiny"
N = 6000


def numbers(path, kind):
    values = array.array(kind)
    values.frombytes(path.read_bytes())
    if sys.byteorder == "big":
        values.byteswap()
    return values


def main():
    logits = numbers(pathlib.Path(sys.argv[1]), "f")
    least_share, most_margin = float(sys.argv[2]), float(sys.argv[3])
    want, margin = numbers(TINY / f"argmax_{N}.bin", "i"), numbers(TINY / f"margin_{N}.bin", "f")
    vocab_size, rest = divmod(len(logits), N)
    if rest or not vocab_size:
        sys.exit(f"{len(logits)} logits are not those of {N} positions")
    differing = []
    for i in range(N):
        row = logits[i * vocab_size : (i + 1) * vocab_size]
        if any(x != x for x in (sum(row), max(row))):
            sys.exit(f"a logit of position {i} is not a number")
        if row.index(max(row)) != want[i]:
            differing.append(margin[i])
    share = 1 - len(differing) / N
    widest = max(differing, default=0.0)
    print(f"argmax as in float32 at {N - len(differing)} of {N} positions: {100 * share:.2f} %, {100 * least_share:g} wanted; "
          f"widest margin where not {widest:.3f}, {most_margin:g} allowed")
    if share < least_share or widest > most_margin:
        sys.exit(1)


if __name__ == "__main__":
    main()
