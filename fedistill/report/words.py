"""Numbers and names as people read them."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable
from itertools import pairwise

MISSING = "–"
MINUS = "−"


def clean(text: object, cap: int = 60) -> str:
    """A text from a run folder on one line: no control or direction characters, at most ``cap``.

    Ids and reasons come from other sites. Escaping for HTML is the template's business; this
    keeps them from moving a terminal's cursor or flooding a page.
    """
    kept = "".join(
        character if unicodedata.category(character)[0] != "C" else "\N{REPLACEMENT CHARACTER}"
        for character in str(text)[: 4 * cap].strip()
    )
    return kept if len(kept) <= cap else kept[: cap - 1] + "…"


def number(value: object) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def percent(value: float | None, sd: float | None = None) -> str:
    """``0.913`` as ``91.3%``; with a deviation ``91.3% ± 0.4``."""
    if value is None:
        return MISSING
    return f"{100 * value:.1f}%" + ("" if sd is None else f" ± {100 * sd:.1f}")


def share(value: float | None, sd: float | None = None) -> str:
    """A figure between 0 and 1 with three decimals, as AUC is printed."""
    if value is None:
        return MISSING
    return f"{value:.3f}" + ("" if sd is None else f" ± {sd:.3f}")


def epsilon(value: float | None) -> str:
    """A privacy loss with three digits, rounded up: it is never told smaller than it is.

    >>> epsilon(2.9951), epsilon(8.0), epsilon(0.12345), epsilon(None)
    ('3', '8', '0.124', '–')
    """
    if value is None:
        return MISSING
    if value <= 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / unit - 1e-9) * unit:.3g}"


def delta(value: float | None) -> str:
    """``1e-5``."""
    return MISSING if value is None else f"{value:.2g}".replace("e-0", "e-")


def signed(value: float, digits: int) -> str:
    """A difference with its sign, ``+2.1`` or ``−0.4``; what rounds to nothing is ``±0``."""
    text = f"{abs(value):.{digits}f}"
    if not float(text):
        return "±0"
    return ("+" if value > 0 else MINUS) + text


def human_bytes(value: float | None) -> str:
    """Three significant digits and a decimal unit, ``12.3 kB``."""
    if value is None:
        return MISSING
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < (1000 if unit == "B" else 999.5):
            return f"{value:.0f} {unit}" if unit == "B" else f"{_three(value)} {unit}"
        value /= 1000
    return f"{_three(value)} TB"


def times(value: float | None) -> str:
    """A ratio, ``214×`` or ``3.4×`` or ``1.02×``."""
    if value is None:
        return MISSING
    if value >= 99.5:
        return f"{value:,.0f}×"
    return f"{value:.1f}×" if value >= 1.95 else f"{value:.2f}×"


def against_fedavg(saving: float | None) -> str:
    """A saving in words, ``12× fewer bytes than FedAvg``."""
    if saving is None or saving <= 0:
        return "bytes against FedAvg unknown"
    ratio, word = (saving, "fewer") if saving > 1 else (1 / saving, "more")
    if times(ratio) == "1.00×":
        return "as many bytes as FedAvg"
    return f"{times(ratio)} {word} bytes than FedAvg"


def duration(seconds: float | None) -> str:
    """``0.42 s``, ``34 s``, ``2 min 05 s``, ``1 h 02 min``."""
    if seconds is None:
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.2g} s" if seconds >= 0.01 else "<0.01 s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count(amount: int, noun: str) -> str:
    """``1 round``, ``1,200 rounds``."""
    return f"{amount:,} {noun}" + ("" if amount == 1 else "s")


def ranges(numbers: Iterable[int]) -> str:
    """``[1, 2, 3, 7]`` as ``1–3, 7``."""
    ordered = sorted(set(numbers))
    starts = [n for k, n in enumerate(ordered) if k == 0 or n != ordered[k - 1] + 1]
    ends = [n for n, after in pairwise(ordered) if after != n + 1] + ordered[-1:]
    return ", ".join(
        f"{start}" if start == end else f"{start}–{end}"
        for start, end in zip(starts, ends, strict=True)
    )


def _three(value: float) -> str:
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}"


def round_bytes(value: float) -> str:
    """A round number of bytes for an axis, ``300 kB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999:
            return f"{value:g} {unit}"
        value = round(value / 1000, 6)
    return f"{value:g} TB"
