"""What codecs cost and lose on predictions of models in a federation.

`python benchmarks/codecs.py` runs small federations (digits; Fashion-MNIST too where FEDISTILL_DATA
is set), takes what clients predict on the same proxy rows in two rounds that follow one another,
and prints tables in Markdown: bytes a row and KL of every codec, with and without a delta; what
sorting and the choice of coder are worth; milliseconds. One to three minutes on one core.
"""

from __future__ import annotations

import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import lgamma, log
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fedistill as fd
from fedistill.aggregate.rules import softmax
from fedistill.data.files import find_file, read_bytes
from fedistill.data.idx import parse_idx
from fedistill.distill.recipe import Recipe
from fedistill.models import LeNet
from fedistill.types import IntArray, Probs, Rows
from fedistill.wire import codec as codecs
from fedistill.wire.delta import delta_encode, grid_of, quantise, restore

EARLY, LATE = 3, 10
"""Rounds that are shown, each against the one before."""
BITS = range(2, 9)

Pair = tuple[Probs, Probs]


def federated(
    clients: Sequence[fd.Client], proxy: fd.ProxySet, student: Callable[[], Any]
) -> Iterator[tuple[str, Pair]]:
    """What a client predicts and what the server makes of all, in two rounds that follow."""
    federation = fd.Federation(
        clients, proxy=proxy, student=student, method=fd.method("ds-fl", rule="mean"), seed=7
    )
    before: dict[str, Probs] = {}
    for number, _ in enumerate(federation.run(rounds=LATE), start=1):
        site = federation.sites[clients[0].id]
        now = {
            "client": softmax(site.learner.predict(proxy.inputs).astype(np.float64)),
            "targets": federation.server.table.astype(np.float64),
        }
        if number in (EARLY, LATE):
            yield from ((f"{k}, round {number}", (before[k], now[k])) for k in now)
        before = now


def digits() -> Iterator[tuple[str, Pair]]:
    """Eight clients, Dirichlet 0.3, small networks of one hidden layer."""
    data = fd.data.digits(seed=7, proxy_rows=600)
    parts = fd.data.dirichlet(data.train, clients=8, alpha=0.3, seed=7)
    build = partial(fd.models.MLP, 64, 10, width=32)
    clients = [
        fd.Client(id=f"site-{k}", build=build, data=part, training=Recipe(epochs=5))
        for k, part in enumerate(parts)
    ]
    yield from federated(clients, fd.ProxySet(data.public.inputs), build)


def fashion(root: str) -> Iterator[tuple[str, Pair]]:
    """Four clients of 1,500 Fashion-MNIST images, Dirichlet 0.3, LeNet."""
    names = ("images-idx3-ubyte", 3), ("labels-idx1-ubyte", 1)
    images, labels = (
        parse_idx(read_bytes(at), dimensions, at)
        for name, dimensions in names
        for at in [find_file(root, f"fashion_mnist/train-{name}")]
    )
    inputs = images[:8000, None].astype(np.float32) / 127.5 - 1
    rows = Rows(inputs[:6000], labels[:6000].astype(np.int64))
    clients = [
        fd.Client(id=f"site-{k}", build=LeNet, data=part, training=Recipe(epochs=2, batch_size=50))
        for k, part in enumerate(fd.data.dirichlet(rows, clients=4, alpha=0.3, seed=7))
    ]
    yield from federated(clients, fd.ProxySet(inputs[6000:]), LeNet)


def hundred() -> Pair:
    """Made up: 1,000 rows of 100 classes, a clear favourite in most, and a step further."""
    random = np.random.default_rng(1)
    logits = 2 * random.normal(size=(1000, 100))
    logits[np.arange(1000), random.integers(100, size=1000)] += 6
    return softmax(logits), softmax(logits + 0.3 * random.normal(size=logits.shape))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """One table in Markdown."""
    for row in (head, ["---", *["---:"] * (len(head) - 1)], *rows):
        print("|", " | ".join(str(cell) for cell in row), "|")
    print(flush=True)


def figures(name: str, before: Probs, now: Probs) -> tuple[float, float, float]:
    """Bytes a row alone and against the round before, and nats lost."""
    held, codes = (quantise(name, probs, seed=k) for k, probs in enumerate((before, now)))
    alone = len(codecs.pack(grid_of(name).dump(codes)))
    after = len(delta_encode(name, codes, held))
    lost = codecs.kl(now, restore(name, codes, now.shape[1]))
    return alone / len(now), after / len(now), lost


