"""Showing several runs at once: live bars on a terminal, plain lines in a log."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console


class Watched(Protocol):
    """What a display needs to know about a run."""

    name: str
    state: str
    step: int
    steps: int
    loss: float | None
    eta_s: float | None


class Display(Protocol):
    """Something that shows the state of all runs."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def show(self, runs: Iterable[Watched]) -> None:
        """Show the runs as they are now."""


def open_display(console: Console) -> Display:
    """Choose the display that ``console`` can show."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)


class LiveDisplay:
    """One bar per run, redrawn in place."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._tasks: dict[str, int] = {}
        self._progress = Progress(
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[state]}"),
            console=console,
            expand=True,
            refresh_per_second=4,
        )

    def __enter__(self) -> LiveDisplay:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def show(self, runs: Iterable[Watched]) -> None:
        """Redraw the bars."""
        for run in runs:
            if run.name not in self._tasks:
                self._tasks[run.name] = self._progress.add_task(
                    run.name, total=run.steps, loss="-", state=""
                )
            self._progress.update(
                self._tasks[run.name],  # type: ignore[arg-type]
                completed=run.step,
                loss=loss_text(run.loss),
                state=state_text(run),
            )


class PlainDisplay:
    """One line per run and tenth of its way, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[str, tuple[str, int]] = {}

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def show(self, runs: Iterable[Watched]) -> None:
        """Print a line for each run that changed its state or passed another tenth."""
        for run in runs:
            mark = (run.state, 10 * run.step // run.steps)
            if self._shown.get(run.name, ("waiting", 0)) != mark:
                self._shown[run.name] = mark
                self._console.print(
                    f"{run.name}: step {run.step} of {run.steps}, loss {loss_text(run.loss)}, "
                    f"{state_text(run)}",
                    soft_wrap=True,
                    highlight=False,
                )


def loss_text(loss: float | None) -> str:
    """Format a loss that may not be known yet."""
    return "-" if loss is None else f"{loss:.3f}"


def state_text(run: Watched) -> str:
    """Say how long a run still takes, or what else is the case."""
    if run.state != "running":
        return run.state
    if run.eta_s is None:
        return "starting"
    minutes, seconds = divmod(round(run.eta_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"
