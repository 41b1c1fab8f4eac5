"""The label store: durable, blind, nothing lost, and clear about what is wrong with its file."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from hma_gym.errors import DatasetError, InvalidArgument, InvalidImage, StorageError, UnknownName
from hma_gym.judges.agreement import cohen_kappa, fleiss_kappa, majority, measure_agreement
from hma_gym.judges.human import LabelQueue
from hma_gym.judges.labels import FILE_NAME, LabelStore, Machine


def make_store(folder: Path, items: int = 6, overlap: int = 1) -> LabelStore:
    store = LabelStore.create(folder / FILE_NAME, overlap=overlap, seed="s")
    for i in range(items):
        store.add_item(f"policy-a/{i}", frames=10, fps=20.0, policy="policy-a", machine=Machine("m", 0.9, i % 2 == 0))
    return store


def test_a_verdict_outlives_the_store(tmp_path: Path) -> None:
    with make_store(tmp_path) as store:
        (item,) = store.next_items("ana", 1)
        assert store.save("ana", [(item.item, "success")]) == 1
    with LabelStore.open(tmp_path / FILE_NAME) as again:
        assert [entry.verdicts for entry in again.entries() if entry.verdicts] == [{"ana": "success"}]


def test_every_annotator_has_an_order_of_their_own_and_sees_no_key(tmp_path: Path) -> None:
    with make_store(tmp_path, items=12, overlap=3) as store:
        ana, bob = store.next_items("ana", 12), store.next_items("bob", 12)
        assert {x.item for x in ana} == {x.item for x in bob} and ana != bob
        assert [x.item for x in ana] != [store.item_name(f"policy-a/{i}") for i in range(12)]
        assert ana == store.next_items("ana", 12), "a reloaded page goes on where it was"
        assert not any("policy" in repr(item) for item in ana)


def test_two_people_are_not_given_the_same_work_and_each_verdict_of_both_counts(tmp_path: Path) -> None:
    with make_store(tmp_path, items=4) as store:
        ana, bob = store.next_items("ana", 3), store.next_items("bob", 3)
        assert not {x.item for x in ana} & {x.item for x in bob} and len(bob) == 1
        store.save("ana", [(ana[0].item, "success")])
        store.save("bob", [(ana[0].item, "failure")])  # all the same
        (both,) = [entry.verdicts for entry in store.entries() if entry.verdicts]
        assert both == {"ana": "success", "bob": "failure"}


def test_overlap_hands_each_item_to_that_many_people(tmp_path: Path) -> None:
    with make_store(tmp_path, items=5, overlap=2) as store:
        for name in ("ana", "bob", "eve"):
            for item in store.next_items(name, 5):
                store.save(name, [(item.item, "failure")])
        assert all(len(entry.verdicts) == 2 for entry in store.entries())
        progress = store.progress("eve")
        assert (progress.items, progress.complete, progress.mine, progress.left) == (5, 5, 0, 0)


def test_undo_takes_back_the_last_batch_and_keeps_its_trace(tmp_path: Path) -> None:
    with make_store(tmp_path) as store:
        items = [item.item for item in store.next_items("ana", 4)]
        store.save("ana", [(items[0], "success")])
        store.save("ana", [(item, "unsure") for item in items[1:3]])
        assert [item.item for item in store.undo("ana")] == items[1:3]
        assert store.progress("ana").mine == 1 and [x.item for x in store.next_items("ana", 2)] != [items[0]]
        assert [item.item for item in store.undo("ana")] == items[:1]
        assert store.undo("ana") == []
    rows = sqlite3.connect(tmp_path / FILE_NAME)
    assert rows.execute("SELECT COUNT(*) FROM verdicts WHERE withdrawn_at IS NOT NULL").fetchone() == (3,)
    rows.close()


def test_a_second_thought_replaces_and_a_batch_holds_wholly_or_not_at_all(tmp_path: Path) -> None:
    with make_store(tmp_path) as store:
        first, second = (item.item for item in store.next_items("ana", 2))
        store.save("ana", [(first, "success")])
        assert store.save("ana", [(first, "failure")]) == 1
        with pytest.raises(UnknownName, match="video 'nowhere'"):
            store.save("ana", [(second, "success"), ("nowhere", "success")])
        assert {entry.item: entry.verdicts for entry in store.entries() if entry.verdicts} == {
            first: {"ana": "failure"}
        }


def test_wrong_calls_are_refused(tmp_path: Path) -> None:
    with make_store(tmp_path) as store:
        item = store.next_items("ana", 1)[0].item
        for name in ("", "  ", "x" * 41, "a\x00b"):
            with pytest.raises(InvalidArgument, match="printable"):
                store.save(name, [(item, "success")])
        with pytest.raises(InvalidArgument, match="unsure"):
            store.save("ana", [(item, "perhaps")])
        with pytest.raises(InvalidArgument, match="overlap must be that of"):
            LabelStore.create(store.path, overlap=2)
    with pytest.raises(StorageError, match="closed"):
        store.progress("ana")


def test_a_locked_damaged_or_foreign_file_is_named(tmp_path: Path) -> None:
    path = make_store(tmp_path).path
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with LabelStore.open(path, wait_seconds=0.05) as store:
        with pytest.raises(StorageError, match="locked by another program"):
            store.undo("ana")
        holder.execute("ROLLBACK")
        assert store.undo("ana") == []
    holder.close()
    content = path.read_bytes()
    path.write_bytes(content[:100] + b"\xff" * (len(content) - 100))
    with pytest.raises(DatasetError, match="damaged"):
        LabelStore.open(path)
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(DatasetError, match="damaged"):
        LabelStore.open(path)
    foreign = tmp_path / "foreign.sqlite"
    other = sqlite3.connect(foreign)
    other.execute("CREATE TABLE t (x)")
    other.commit()
    with pytest.raises(DatasetError, match="not a label store"):
        LabelStore.open(foreign)
    other.close()
    newer = make_store(tmp_path / "newer").path
    raised = sqlite3.connect(newer)
    raised.execute("PRAGMA user_version = 99")
    raised.close()
    with pytest.raises(DatasetError, match="upgrade"):
        LabelStore.open(newer)
    with pytest.raises(StorageError, match="no label store"):
        LabelStore.open(tmp_path / "absent.sqlite")


def test_many_threads_lose_nothing(tmp_path: Path) -> None:
    with make_store(tmp_path, items=24) as store:

        def work(name: str) -> None:
            while items := store.next_items(name, 2):
                store.save(name, [(item.item, "success") for item in items])

        threads = [threading.Thread(target=work, args=(name,)) for name in ("ana", "bob", "eve")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [len(entry.verdicts) for entry in store.entries()] == [1] * 24


LABEL_FOREVER = """
import sys
from hma_gym.judges.labels import LabelStore
store = LabelStore.open(sys.argv[1])
for item in store.next_items("ana", 200):
    store.save("ana", [(item.item, "success")])
    print(item.item, flush=True)
