"""The file of the ledger: SQLite, written durably, proved whenever others have touched it.

Tables: ``entry``, rows of the chain, only ever appended; ``member``, who is in which cohort, under
a keyed hash, with a digest in every row of the chain; ``known``, epsilons that were computed
(:mod:`fedistill.privacy.known`); ``meta``, the version of these tables, and a mark of the key. The
digest of the members covers that mark: under another key all of them would be newcomers.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from fedistill.errors import LedgerError
from fedistill.privacy.chain import ACKNOWLEDGE, COLUMNS, Entry, read_chain
from fedistill.store import sync_folder

SCHEMA = 1
WAIT = 30.0
"""Seconds until a ledger that another process writes to is given up."""

TABLES = f"""
CREATE TABLE entry ({", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())},
    UNIQUE (entry_id, kind));
CREATE TABLE member (unit BLOB PRIMARY KEY, cohort TEXT NOT NULL, erased INTEGER NOT NULL)
    WITHOUT ROWID;
CREATE TABLE known (asked TEXT PRIMARY KEY, epsilon REAL NOT NULL, seal TEXT NOT NULL)
    WITHOUT ROWID;
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""

_INHERITED: list[sqlite3.Connection] = []
"""Connections of a parent process: never used here, and never closed, as its locks hang on them."""


class LedgerFile:
    """One ledger on disk, or in memory.

    Attributes:
        path: the file; ``None`` keeps all in memory. It is made with the first row.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._db: sqlite3.Connection | None = None
        self._owner = os.getpid()
        self._opened_as: tuple[int, int] | None = None
        self._secret: bytes | None = None
        self._entries: tuple[Entry, ...] | None = None
        self._version = -1

    @property
    def name(self) -> str:
        """For errors."""
        return str(self.path) if self.path else "the ledger in memory"

    @property
    def exists(self) -> bool:
        """Whether there is a row, or a file for one.

        Raises:
            LedgerError: the file is gone, but not what SQLite keeps beside it; or it is another
                than was opened.
        """
        if self.path is None:
            return self._db is not None
        found = _identity(self.path)
        if self._db is not None and self._owner == os.getpid() and found != self._opened_as:
            raise LedgerError(
                f"{self.path} was replaced or deleted while it was in use: nothing is released; "
                f"start again with the newest copy in its place, or {ACKNOWLEDGE}"
            )
        if found is not None:
            return True
        if self.path.with_name(self.path.name + "-wal").exists():
            raise LedgerError(
                f"{self.path} is gone, its -wal file is still there: restore it from a backup, "
                f"and {ACKNOWLEDGE}"
            )
        return False

    # --- reading ---------------------------------------------------------------------------------

    def entries(self) -> tuple[Entry, ...]:
        """All rows, proved: the chain, and who is in which cohort.

        They are proved again once another process has written; own rows are as they were written.

        Raises:
            LedgerError: an edited row or table, a damaged file, one of a newer version.
        """
        if not self.exists:
            return ()
        with self.errors():
            db = self._opened()
            version = db.execute("PRAGMA data_version").fetchone()[0]
            if self._entries is None or version != self._version:
                with _snapshot(db):
                    self._entries = self._proved(db)
                self._version = version
        return self._entries

    def _proved(self, db: sqlite3.Connection) -> tuple[Entry, ...]:
        rows = db.execute(f"SELECT {', '.join(COLUMNS)} FROM entry ORDER BY seq")
        try:
            entries = read_chain(rows, self.name)
        except (TypeError, ValueError):
            raise LedgerError(
                f"{self.name} holds events that this version does not know: it needs a newer "
                "fedistill"
            ) from None
        noted = entries[-1].members if entries else self._digest(db, ())
        if noted != self.members_digest(db):
            raise LedgerError(
                f"{self.name} was edited, who is in which cohort, or under which key, is not what "
                f"row {len(entries)} says: nothing is released; restore it and its key from a "
                f"backup, and {ACKNOWLEDGE}"
            )
        return entries

    def members(self) -> Mapping[bytes, str]:
        """Cohort of each unit, by its keyed hash; ``""`` for one that was erased before its use."""
        return self._column("cohort") if self.exists else {}

    def erased(self) -> frozenset[bytes]:
        """Units that were erased, by keyed hash."""
        marks = self._column("erased") if self.exists else {}
        return frozenset(unit for unit, mark in marks.items() if mark == "1")

    def _column(self, name: str) -> dict[bytes, str]:
        with self.errors():
            return dict(self._opened().execute(f"SELECT unit, CAST({name} AS TEXT) FROM member"))

    def members_digest(self, db: sqlite3.Connection | None = None) -> str:
        """SHA-256 of table ``member``, and of the mark of the key that its units stand under."""
        db = db or self._opened()
        told = "SELECT quote(unit) || ' ' || quote(cohort) || ' ' || quote(erased) FROM member"
        return self._digest(db, (str(row[0]) for row in db.execute(f"{told} ORDER BY unit")))

    def _digest(self, db: sqlite3.Connection, members: Iterable[str]) -> str:
        mark = self._meta(db).get("key", "")  # in memory there is none
        return hashlib.sha256("\n".join([mark, *members]).encode()).hexdigest()

    # --- writing ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """All that is appended inside is on disk when it ends, or none of it.

        Raises:
            LedgerError: another process holds the ledger for too long; the disk is full.
        """
        with self.errors():
            db = self._opened(create=True)
            db.execute("BEGIN IMMEDIATE")
            try:
                yield
                db.execute("COMMIT")
            except BaseException:
                self._entries = None
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def append(self, entry: Entry) -> Entry:
        """Add a row at the end of the chain, inside :meth:`writing`."""
        before = self.entries()
        sealed = entry.sealed()
        marks = ", ".join("?" * len(COLUMNS))
        self._opened().execute(f"INSERT INTO entry VALUES ({marks})", sealed.row())
        self._entries = (*before, sealed)
        return sealed

    def move(self, units: Iterable[bytes], cohort: str) -> None:
        """Put units into a cohort, inside :meth:`writing`."""
        self._opened().executemany(
            "INSERT INTO member VALUES (?, ?, 0) "
            "ON CONFLICT (unit) DO UPDATE SET cohort = excluded.cohort",
            ((unit, cohort) for unit in units),
        )

    def erase(self, units: Iterable[bytes]) -> None:
        """Mark units as erased, inside :meth:`writing`; their cohorts stay charged."""
        self._opened().executemany(
            "INSERT INTO member VALUES (?, '', 1) ON CONFLICT (unit) DO UPDATE SET erased = 1",
            ((unit,) for unit in units),
        )

    def drop_leftovers(self) -> None:
        """Remove what SQLite kept beside a file that is gone: it must not get into a new one."""
        if self.path is not None and self._db is None and not self.path.exists():
            with self.errors():
                _remove(self.path)

    # --- computed epsilons -----------------------------------------------------------------------

    def recall(self, asked: str) -> tuple[float, str] | None:
        """An epsilon that was computed earlier, with its seal."""
        if not self.exists:
            return None
        with self.errors():
            row: tuple[float, str] | None = (
                self._opened()
                .execute("SELECT epsilon, seal FROM known WHERE asked = ?", (asked,))
                .fetchone()
            )
            return row

    def remember(self, asked: str, epsilon: float, seal: str) -> None:
        """Keep one. Not being able to is no matter: it is only computed again."""
        if self.exists and not (db := self._opened()).in_transaction:
            with contextlib.suppress(sqlite3.Error):
                db.execute("INSERT OR REPLACE INTO known VALUES (?, ?, ?)", (asked, epsilon, seal))

    # --- the key ---------------------------------------------------------------------------------

    def key(self, *, create: bool = False) -> bytes | None:
        """The 32 bytes that names of units are hashed under; they lie beside the ledger.

        Args:
            create: make one if there is none yet.

        Raises:
            LedgerError: it is gone, or is not the one that this ledger was written with.
        """
        if self._secret is None:
            with self.errors():
                self._secret = self._read_key(create)
        return self._secret

    def _read_key(self, create: bool) -> bytes | None:
        if self.path is None:
            return secrets.token_bytes(32)
        home = self.path.with_suffix(".key")
        if create and not self.path.exists():
            home.parent.mkdir(parents=True, exist_ok=True)
            _place(home, secrets.token_bytes(32))
        if not home.exists() and not self.path.exists():
            return None
        secret = home.read_bytes() if home.exists() else b""
        if self.path.exists() and self._meta(self._opened()).get("key") != _mark(secret):
            raise LedgerError(
                f"{home} must be the key that {self.path.name} was written with, found "
                f"{'another' if secret else 'none'}: restore it from a backup"
            )
        return secret

    # --- opening ---------------------------------------------------------------------------------

    def _opened(self, *, create: bool = False) -> sqlite3.Connection:
        if self._db is not None and self._owner != os.getpid() and self.path is not None:
            _INHERITED.append(self._db)
            self._db = self._entries = None
        if self._db is None:
            self._db = self._connect(create)
            self._owner = os.getpid()
            self._opened_as = _identity(self.path) if self.path else None
        return self._db

    def _connect(self, create: bool) -> sqlite3.Connection:
        if self.path is None:
            db = _connection(":memory:")
            db.executescript(TABLES)
            return db
        if create and not self.exists:
            self._create()
        if self.path.stat().st_size == 0:
            raise LedgerError(_damaged(self.name, "it is empty"))
        db = _connection(self.path)
        try:
            schema = self._meta(db).get("schema", "")
            if schema.isdigit() and int(schema) > SCHEMA:
                raise LedgerError(
                    f"{self.name} has version {schema}, this is made for {SCHEMA}: it needs a "
                    "newer fedistill"
                )
            if schema != str(SCHEMA):
                raise LedgerError(_damaged(self.name, "its version cannot be read"))
        except BaseException:
            db.close()
            raise
        return db

    def _meta(self, db: sqlite3.Connection) -> dict[str, str]:
        return {str(name): str(value) for name, value in db.execute("SELECT * FROM meta")}

    def _create(self) -> None:
        """Written whole, under another name first: a crash leaves a ledger or none."""
        assert self.path is not None
        key = self.key(create=True)
        assert key is not None
        with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as draft:
            draft.executescript(TABLES)
            meta = [("schema", str(SCHEMA)), ("key", _mark(key))]
            draft.executemany("INSERT INTO meta VALUES (?, ?)", meta)
            _place(self.path, draft.serialize())

    def close(self) -> None:
        """Let the file go; it is opened, and proved, again when it is needed."""
        self._entries = None
        if self._db is not None and self.path is not None:
            self._db.close()
            self._db = None

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """What SQLite and the disk have to say, as one sentence."""
        try:
            yield
        except sqlite3.Error as error:
            raise LedgerError(_said(self.name, error)) from None
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise LedgerError(
                f"cannot use {self.name}: {reason}; nothing is released, make room or make it "
                "writable"
            ) from None


def _connection(path: Path | str) -> sqlite3.Connection:
    # Threads share it one at a time: the ledger holds a lock of its own.
    db = sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA wal_autocheckpoint = 1")  # so that a copy of the one file is whole
    except BaseException:
        db.close()
        raise
    return db


@contextlib.contextmanager
def _snapshot(db: sqlite3.Connection) -> Iterator[None]:
    """One state of all tables, whoever writes meanwhile."""
    if db.in_transaction:
        yield
        return
    db.execute("BEGIN")
    try:
        yield
    finally:
        db.execute("ROLLBACK")


def _mark(key: bytes) -> str:
    return hmac.digest(key, b"fedistill ledger", "sha256").hex()


def _place(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, unless there is one already."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    draft.unlink(missing_ok=True)
    try:
        handle = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
        sync_folder(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file lies there; None if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm", "-journal"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _said(name: str, error: sqlite3.Error) -> str:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return (
            f"{name} was in use by another process for {WAIT:g} s: wait until that has ended, and "
            "start again"
        )
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        return f"cannot write to {name}, the disk is full or failing: nothing is released"
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return f"cannot write to {name}: nothing is released; make the file and folder writable"
    return _damaged(name, str(error))


def _damaged(name: str, why: str) -> str:
    return (
        f"{name} is damaged ({why}): nothing is released; restore it from a backup, and "
        f"{ACKNOWLEDGE}"
    )


def keyed(key: bytes, units: Sequence[bytes]) -> list[bytes]:
    """Keyed hash of each name, in order, each once."""
    return sorted({hmac.digest(key, unit, "sha256") for unit in units})


def keyed_digest(key: bytes, units: Sequence[bytes]) -> str:
    """Keyed hash of the set: quick, and enough to see that it is the same one as last time."""
    told = b"".join(len(unit).to_bytes(4, "big") + unit for unit in sorted(set(units)))
    return hmac.digest(key, b"set:" + told, "sha256").hex()
