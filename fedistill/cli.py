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

    from fedistill import experiment
    from fedistill.report import RoundTable

    summary = experiment.run(settings, name=file.stem, out=out, resume=resume, show=RoundTable)
    folder = Path(summary["folder"])
    for note in summary.get("notes", [])[:MOST_NOTES]:
        typer.echo(f"note: {note}")
    typer.echo(f"report: {folder / 'report.html'}")


@app.command()
def check(file: File, overrides: Overrides = None) -> None:
    """Check a settings file and print its plan.

    All problems at once; clients, rows and bytes per round against FedAvg. Trains nothing.
    """
    from fedistill import config

    settings = config.load(file, overrides or [])
    from fedistill.plan import describe  # imports torch, which a wrong file need not wait for

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
