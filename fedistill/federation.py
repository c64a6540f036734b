"""The round: plan, run, check, combine, distil, evaluate, log, checkpoint.

:class:`Federation` puts clients, proxy rows, a student and a method together;
:meth:`Federation.run` is the loop, and it does not know which backend runs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedistill.backends import Away, Backend, at_work, backend_of
from fedistill.backends.serial import Serial
from fedistill.client import Client, Member, Site, new_student
from fedistill.distill.learner import Learner
from fedistill.distill.recipe import Recipe
from fedistill.distill.torch_student import TorchStudent
from fedistill.dormant import MANY, Dormant, accounts, most_awake, remarks, settle, standing
from fedistill.errors import DataError, QuorumError
from fedistill.evaluate import measure_clients, measure_student
from fedistill.exchange import EXCHANGES
from fedistill.gathering import (
    check_clients,
    check_members,
    class_names,
    declared_rows,
    pooled,
)
from fedistill.journal import Journal
from fedistill.log import event
from fedistill.models import parameter_count, pick_device
from fedistill.models import threads as computing
from fedistill.newcomer import private_client
from fedistill.presets import Method, discreet
from fedistill.presets import method as preset
from fedistill.privacy.terms import PRIVATE
from fedistill.server import Combined, Server
from fedistill.settings import PrivacySettings
from fedistill.spent import check_budgets, keep_account, privacy_row, privacy_summary, replanned
from fedistill.state_store import store_of
from fedistill.streamed import Streamed, experience_line, summary_of
from fedistill.tables import TableServer, TableSite
from fedistill.tally import Tally
from fedistill.types import IntArray, ProxySet, Rows
from fedistill.wire.messages import Plan, bucket

ATTEMPTS = 3
"""Tries of a round without quorum before the run gives up."""
PAUSE = 0.05
"""Seconds before the first new try; doubled for each further one."""

UNSAID = {"seconds", "experience"}
"""Figures of a round that a summary leaves out."""

Row = dict[str, Any]
Progress = Callable[[str, int, int], None]


class Federation:
    """Clients that teach one another through predictions on a proxy set.

    Args:
        clients: who takes part; a :class:`Member` is reached by the backend alone.
        proxy: the public rows.
        student: factory of the server's student, or None for none.
        method: a :class:`Method`, or the name of a preset.
        classes: names of the classes; by default "0", "1", ... up to the largest label.
        seed: everything random is derived from it.
        per_round: proxy rows asked in a round; 0 asks all.
        participation: share of the clients asked in a round.
        quorum: fewest teachers of a round; 0 stands for 3, or as many as can be asked at once.
        training: how the student trains where neither the method nor ``student_options`` says.
        student_options: fields of :class:`Recipe` that are set for the student alone.
        device: ``cpu``, ``cuda`` or ``auto``.
        limit: largest message accepted, in bytes.
        anchors: ``[rows]`` labels of proxy rows that the server knows, -1 elsewhere; no client is
            told them.
        stream: what clients with a course meet, and the test rows of it.
        alarm_quorum: alarms in one round that are followed by an extra round of distillation.
        privacy: how clients make private what they share, as all agreed; None: not at all.
            Clients without terms of their own get them, and a private learner.
        awake: clients at work in memory at once; the others sleep, and go on to the bit when they
            are asked. 0: all; None: all of up to 1,000 clients, else 100.
        store: where the states of sleeping clients are while there is no run folder that has
            them: ``disk`` (temporary files) or ``memory``.

    Raises:
        DataError: no clients, equal ids, labels outside the classes, or a negative ``awake``.
    """

    def __init__(
        self,
        clients: Sequence[Client | Member],
        proxy: ProxySet,
        student: Callable[[], Any] | None = None,
        method: Method | str = "fedistill",
        *,
        classes: Sequence[str] | None = None,
        seed: int = 0,
        per_round: int = 0,
        participation: float = 1.0,
        quorum: int = 0,
        training: Recipe | None = None,
        student_options: Mapping[str, Any] | None = None,
        device: str = "auto",
        limit: int = 64 << 20,
        anchors: IntArray | None = None,
        stream: Streamed | None = None,
        alarm_quorum: int = 0,
        privacy: PrivacySettings | None = None,
        awake: int | None = None,
        store: str = "disk",
    ) -> None:
        self.stream = stream
        self.privacy = privacy or PrivacySettings()
        self.method = preset(method) if isinstance(method, str) else method
        if self.privacy.mechanism in (*PRIVATE, "central-gauss"):
            self.method = discreet(self.method, own=not isinstance(method, str))
        self.members: Sequence[Client | Member] = list(clients)
        self.clients = [client for client in clients if isinstance(client, Client)]
        check_members(self.members, self.method.exchange)
        if self.method.exchange == "rows":
            self.members = self.clients = pooled(self.clients)
        self.proxy = proxy if isinstance(proxy, ProxySet) else ProxySet(np.asarray(proxy))
        self.classes = tuple(classes) if classes else class_names(self.clients)
        self.seed = seed
        self.device = str(pick_device(device))
        self.history: list[Row] = []
        self.notes: list[str] = []
        self.sites: Mapping[str, Site] = {}
        self._awake = most_awake(awake, len(self.clients))
        self._store = store_of(store)
        self._away: Away | None = None
        if self.method.teach == "student" and student is None:
            raise DataError(
                f"{self.method.name} teaches clients by the server's student, found none: give the "
                'federation a student, or set teach="targets"'
            )
        check_clients(self.clients, len(self.classes), self.proxy)

        exchange = self.method.exchange
        base = training or (self.clients[0].training if self.clients else Recipe())
        learner = None
        self._travels = exchange == "predictions" or exchange in EXCHANGES
        if student is not None and exchange in {"predictions", "weights"}:
            recipe = self.method.student_recipe(base, **(student_options or {}))
            learner = self._learner(student, recipe)
        kind = TableServer if exchange in EXCHANGES else Server
        self.server = kind(
            self.proxy,
            self.classes,
            learner,
            self.method,
            {member.id: declared_rows(member, exchange) for member in self.members},
            seed=seed,
            per_round=per_round,
            participation=participation,
            quorum=quorum,
            limit=limit,
            anchors=anchors,
            alarm_quorum=alarm_quorum,
            mechanism=self.privacy.mechanism,
            purpose=self.privacy.purpose,
        )
        self._student_factory = student

    # --- the loop ------------------------------------------------------------------------------

    def run(
        self,
        rounds: int,
        test: Rows | None = None,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        measure_every: int = 1,
        backend: str | Callable[[Mapping[str, Site]], Backend] = Serial,
        progress: Progress = lambda label, done, total: None,
        threads: int = 1,
    ) -> Iterator[Row]:
        """Run the rounds; yields one row of figures after each.

        Args:
            rounds: number of rounds in all, those that this object ran before included.
            test: common test rows, for the student and for clients without their own.
            out: folder for checkpoints and ``rounds.jsonl``; None keeps everything in memory.
            resume: go on from the checkpoint in ``out``.
            measure_every: rounds between measurements of the clients, which cost a prediction of
                all test rows by each; the first and the last round are always measured. Of more
                than 1,000 clients, those that the round asked are measured.
            backend: what runs the clients: ``serial``, ``vectorized``, ``processes``, or what makes
                a backend from the sites.
            progress: called with what is being done, how much of it is done, and of how much.
            threads: torch threads while it runs; equal bytes need equal threads.

        Raises:
            QuorumError: too few usable uploads, several times in a row.
            RunError: the folder cannot be written, or the proxy rows changed.
        """
        journal = Journal(Path(out) if out is not None else None, self._identity())
        with journal, computing(threads), contextlib.ExitStack() as ended:
            self._agree(rounds, journal.folder)
            self._begin(journal, resume)
            asked = backend_of(backend)(self.sites)
            self._away = ended.enter_context(at_work(asked))
            said = getattr(asked, "notes", ())
            self.notes += [note for note in said if note not in self.notes]
            self._announce(rounds)
            for number in self._numbers(rounds):
                started = time.monotonic()
                plan, tally, combined = self._exchange(asked, number, progress)
                progress("student", 0, 1)
                self.server.distil(plan)
                regular = number - plan.extra
                due = regular in {1, rounds} or regular % measure_every == 0
                row = self._row(plan, tally, combined, test, due)
                row["seconds"] = round(time.monotonic() - started, 3)
                if "experience" in row:
                    row["experience"]["seconds"] += row["seconds"]
                self.history.append(row)
                journal.save(self.server, self.history)
                told = ("bytes_up", "bytes_down", "seconds")
                event(
                    "round_done",
                    run=plan.run,
                    round=number,
                    answered=row["clients_ok"],
                    accuracy=row["student_accuracy"],
                    **{key: row[key] for key in told},
                )
                yield row
            event("run_done", run=self.server.run, round=self.server.round)

    def _numbers(self, rounds: int) -> Iterator[int]:
        """The rounds still to come; each round of distillation after alarms is one more."""
        while self.server.round < rounds + self.server.extra + self.server.alarmed:
            yield self.server.round + 1

    def _announce(self, rounds: int) -> None:
        """Tell the log that the run begins, or goes on; and whoever looks, that it has ended."""
        if self.server.round and next(self._numbers(rounds), None) is None:
            self.notes.append(f"all {rounds} rounds were done before: more --rounds go on")
        event(
            "run_resumed" if self.server.round else "run_started",
            run=self.server.run,
            round=self.server.round,
            rounds=rounds,
            sites=[member.id for member in self.members],
            method=self.method.name,
        )

    def _exchange(
        self, backend: Backend, number: int, progress: Progress
    ) -> tuple[Plan, Tally, Combined]:
        """Plan, ask, check each answer alone, combine; again, while the quorum is missed."""
        tally: Tally | None = None
        for attempt in range(ATTEMPTS):
            plan = self.server.plan(number, attempt)
            tally = Tally(plan, travels=self._travels, before=tally)
            event(
                "round_started",
                run=plan.run,
                round=number,
                attempt=attempt,
                asked=list(plan.clients),
            )
            for reply in backend.run(plan):
                tally.take(reply, self.server)
                progress("clients", tally.heard, len(plan.clients))
            try:
                combined = self._combine(plan, tally)
            except QuorumError as shortage:
                check_budgets(tally)
                told = [f"{name}: {reason}" for name, reason in sorted(tally.dropped.items())]
                reasons = ", ".join(told[:5]) or "no answer"
                missed = QuorumError(f"{shortage} ({reasons})")
                event(
                    "quorum_missed",
                    run=plan.run,
                    round=number,
                    attempt=attempt,
                    answered=len(tally.answers),
                    quorum=self.server.quorum,
                )
                time.sleep(PAUSE * 2**attempt)
                continue
            self.server.close(plan, tally.seen, len(combined.alarms))
            return plan, tally, combined
        self.server.vigilance.note_all(plan.clients, tally.seen if tally else ())
        raise missed

    def _combine(self, plan: Plan, tally: Tally) -> Combined:
        return self.server.combine(plan, tally.answers) if self._travels else Combined()

    def _row(
        self,
        plan: Plan,
        tally: Tally,
        combined: Combined,
        test: Rows | None,
        due: bool,
    ) -> Row:
        """The figures of a round, as they stand in ``rounds.jsonl``."""
        asked = set(plan.clients) if len(self.clients) > MANY else {*self.sites}
        names = [name for name in self.sites if name in asked]
        own = [client.test for client in self.clients if client.id in asked]
        common = [test] if test is not None else []
        away = None if self._away is None else self._away.measure
        figures = measure_student(self._student(), [t for t in own if t is not None] or common)
        figures |= measure_clients(self.sites, names if due else (), test, away)
        return {
            "round": plan.round,
            **figures,
            "bytes_up": tally.bytes_up,
            "bytes_down": tally.bytes_down,
            "clients_ok": len(tally.answers) - tally.late,
            "clients_failed": len(plan.clients) - len(tally.answers) + tally.late,
            "clients_late": tally.late,
            "uploads": tally.uploads,
            "epsilon_max": combined.epsilon_max,
            **privacy_row(self.server),
            "agreement": combined.agreement,
            "target_entropy": combined.target_entropy,
            "dropped": tally.dropped,
            "flags": self._flags(plan, combined),
            **self._streamed(plan, combined),
        }

    def _student(self) -> Learner | None:
        """The student of the whole: the server's, or where all rows are pooled, theirs."""
        pooled = self.method.exchange == "rows"
        if pooled and self._away is not None:
            self._away.fetch()
        return self.sites["pooled"].learner if pooled else self.server.student

    def _streamed(self, plan: Plan, combined: Combined) -> Row:
        """What a round says of rows that change; nothing where they do not."""
        if self.stream is None:
            return {}
        row: Row = {"alarms": list(combined.alarms), "extra": plan.consolidate}
        ended = self.stream.ends_in(plan.round - plan.extra)
        if ended is not None and not plan.consolidate:
            if self._away is not None:
                self._away.fetch()
            row["experience"] = experience_line(
                self.stream, ended, plan.round, self.sites, self._student(), self.history
            )
        return row

    def _flags(self, plan: Plan, combined: Combined) -> dict[str, list[str]]:
        """Remarks on single clients, from what they sent and from whether they answer."""
        flags = {name: list(remarks) for name, remarks in combined.flags.items()}
        for name in self.server.vigilance.inactive():
            flags.setdefault(name, []).append("inactive")
        asked = set(plan.clients)
        for name in self.sites:
            if name in asked and standing(self.sites, name).clipped:
                flags.setdefault(name, []).append("clipped")
        return flags

    # --- building ------------------------------------------------------------------------------

    def _agree(self, rounds: int, folder: Path | None) -> None:
        """Give clients (or a trusted server) their terms: it is known for how many rounds now."""
        if self.privacy.mechanism == "central-gauss":
            keep_account(self.server, self.privacy, rounds, folder)
        self.clients = [
            client if client.terms else private_client(client, self.privacy, rounds)
            for client in self.clients
        ]
        if self.sites:  # budgets that were planned for fewer rounds
            planned = self.privacy.rounds or rounds
            self.clients = [replanned(client, planned) for client in self.clients]
            for account in accounts(self.sites):
                account.terms = dataclasses.replace(account.terms, rounds=planned)

    def _sites(self, folder: Path | None) -> Mapping[str, Site]:
        """Every client at work, or ready to be woken, with its state under ``folder``."""
        if self._awake:
            people = {client.id: client for client in self.clients}
            sleeping = Dormant(people, self.site, folder, awake=self._awake, rest=self._store())
            self.notes = list(remarks(sleeping, self.proxy, len(self.classes)))
            return sleeping
        sites = {client.id: self.site(client, folder) for client in self.clients}
        self.notes = [note for site in sites.values() for note in site.notes]
        return sites

    def site(self, client: Client, folder: Path | None = None) -> Site:
        """One client at work, untaught, with its state under ``folder``."""
        kind = TableSite if self.method.exchange in EXCHANGES else Site
        if self.method.exchange == "weights":
            client = dataclasses.replace(client, build=self._student_factory or client.build)
        site = kind.open(
            client,
            self.proxy,
            self.classes,
            self.method,
            seed=self.seed,
            device=self.device,
            limit=self.server.limit,
        )
        site.keep_in(folder)
        return site

    def _learner(self, build: Callable[[], Any], recipe: Recipe) -> Any:
        return new_student(build, recipe, self.proxy, len(self.classes), self.seed, self.device)

    # --- state ---------------------------------------------------------------------------------

    def _begin(self, journal: Journal, resume: bool) -> None:
        """Build the sites, or go on with those at hand; restore what the journal holds."""
        if not self.sites:
            self.sites = self._sites(journal.folder)
        settle(self.sites, self.clients, journal.folder)
        if resume and journal.exists():
            history, notes = journal.restore(self.server, self.sites)
            self.history = history
            self.notes += notes
            return
        if self.history:
            # This object has run before: the folder gets what it knows, and goes on from there.
            journal.save(self.server, self.history)
            return
        journal.clear(self.sites)
        # From here on the run has its name: killed in its first round, it goes on as the same.
        journal.save(self.server, self.history)
        if resume:
            self.notes.append("nothing to resume: the run starts from its first round")

    def _identity(self) -> dict[str, str]:
        """What must be the same for a run to be resumed."""
        return {
            "method": f"{self.method.name} {self._recipes()}",
            "seed": str(self.seed),
            "proxy": self.proxy.fingerprint,
            "proxy rows in a round": str(min(self.server.per_round, len(self.proxy))),
            "classes": ",".join(self.classes),
            "codec": self.method.codec,
            "privacy": repr(self.privacy),
            "stream": "" if self.stream is None else f"{self.stream.names} {self.stream.ends[:-1]}",
            "clients": ",".join(
                f"{member.id}:{bucket(len(member.data))}"
                if isinstance(member, Client)
                else member.id
                for member in self.members
            ),
        }

    def _recipes(self) -> str:
        """A short digest of the method and of how everybody trains."""
        rules: dict[str, Any] = {
            name: rule if isinstance(rule := getattr(self.method, name), str) else "own"
            for name in ("rule", "student_rule")
        }
        told: list[Any] = [dataclasses.replace(self.method, **rules)]
        told += [self.method.client_recipe(client.training) for client in self.clients]
        return hashlib.sha256(repr(told).encode()).hexdigest()[:12]

    # --- figures -------------------------------------------------------------------------------

    def fedavg_bytes(self) -> int | None:
        """What FedAvg would send each way per client and round: the student's weights in fp32."""
        student = self.server.student
        if student is None and self._student_factory is not None:
            student = self._learner(self._student_factory, Recipe())
        return 4 * parameter_count(student.module) if isinstance(student, TorchStudent) else None

    def summary(self) -> Row:
        """The facts of the whole run so far."""
        ok = sum(row["clients_ok"] for row in self.history)
        asked = ok + sum(row["clients_failed"] for row in self.history)
        sent = sum(row["uploads"] for row in self.history)
        up = sum(row["bytes_up"] for row in self.history) / sent if sent else 0.0
        down = sum(row["bytes_down"] for row in self.history) / asked if asked else 0.0
        fedavg = self.fedavg_bytes()
        saving = round(2 * fedavg / (up + down), 3) if fedavg and up + down else None
        last = (
            {k: v for k, v in self.history[-1].items() if k not in UNSAID} if self.history else {}
        )
        rule, exchange = self.method.rule, self.method.exchange
        return {
            **last,
            "method": self.method.name,
            "method_summary": self.method.summary,
            "rule": rule if isinstance(rule, str) else getattr(rule, "__name__", "own"),
            "codec": self.method.codec,
            "codec_down": self.method.down(),
            "exchange": self.method.exchange,
            "tells": EXCHANGES[exchange].tells if exchange in EXCHANGES else "",
            "bad": [client.id for client in self.clients if client.wrap is not None],
            "cache": self.method.cache,
            "clients": len(self.members),
            "classes": list(self.classes),
            "proxy_rows": len(self.proxy),
            "proxy_per_round": min(self.server.per_round, len(self.proxy)),
            "bytes_up_per_client_round": round(up, 1),
            "bytes_down_per_client_round": round(down, 1),
            "fedavg_bytes_per_client_round": fedavg,
            "bytes_saving": saving,
            "seconds": round(sum(row["seconds"] for row in self.history), 3),
            "seed": self.seed,
            "proxy_sha256": self.proxy.fingerprint,
            "soft_targets_sha256": self.server.digest(),
            "privacy": privacy_summary(self.privacy, self.server, self.sites),
            "notes": self.notes,
            **self._stream_summary(),
        }

    def _stream_summary(self) -> Row:
        if self.stream is None:
            return {}
        lines = [row["experience"] for row in self.history if "experience" in row]
        return {"stream": summary_of(lines, same=self.stream.same)}