"""


def test_a_killed_process_loses_no_saved_verdict(tmp_path: Path) -> None:
    with make_store(tmp_path, items=200) as store:
        command = [sys.executable, "-c", LABEL_FOREVER, str(store.path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            confirmed = [process.stdout.readline().strip() for _ in range(7)]
            process.send_signal(signal.SIGKILL)
            confirmed += [line.strip() for line in process.stdout if line.endswith("\n")]
        kept = {entry.item for entry in store.entries() if entry.verdicts}
        assert set(confirmed) <= kept and len(kept) <= len(confirmed) + 1


def test_kappas_of_known_tables() -> None:
    # Cohen's own arithmetic: 20 and 15 agreements of 50, marginals 25 and 30: p_o = .7, p_e = .5.
    table = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    assert cohen_kappa(table) == pytest.approx(0.4)
    assert cohen_kappa([("y", "y")] * 3) is None and cohen_kappa([]) is None
    # Fleiss (1971) as tabulated in the literature: 10 subjects, 14 raters, 5 categories, kappa .210.
    counts = [
        [0, 0, 0, 0, 14],
        [0, 2, 6, 4, 2],
        [0, 0, 3, 5, 6],
        [0, 3, 9, 2, 0],
        [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0],
        [3, 2, 6, 3, 0],
        [2, 5, 3, 2, 2],
        [6, 5, 2, 1, 0],
        [0, 2, 2, 3, 7],
    ]
    assert fleiss_kappa(counts) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa([[2, 0], [3, 0]]) is None and fleiss_kappa([]) is None


def test_majority_and_confusion(tmp_path: Path) -> None:
    assert majority(["success", "unsure"]) is True and majority(["failure"]) is False
    assert majority(["success", "failure"]) is None and majority(["unsure"]) is None and majority([]) is None
    with make_store(tmp_path, items=4, overlap=2) as store:  # the machine says success on items 0 and 2
        names = [store.item_name(f"policy-a/{i}") for i in range(4)]
        store.save("ana", list(zip(names, ("success", "success", "failure", "failure"), strict=True)))
        store.save("bob", list(zip(names[:3], ("success", "success", "unsure"), strict=True)))
        found = measure_agreement(store.entries())
    (confusion,) = found.confusions
    assert (confusion.both_success, confusion.only_people, confusion.only_machine, confusion.both_failure) == (
        1,
        1,
        1,
        1,
    )
    assert confusion.disagreements == ("policy-a/1", "policy-a/2") and confusion.agreement == 0.5
    (pair,) = found.pairs
    assert pair.names == ("ana", "bob") and pair.items == 3 and pair.agreement == pytest.approx(2 / 3)
    assert found.annotators == {"ana": 4, "bob": 3} and found.shared_items == 3


def test_the_queue_from_frames_to_outcomes(tmp_path: Path) -> None:
    frames = np.zeros((4, 16, 18, 3), dtype=np.uint8)
    with LabelQueue.create(tmp_path / "labels") as queue:
        assert queue.add("a", frames, fps=20.0, machine=Machine("m", 0.2, False))
        assert queue.add("b", frames, fps=20.0)
        assert not queue.add("a", frames, fps=20.0), "an interrupted evaluation adds what is missing only"
        with pytest.raises(InvalidImage, match="uint8"):
            queue.add("c", frames.astype(np.float32), fps=20.0)  # type: ignore[arg-type]
        videos = sorted((tmp_path / "labels" / "videos").iterdir())
        assert videos == sorted(queue.video(queue.store.item_name(key)) for key in "ab")
        assert all(video.read_bytes()[4:8] == b"ftyp" for video in videos)
        assert not queue.complete() and queue.outcomes()["a"].success is None
        with LabelQueue.open(tmp_path / "labels") as other:
            other.store.save("ana", [(other.store.item_name("a"), "success")])
        outcome = queue.outcomes()["a"]
        assert outcome.success is True and outcome.probability == 1.0 and outcome.complete
        assert queue.agreement().confusions[0].only_people == 1 and not queue.complete()
