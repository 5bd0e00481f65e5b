"""The command line: `esper-fx demo`, `esper-fx doctor`, `esper-fx kernels build`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    name="esper-fx",
    help="Neural networks that change their own structure while they train, inside torch.compile.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

kernels = typer.Typer(help="Triton kernels.", no_args_is_help=True)
app.add_typer(kernels, name="kernels")

_LEAST_STEPS = 100


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"esper-fx {version('esper-fx')}, torch {version('torch')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    text: Annotated[bool, typer.Option("--text", help="A transformer on source code instead of digits.")] = False,
    steps: Annotated[
        int | None,
        typer.Option(
            min=_LEAST_STEPS,
            help="Training steps, besides those in which a growth is on its way.",
            show_default="the demo's own",
        ),
    ] = None,
    output: Annotated[Path, typer.Option(file_okay=False, help="Folder of the picture.")] = Path("demo-output"),
    seed: Annotated[int, typer.Option(min=0, help="Starts the weights and the order of the data.")] = 0,
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Draw no picture.")] = False,
    no_control: Annotated[
        bool, typer.Option("--no-control", help="Skip the same training without growth, done to compare.")
    ] = False,
) -> None:
    """Grow a small network inside torch.compile while it trains, and show what that cost."""
    from esper_fx.demo.run import run_demo
    from esper_fx.demo.task import DemoError
    from esper_fx.errors import EsperError

    console = Console()
    try:
        run_demo(console, text=text, steps=steps, seed=seed, output=None if no_plot else output, control=not no_control)
    except (DemoError, EsperError) as error:
        console.print(f"[bold red]esper-fx demo:[/bold red] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from error


@app.command()
def doctor() -> None:
    """Check this machine and say what to do about what is missing. Exits with 1 where something is broken."""
    from esper_fx.commands.doctor import diagnose, print_checks

    console = Console()
    raise typer.Exit(print_checks(console, diagnose()))


@kernels.command()
def build(
    target: Annotated[
        str, typer.Option(help="GPUs to compile for, with commas in between; they need not be here.")
    ] = "cuda:80,cuda:90,cuda:100,hip:gfx942",
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="How many to compile at a time.", show_default="one per processor, 8 at most"),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder of the kernel store.", show_default="as set in ESPER_FX_CACHE_DIR"),
    ] = None,
) -> None:
    """Compile all kernels ahead of time, print what they use, and put them into the kernel store.

    On a machine with such a GPU they are then loaded instead of compiled. Exits with 1 where a kernel does not compile,
    uses more than the GPU has, or spills registers in a default configuration.
    """
    from esper_fx.commands.kernel_build import run_build
    from esper_fx.errors import EsperError

    console = Console()
    try:
        raise typer.Exit(run_build(console, target, processes=jobs, cache_dir=cache_dir))
    except EsperError as error:
        console.print(f"[bold red]esper-fx kernels build:[/bold red] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from error


def main() -> None:
    """Entry point of the `esper-fx` command."""
    app()


if __name__ == "__main__":
    main()
