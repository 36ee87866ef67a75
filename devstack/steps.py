"""Say what is being done and how long it took, on standard error."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# Into a file or a pipe a moving line can't be drawn; there a note comes this often.
NOTE_INTERVAL_S = 5.0


class Step:
    """Something that has begun; several may run at once."""

    def __init__(self, what: str, progress: Progress) -> None:
        self._what = what
        self._progress = progress
        self._began = self._noted = time.monotonic()
        self._task = progress.add_task(what, total=None)

    def note(self, text: str) -> None:
        """Say how far it is."""
        self._progress.update(self._task, description=f"{self._what}: {text}")
        now = time.monotonic()
        if not self._progress.console.is_terminal and now - self._noted > NOTE_INTERVAL_S:
            self._noted = now
            self._progress.console.print(f"  … {self._what}: {text}", highlight=False)

    def done(self, result: str | None = None) -> None:
        """Say that it is finished, and how long it took."""
        elapsed_s = time.monotonic() - self._began
        self._progress.remove_task(self._task)
        self._progress.console.print(
            f"  [green]✓[/] {result or self._what} [dim]{elapsed_s:.1f} s[/]", highlight=False
        )


class Steps:
    """A list of steps on a console, with a spinner for each that runs. A context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def finish(self) -> None:
        """Take the spinners off the screen: what is printed afterwards stands in a line alone."""
        self._progress.stop()
        if self.console.is_terminal:
            self.console.print()  # ends the line in which the cursor came back

    def begin(self, what: str) -> Step:
        """Begin a step."""
        return Step(what, self._progress)

    @contextmanager
    def step(self, what: str) -> Iterator[Step]:
        """A step that is done when the block ends well."""
        step = self.begin(what)
        yield step
        step.done()
