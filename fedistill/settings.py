"""The settings as frozen dataclasses: each field with its meaning, its range and its choices.

Reading, checking, ``fedistill new`` and the settings page of the docs are all derived from these
fields; :mod:`fedistill.config` does the reading and the writing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

OPTIMIZERS = ("sgd", "adam", "adamw")
CLIENT_ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""Ids of clients, which are names of folders too."""
CLIENT_ID_WORDS = "a client id must be 1 to 64 letters, digits, '.', '_' or '-'"
SCALES = ("auto", "standard", "centred", "unit", "none")


def setting(
    default: Any,
    doc: str,
    *,
    choices: str | Sequence[str] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """A field with its meaning and its limits.

    Args:
        default: the value when the file is silent.
        doc: one sentence, shown by ``fedistill new`` and in the docs.
        choices: a kind of ``fedistill.catalog``, or the allowed words.
        low: smallest value, itself allowed.
        high: largest value, itself allowed.
        above: smallest value, itself not allowed.
    """
    metadata = {"doc": doc, "choices": choices, "low": low, "high": high, "above": above}
    if isinstance(default, type) or callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where the rows come from and how they are read."""

    source: str = setting(
        "digits", "digits, breast-cancer, idx:, csv:, npz:, parquet:, hf: or openml: and a name"
    )
    path: str = setting("", "data root for file sources; empty: $FEDISTILL_DATA, else .")
    test: str = setting("", "source of the test rows; empty: a share of the rows is held out")
    test_rows: int | float = setting(
        0.2, "held-out test rows: a count, or a share of each site below 1", low=0
    )
    label: str = setting("label", "csv, parquet: name or number (-1 is last) of the label column")
    header: bool = setting(True, "csv: the first line names the columns")
    separator: str = setting(",", "csv: what separates the columns")
    missing: str = setting(
        "? NA", "csv: texts of a missing value, between spaces, beside the empty one"
    )
    zero_missing: tuple[str, ...] = setting(
        (), "names or numbers of columns in which 0 stands for a missing value"
    )
    categorical: tuple[str, ...] = setting(
        (), "names or numbers of columns whose numbers are codes: a 0/1 column for each"
    )
    indicators: float = setting(
        1.0,
        "add a 0/1 column for columns missing in more than this share of the public rows; "
        "1: for none",
        low=0,
        high=1,
    )
    drop: tuple[str, ...] = setting((), "csv and parquet: names or numbers of columns to leave out")
    positive_above: float | None = setting(
        None, "make two classes: 1 where the label is above this number"
    )
    positive: tuple[str, ...] = setting(
        (), "csv, parquet: make two classes: 1 where the label is one of these"
    )
    history: int = setting(20, "sessions: the clicks before the next that are looked at", low=1)
    items: int = setting(
        1000, "sessions: how many of the most frequent items make the catalogue; 0: all", low=0
    )
    subject: str = setting(
        "",
        "csv, parquet: name or number of the column that says whose row it is; no input: for "
        "users as the unit of privacy, and for erasure",
    )
    scale: str = setting(
        "auto",
        "standard (mean 0, deviation 1), centred ([0,255] to [-1,1]), unit (largest is 1), none; "
        "statistics from public rows only; auto: standard for tables, centred for images",
        choices=SCALES,
    )


@dataclass(frozen=True, kw_only=True)
class ProxySettings:
    """The public rows on which clients share predictions."""

    rows: int = setting(400, "proxy rows, drawn from the seed", low=1)
    per_round: int = setting(0, "rows asked in a round; 0: all of them", low=0)
    path: str = setting("", "source of the proxy rows; empty: drawn from the data")
    labelled: int = setting(
        0,
        "proxy rows whose labels the server knows (anchors): for rules that judge by them; 0: none",
        low=0,
    )


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a model is built and trained."""

    model: str = setting("mlp", "the kind of model", choices="models")
    width: int = setting(64, "hidden units, or channels of a cnn", low=1)
    depth: int = setting(1, "hidden layers of an mlp", low=1, high=64)
    epochs: int = setting(2, "passes over the own rows in a round", low=0)
    batch_size: int = setting(50, "rows in a step", low=1)
    lr: float = setting(0.1, "learning rate", above=0)
    optimizer: str = setting("sgd", "the optimizer", choices=OPTIMIZERS)
    momentum: float | None = setting(
        None, "momentum of sgd; not set: the method decides", low=0, high=1
    )
    weight_decay: float = setting(0.0, "weight decay", low=0)
    clip: float = setting(5.0, "largest gradient norm; 0: not clipped", low=0)


@dataclass(frozen=True, kw_only=True)
class TrainOverrides:
    """How a model is built and trained; what is not set here is decided elsewhere."""

    model: str | None = setting(None, "the kind of model", choices="models")
    width: int | None = setting(None, "hidden units, or channels of a cnn", low=1)
    depth: int | None = setting(None, "hidden layers of an mlp", low=1, high=64)
    epochs: int | None = setting(None, "passes over its rows in a round", low=0)
    batch_size: int | None = setting(None, "rows in a step", low=1)
    lr: float | None = setting(None, "learning rate", above=0)
    optimizer: str | None = setting(None, "the optimizer", choices=OPTIMIZERS)
    momentum: float | None = setting(None, "momentum of sgd", low=0, high=1)
    weight_decay: float | None = setting(None, "weight decay", low=0)
    clip: float | None = setting(None, "largest gradient norm; 0: not clipped", low=0)


@dataclass(frozen=True, kw_only=True)
class GroupSettings(TrainOverrides):
    """Clients of another kind; what is not set here comes from [clients]."""

    count: int = setting(0, "how many of the clients, in order; 0: those named in sites", low=0)
    sites: tuple[str, ...] = setting((), "the clients by id")
    mechanism: str | None = setting(
        None, "how these are made private; not set: as [privacy] says", choices="mechanisms"
    )


@dataclass(frozen=True, kw_only=True)
class ClientsSettings(TrainSettings):
    """Who takes part, which rows each holds, and how each trains."""

    count: int = setting(8, "clients; by column: as many as the column has values", low=1)
    names: tuple[str, ...] = setting((), "ids of the clients in place of site-0, site-1 ...")
    partition: str = setting("dirichlet", "how rows are dealt to clients", choices="partitions")
    alpha: float = setting(0.3, "dirichlet: the smaller, the more unequal the classes", above=0)
    classes_per_client: int = setting(2, "shards: shards dealt to each client", low=1)
    column: str = setting(
        "",
        "by-column: the column whose values are the sites; csv: also 'file'; several with +, "
        "numbers in bands: EDUCATION:2,3 + AGE:35",
    )
    partition_path: str = setting("", "file: an npz with arrays of row numbers")
    partition_key: str = setting("", "file: arrays are KEY_0 ... KEY_{n-1}, and 'public'")
    labelled: int | float = setting(
        0, "labelled rows of a client: a count, or a share below 1; 0: all", low=0
    )
    participation: float = setting(1.0, "share of the clients asked in a round", above=0, high=1)
    quorum: int = setting(0, "fewest usable uploads of a round; 0: 3, or all if fewer", low=0)
    dropout: float = setting(
        0.0, "simulated: share of those asked who are offline in a round", low=0, high=1
    )
    stragglers: float = setting(
        0.0, "simulated: share of those asked whose upload misses the deadline", low=0, high=1
    )
    lateness: int = setting(1, "rounds by which the upload of a straggler is late", low=1, high=3)
    group: tuple[GroupSettings, ...] = setting((), "clients of other kinds")


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """A preset, and what differs from it."""

    preset: str = setting("fedistill", "the method", choices="methods")
    rule: str | None = setting(None, "how predictions become soft targets", choices="rules")
    codec: str | None = setting(None, "how predictions become bytes", choices="codecs")
    codec_down: str | None = setting(
        None,
        "how soft targets become bytes; not set: as the method has it, or like codec",
        choices="codecs",
    )
    cache: bool | None = setting(None, "send what changed against what the other side holds")
    cache_rounds: int | None = setting(
        None, "with a cache: rounds that a soft target stays fresh and is not asked again", low=0
    )
    rows: str | None = setting(
        None,
        "proxy rows: drawn for each round, or fixed to those of the first",
        choices=("drawn", "fixed"),
    )
    sharpen: str | None = setting(None, "after the rule: none, era:TEMPERATURE or power:EXPONENT")
    student_rule: str | None = setting(
        None, "the rule for the server's student, where it is another one", choices="rules"
    )
    teach: str | None = setting(
        None,
        "clients learn from the soft targets, or from what the server's student predicts",
        choices=("targets", "student"),
    )
    familiarity: str | None = setting(
        None,
        "how a client tells which rows are like its own: none, head (an output of its network), "
        "kulsif, logistic",
        choices=("none", "head", "kulsif", "logistic"),
    )
    accept: float | None = setting(
        None,
        "clients answer rows as familiar as this quantile of their own; 0: all rows",
        low=0,
        high=1,
    )
    ambiguity: float | None = setting(
        None, "targets this far (L1) from certainty are dropped; 2: none is", above=0, high=2
    )
    late: float | None = setting(
        None,
        "what an upload counts that comes a round late, and again for each round; 0: nothing",
        low=0,
        high=1,
    )
    temperature: float | None = setting(None, "temperature of the distillation loss", above=0)
    distil: str | None = setting(
        None,
        "clients distil inside the local steps, in a phase before them, or never",
        choices=("inside", "phase", "never"),
    )
    distil_epochs: int | None = setting(None, "epochs of a distillation phase", low=1)
    soft_weight: float | None = setting(None, "weight of the soft part inside local steps", low=0)
    average: float | None = setting(
        None, "decay of the moving average of weights that predicts; 0: off", low=0, high=1
    )
    mixup: float | None = setting(
        None, "concentration of the law that mixes rows and their targets; 0: off", low=0
    )
    scarce_rows: int | None = setting(
        None, "with fewer own rows than this the soft part weighs more, in proportion", low=0
    )
    memory: float | None = setting(
        None,
        "what a soft target weighs a round later: 0 teaches the last round's alone, 1 all",
        low=0,
        high=1,
    )
    prior_rows: float | None = setting(
        None, "distribution-weighted, trust: rows a client's familiarity must outweigh", low=0
    )
    exponent: float | None = setting(None, "power: above 1 sharpens", above=0)
    trim: float | None = setting(None, "trimmed-mean: share cut off at either end", low=0, high=0.5)
    byzantine: float | None = setting(
        None, "krum: share of bad clients that is assumed", low=0, high=0.5
    )
    diversity: float | None = setting(None, "consensus: weight of those who disagree", low=0)
    centroids: int | None = setting(None, "clusters: targets a row", low=1, high=64)
    rate: float | None = setting(None, "trust: how fast it is lost", low=0)
    forget: float | None = setting(
        None, "trust: what is left of a bad record a round later", low=0, high=1
    )
    guide_weight: float | None = setting(
        None, "fd, fedproto, fedhenn: weight of what others shared", low=0
    )


@dataclass(frozen=True, kw_only=True)
class StudentSettings(TrainOverrides):
    """The server's student, taught by soft targets alone.

    What is not set, the method decides; the kind of model is that of [clients], 128 wide.
    """


COURSES = ("abrupt", "gradual", "recurring")
ORDERS = ("same", "own")
TEACHERS = ("none", "ema", "self")
WATCHED = ("entropy", "confidence", "margin", "predictions", "error", "loss")


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """How the clients' rows change while the federation runs."""

    experiences: int = setting(0, "units of the stream; 0: the rows stay as they are", low=0)
    shift: str = setting("time", "what makes experiences differ", choices="shifts")
    course: str = setting(
        "abrupt",
        "abrupt; gradual: neighbours overlap; recurring: what was comes back",
        choices=COURSES,
    )
    overlap: float = setting(
        0.2, "gradual: share of an experience that mixes with the next", above=0, high=0.5
    )
    first: float = setting(
        0.0, "time: share of the rows in the first experience; 0: as in the others", low=0, high=1
    )
    degrees: float = setting(180.0, "rotation: the largest angle", low=0, high=360)
    alpha: float = setting(
        0.3, "label-prior: the smaller, the more the class shares change", above=0
    )
    strength: float = setting(1.0, "covariate: how far the inputs move, in deviations", low=0)
    order: str = setting(
        "same", "clients meet the experiences in the same order, or each in its own", choices=ORDERS
    )
    every: int = setting(0, "rounds of an experience; 0: rounds / experiences, rounded down", low=0)
    lag: int = setting(0, "rounds by which each client's shifts come after the last's", low=0)


@dataclass(frozen=True, kw_only=True)
class ContinualSettings:
    """How clients keep what they learned: what they remember, and what a step minimises."""

    buffer: int = setting(0, "own rows that a client remembers; 0: none", low=0)
    policy: str = setting("reservoir", "which of its rows stay", choices="policies")
    draw: str = setting(
        "uniform",
        "which are replayed: uniform, balanced, mir",
        choices=("uniform", "balanced", "mir"),
    )
    max_uses: int = setting(0, "uses after which a remembered row leaves; 0: no limit", low=0)
    objective: str | None = setting(
        None,
        "what a step minimises; not set: er with a buffer, new rows alone without",
        choices="objectives",
    )
    replay_rows: int | None = setting(
        None, "remembered (cfed: public) rows in a step; not set: the objective's own", low=1
    )
    alpha: float | None = setting(None, "der, der++, steady: weight of logits", low=0)
    beta: float | None = setting(None, "der++, steady: weight of remembered labels", low=0)
    weight: float | None = setting(None, "lwf, cfed: weight of the teacher", low=0)
    learns: float | None = setting(
        None, "cfed: share of the rounds in which a client learns new rows", low=0, high=1
    )
    distils: float | None = setting(
        None, "cfed: share of the rounds in which a client distils", low=0, high=1
    )
    teacher: str = setting(
        "none",
        "who teaches besides: none (or whom the objective asks for); ema, an average of the "
        "student; self, the student before the experience",
        choices=TEACHERS,
    )
    teacher_weight: float = setting(0.1, "of a teacher that the objective does not ask for", low=0)
    decay: float = setting(0.99, "of the average that teaches", low=0, high=1)
    drift: str | None = setting(
        None, "what watches the predictions on new rows; not set: nothing", choices="detectors"
    )
    on: str = setting(
        "entropy",
        "what it watches: entropy, confidence, margin, predictions (mmd), error, loss",
        choices=WATCHED,
    )
    on_drift: str = setting(
        "consolidate",
        "what a client does after an alarm: consolidate on what it remembers, forget it (where "
        "labels mean something else now), nothing",
        choices=("consolidate", "forget", "nothing"),
    )
    quorum: int = setting(
        0,
        "clients with an alarm in one round that make the next a round of distillation; 0: none",
        low=0,
    )

    @property
    def active(self) -> bool:
        """Whether clients do more than train on the rows of the day."""
        return bool(self.buffer or self.objective or self.drift) or self.teacher != "none"


UNITS = ("record", "user")


@dataclass(frozen=True, kw_only=True)
class PrivacySettings:
    """Differential privacy of what a client shares."""

    mechanism: str = setting("none", "how predictions are made private", choices="mechanisms")
    unit: str = setting(
        "record",
        "whose presence is hidden: that of a record, or of a user with all of its rows "
        "(data.subject names the column)",
        choices=UNITS,
    )
    epsilon: float = setting(
        8.0, "the most that may be spent of a client's rows, earlier runs included", above=0
    )
    delta: float | None = setting(
        None, "not set: 1e-5, or less where a client has many rows: 1 / (10 rows)", above=0, high=1
    )
    rounds: int = setting(
        0,
        "rounds in which clients train on own rows; in later ones they learn from soft targets "
        "alone, which is free; 0: all rounds of the run",
        low=0,
    )
    clip_norm: float = setting(1.0, "largest gradient norm of a record (or user)", above=0)
    sample_rate: float = setting(
        0.0,
        "probability of a record (or user) to be in a step; 0: 1 for dp-head, 0.25 else",
        low=0,
        high=1,
    )
    steps: int | None = setting(
        None,
        "noisy steps in a round; not set: 1 for dp-head, clients.epochs / sample_rate else",
        low=1,
    )
    sigma: float | None = setting(
        None,
        "noise multiplier; not set: as little as keeps all rounds within epsilon",
        above=0,
    )
    lr: float | None = setting(
        None, "learning rate of noisy steps; not set: 25 for dp-head, clients.lr else", above=0
    )
    encoder: str = setting(
        "auto",
        "dp-head: what turns inputs into features, made from public rows alone",
        choices="encoders",
    )
    teachers: int = setting(50, "gnmax: sub-teachers of a client, each on its own rows", low=2)
    threshold: float = setting(
        0.4,
        "gnmax: share of the sub-teachers that is taken to agree on a row: the higher, the surer "
        "its answers",
        above=0,
        high=1,
    )
    purpose: str = setting("", "what the run is for; a site may allow some purposes only")


Privacy = PrivacySettings
"""Its name in Python: ``fd.Privacy(mechanism="dpsgd", epsilon=3)``."""


@dataclass(frozen=True, kw_only=True)
class AttackSettings:
    """Simulated bad clients; the baselines run without them."""

    kind: str | None = setting(None, "what the bad clients do", choices="attacks")
    count: int = setting(0, "how many are bad, drawn from the seed", low=0)
    collude: bool = setting(False, "they pool their rows, train alike and disguise it by noise")


@dataclass(frozen=True, kw_only=True)
class BackendSettings:
    """What runs the clients."""

    name: str = setting("serial", "the backend", choices="backends")
    device: str = setting("auto", "cpu, cuda, or auto: cuda where there is one")
    threads: int = setting(1, "torch threads of a worker", low=1)
    workers: int = setting(
        0, 'worker processes of the backend "processes"; 0: as many as there are cores', low=0
    )
    tune: bool = setting(
        False, 'the backend "vectorized" measures once how many clients it trains side by side'
    )
    awake: int | None = setting(
        None,
        "clients at work in memory at once, the others sleep; 0: all; not set: all of up to 1,000 "
        "clients, else 100",
        low=0,
    )
    store: str = setting(
        "disk",
        "where states of sleeping clients are that the run folder does not hold: in temporary "
        "files, or in memory",
        choices=("disk", "memory"),
    )
    max_message_mb: float = setting(64.0, "largest message accepted, in MiB", above=0)


@dataclass(frozen=True, kw_only=True)
class DeploymentSettings:
    """A federation of real sites; where no site is named, the run is a simulation.

    Paths are relative to the folder of the settings file.
    """

    sites: tuple[str, ...] = setting((), "ids of the sites that take part")
    classes: tuple[str, ...] = setting((), "names of the classes, in the order all agree on")
    proxy_sha256: str = setting("", "fingerprint of the proxy rows; every site must find the same")
    deadline: float = setting(600.0, "seconds that a site has to answer a round", above=0)
    grace: float = setting(
        15.0, "seconds that an offline site is waited for once all others have answered", low=0
    )
    most_rows: int = setting(
        0, "rows that a site counts with at most, whatever it declares; 0: what it declares", low=0
    )
    superlink: str = setting("127.0.0.1:9091", "host:port at which the coordinator starts runs")
    ca: str = setting("ca.crt", "certificate of the authority that signed the SuperLink's")
    keys: str = setting("sites", "folder of the sites' public keys, ID.pub")
    app: str = setting("app", "folder of the Flower app; where there is none, it is made up")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What the run is measured against; all of it lands in the report's per-site table."""

    baselines: tuple[str, ...] = setting((), "methods run on the same rows for comparison")
    leave_one_out: bool = setting(False, "also federate without each client and test on its rows")
    without_privacy: bool = setting(
        False, "also run the same without differential privacy, to see what privacy costs"
    )
    every: int = setting(
        1, "rounds between measurements of the clients; the last round always is", low=1
    )
    repeats: int = setting(1, "seeds, counted up from seed; figures are mean and deviation", low=1)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A whole experiment."""

    seed: int = setting(7, "everything random is derived from it", low=0)
    rounds: int = setting(10, "rounds of exchange", low=1)
    data: DataSettings = setting(DataSettings, "")
    proxy: ProxySettings = setting(ProxySettings, "")
    clients: ClientsSettings = setting(ClientsSettings, "")
    method: MethodSettings = setting(MethodSettings, "")
    student: StudentSettings = setting(StudentSettings, "")
    stream: StreamSettings = setting(StreamSettings, "")
    continual: ContinualSettings = setting(ContinualSettings, "")
    privacy: PrivacySettings = setting(PrivacySettings, "")
    attack: AttackSettings = setting(AttackSettings, "")
    backend: BackendSettings = setting(BackendSettings, "")
    evaluation: EvaluationSettings = setting(EvaluationSettings, "")
    deployment: DeploymentSettings = setting(DeploymentSettings, "")


@dataclass(frozen=True, kw_only=True)
class OwnDataSettings:
    """Where a site's own rows are; how they become inputs is agreed by all."""

    source: str = setting(
        "", "csv:, npz:, parquet:, idx: and a name; empty: no rows, it only learns"
    )
    path: str = setting(".", "folder that the sources start from; .: that of site.toml")
    arrivals: str = setting(
        "",
        "source and pattern of files that come between rounds, such as csv:incoming/*.csv: each is "
        "the next experience, in the order of names",
    )
    test: str = setting("", "source of own test rows; empty: a share of the rows is held out")
    test_rows: int | float = setting(
        0.2, "rows held out to test the student on: a count, or a share below 1; 0: none", low=0
    )
    label: str | None = setting(None, "the label column here; not set: as agreed")
    header: bool | None = setting(None, "csv: the first line names the columns; not set: as agreed")
    separator: str | None = setting(None, "csv: what separates the columns; not set: as agreed")
    missing: str | None = setting(None, "csv: texts of a missing value; not set: as agreed")
    drop: tuple[str, ...] = setting((), "columns that the public rows do not have: to leave out")


SHARED = ("class-logits", "prototypes", "kernel")
"""What a site may allow to be shared beside predictions on proxy rows."""


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """What a site allows, whatever the coordinator asks."""

    runs: int = setting(0, "most runs that are answered; 0: no limit", low=0)
    rounds: int = setting(0, "most rounds of one run that are answered; 0: no limit", low=0)
    rows: int = setting(0, "most proxy rows answered in a round; 0: all of them", low=0)
    share: tuple[str, ...] = setting(
        (),
        "what may be shared beside predictions on proxy rows: class-logits, prototypes, kernel",
    )
    seconds: float = setting(
        0.0, "longest step; 0: until the coordinator no longer waits for it", low=0
    )
    mechanisms: tuple[str, ...] = setting(
        (), "privacy mechanisms that are enough for this site; empty: any, none included"
    )
    epsilon: float = setting(
        0.0, "most privacy loss of this site's rows, ever; 0: what the federation agreed on", low=0
    )
    delta: float = setting(
        0.0, "largest delta of it; 0: what the federation agreed on", low=0, high=1
    )
    purposes: tuple[str, ...] = setting((), "purposes that are answered; empty: any")
    proxies: tuple[str, ...] = setting(
        (), "fingerprints (sha256) of proxy rows that are answered; empty: those agreed on"
    )


@dataclass(frozen=True, kw_only=True)
class SiteSettings:
    """One real site: its rows, its model, what it allows. Everything else is agreed by all."""

    id: str = setting("", "the site's id, as the coordinator knows it")
    federation: str = setting("federation.toml", "the settings that all sites agreed on")
    mechanism: str | None = setting(
        None, "how this site is made private; not set: as agreed", choices="mechanisms"
    )
    data: OwnDataSettings = setting(OwnDataSettings, "")
    training: TrainOverrides = setting(TrainOverrides, "")
    policy: PolicySettings = setting(PolicySettings, "")
