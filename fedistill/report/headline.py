"""The top of the report: what was run, what came of it, and what a reader must not miss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedistill.privacy import disclosure
from fedistill.report import shared, simulated, words
from fedistill.report.folder import Run
from fedistill.report.words import number

ENDS: Mapping[str, str] = {
    "quorum": "too few usable uploads",
    "budget": "every site has spent its privacy budget",
}
"""Why a run failed, in plain words."""


@dataclass(frozen=True)
class Tile:
    """One large number with its name and a line of context."""

    name: str
    value: str
    context: str
    bad: bool = False


@dataclass(frozen=True)
class Savings:
    """How many times fewer bytes than FedAvg: in all, up, and down. Below 1 the run lost."""

    total: float | None
    up: float | None
    down: float | None


def savings(run: Run) -> Savings:
    """The savings of a run, from its figures per client-round."""
    fedavg = run.figure("fedavg_bytes_per_client_round")
    up = run.figure("bytes_up_per_client_round")
    down = run.figure("bytes_down_per_client_round")
    total = run.figure("bytes_saving")
    if total is None and fedavg is not None and up is not None and down is not None and up + down:
        total = 2 * fedavg / (up + down)
    return Savings(total, _ratio(fedavg, up), _ratio(fedavg, down))


def sentence(run: Run) -> str:
    """The headline."""
    method, clients, done = run.method, run.figure("clients"), len(run.rounds)
    who = words.count(int(clients), "site") if clients else "Several sites"
    after = f" after {words.count(done, 'round')}"
    student = run.figure("student_accuracy")
    mean = run.figure("client_accuracy_mean")
    if not done:
        return f"{who} started, and no round was finished"
    if student is not None:
        return f"{who}, one student: {words.percent(student)} correct{after}"
    if mean is not None:
        return f"{who}: {words.percent(mean)} correct on average{after}"
    return f"{who}{after}{f', by {method}' if method else ''}"


def lead(run: Run) -> str:
    """A few sentences in plain words under the headline."""
    method, summary = run.method, run.text("method_summary", 240).rstrip(".")
    said = [f"Method: {method}" + (f", {_lower(summary)}." if summary else ".")] if method else []
    rows, asked = run.figure("proxy_rows"), run.figure("proxy_per_round")
    if rows and shares_predictions(run):
        part = f", {asked:,.0f} of them in each round" if asked and asked < rows else ""
        chosen = shared.method_of(run)
        familiar = chosen is not None and chosen.tells_familiarity()
        said.append(
            f"The sites kept their own rows and shared only predictions on "
            f"{rows:,.0f} proxy rows{part}"
            + (", with how familiar each row is to them." if familiar else ".")
        )
    elif table := shared.what(run):
        said.append(f"The sites kept their own rows, and exchanged tables: {table}.")
    said += simulated.sentences(run)
    if run.repeats:
        said.append(
            f"Figures are means over {words.count(len(run.repeats), 'repeat')} with "
            "different seeds; ± and bands are one standard deviation."
        )
    return " ".join(said)


def tiles(run: Run) -> list[Tile]:
    """The four numbers of a run."""
    saving = savings(run).total
    first = next(iter(run.curve("client_accuracy_mean")), None)
    mean = run.figure("client_accuracy_mean")
    context = f"least {words.percent(run.figure('client_accuracy_min'))}"
    if first and mean is not None and len(run.rounds) > 1:
        context += f"; {words.percent(first.y)} after round {first.x:.0f}"
    auc = run.figure("student_auc")
    ratio = saving if saving is None or saving >= 1 else 1 / saving
    student = Tile(
        "Student",
        words.percent(run.figure("student_accuracy")),
        _spread(run, "student_accuracy")
        + "correct on the test rows"
        + (f"; AUC {auc:.3f}" if auc is not None else ""),
    )
    if not has_student(run):
        student = Tile("Student", "none", "the server has no model")
    return [
        student,
        Tile("Clients, mean", words.percent(mean), _spread(run, "client_accuracy_mean") + context),
        Tile(
            "Bytes against FedAvg",
            words.times(ratio),
            _no_saving(run)
            if saving is None
            else "fewer, both ways together"
            if saving >= 1
            else "MORE, both ways together",
            bad=saving is not None and saving < 1,
        ),
        Tile(
            "Privacy",
            epsilon(run),
            privacy(run) if run.figure("epsilon_max") is None else _spent(run),
        ),
    ]


def has_student(run: Run) -> bool:
    """Whether the server has a model: no, where clients were measured and a student never was."""
    measured = run.figure("client_accuracy_mean") is not None
    return run.figure("student_accuracy") is not None or not measured


def shares_predictions(run: Run) -> bool:
    """Whether predictions on proxy rows are what the sites share."""
    return shared.exchange(run) == shared.PREDICTIONS


def epsilon(run: Run) -> str:
    """``no DP`` where no mechanism ran, else what was spent; what is unknown is called so."""
    spent = run.figure("epsilon_max")
    if spent is not None:
        return f"ε = {words.epsilon(spent)}"
    return "no DP" if run.mechanism in disclosure.NO_DP else "ε unknown"


def privacy(run: Run) -> str:
    """What is promised, plainly; without a mechanism ``no differential privacy``."""
    statement = words.clean(run.table("privacy").get("statement") or "", 300)
    if statement or run.figure("epsilon_max") is None:
        return statement or disclosure.unstated(run.mechanism)
    return disclosure.meaningless(run.mechanism)


def warnings(run: Run) -> list[str]:
    """What a reader must see before the numbers."""
    said = []
    status = run.text("status", 80)
    if status.startswith("failed"):
        reason = status.partition(":")[2].strip()
        why = ENDS.get(reason, reason)
        said.append(
            f"The run failed{f': {why}' if why else ''}. "
            "The figures are those of the last finished round."
        )
    elif status == "interrupted" or not run.summary:
        said.append("The run did not finish. The figures are those of the last finished round.")
    if told := shared.tells(run):
        said.append(f"The sites shared more than predictions. It tells {told}.")
    saved = savings(run)
    if saved.total is not None and saved.total < 1:
        advice = "Fewer proxy rows, a smaller codec or fewer rows per round would change that."
        said.append(
            f"This run sent {words.against_fedavg(saved.total)} {for_student(run)}."
            + (f" {advice}" if shares_predictions(run) else "")
        )
    else:
        for way, value in (("up", saved.up), ("down", saved.down)):
            if value is not None and value < 1:
                said.append(f"On the way {way} this run sent {words.against_fedavg(value)}.")
    return said


def for_student(run: Run) -> str:
    """Whose weights FedAvg would send."""
    return "for the same student" if has_student(run) else "for the student of the settings"


def notes(run: Run) -> list[str]:
    """The run's own notes and what the reader of the folder missed."""
    own = run.summary.get("notes")
    found = own if isinstance(own, list) else []
    return [words.clean(note, 400) for note in found[:40]] + list(run.remarks)


