"""The label store: one SQLite file that holds which videos wait for people, who saw which, and every verdict.

>>> store = LabelStore.create("outputs/eval/labels.sqlite", overlap=2)  # doctest: +SKIP
>>> store.add_item("bc/start 3/seed 0", frames=80, fps=20.0)  # doctest: +SKIP
>>> item = store.next_items("ana", 1)[0]  # doctest: +SKIP
>>> store.save("ana", [(item.item, "success")])  # on disk when this returns  # doctest: +SKIP

* **Durable.** WAL with ``synchronous=FULL``: a verdict is on disk, flushed, when :meth:`LabelStore.save` returns.
* **Nothing is overwritten.** Verdicts are only appended; undo and second thoughts mark the older one as withdrawn.
* **Blind.** An annotator is handed an opaque name made from the store's seed, in an order of their own; the caller's
  key, the policy's name and the machine's verdict stay inside.
* **Overlap.** Each item is handed to people until ``overlap`` of them judged it. What is handed out is reserved for
  :data:`RESERVED_SECONDS`, so that two people at once do not do the same work; should both judge an item all the same,
  both verdicts count.

Any number of processes may have the file open. A store may be used from several threads.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hma_gym.errors import DatasetError, InvalidArgument, StorageError, UnknownName

VERDICTS = ("success", "failure", "unsure")
FILE_NAME = "labels.sqlite"
RESERVED_SECONDS = 600.0
MAX_NAME = 40
"""Characters of an annotator's name."""

_APPLICATION, _VERSION = 0x484D4147, 1
_WAIT_SECONDS = 5.0
_SCHEMA = f"""
CREATE TABLE settings (overlap INTEGER NOT NULL CHECK (overlap >= 1), seed TEXT NOT NULL);
CREATE TABLE items (
    number INTEGER PRIMARY KEY,
    item TEXT NOT NULL UNIQUE,
    key TEXT NOT NULL UNIQUE,
    frames INTEGER NOT NULL CHECK (frames >= 1),
    fps REAL NOT NULL CHECK (fps > 0),
    policy TEXT NOT NULL,
    machine TEXT NOT NULL,
    machine_probability REAL,
    machine_success INTEGER
);
CREATE TABLE verdicts (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    item TEXT NOT NULL REFERENCES items (item),
    annotator TEXT NOT NULL,
    verdict TEXT NOT NULL CHECK (verdict IN {VERDICTS}),
    saved_at REAL NOT NULL,
    batch INTEGER NOT NULL,
    withdrawn_at REAL
);
CREATE UNIQUE INDEX one_verdict_counts ON verdicts (item, annotator) WHERE withdrawn_at IS NULL;
CREATE TABLE reservations (
    item TEXT NOT NULL REFERENCES items (item),
    annotator TEXT NOT NULL,
    until REAL NOT NULL,
    PRIMARY KEY (item, annotator)
);
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_VERSION};
"""


@dataclass(frozen=True)
class Machine:
    """What a machine judge said of an item, for the confusion with people; never shown to annotators.

    Attributes:
        name: of the judge.
        probability: of success, in [0, 1].
        success: its verdict.
    """

    name: str
    probability: float
    success: bool


@dataclass(frozen=True)
class Item:
    """What an annotator may know of a video.

    Attributes:
        item: opaque name, also of the video file.
        frames: its length.
        fps: frames a second.
    """

    item: str
    frames: int
    fps: float


@dataclass(frozen=True)
class Entry:
    """All that is known of an item.

    Attributes:
        item: opaque name.
        key: the caller's own name of it.
        policy: whose episode it is; may be empty.
        machine: a machine's verdict, or None.
        verdicts: those that count, by annotator.
    """

    item: str
    key: str
    policy: str
    machine: Machine | None
    verdicts: dict[str, str]


@dataclass(frozen=True)
class Progress:
    """How far the labelling is.

    Attributes:
        items: videos in the store.
        complete: videos with at least ``overlap`` verdicts.
        mine: verdicts of this annotator that count.
        left: videos that this annotator can still be handed (reserved ones of others included).
    """

    items: int
    complete: int
    mine: int
    left: int


