"""`python -m benchmarks.publish RESULT…`: put a run's tables and charts into the documents."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks import charts, report
from benchmarks.results import Results, combined, load
from devstack.state import REPOSITORY

README = REPOSITORY / "README.md"
DOCUMENT = REPOSITORY / "docs" / "benchmarks.md"
PROMISES = REPOSITORY / "docs" / "promises.md"
PUBLISHED = REPOSITORY / "benchmarks" / "results" / "published.json"
# Those of the page of all figures; the others stand beside what they are about.
PICTURES = ("drain", "cost", "latency", "outage-p99", "soak")
CHARTS = REPOSITORY / "docs" / "charts"


@click.command()
@click.argument(
    "results", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
def main(results: tuple[Path, ...]) -> None:
    """Keep RESULTS as the published ones; write their figures and charts into docs/.

    Of several, each section comes from the last one that has it, whole: figures are compared within
    a run only.
    """
    _publish(combined([json.loads(path.read_text("utf-8")) for path in results]))


def _publish(run: dict[str, Any]) -> None:
    PUBLISHED.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    results = load(PUBLISHED)
    charts.draw(results, CHARTS)
    for document, blocks in BLOCKS.items():
        text = document.read_text("utf-8")
        for name, told in blocks.items():
            text = with_figures(text, name, told(results))
        document.write_text(text, encoding="utf-8")


def figures(results: Results) -> str:
    """Return where it was measured, and all tables."""
    events = results.sizes
    rows = events and (
        f"An event has on average {events['payload_bytes']:.0f} bytes of payload, "
        f"{events['key_bytes']:.0f} of key and {events['headers_bytes']:.0f} of headers "
        f"({events['headers']:.1f} of them)."
    )
    told = f"{place(results)} Figures of a run are comparable: {report.measured(results)}."
    pictures = [
        f"![{chart.config.title}](charts/{name}.svg)"
        for name, chart in charts.drawn(results).items()
        if name.startswith(PICTURES)
    ]
    return "\n\n".join(line for line in (told, rows, report.markdown(results), *pictures) if line)


def place(results: Results) -> str:
    """Return on what it was measured."""
    machine = results.machine
    return (
        f"{machine['cpus']} CPUs ({machine['cpu']}), {machine['memory_gib']} GiB, Linux "
        f"{machine['linux']}, {machine['postgres']}, {machine['kafka']}, Python "
        f"{machine['python']}, librdkafka {machine['librdkafka']}."
    )


PROMISED = {"ways"} | {f"promise {name}" for name in report.PROMISES}
# What each document shows, by the name of the block between two marks.
BLOCKS: dict[Path, dict[str, Callable[[Results], str]]] = {
    README: {
        "ways": lambda results: report.old_and_new(results.figures),
        "beside": report.beside,
    },
    DOCUMENT: {"all": figures},
    PROMISES: {
        "place": lambda results: f"{place(results)} {report.measured(results, PROMISED)}.",
        "ways": lambda results: report.old_and_new(results.figures),
        **{
            name: lambda results, name=name: report.promise(results.figures, name)  # type: ignore[misc]
            for name in report.PROMISES
        },
    },
}


def with_figures(document: str, name: str, text: str) -> str:
    """Return the document with `text` between the marks of a block.

    Raises:
        ValueError: a mark is missing.
    """
    begin, end = (f"<!-- figures {name}: {mark} -->" for mark in ("begin", "end"))
    before, found, rest = document.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the document has no {begin} … {end}")
    return f"{before}{begin}\n{text}\n{end}{after}"


if __name__ == "__main__":
    main()
