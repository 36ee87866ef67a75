"""The relay: transactions write events, a relay reads them and publishes, parts of it die.

What is taken from Postgres: a transaction draws an id from a sequence, and gets its xid (its number
as a writer) when it first writes, which may be long before or just after; an event's key is locked
from before the INSERT until the end; a snapshot has seen every xid below its `xmax` but those
in progress; a commit takes all before it to the disk, a rollback nothing; a crash ends whatever
is open and gives out again the xids that the disk doesn't know. From Kafka: a transaction of an
older epoch can't be committed.

The promises: the topic holds each committed event once, and those of a key in the order in which
their transactions committed; when all have ended and the relay finds nothing new, none is missing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

OPEN, LOCKED, COMMITTED, ROLLED_BACK = range(4)


class Tx(NamedTuple):
    """A writer's transaction; 0 is "none yet" in each number."""

    phase: int = OPEN
    xid: int = 0
    drawn_id: int = 0
    ids: tuple[int, ...] = ()
    commit_number: int = 0

    @property
    def begun(self) -> bool:
        """Whether it has done anything that has not ended."""
        return self.phase == LOCKED or (
            self.phase == OPEN and bool(self.xid or self.drawn_id or self.ids)
        )


class Snapshot(NamedTuple):
    """What a statement of Postgres sees."""

    xmax: int
    in_progress: tuple[int, ...] = ()

    def sees(self, xid: int) -> bool:
        """pg_visible_in_snapshot()."""
        return xid < self.xmax and xid not in self.in_progress


class Cursor(NamedTuple):
    """Where a relay goes on. Each reader uses what it needs of it."""

    published: Snapshot = Snapshot(1)
    batch: Snapshot | None = None
    last_id: int = 0
    last_xid: int = 0
    first_new_id: int = 1


class Chunk(NamedTuple):
    """Events that were read, and the cursor that goes to Kafka with them."""

    ids: tuple[int, ...]
    cursor: Cursor


class Relay(NamedTuple):
    """A process: the epoch of its producer, and what it has read and not committed."""

    epoch: int
    chunk: Chunk | None = None


class State(NamedTuple):
    """The world."""

    txs: tuple[Tx, ...]
    relays: tuple[Relay, ...]
    topic: tuple[int, ...] = ()
    cursor: Cursor = Cursor()
    epoch: int = 1
    next_id: int = 1
    next_xid: int = 1
    # What a crash of Postgres falls back to.
    durable_xid: int = 1
    crashes: int = 0

    def snapshot(self) -> Snapshot:
        """pg_current_snapshot()."""
        open_xids = sorted(t.xid for t in self.txs if t.xid and t.phase in (OPEN, LOCKED))
        return Snapshot(self.next_xid, tuple(open_xids))

    def committed(self) -> list[tuple[int, int]]:
        """Return the xid and id of each event that a statement sees now, by id."""
        rows = [(t.xid, i) for t in self.txs if t.phase == COMMITTED for i in t.ids]
        return sorted(rows, key=lambda row: row[1])


class Reader(Protocol):
    """A way to find what is new."""

    @property
    def flushes_wal(self) -> bool:
        """Whether what it has seen is on the disk before it leaves."""
        ...

    def read(self, state: State) -> Chunk | None:
        """Return the next events, and the cursor behind them; None when nothing is new."""
        ...


@dataclass(frozen=True)
class SnapshotDifference:
    """Ours: what the newer snapshot sees and the published one didn't, by id.

    As in outbox_relay/reader.py: a batch that fits into a chunk comes from one statement; a bigger
    one fixes its snapshot first and is then walked by id.
    """

    chunk_rows: int = 1
    flushes_wal: bool = True
    # The trap: take a batch's first id from the sequence instead of from the batch.
    first_id_from_sequence: bool = False

    def read(self, state: State) -> Chunk | None:
        """See Reader."""
        at, now = state.cursor, state.snapshot()
        if at.batch is not None:
            return self._walk(state, at)
        new = [i for xid, i in state.committed() if not at.published.sees(xid)]
        if self.first_id_from_sequence:
            new = [i for i in new if i >= at.first_new_id]
        if not new:
            return None
        first_new_id = 1 if now.in_progress else state.next_id
        if len(new) <= self.chunk_rows:
            return Chunk(tuple(new), Cursor(now, first_new_id=first_new_id))
        begun = at._replace(batch=now, last_id=new[0] - 1, first_new_id=first_new_id)
        return self._walk(state, begun)

    def _walk(self, state: State, at: Cursor) -> Chunk:
        assert at.batch is not None, "a big batch has its snapshot"  # noqa: S101
        rest = [
            i
            for xid, i in state.committed()
            if i > at.last_id and at.batch.sees(xid) and not at.published.sees(xid)
        ][: self.chunk_rows]
        if rest:
            return Chunk(tuple(rest), at._replace(last_id=rest[-1]))
        return Chunk((), Cursor(at.batch, first_new_id=at.first_new_id))


