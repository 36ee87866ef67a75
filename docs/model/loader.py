"""The loader: workers load one partition of the topic, and one of them doesn't know it lost it.

What is taken from Postgres: rows and the offset change together in a transaction, or not at all; a
locked offset row makes others wait; a COMMIT whose answer is lost may have taken place. Of a
worker nothing good is assumed: it may load any batch that it has fetched at any time, again and
again, whoever owns the partition by now, with its next batch fetched already, and be killed.

The promises: whenever no transaction is open, the tables hold each record below the stored offset
once and in order. There is no key on the tables of the model that would hide a
repetition: the offsets alone have to do.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

WORKERS = "AB"


class Offsets(Enum):
    """How a load moves the stored offset."""

    LOCKED_AND_COMPARED = "ours: locked first, compared, moved with the rows"
    NOT_COMPARED = "moved with the rows, not compared"
    NOT_LOCKED = "compared, but not locked"
    AFTERWARDS = "moved in a transaction of its own, after the rows"
    BEFOREHAND = "moved in a transaction of its own, before the rows"


class Batch(NamedTuple):
    """Records of the partition from `first` up to, without, `next`."""

    first: int
    next: int


class Worker(NamedTuple):
    """A process: what it has fetched and not seen loaded, where it fetches next, what it is at."""

    held: tuple[Batch, ...] = ()
    position: int | None = None
    loading: Batch | None = None


class State(NamedTuple):
    """The world: Postgres' rows and offset, and the workers."""

    workers: tuple[Worker, ...]
    offset: int = 0
    rows: tuple[int, ...] = ()
    starts: int = 0


@dataclass(frozen=True)
class Partition:
    """The model, with one of the ways to move the offset."""

    offsets: Offsets = Offsets.LOCKED_AND_COMPARED
    # Whether a worker loads only the first batch in hand. It may still have lost the partition.
    in_turn: bool = False
    records: int = 4
    batch_records: int = 2
    starts: int = 3

    def initial(self) -> State:
        """See Model."""
        return State((Worker(), Worker()))

    def steps(self, state: State) -> Iterator[tuple[str, State]]:
        """See Model."""
        for n, worker in enumerate(state.workers):
            name = f"worker {WORKERS[n]}"
            if state.starts < self.starts:
                begun = _put(state, n, Worker(position=state.offset))
                yield (
                    f"{name} (re)starts: the partition is its, from {state.offset} on",
                    begun._replace(starts=state.starts + 1),
                )
            if worker.loading is not None:
                yield from self._finish(state, n, worker, worker.loading)
            else:
                yield from self._fetch(state, n, worker)
                yield from self._begin(state, n, worker)

    def _fetch(self, state: State, n: int, worker: Worker) -> Iterator[tuple[str, State]]:
        """Fetch a batch, while at most one other one is in hand."""
        if worker.position is None or len(worker.held) > 1:
            return
        first = worker.position
        for end in range(first + 1, min(first + self.batch_records, self.records) + 1):
            fetched = worker._replace(held=(*worker.held, Batch(first, end)), position=end)
            yield (
                f"worker {WORKERS[n]} fetches {_shown(Batch(first, end))}",
                _put(state, n, fetched),
            )

    def _begin(self, state: State, n: int, worker: Worker) -> Iterator[tuple[str, State]]:
        """Begin to load something in hand, as far as the offset lets it."""
        locks = self.offsets is Offsets.LOCKED_AND_COMPARED
        if locks and any(other.loading for other in state.workers):
            return  # it waits for the lock
        for batch in worker.held[:1] if self.in_turn else worker.held:
            name = f"worker {WORKERS[n]}"
            compares = self.offsets is not Offsets.NOT_COMPARED
            if compares and state.offset != batch.first:
                refused = worker._replace(held=(), position=None)
                words = f"{name} wants to load {_shown(batch)} and is refused"
                yield f"{words}: the offset is {state.offset}", _put(state, n, refused)
                continue
            begun = _put(state, n, worker._replace(loading=batch))
            if self.offsets is Offsets.BEFOREHAND:
                begun = begun._replace(offset=batch.next)
            elif self.offsets is Offsets.AFTERWARDS:
                begun = begun._replace(rows=state.rows + tuple(range(*batch)))
            yield f"{name} begins to load {_shown(batch)}", begun

    def _finish(
        self, state: State, n: int, worker: Worker, batch: Batch
    ) -> Iterator[tuple[str, State]]:
        """Commit, with and without an answer; or fail."""
        name = f"worker {WORKERS[n]}"
        done = state
        if self.offsets is not Offsets.AFTERWARDS:
            done = done._replace(rows=state.rows + tuple(range(*batch)))
        if self.offsets is not Offsets.BEFOREHAND:
            done = done._replace(offset=batch.next)
        rest = tuple(held for held in worker.held if held != batch)
        yield (
            f"{name} commits {_shown(batch)}: the offset is {done.offset}",
            _put(done, n, worker._replace(held=rest, loading=None)),
        )
        unknown = worker._replace(loading=None)
        yield (
            f"{name} commits {_shown(batch)} (the offset is {done.offset}), but hears no answer",
            _put(done, n, unknown),
        )
        yield f"{name} loses its connection, {_shown(batch)} still in hand", _put(state, n, unknown)

    def broken(self, state: State) -> str | None:
        """See Model."""
        if any(worker.loading for worker in state.workers):
            return None
        if len(set(state.rows)) < len(state.rows):
            return f"doubled: the tables hold records {list(state.rows)}"
        if missing := set(range(state.offset)) - set(state.rows):
            return f"lost: the offset is {state.offset}, the tables lack {sorted(missing)}"
        if list(state.rows) != sorted(state.rows):
            return f"reordered: the tables hold records {list(state.rows)}"
        return None

    def done(self, state: State) -> bool:
        """See Model."""
        return state.offset == self.records == len(state.rows)


def _put(state: State, n: int, worker: Worker) -> State:
    return state._replace(workers=(*state.workers[:n], worker, *state.workers[n + 1 :]))


def _shown(batch: Batch) -> str:
    """Return a batch in words."""
    last = batch.next - 1
    return f"record {last}" if batch.first == last else f"records {batch.first} to {last}"
