"""`python -m benchmarks.publish RESULT`: put a run's tables and charts into the documents."""

from pathlib import Path

import click

from benchmarks import charts, report
from benchmarks.results import Results, load
from devstack.state import REPOSITORY

DOCUMENT = REPOSITORY / "docs" / "benchmarks.md"
PUBLISHED = REPOSITORY / "benchmarks" / "results" / "published.json"
CHARTS = REPOSITORY / "docs" / "charts"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


@click.command()
@click.argument("result", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(result: Path) -> None:
    """Keep RESULT as the published one; write its figures and charts into docs/."""
    results = load(result)
    PUBLISHED.write_bytes(result.read_bytes())
    charts.draw(results, CHARTS)
    text = DOCUMENT.read_text("utf-8")
    DOCUMENT.write_text(with_figures(text, figures(results)), encoding="utf-8")


def figures(results: Results) -> str:
    """Return what stands between the marks: where it was measured, and the tables."""
    machine, events = results.machine, results.sizes
    place = (
        f"{machine['cpus']} CPUs ({machine['cpu']}), {machine['memory_gib']} GiB, Linux "
        f"{machine['linux']}, {machine['postgres']}, {machine['kafka']}, Python "
        f"{machine['python']}, librdkafka {machine['librdkafka']}."
    )
    rows = events and (
        f"An event has on average {events['payload_bytes']:.0f} bytes of payload, "
        f"{events['key_bytes']:.0f} of key and {events['headers_bytes']:.0f} of headers "
        f"({events['headers']:.1f} of them)."
    )
    lines = [f"Measured {results.settings['date']} on {place}", rows, report.markdown(results)]
    return "\n\n".join(line for line in lines if line)


def with_figures(document: str, text: str) -> str:
    """Return the document with `text` between its marks.

    Raises:
        ValueError: a mark is missing.
    """
    before, _, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the document has no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


if __name__ == "__main__":
    main()
