"""From settings to the rows of every client: read, hold out, scale, deal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from fedistill.config import ClientsSettings, DataSettings, ProxySettings
from fedistill.data.draw import allot, count_of, stratified
from fedistill.data.partition import PARTITIONS, by_column, client_id, file_numbers
from fedistill.data.scale import Scaler
from fedistill.data.sources import read
from fedistill.data.stream import Stream
from fedistill.data.table import Table, align, align_features, rows_of
from fedistill.errors import DataError, did_you_mean
from fedistill.seeding import generator
from fedistill.types import Dataset, IntArray, Rows


@dataclass(frozen=True, eq=False)
class Federated:
    """Who holds which rows.

    Attributes:
        dataset: all private rows before they are dealt, all test rows, the public rows (label -1
            but for those that ``proxy.labelled`` asks for).
        parts: client id to its private rows, labelled ones only.
        tests: client id to its own test rows; empty unless clients come from a column.
        stream: what each client meets in turn, of its rows in ``parts``; None: all of them always.
    """

    dataset: Dataset
    parts: Mapping[str, Rows]
    tests: Mapping[str, Rows] = field(default_factory=dict)
    stream: Stream | None = None


def prepare(
    data: DataSettings,
    proxy: ProxySettings,
    clients: ClientsSettings,
    seed: int,
    *,
    without: str = "",
) -> Federated:
    """Read the source and divide it, as the settings say.

    Args:
        data: the source.
        proxy: the public rows.
        clients: who holds which rows.
        seed: of all draws.
        without: a site (by column) whose private and proxy rows are left out after all draws, so
            that the other sites hold what they hold with it; its test rows stay.

    Raises:
        DataError: a source that cannot be used, or numbers of rows that do not fit together.
    """
    if clients.partition not in PARTITIONS:
        raise DataError(
            f'unknown partition "{clients.partition}"{did_you_mean(clients.partition, PARTITIONS)}'
        )
    by_site = clients.partition == "by-column"
    dataset = load(
        data,
        proxy,
        seed,
        clients if clients.partition == "file" else None,
        clients.column if by_site else "",
        without,
    )
    parts = PARTITIONS[clients.partition].deal(dataset.train, clients, seed)
    limited = {name: labelled(part, clients.labelled, seed, name) for name, part in parts.items()}
    own = dataset.test.site is not None and by_site
    tests = by_column(dataset.test) if own and len(dataset.test) else {}
    measured = [name for name in tests if name in limited or name == without]
    return Federated(dataset, limited, {name: tests[name] for name in measured})


def load(
    data: DataSettings,
    proxy: ProxySettings,
    seed: int,
    from_file: ClientsSettings | None = None,
    column: str = "",
    without: str = "",
) -> Dataset:
    """Read the source; hold out test rows, then public rows; scale all by the public ones.

    Args:
        data: the source and how it is read.
        proxy: how many public rows, or a source of their own.
        seed: of both draws.
        from_file: the file partition that names public and private rows, or None.
        column: the column that holds the sites; test rows are then a share of each site.
        without: a site that gives neither private nor public rows.
    """
    table = read(data.source, data, column=column)
    if len(table.classes) < 2:
        raise DataError(
            f"{table.name}: expected at least two classes, found {len(table.classes)}: check "
            "data.label or data.positive_above"
        )
    rows = rows_of(table, column)
    everything: IntArray = np.arange(len(rows), dtype=np.int64)
    if from_file is None:
        held = _test_numbers(data, rows, everything, seed)
        rest = np.setdiff1d(everything, held)
        public = draw_public(rest, proxy, len(rows), len(held), seed)
        private = np.setdiff1d(rest, public)
    else:
        private, public = _file_rows(from_file, len(rows))
        unused = np.setdiff1d(everything, np.concatenate([private, public]))
        held = _test_numbers(data, rows, unused, seed)
    anchored = rows if proxy.path else hide_labels(rows, public, proxy.labelled, seed)
    if without:
        private, public = (_others(rows, numbers, without) for numbers in (private, public))
    test = read_test(data, table, column) if data.test else rows.take(held)
    seen = read_public(proxy, data, table, seed) if proxy.path else anchored.take(public)
    if not len(private):
        raise DataError(
            f"expected private rows beside the test rows, found none of {len(rows)} left: lower "
            "data.test_rows"
        )
    if not len(seen):
        raise DataError(
            "proxy rows: expected some, found none: add an array 'public' to the partition file, "
            "or set proxy.path"
        )
    scaler = _scaler(table, seen, data)
    train, test, seen = (
        replace(part, inputs=scaler.apply(part.inputs)) for part in (rows.take(private), test, seen)
    )
    return Dataset(table.name, train, test, seen, table.classes)


def _others(rows: Rows, numbers: IntArray, without: str) -> IntArray:
    """Those of the row numbers that belong to another site."""
    if rows.site is None:
        return numbers
    kept = [client_id(str(site)) != without for site in rows.site[numbers]]
    others: IntArray = numbers[np.array(kept, dtype=bool)]
    return others


def _scaler(table: Table, public: Rows, data: DataSettings) -> Scaler:
    scale = table.auto if data.scale == "auto" else data.scale
    return Scaler.fit(public.inputs, table.kind, scale, indicators=data.indicators)


def _file_rows(clients: ClientsSettings, total: int) -> tuple[IntArray, IntArray]:
    parts, public = file_numbers(clients.partition_path, clients.partition_key, total)
    if len(parts) != clients.count:
        raise DataError(
            f"{clients.partition_path}: expected clients.count = {clients.count} arrays "
            f"{clients.partition_key}_0 and so on, found {len(parts)}: set clients.count = "
            f"{len(parts)}"
        )
    return np.sort(np.concatenate(parts)), public


def _test_numbers(data: DataSettings, rows: Rows, among: IntArray, seed: int) -> IntArray:
    """Numbers of the held-out test rows, stratified by class, and by site where there are sites."""
    if data.test:
        return np.zeros(0, dtype=np.int64)
    site = rows.site[among] if rows.site is not None else np.zeros(len(among), dtype=np.str_)
    names, numbers, sizes = np.unique(site, return_inverse=True, return_counts=True)
    if data.test_rows < 1:
        counts = [count_of(data.test_rows, int(size), "data.test_rows") for size in sizes]
    else:
        counts = allot(sizes, count_of(data.test_rows, 0, "data.test_rows")).tolist()
    if not len(among) or data.test_rows > len(among):
        raise DataError(
            f"data.test_rows: expected at most {len(among)} rows beside those in use, found "
            f"{data.test_rows}: lower it, or name a source of test rows as data.test"
        )
    chosen = []
    for number, (name, count) in enumerate(zip(names, counts, strict=True)):
        members = among[numbers == number]
        picked = stratified(rows.labels[members], count, generator(seed, "test", str(name)))
        chosen.append(members[picked])
    return np.sort(np.concatenate(chosen))


def draw_public(
    among: IntArray, proxy: ProxySettings, total: int, tests: int, seed: int
) -> IntArray:
    """Sorted numbers of the public rows, drawn blindly: labels play no part in the choice."""
    if proxy.path:
        return np.zeros(0, dtype=np.int64)
    if proxy.rows >= len(among):
        raise DataError(
            f"proxy.rows: expected fewer than {len(among)} (the source has {total} rows, {tests} "
            f"of them are test rows, and clients need some), found {proxy.rows}: lower proxy.rows "
            "or data.test_rows, or name a source of proxy rows as proxy.path"
        )
    order: IntArray = generator(seed, "public").permutation(among)
    return np.sort(order[: proxy.rows])


def hide_labels(rows: Rows, public: IntArray, labelled: int, seed: int) -> Rows:
    """The rows without labels (-1), but for some of the public ones, drawn blindly.

    They are drawn before a site is left out, so that the others' do not change.

    Args:
        rows: all of them.
        public: numbers of the public ones.
        labelled: how many of these keep their label.
        seed: of the draw.

    Raises:
        DataError: fewer public rows than that.
    """
    if labelled > len(public):
        raise DataError(
            f"proxy.labelled: expected at most {len(public)}, the number of proxy rows, found "
            f"{labelled}: lower it"
        )
    labels = np.full(len(rows), -1, dtype=np.int64)
    kept = generator(seed, "anchors").permutation(public)[:labelled]
    labels[kept] = rows.labels[kept]
    return replace(rows, labels=labels)


def read_test(data: DataSettings, table: Table, column: str) -> Rows:
    """The rows of the test source, with the features and classes of the training source."""
    _other_source(data.test, data.source, "data.test")
    return rows_of(align(read(data.test, data, column=column, owned=False), table), column)


def read_public(proxy: ProxySettings, data: DataSettings, table: Table, seed: int) -> Rows:
    """Proxy rows from a source of their own, which needs no labels but for ``proxy.labelled``."""
    for used, name in ((data.source, "data.source"), (data.test, "data.test")):
        _other_source(proxy.path, used, "proxy.path", name)
    found = align_features(read(proxy.path, data, labelled=False), table)
    if proxy.rows > len(found):
        raise DataError(
            f"proxy.rows: expected at most {len(found)}, the rows of {proxy.path}, found "
            f"{proxy.rows}: lower it"
        )
    rows = rows_of(found)
    if proxy.labelled:
        rows = replace(rows, labels=_public_labels(proxy, data, table))
    order = np.sort(generator(seed, "public").permutation(len(found))[: proxy.rows])
    return hide_labels(rows, order, proxy.labelled, seed).take(order)


def _public_labels(proxy: ProxySettings, data: DataSettings, table: Table) -> IntArray:
    """Labels of all rows of the proxy source, as numbers of the classes that the data have."""
    try:
        return align(read(proxy.path, data, owned=False), table).labels
    except DataError as error:
        raise DataError(
            f"proxy.labelled: expected labels in {proxy.path}, found none that fit ({error}); "
            "without them set proxy.labelled = 0"
        ) from None


def _other_source(source: str, used: str, setting: str, other: str = "data.source") -> None:
    if source == used:
        raise DataError(
            f"{setting}: expected another source than {other}, found the same: its rows would be "
            f"used twice; leave {setting} empty to hold rows out"
        )


def labelled(part: Rows, amount: int | float, seed: int, name: str) -> Rows:
    """The rows of one client that have labels; the others stay unused."""
    count = count_of(amount, len(part), "clients.labelled")
    if not amount or count >= len(part):
        return part
    return part.take(stratified(part.labels, count, generator(seed, "labelled", name)))