def compare_codecs(cases: Mapping[str, Pair]) -> None:
    """Bytes a row, bytes a row as a delta, and KL, for every codec and case."""
    head = ["codec", *(f"{title}: B/row, delta, KL" for title in cases)]
    rows = []
    for name in codecs.CODECS:
        cells = []
        for before, now in cases.values():
            alone, after, lost = figures(name, before, now)
            told = "unbiased" if codecs.CODECS[name].draws else f"{max(lost, 0):.2g}"
            cells.append(f"{alone:.2f}, {after:.2f}, {told}")
        rows.append([f"`{name}`", *cells])
    table(head, rows)


def compare_coders(probs: Probs) -> None:
    """What zlib makes of codes row by row, bit by bit and sorted; ours; an ideal adaptive coder."""
    rows = []
    for bits in BITS:
        grid = grid_of(f"simplex-{bits}")
        codes = grid.quantise(probs)
        spread = (codes[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        sizes = [
            len(zlib.compress(codes.tobytes(), 9)),
            len(zlib.compress(np.packbits(spread.astype(np.uint8)).tobytes(), 9)),
            len(zlib.compress(grid.dump(codes), 9)),
            len(codecs.pack(grid.dump(codes))),
            ideal(codes, grid.units),
        ]
        saved = 1 - sizes[3] / min(sizes[:2])
        rows.append(
            [f"`simplex-{bits}`", *(f"{size / len(probs):.2f}" for size in sizes), f"{saved:.0%}"]
        )
    head = ["B/row", "zlib, rows", "zlib, bits", "zlib, sorted", "ours", "ideal adaptive", "saved"]
    table(head, rows)


def ideal(codes: IntArray, units: int) -> float:
    """Bytes of a coder without overhead that learns a code for each class and units left.

    Units left count by their number of bits. Counts start as in Krichevsky and Trofimov, with a
    smaller prior where there are many symbols.
    """
    prior = 0.3 if units < 20 else 0.05
    left = np.full(len(codes), units)
    total = 0.0
    for column in codes.T[:-1].astype(np.int64):
        context = np.ceil(np.log2(np.maximum(left, 0.5) + 1e-4))
        for value in np.unique(context[left > 0]):
            counts = np.bincount(column[(context == value) & (left > 0)], minlength=units + 1)
            symbols = units + 1
            total -= sum(lgamma(n + prior) - lgamma(prior) for n in counts if n)
            total -= lgamma(symbols * prior) - lgamma(counts.sum() + symbols * prior)
        left = left - column
    return total / log(2) / 8


def compare_speed() -> None:
    """Milliseconds of processor time, the best of five."""
    random = np.random.default_rng(0)
    wide, long = (softmax(3 * random.normal(size=shape)) for shape in ((1000, 1000), (10_000, 10)))
    rows = []
    for name in codecs.CODECS:
        cells: list[str] = []
        for probs in (long, wide):
            content = codecs.encode(name, probs)
            packed = codecs.pack(content)

            def back(name: str = name, probs: Probs = probs, packed: bytes = packed) -> object:
                size = codecs.expected_size(name, *probs.shape)
                return codecs.CODECS[name].decode(codecs.unpack(packed, size), *probs.shape)

            steps = (partial(codecs.encode, name, probs), partial(codecs.pack, content), back)
            cells += [f"{milliseconds(step):.1f}" for step in steps]
        rows.append([f"`{name}`", *cells])
    steps_of = ("encode", "pack", "unpack and decode")
    shapes = ("10,000 x 10", "1,000 x 1,000")
    table(["ms", *(f"{shape}: {step}" for shape in shapes for step in steps_of)], rows)


def milliseconds(step: Callable[[], object]) -> float:
    """Processor time of a call."""
    found = []
    for _ in range(5):
        began = time.process_time()
        step()
        found.append(time.process_time() - began)
    return 1000 * min(found)


def main() -> None:
    """Print all tables."""
    torch.set_num_threads(1)
    sources = {"digits": digits()}
    if root := os.environ.get("FEDISTILL_DATA"):
        if any((Path(root) / "fashion_mnist").glob("train-images*")):
            sources["fashion"] = fashion(root)
        else:
            print("no fashion_mnist under FEDISTILL_DATA: digits only", file=sys.stderr)
    coders: dict[str, Probs] = {}
    for title, pairs in sources.items():
        cases = dict(pairs)
        print(f"\n{title}: {len(next(iter(cases.values()))[0])} rows of 10 classes\n")
        compare_codecs(cases)
        coders[title] = cases[f"client, round {LATE}"][1]
    print("\nmade up: 1,000 rows of 100 classes\n")
    compare_codecs({"logits moved by 0.3": hundred()})
    coders["made up, 100 classes"] = hundred()[0]
    for title, probs in coders.items():
        print(f"\ncoders on {title}\n")
        compare_coders(probs)
    compare_speed()


if __name__ == "__main__":
    main()