@dataclass(frozen=True)
class ById:
    """WHERE id > last ORDER BY id."""

    flushes_wal: bool = True

    def read(self, state: State) -> Chunk | None:
        """See Reader."""
        for _, i in state.committed():
            if i > state.cursor.last_id:
                return Chunk((i,), Cursor(last_id=i))
        return None


@dataclass(frozen=True)
class ByTransaction:
    """WHERE (transaction_id, id) > last ORDER BY transaction_id, id; perhaps below the horizon."""

    below_horizon: bool
    flushes_wal: bool = True

    def read(self, state: State) -> Chunk | None:
        """See Reader."""
        xmax, in_progress = state.snapshot()
        horizon = min([xmax, *in_progress]) if self.below_horizon else xmax
        at = state.cursor.last_xid, state.cursor.last_id
        for xid, i in sorted(state.committed()):
            if (xid, i) > at and xid < horizon:
                return Chunk((i,), Cursor(last_id=i, last_xid=xid))
        return None


@dataclass(frozen=True)
class Bounds:
    """How much may happen. `keys` has a word for each transaction: a letter for each event.

    "bb" is a transaction that writes two events of key b.
    """

    keys: Sequence[str]
    sessions: int = 2
    crashes: int = 1


@dataclass(frozen=True)
class Outbox:
    """The model, with one of the readers; the other switches are the wrong ways."""

    reader: Reader
    bounds: Bounds
    fencing: bool = True
    locks_first: bool = True

    def initial(self) -> State:
        """See Model."""
        return State(tuple(Tx() for _ in self.bounds.keys), (Relay(1), Relay(0)))

    def steps(self, state: State) -> Iterator[tuple[str, State]]:
        """See Model."""
        for n, tx in enumerate(state.txs):
            if tx.phase in (OPEN, LOCKED):
                yield from self._transaction(state, n, tx)
        for n, relay in enumerate(state.relays):
            yield from self._relay(state, n, relay)
        if state.crashes < self.bounds.crashes:
            yield self._crash(state)

    # ---- the writers

    def _transaction(self, state: State, n: int, tx: Tx) -> Iterator[tuple[str, State]]:
        name, keys = f"transaction {n + 1}", self.bounds.keys[n]
        if tx.drawn_id:
            yield self._insert(state, n, tx, tx.drawn_id)
            return
        if tx.phase == OPEN and not tx.xid and not tx.ids:
            given = _put(state, n, tx._replace(xid=state.next_xid))
            yield (
                f"{name} writes something else first: its xid is {state.next_xid}",
                given._replace(next_xid=state.next_xid + 1),
            )
        if len(tx.ids) < len(keys) and (tx.phase == LOCKED or not self.locks_first):
            drawn = state._replace(next_id=state.next_id + 1)
            if tx.xid:
                yield self._insert(drawn, n, tx, state.next_id)
            else:
                yield (
                    f"{name} draws id {state.next_id} for an event of key {keys[0]}",
                    _put(drawn, n, tx._replace(drawn_id=state.next_id)),
                )
        if tx.phase == OPEN and not self._is_locked(state, n):
            yield f"{name} locks key {keys[0]}", _put(state, n, tx._replace(phase=LOCKED))
        elif tx.phase == LOCKED and len(tx.ids) == len(keys):
            yield from self._end(state, n, tx)

    def _insert(self, state: State, n: int, tx: Tx, row_id: int) -> tuple[str, State]:
        """An event becomes a row; its transaction has an xid from now on."""
        xid = tx.xid or state.next_xid
        row = tx._replace(xid=xid, drawn_id=0, ids=(*tx.ids, row_id))
        after = _put(state, n, row)._replace(next_xid=max(state.next_xid, xid + 1))
        words = f"inserts its event of key {self.bounds.keys[n][0]}: id {row_id}, xid {xid}"
        return f"transaction {n + 1} {words}", after

    def _is_locked(self, state: State, n: int) -> bool:
        """Whether somebody else holds the lock of the key that a transaction wants."""
        wanted = self.bounds.keys[n][0]
        return any(
            other.phase == LOCKED and keys[0] == wanted for other, keys in self._events(state)
        )

    def _end(self, state: State, n: int, tx: Tx) -> Iterator[tuple[str, State]]:
        number = 1 + max(other.commit_number for other in state.txs)
        ended = _put(state, n, tx._replace(phase=COMMITTED, commit_number=number))
        yield f"transaction {n + 1} commits", ended._replace(durable_xid=state.next_xid)
        yield f"transaction {n + 1} rolls back", _put(state, n, tx._replace(phase=ROLLED_BACK))

    def _crash(self, state: State) -> tuple[str, State]:
        txs = tuple(t._replace(phase=ROLLED_BACK, drawn_id=0) if t.begun else t for t in state.txs)
        words = "Postgres crashes"
        if state.durable_xid < state.next_xid:
            words += f", and will give out xid {state.durable_xid} again"
        return words, state._replace(txs=txs, next_xid=state.durable_xid, crashes=state.crashes + 1)

    # ---- the relays

    def _relay(self, state: State, n: int, relay: Relay) -> Iterator[tuple[str, State]]:
        name = f"relay {'AB'[n]}"
        if state.epoch < self.bounds.sessions:
            epoch = state.epoch + 1
            taken = state._replace(epoch=epoch, relays=_at(state.relays, n, Relay(epoch)))
            yield f"{name} (re)starts: it fences the others and reads the cursor", taken
        if relay.chunk is not None:
            yield self._publish(state, n, relay.epoch, relay.chunk)
        elif relay.epoch == state.epoch and (chunk := self.reader.read(state)):
            read = state._replace(relays=_at(state.relays, n, Relay(relay.epoch, chunk)))
            if self.reader.flushes_wal:
                read = read._replace(durable_xid=state.next_xid)
            yield f"{name} reads {_ids(chunk.ids)}; it sees {_shown(state.snapshot())}", read

    def _publish(self, state: State, n: int, epoch: int, chunk: Chunk) -> tuple[str, State]:
        name = f"relay {'AB'[n]}"
        done = state._replace(relays=_at(state.relays, n, Relay(epoch)))
        if self.fencing and epoch != state.epoch:
            return f"{name} wants to publish {_ids(chunk.ids)} and is refused: fenced", done
        return (
            f"{name} publishes {_ids(chunk.ids)}, with its cursor",
            done._replace(topic=state.topic + chunk.ids, cursor=chunk.cursor),
        )

    # ---- the promises

    def broken(self, state: State) -> str | None:
        """See Model."""
        if len(set(state.topic)) < len(state.topic):
            return f"doubled: the topic holds ids {list(state.topic)}"
        order = [(t.commit_number, i) for t in state.txs if t.phase == COMMITTED for i in t.ids]
        keys = {i: of_tx[0] for tx, of_tx in self._events(state) for i in tx.ids}
        rank = {i: place for place, (_, i) in enumerate(sorted(order))}
        for key in set(keys.values()):
            of_key = [i for i in state.topic if keys[i] == key]
            if of_key != sorted(of_key, key=rank.__getitem__):
                return f"reordered: ids {of_key} of key {key}, whose order is the reverse"
        missing = sorted(rank.keys() - set(state.topic))
        if missing and self._at_rest(state):
            return f"lost: nothing more will come, and {_ids(missing)} is not in the topic"
        return None

    def done(self, state: State) -> bool:
        """See Model."""
        written = sum(len(tx.ids) for tx in state.txs if tx.phase == COMMITTED)
        wanted = sum(map(len, self.bounds.keys))
        return written == wanted == len(state.topic) and self._at_rest(state)

    def _events(self, state: State) -> Iterator[tuple[Tx, str]]:
        return zip(state.txs, self.bounds.keys, strict=True)

    def _at_rest(self, state: State) -> bool:
        """Whether nobody is in the middle of something, and the relay finds nothing new."""
        return (
            not any(tx.begun for tx in state.txs)
            and all(relay.chunk is None for relay in state.relays)
            and self.reader.read(state) is None
        )


def _put(state: State, n: int, tx: Tx) -> State:
    return state._replace(txs=(*state.txs[:n], tx, *state.txs[n + 1 :]))


def _at(relays: tuple[Relay, ...], n: int, relay: Relay) -> tuple[Relay, ...]:
    return (*relays[:n], relay, *relays[n + 1 :])


def _ids(ids: Sequence[int]) -> str:
    return f"id {', '.join(map(str, ids))}" if ids else "the end of its batch"


def _shown(snapshot: Snapshot) -> str:
    seen = f"xids below {snapshot.xmax}"
    return f"{seen} but {', '.join(map(str, snapshot.in_progress))}" if snapshot[1] else seen