def _spent(run: Run) -> str:
    """What the epsilon of the run is that of."""
    promised = disclosure.guarantee(run.summary)
    if promised is None:
        return "spent by the site that spent most"
    budget = promised["budget"]
    of = f"of {budget:.3g} at most; " if budget else ""
    delta = f"δ\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{words.delta(promised['delta'])}"
    return f"{of}per {words.clean(promised['unit'], 20)}, {delta}"


def _no_saving(run: Run) -> str:
    return "nothing was sent" if run.rounds and not _sent(run) else "unknown"


def _sent(run: Run) -> float:
    return run.total("bytes_up", "bytes_down")


def _ratio(fedavg: float | None, ours: float | None) -> float | None:
    return fedavg / ours if fedavg is not None and ours else None


def _spread(run: Run, key: str) -> str:
    """``± 1.8; `` where a run was repeated: the summary's deviation, else the last round's."""
    deviation = number(run.summary.get(f"{key}_sd"))
    if deviation is None and (curve := run.curve(key)):
        deviation = curve[-1].sd
    return "" if deviation is None else f"± {100 * deviation:.1f}; "


def _lower(summary: str) -> str:
    """A sentence made to follow a comma; abbreviations keep their capitals."""
    return summary if summary[1:2].isupper() else summary[:1].lower() + summary[1:]