class LabelStore:
    """An open label store; make one with :meth:`create` or :meth:`open`, and close it (or use ``with``).

    Raises:
        StorageError: the file cannot be read or written, or another program keeps it locked.
        DatasetError: the file is damaged, not a label store, or of a newer version.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, wait_seconds: float) -> None:
        self.path = path
        self._connection = connection
        self._lock = threading.Lock()
        self._wait_seconds = wait_seconds
        with self._reading() as db:
            self.overlap, self._seed = db.execute("SELECT overlap, seed FROM settings").fetchone()

    @classmethod
    def create(cls, path: str | Path, *, overlap: int = 1, seed: str | None = None) -> LabelStore:
        """Make the file, or open the one that is there if it has the same overlap.

        Args:
            path: of the file; its folder is made if needed.
            overlap: how many people shall judge each item; 1 or more.
            seed: of the opaque names and the orders; None draws one.

        Raises:
            InvalidArgument: overlap below 1, or another one than the existing file's.
        """
        path = Path(path)
        if overlap < 1:
            raise InvalidArgument(f"overlap must be at least 1 (people for each video), got {overlap}.")
        if not path.exists():
            # Built aside and moved into place, so that no other process ever sees a half-made store.
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with _failures(path):
                    connection = sqlite3.connect(temporary, isolation_level=None)
                    connection.executescript(_SCHEMA)
                    connection.execute("INSERT INTO settings VALUES (?, ?)", (overlap, seed or secrets.token_hex(16)))
                    connection.close()
                temporary.replace(path)
            except OSError as error:
                temporary.unlink(missing_ok=True)
                raise StorageError(f"cannot make the label store {str(path)!r}: {error}; choose another.") from error
        store = cls.open(path)
        if store.overlap != overlap:
            store.close()
            raise InvalidArgument(
                f"overlap must be that of the existing label store {str(path)!r}, {store.overlap}, got {overlap}; "
                "use that one or another folder."
            )
        return store

    @classmethod
    def open(cls, path: str | Path, *, wait_seconds: float = _WAIT_SECONDS) -> LabelStore:
        """Open an existing store.

        Args:
            path: of the file.
            wait_seconds: how long to wait for other writers before :class:`StorageError`.
        """
        path = Path(path)
        if not path.is_file():
            raise StorageError(f"there is no label store at {str(path)!r}; give a folder that holds a {FILE_NAME}.")
        with _failures(path):
            # A URI so that a file which vanishes meanwhile is not made anew, empty.
            connection = sqlite3.connect(
                f"{path.resolve().as_uri()}?mode=rw",
                uri=True,
                timeout=wait_seconds,
                isolation_level=None,
                check_same_thread=False,
            )
            try:
                (application,) = connection.execute("PRAGMA application_id").fetchone()
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                if application != _APPLICATION:
                    raise DatasetError(f"{str(path)!r} is an SQLite file, but not a label store; choose another.")
                if version > _VERSION:
                    raise DatasetError(
                        f"{str(path)!r} is a label store of version {version}, newer than this hma_gym knows "
                        f"({_VERSION}); upgrade hma_gym."
                    )
                (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
                if found != "ok":
                    raise _damaged(path, found)
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("PRAGMA foreign_keys = ON")
                return cls(path, connection, wait_seconds)
            except BaseException:
                connection.close()
                raise

    def __enter__(self) -> LabelStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Calling it twice is harmless."""
        with self._lock:
            self._connection.close()

    # ------------------------------------------------------------------ the caller's side

    def item_name(self, key: str) -> str:
        """The opaque name of the item with this key: 16 hexadecimal digits that tell nothing without the seed."""
        return hashlib.sha256(f"{self._seed}|item|{key}".encode()).hexdigest()[:16]

    def add_item(
        self, key: str, *, frames: int, fps: float, policy: str = "", machine: Machine | None = None
    ) -> tuple[str, bool]:
        """Put a video on the list; the same key again changes nothing.

        Args:
            key: the caller's own name of the video, unique in the store.
            frames: its length, at least 1.
            fps: frames a second, above 0.
            policy: whose episode it is; hidden from annotators.
            machine: a machine's verdict, hidden from annotators.

        Returns:
            The opaque name, and whether it is new.
        """
        if not key or frames < 1 or not fps > 0:
            raise InvalidArgument(
                f"an item needs a key, frames of at least 1 and fps above 0, got key={key!r}, frames={frames}, "
                f"fps={fps}."
            )
        item = self.item_name(key)
        told = ("", None, None) if machine is None else (machine.name, machine.probability, int(machine.success))
        with self._writing() as db:
            cursor = db.execute(
                "INSERT INTO items (item, key, frames, fps, policy, machine, machine_probability, machine_success) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO NOTHING",
                (item, key, frames, fps, policy, *told),
            )
            return item, cursor.rowcount == 1

    def entries(self) -> list[Entry]:
        """Every item with the verdicts that count, in the order in which they were added."""
        with self._reading() as db:
            said: dict[str, dict[str, str]] = {}
            for item, annotator, verdict in db.execute(
                "SELECT item, annotator, verdict FROM verdicts WHERE withdrawn_at IS NULL ORDER BY number"
            ):
                said.setdefault(item, {})[annotator] = verdict
            rows = db.execute(
                "SELECT item, key, policy, machine, machine_probability, machine_success FROM items ORDER BY number"
            ).fetchall()
        return [
            Entry(item, key, policy, Machine(name, chance, bool(success)) if name else None, said.get(item, {}))
            for item, key, policy, name, chance, success in rows
        ]

    # ------------------------------------------------------------------ the annotator's side

    def next_items(self, annotator: str, count: int) -> list[Item]:
        """The next videos for this person: those already in their hands first, then new ones in their own order.

        They are reserved for :data:`RESERVED_SECONDS`. Asked again before a verdict, the same ones come: a reloaded
        page goes on where it was.

        Raises:
            InvalidArgument: no usable name, or a count below 1.
        """
        annotator = check_annotator(annotator)
        if count < 1:
            raise InvalidArgument(f"count must be at least 1, got {count}.")
        now = time.time()
        with self._writing() as db:
            open_items = db.execute(
                """
                SELECT i.item, i.frames, i.fps, EXISTS (
                    SELECT 1 FROM reservations r WHERE r.item = i.item AND r.annotator = :me AND r.until > :now
                ) AS held
                FROM items i
                WHERE NOT EXISTS (
                    SELECT 1 FROM verdicts v
                    WHERE v.item = i.item AND v.annotator = :me AND v.withdrawn_at IS NULL
                ) AND (
                    SELECT COUNT(*) FROM verdicts v WHERE v.item = i.item AND v.withdrawn_at IS NULL
                ) + (
                    SELECT COUNT(*) FROM reservations r
                    WHERE r.item = i.item AND r.annotator != :me AND r.until > :now
                ) < :overlap
                """,
                {"me": annotator, "now": now, "overlap": self.overlap},
            ).fetchall()
            order = sorted(open_items, key=lambda row: (not row[3], self._place(annotator, row[0])))
            chosen = [Item(item, frames, fps) for item, frames, fps, _ in order[:count]]
            db.executemany(
                "INSERT INTO reservations VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET until = excluded.until",
                [(item.item, annotator, now + RESERVED_SECONDS) for item in chosen],
            )
        return chosen

    def save(self, annotator: str, verdicts: Sequence[tuple[str, str]]) -> int:
        """Record verdicts, all or none of them; they are on disk when this returns.

        A second verdict of the same person on the same item replaces the first, which stays in the file as withdrawn.

        Args:
            annotator: who.
            verdicts: (item, verdict) with a verdict of :data:`VERDICTS`; at least one.

        Returns:
            How many verdicts of this annotator count now.

        Raises:
            InvalidArgument: no usable name, no verdict, or one that does not exist.
            UnknownName: no such item.
        """
        annotator = check_annotator(annotator)
        if not verdicts or any(verdict not in VERDICTS for _, verdict in verdicts):
            raise InvalidArgument(
                f"verdicts must be one or more, each of {list(VERDICTS)}, got {[verdict for _, verdict in verdicts]}."
            )
        now = time.time()
        with self._writing() as db:
            (batch,) = db.execute("SELECT COALESCE(MAX(batch), 0) + 1 FROM verdicts").fetchone()
            for item, verdict in verdicts:
                self._known(db, item)
                db.execute(
                    "UPDATE verdicts SET withdrawn_at = ? WHERE item = ? AND annotator = ? AND withdrawn_at IS NULL",
                    (now, item, annotator),
                )
                db.execute(
                    "INSERT INTO verdicts (item, annotator, verdict, saved_at, batch) VALUES (?, ?, ?, ?, ?)",
                    (item, annotator, verdict, now, batch),
                )
                db.execute("DELETE FROM reservations WHERE item = ? AND annotator = ?", (item, annotator))
            return _count_of(db, annotator)

    def undo(self, annotator: str) -> list[Item]:
        """Withdraw what this person saved last (a whole batch), and hand it to them again.

        Returns:
            The items, reserved for them; empty if there is nothing to undo.
        """
        annotator = check_annotator(annotator)
        now = time.time()
        with self._writing() as db:
            rows = db.execute(
                """
                SELECT i.item, i.frames, i.fps FROM verdicts v JOIN items i USING (item)
                WHERE v.annotator = :me AND v.withdrawn_at IS NULL AND v.batch = (
                    SELECT MAX(batch) FROM verdicts WHERE annotator = :me AND withdrawn_at IS NULL
                ) ORDER BY v.number
                """,
                {"me": annotator},
            ).fetchall()
            for item, _, _ in rows:
                db.execute(
                    "UPDATE verdicts SET withdrawn_at = ? WHERE item = ? AND annotator = ? AND withdrawn_at IS NULL",
                    (now, item, annotator),
                )
                db.execute(
                    "INSERT INTO reservations VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET until = excluded.until",
                    (item, annotator, now + RESERVED_SECONDS),
                )
        return [Item(*row) for row in rows]

    def progress(self, annotator: str) -> Progress:
        """How far the labelling is, and what is left for this person."""
        annotator = check_annotator(annotator)
        with self._reading() as db:
            (items,) = db.execute("SELECT COUNT(*) FROM items").fetchone()
            counts = db.execute(
                "SELECT COUNT(*), MAX(annotator = ?) FROM verdicts WHERE withdrawn_at IS NULL GROUP BY item",
                (annotator,),
            ).fetchall()
            mine = _count_of(db, annotator)
        complete = sum(count >= self.overlap for count, _ in counts)
        closed = sum(count >= self.overlap or bool(by_me) for count, by_me in counts)
        return Progress(items, complete, mine, items - closed)

    def item(self, item: str) -> Item:
        """What annotators may know of an item; :class:`UnknownName` if there is none of that name."""
        with self._reading() as db:
            return self._known(db, item)

    # ------------------------------------------------------------------ inside

    def _place(self, annotator: str, item: str) -> bytes:
        """Where an item stands in this person's order."""
        return hashlib.sha256(f"{self._seed}|order|{annotator}|{item}".encode()).digest()

    def _known(self, db: sqlite3.Connection, item: str) -> Item:
        row = db.execute("SELECT item, frames, fps FROM items WHERE item = ?", (item,)).fetchone()
        if row is None:
            raise UnknownName("video", item, [], "Its name comes from the queue; reload the page.")
        return Item(*row)

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _failures(self.path):
            yield self._connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: it holds wholly, and durably, when the block is left; after a failure not at all."""
        with self._lock, _failures(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise


def check_annotator(name: str) -> str:
    """The name without surrounding blanks; :class:`InvalidArgument` unless 1 to 40 printable characters are left."""
    name = " ".join(name.split())
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise InvalidArgument(f"annotator must be a name of 1 to {MAX_NAME} printable characters, got {name[:60]!r}.")
    return name


def _count_of(db: sqlite3.Connection, annotator: str) -> int:
    row = db.execute("SELECT COUNT(*) FROM verdicts WHERE annotator = ? AND withdrawn_at IS NULL", (annotator,))
    return int(row.fetchone()[0])


def _damaged(path: Path, reason: object) -> DatasetError:
    return DatasetError(
        f"the label store {str(path)!r} is damaged ({reason}); put a copy back, or save what is left with: "
        f"sqlite3 {path.name} .recover"
    )


@contextmanager
def _failures(path: Path) -> Iterator[None]:
    """SQLite's errors as ours."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "locked" in str(error) or "busy" in str(error):
            raise StorageError(
                f"the label store {str(path)!r} is locked by another program; close that one and try again. "
                "Nothing was saved."
            ) from error
        raise StorageError(f"cannot use the label store {str(path)!r}: {error}; nothing was saved.") from error
    except sqlite3.ProgrammingError as error:
        raise StorageError(f"the label store {str(path)!r} is closed: {error}; open it again.") from error
    except sqlite3.DatabaseError as error:
        raise _damaged(path, error) from error
