"""What our robust rules cost against the same written with torch.

`python benchmarks/robust_rules.py [--clients 100] [--rows 10000] [--classes 10] [--repeats 5]`
prints a JSON line for each rule and dtype of torch: milliseconds of processor time (medians), the
ratio, the largest difference to a float64 oracle and the load of the machine. Both take float32
logits to probabilities, softmax included; one thread each, in turns (A B A B). About one minute.

float32 is what torch users would write; float64 is what we compute in. `torch.median` returns the
lower of two middle values, ours their mean, so torch's median is timed with `torch.median` and
measured with `torch.sort`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from fedistill.aggregate import robust
from fedistill.types import FloatArray, Logits, Probs

TRIM = 0.1


def torch_probs(logits: Logits, dtype: torch.dtype) -> torch.Tensor:
    """Softmax over classes."""
    return torch.softmax(torch.from_numpy(logits).to(dtype), dim=2)


def rows_of(values: torch.Tensor) -> FloatArray:
    """Rows renormalised."""
    return (values / values.sum(dim=1, keepdim=True)).numpy()


def torch_median(logits: Logits, dtype: torch.dtype) -> FloatArray:
    """The lower middle value."""
    return rows_of(torch.median(torch_probs(logits, dtype), dim=0).values)


def torch_middle(logits: Logits, dtype: torch.dtype) -> FloatArray:
    """The mean of the two middle values, by sorting."""
    probs = torch.sort(torch_probs(logits, dtype), dim=0).values
    clients = len(probs)
    return rows_of((probs[(clients - 1) // 2] + probs[clients // 2]) / 2)


def torch_trimmed(logits: Logits, dtype: torch.dtype) -> FloatArray:
    """Sorted, cut, averaged."""
    probs = torch.sort(torch_probs(logits, dtype), dim=0).values
    cut = round(TRIM * len(probs))
    return rows_of(probs[cut : len(probs) - cut].mean(dim=0))


def torch_geometric(logits: Logits, dtype: torch.dtype) -> FloatArray:
    """Weiszfeld's loop on all rows at once; ends as ours does, or where float32 can do no more."""
    probs = torch_probs(logits, dtype)
    settled = robust.SETTLED if dtype == torch.float64 else 1e-6
    squares = (probs * probs).sum(dim=2)
    centre = probs.mean(dim=0)
    for _ in range(robust.STEPS):
        cross = torch.einsum("krc,rc->kr", probs, centre)
        gaps = (squares - 2 * cross + (centre * centre).sum(dim=1)).clamp(min=0)
        pull = 1 / torch.sqrt(gaps + robust.SMOOTHING**2)
        pull /= pull.sum(dim=0)
        moved = torch.einsum("krc,kr->rc", probs, pull)
        done = bool((moved - centre).abs().max() <= settled)
        centre = moved
        if done:
            break
    return rows_of(centre)


def oracle(rule: Callable[[Logits, torch.dtype], FloatArray], logits: Logits) -> FloatArray:
    """What torch makes of it in float64, at most 1,000 rows."""
    return rule(logits[:, :1000], torch.float64)


def milliseconds(step: Callable[[], object]) -> float:
    """Processor time of a call."""
    began = time.process_time()
    step()
    return 1000 * (time.process_time() - began)


def compare(name: str, logits: Logits, repeats: int) -> None:
    """Print the line of one rule for each dtype of torch."""
    ours, theirs, exact = RULES[name]
    weights = np.ones(len(logits))
    wanted = oracle(exact, logits)
    for dtype in (torch.float32, torch.float64):
        steps: tuple[Callable[[], object], ...] = (
            partial(ours, logits, weights),
            partial(theirs, logits, dtype),
        )
        times = np.array([[milliseconds(step) for step in steps] for _ in range(repeats + 1)])[1:]
        fast, slow = np.median(times, axis=0)
        found: Probs = ours(logits[:, : len(wanted)], weights)
        line = {
            "rule": name,
            "torch": str(dtype).removeprefix("torch."),
            "clients": logits.shape[0],
            "rows": logits.shape[1],
            "classes": logits.shape[2],
            "ours_ms": round(float(fast), 1),
            "torch_ms": round(float(slow), 1),
            "ratio": round(float(slow / fast), 2),
            "ratio_min": round(float((times[:, 1] / times[:, 0]).min()), 2),
            "error": float(np.abs(found - wanted).max()),
            "torch_error": float(np.abs(exact(logits, dtype)[: len(wanted)] - wanted).max()),
            "load": round(os.getloadavg()[0], 2),
        }
        print(json.dumps(line), flush=True)


RULES = {
    "median": (robust.median, torch_median, torch_middle),
    "trimmed-mean": (partial(robust.trimmed_mean, trim=TRIM), torch_trimmed, torch_trimmed),
    "geometric-median": (robust.geometric_median, torch_geometric, torch_geometric),
}


def main() -> None:
    """Compare all."""
    parser = argparse.ArgumentParser(description="Robust rules against torch, JSON lines.")
    for option, usual in (("clients", 100), ("rows", 10_000), ("classes", 10), ("repeats", 5)):
        parser.add_argument(f"--{option}", type=int, default=usual)
    given = parser.parse_args()
    torch.set_num_threads(1)
    shape = (given.clients, given.rows, given.classes)
    logits = (2 * np.random.default_rng(7).normal(size=shape)).astype(np.float32)
    with threadpool_limits(1):
        for name in RULES:
            compare(name, logits, given.repeats)


if __name__ == "__main__":
    main()
