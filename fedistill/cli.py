"""The command line: thin commands, with their imports inside, so that help is instant."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import click
import typer
import typer.core

from fedistill.errors import FedistillError

# Plain help takes half the time of styled help; else typer would still escape brackets for rich.
typer.core.HAS_RICH = False

MOST_NOTES = 10
AUDIT_FAILED = 5
INTERRUPTED = 130
RESUMABLE = "fedistill: interrupted; the same command with --resume goes on"

app = typer.Typer(
    name="fedistill",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

File = Annotated[Path, typer.Argument(help="Settings file (TOML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, e.g. clients.alpha=0.1."),
]


def _version(wanted: bool) -> None:
    if wanted:
        from fedistill import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def everywhere(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", is_eager=True, callback=_version),
    ] = False,
) -> None:
    """Federated distillation: sites teach one another through predictions on public rows."""
    del version


@app.command()
def run(
    file: File,
    overrides: Overrides = None,
    backend: Annotated[str | None, typer.Option(help="What runs the clients.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Number of rounds.")] = None,
    seed: Annotated[int | None, typer.Option(help="Everything random is derived from it.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run folder.")] = False,
) -> None:
    """Run an experiment.

    Shows the round table live and writes a run folder with a report.
    """
    from fedistill import config

    changes = [*(overrides or [])]
    given = {"backend.name": backend, "rounds": rounds, "seed": seed}
    changes += [f"{key}={value}" for key, value in given.items() if value is not None]
    settings = config.load(file, changes)

    show = _round_table(settings.privacy.mechanism)
    if settings.backend.name == "flower":
        from fedistill.flower import launch

        summary = launch.run(settings, file, out=out, resume=resume, show=show)
    else:
        from fedistill import experiment

        summary = experiment.run(settings, name=file.stem, out=out, resume=resume, show=show)
    folder = Path(summary["folder"])
    for note in summary.get("notes", [])[:MOST_NOTES]:
        typer.echo(f"note: {note}")
    typer.echo(f"report: {folder / 'report.html'}")


def _round_table(mechanism: str) -> Any:
    """What shows the rounds of a run; with epsilon where it is counted."""
    from functools import partial

    from fedistill.report import RoundTable

    return partial(RoundTable, private=mechanism not in {"none", "hard-label"})


@app.command()
def check(file: File, overrides: Overrides = None) -> None:
    """Check a settings file and print its plan.

    All problems at once; clients, rows and bytes per round against FedAvg. Trains nothing.
    """
    import contextlib

    from fedistill import config

    text = config.read_text(file)
    if config.speaks_of_a_site(text):
        config.parse_site(text, source=str(file))
        from fedistill.plan import describe_site

        for line in describe_site(file.parent):
            typer.echo(line)
        return
    settings = config.parse(text, overrides or [], source=str(file))
    from fedistill.plan import describe  # imports torch, which a wrong file need not wait for

    # The paths of a deployment start from its own folder, those of an experiment from here.
    place = file.parent if settings.deployment.sites else Path()
    with contextlib.chdir(place):
        for line in describe(settings):
            typer.echo(line)


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Argument(help="One kind, e.g. rules.")] = None,
) -> None:
    """List what can be named in settings."""
    from fedistill import catalog
    from fedistill.errors import Problem, SettingsError, did_you_mean

    if kind is not None and kind not in catalog.TABLES:
        text = f'unknown kind "{kind}"{did_you_mean(kind, catalog.TABLES)}'
        raise SettingsError([Problem("list", text)])
    for shown in [kind] if kind else list(catalog.TABLES):
        names = catalog.known(shown)
        width = max(len(name) for name in names)
        typer.echo(shown if kind is None else "", nl=kind is None)
        for name in names:
            paper = getattr(catalog.table(shown)[name], "paper", "")
            end = f"  [{paper}]" if paper else ""
            typer.echo(f"  {name:<{width}}  {catalog.summary(shown, name)}{end}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
) -> None:
    """Write the report of a run folder afresh."""
    from fedistill.report import write_report

    typer.echo(f"report: {write_report(folder)}")


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run folders.")],
    out: Annotated[Path, typer.Option(help="Where the page with the plot goes.")] = Path(
        "comparison.html"
    ),
) -> None:
    """Compare runs: a table, and a page with plots."""
    from rich.console import Console

    from fedistill.report import compare as compare_runs
    from fedistill.report import write_comparison

    Console().print(compare_runs(folders).render())
    typer.echo(f"plot: {write_comparison(folders, out)}")


@app.command()
def new(
    file: File,
    example: Annotated[str, typer.Option(help="digits, images, hospitals or csv.")] = "digits",
) -> None:
    """Write a commented settings file to start from."""
    from fedistill.starters import write_starter

    write_starter(file, example)
    typer.echo(f"{file}: edit it, then `fedistill check {file}` and `fedistill run {file}`")


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="A run folder, or a site's own folder.")],
    serve: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Serve a page and /health; :PORT: this machine."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Print it anew until the end.")] = False,
) -> None:
    """Show how a run stands, or a site: rounds, sites, bytes.

    Works while the run is on and after it was killed, from what the folder holds.
    """
    import json

    from fedistill import status as shown

    if sum([serve is not None, as_json, watch]) > 1:
        raise typer.BadParameter("expected one of --serve, --json and --watch, found several")
    if serve is not None:
        host, port = shown.address(serve)
        shown.serve(folder, host, port, ready=lambda url: typer.echo(f"status page: {url}"))
    elif as_json:
        typer.echo(json.dumps(shown.facts(shown.read_status(folder)), indent=2))
    elif watch:
        shown.watch(folder, lambda found: typer.echo("\n".join([*shown.lines(found), ""])))
    else:
        typer.echo("\n".join(shown.lines(shown.read_status(folder))))


@app.command()
def audit(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_FILE", help="A run folder, or a settings file.")
    ],
    canaries: Annotated[int, typer.Option(help="Planted rows, each in by a fair coin.")] = 1000,
    client: Annotated[str | None, typer.Option(help="Whose; default: with most rows.")] = None,
    seeds: Annotated[int, typer.Option(help="Audits, each with other canaries.")] = 1,
    confidence: Annotated[float, typer.Option(help="Of the lower bound.")] = 0.95,
    out: Annotated[Path | None, typer.Option(help="Where figures go; default: the run.")] = None,
) -> None:
    """Audit the privacy of a run: is what leaks less than what is claimed?

    Trains once more with planted rows, never the model in use. Exit code 5 if the measured lower
    bound exceeds the claim.
    """
    from fedistill import auditing

    found = auditing.audit(
        source,
        canaries=canaries,
        seeds=seeds,
        client=client,
        confidence=confidence,
        out=out,
        say=typer.echo,
    )
    if not found["passed"]:
        raise typer.Exit(AUDIT_FAILED)


@app.command()
def forget(
    state: Annotated[
        Path, typer.Argument(metavar="STATE", help="A site's folder, or a run folder.")
    ],
    subject: Annotated[
        list[str] | None, typer.Option(help="Whose rows, at a site; may be repeated.")
    ] = None,
    client: Annotated[
        str | None, typer.Option(help="At the coordinator: the site whose predictions to drop.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Train anew, without their influence.")
    ] = False,
) -> None:
    """Forget persons at a site, or a site at the coordinator; with a receipt."""
    from fedistill import forget as forgetting

    if bool(subject) == (client is not None):
        found = "both" if subject else "neither"
        raise typer.BadParameter(f"expected --subject or --client, found {found}")
    if client is not None:
        forgetting.drop_client(state, client, restart=restart, say=typer.echo)
    else:
        forgetting.forget(state, subject or [], restart=restart, say=typer.echo)


ledger = typer.Typer(
    no_args_is_help=True, help="The privacy ledger of a site.", rich_markup_mode=None
)
app.add_typer(ledger, name="ledger")
LedgerPath = Annotated[
    Path, typer.Argument(metavar="PATH", help="ledger.sqlite, or the folder that holds it.")
]


@ledger.command("show")
def ledger_show(path: LedgerPath) -> None:
    """Show every entry, and what was spent."""
    from fedistill.privacy import show

    for line in show.show(path):
        typer.echo(line)


@ledger.command("verify")
def ledger_verify(path: LedgerPath) -> None:
    """Check that nothing was edited, moved or taken away."""
    from fedistill.privacy import show

    typer.echo(show.verify(path))


@ledger.command("acknowledge-loss")
def ledger_acknowledge(
    path: LedgerPath,
    epsilon: Annotated[float, typer.Option(help="The most that may be missing.")],
    delta: Annotated[float | None, typer.Option(help="Delta of that; default: a little.")] = None,
    head: Annotated[
        list[str] | None, typer.Option(help="An entry that is gone, as it is asked for.")
    ] = None,
) -> None:
    """Go on with a ledger that was restored from a backup.

    What may be missing is charged to all: at least the epsilon that the site told last.
    """
    from fedistill.privacy import show

    typer.echo(show.acknowledge(path, epsilon, delta, head or ()))


log = typer.Typer(no_args_is_help=True, help="The audit log of a site.", rich_markup_mode=None)
app.add_typer(log, name="audit-log")


@log.command("verify")
def audit_log_verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="audit-log.jsonl, or its folder.")],
    head: Annotated[str, typer.Option(help="A hash of it that was kept elsewhere.")] = "",
) -> None:
    """Check that no line was edited, moved or taken away."""
    from fedistill.privacy import audit_log

    place = path / audit_log.NAME if path.is_dir() else path
    found = audit_log.verify(place, head)
    typer.echo(f"{place}: {len(found.entries)} entries, in order and unchanged; head {found.head}")
    if found.torn:
        typer.echo(f"note: {found.torn} bytes at its end were left incomplete by a crash")


deploy = typer.Typer(
    no_args_is_help=True, help="Set up real sites, and rehearse them.", rich_markup_mode=None
)
app.add_typer(deploy, name="deploy")


@deploy.command("init")
def deploy_init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    sites: Annotated[str, typer.Option(help="Ids of the sites, with commas between.")],
    settings: Annotated[
        Path | None, typer.Option(help="Settings file; default: an example on digits.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Name by which sites reach the coordinator.")
    ] = "localhost",
    port: Annotated[int, typer.Option(help="Port for that.")] = 8443,
) -> None:
    """Write a folder for the coordinator and one for every site.

    Certificates, node keys, settings, start scripts and a README for each administrator.
    """
    from fedistill import config

    chosen = config.load(settings) if settings else None
    names = [name.strip() for name in sites.split(",") if name.strip()]
    from fedistill.flower.founding import write_deployment

    write_deployment(folder, names, chosen, host=host, port=port)
    typer.echo(f"{folder}: read {folder / 'README.md'}, then `fedistill deploy trial {folder}`")


@deploy.command("trial")
def deploy_trial(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What deploy init wrote.")],
    rounds: Annotated[int | None, typer.Option(help="Number of rounds.")] = None,
) -> None:
    """Rehearse a deployment on this machine.

    Starts all parties on loopback with TLS and node keys, runs the federation, and stops what it
    started.
    """
    from fedistill import config
    from fedistill.flower.trial import trial

    agreed = folder / "coordinator" / "federation.toml"
    mechanism = config.load(agreed).privacy.mechanism if agreed.exists() else "none"
    show = _round_table(mechanism)
    summary = trial(folder, rounds=rounds, show=show, say=typer.echo)
    typer.echo(f"report: {Path(summary['folder']) / 'report.html'}")


def main(arguments: Sequence[str] | None = None) -> Any:
    """Entry point: errors become one sentence and an exit code, never a traceback."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(args=arguments, standalone_mode=False)
    except FedistillError as error:
        typer.echo(f"fedistill: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo(RESUMABLE, err=True)
        sys.exit(INTERRUPTED)
    except typer.Exit as leaving:
        sys.exit(leaving.exit_code)
    except BrokenPipeError:
        sys.exit(0)
    except click.ClickException as error:
        if isinstance(error, click.UsageError) and not arguments and len(sys.argv) == 1:
            typer.echo(error.format_message())  # no command at all: the message is the help
        else:
            typer.echo(f"fedistill: {error.format_message()} (see --help)", err=True)
        sys.exit(error.exit_code)
    if code == INTERRUPTED:
        typer.echo(RESUMABLE, err=True)
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(signum: int, frame: object) -> None:
    """SIGTERM is treated like Ctrl-C: the write in progress ends, the run can be resumed."""
    del signum, frame
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
