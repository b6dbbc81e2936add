"""What `clean` finds in a store and removes, and what it never touches."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_steps.commands import clean
from llava_steps.core import filesystem
from llava_steps.store import lease, registry, run, store, waiting
from llava_steps.store.shown import shown
from tests.helpers.patience import wait_for

LONG_AGO = time.time() - 3 * 86400


def name(number: int) -> str:
    """A fingerprint."""
    return f"{number:032x}"


def sealed(root: Path, step: str, number: int, text: str = "value") -> Path:
    """A sealed entry with one file."""
    entry = root / step / name(number)
    (entry / ".work/logs").mkdir(parents=True)
    (entry / "out.txt").write_text(text)
    store.seal(entry, {"step": step, "fingerprint": name(number)})
    return entry


def killed(root: Path, step: str, number: int, ended: float = LONG_AGO) -> Path:
    """What a killed attempt leaves."""
    entry = root / step / name(number)
    (entry / ".work/logs").mkdir(parents=True)
    (entry / "part.bin").write_text("part")
    dead = lease._identity() | {"pid": 4_000_000, "started": "1"}
    (entry / ".work/lease.json").write_text(json.dumps(dead))
    age(entry, ended)
    return entry


def age(path: Path, when: float = LONG_AGO) -> None:
    for item in (path, *path.rglob("*")):
        os.utime(item, (when, when), follow_symlinks=False)


def digest(*roots: Path) -> str:
    """Of the names, kinds, times and bytes of all files."""
    rows = []
    for item in sorted(item for root in roots for item in (root, *root.rglob("*"))):
        content = os.readlink(item) if item.is_symlink() else ""
        if item.is_file() and not item.is_symlink():
            content = hashlib.sha256(item.read_bytes()).hexdigest()
        rows.append((str(item), content, item.lstat().st_mode, item.lstat().st_mtime_ns))
    return hashlib.sha256(repr(rows).encode()).hexdigest()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with one value that a registered results directory shows."""
    monkeypatch.chdir(tmp_path)
    made = tmp_path / "store"
    store.publish(sealed(made, "model", 0), tmp_path / "results/a/model")
    registry.register(made, tmp_path / "results")
    return made


@pytest.fixture
def cleaned(root: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """The figures of a call of `clean`."""

    def call(*flags: str) -> dict[str, Any]:
        assert clean.main(["--store", str(root), "--json", *flags]) == 0
        line, end = capsys.readouterr().out.split("\n")
        assert end == ""
        return json.loads(line)

    return call


def paths(figures: dict[str, Any]) -> dict[str, str]:
    """Kind of each path below the store."""
    found = {}
    for item in figures["items"]:
        path = Path(item["path"])
        found["/".join(path.parts[path.parts.index("store") + 1 :])] = item["kind"]
    return found


def test_unshown_replaced_killed_and_temporary_are_listed_and_removed(
    root: Path, cleaned: Callable[..., dict[str, Any]]
) -> None:
    sealed(root, "model", 1)
    sealed(root, "model", 2).rename(root / "model" / f"{name(0)}.replaced-1")
    killed(root, "train", 3)
    killed(root, "train", 4, time.time())
    (root / "model" / name(0) / ".tmp-x").write_text("x")
    (root / "model" / name(0) / ".work/damaged/iter_0000001").mkdir(parents=True)
    (root / ".tmp-digests.json-1").write_text("x")
    age(root / ".tmp-digests.json-1")
    (root / ".tmp-digests.json-2").write_text("of a process that writes")
    (root / "model" / "notes").mkdir()
    (root / "model" / "a.txt").write_text("of the user")
    expected = {
        f"model/{name(1)}": "value",
        f"model/{name(0)}.replaced-1": "replaced",
        f"train/{name(3)}": "unfinished",
        f"model/{name(0)}/.tmp-x": "temporary",
        f"model/{name(0)}/.work/damaged": "leftover",
        ".tmp-digests.json-1": "temporary",
    }
    before = digest(root, root.parent / "results")
    assert paths(cleaned()) == expected
    assert digest(root, root.parent / "results") == before, "without --yes nothing changes"
    assert paths(cleaned("--yes")) == expected
    assert paths(cleaned()) == {}
    left = {path.relative_to(root).as_posix() for path in root.glob("*/*")}
    assert left - {f"results/{p.name}" for p in (root / "results").iterdir()} == {
        f"model/{name(0)}", f"train/{name(4)}", "model/notes", "model/a.txt",
    }  # fmt: skip
    assert store.shows(root.parent / "results/a/model", root / "model" / name(0))


def test_what_a_run_shows_as_work_goes_only_when_asked_for(
    root: Path, cleaned: Callable[..., dict[str, Any]]
) -> None:
    store.show_work(killed(root, "train", 1), root.parent / "results/a/train")
    killed(root, "train", 2, time.time())
    assert paths(cleaned()) == {}
    both = {f"train/{name(1)}": "unfinished", f"train/{name(2)}": "unfinished"}
    assert paths(cleaned("--unfinished", "--yes")) == both
    assert not (root / "train" / name(1)).exists()


def test_a_value_that_is_being_computed_again_stays(
    root: Path, cleaned: Callable[..., dict[str, Any]]
) -> None:
    sealed(root, "train", 1).rename(root / "train" / f"{name(1)}.replaced-1")
    killed(root, "train", 1, time.time())
    assert paths(cleaned()) == {}


@pytest.mark.parametrize("flags", [(), ("--unfinished",)])
def test_what_a_live_lease_holds_and_what_it_reads_stay(
    flags: tuple[str, ...], root: Path, cleaned: Callable[..., dict[str, Any]]
) -> None:
    read, entry = sealed(root, "model", 1), killed(root, "train", 1)
    run._note_inputs(entry, {"load": store.Input(read, "", {}, read)})
    elsewhere = killed(root, "train", 2)
    (elsewhere / ".work/lease.json").write_text(
        json.dumps(lease._identity() | {"boot_id": "another"})
    )
    age(entry)
    with lease.Lease(entry / ".work"):
        assert paths(cleaned(*flags, "--yes")) == {}
    age(entry)
    found = {f"train/{name(1)}": "unfinished", f"model/{name(1)}": "value"}
    assert paths(cleaned(*flags)) == found, "a foreign lease counts until it is long silent"
    age(elsewhere)
    assert paths(cleaned(*flags)) == found | {f"train/{name(2)}": "unfinished"}


def test_what_shown_entries_read_through_links_stays(
    root: Path, cleaned: Callable[..., dict[str, Any]]
) -> None:
    first, second = sealed(root, "raw", 1), sealed(root, "raw", 2)
    (first / "chained").symlink_to(second / "out.txt")
    (root / "model" / name(0) / "far").symlink_to(os.path.relpath(first, root / "model" / name(0)))
    assert paths(cleaned()) == {}


def test_links_by_hand_manifests_and_shares_count_as_shown(
    root: Path, cleaned: Callable[..., dict[str, Any]]
) -> None:
    results = root.parent / "results"
    store.publish(sealed(root, "shards", 1), results / "a/tar_shards_parts/1-of-2")
    (results / "best").symlink_to(sealed(root, "model", 1))
    copy = results / "b/model"
    copy.mkdir(parents=True)
    shutil.copy(sealed(root, "model", 2) / "manifest.json", copy)
    outer = root.parent / "mine"
    outer.mkdir()
    (outer / "model").symlink_to(sealed(root, "model", 3) / "out.txt")
    assert paths(cleaned()) == {f"model/{name(3)}": "value"}
    assert paths(cleaned("--results", str(outer))) == {}


def test_hard_links_count_once(root: Path, cleaned: Callable[..., dict[str, Any]]) -> None:
    tars, dataset = sealed(root, "tars", 1, "x" * 1000), sealed(root, "dataset", 1)
    os.link(tars / "out.txt", dataset / "0.tar")
    os.link(root / "model" / name(0) / "out.txt", dataset / "kept.txt")
    figures = cleaned()
    shares = {
        path: sum(f.stat().st_size for f in path.rglob("*") if f.is_file() and f.name not in own)
        for path, own in ((tars, ()), (dataset, ("0.tar", "kept.txt")))
    }
    assert figures["bytes"] == sum(shares.values())
    assert {Path(i["path"]): i["bytes"] for i in figures["items"]} == shares


def test_links_out_of_the_store_are_not_followed(
    root: Path, cleaned: Callable[..., dict[str, Any]]
) -> None:
    outside = root.parent / "outside"
    sealed(outside, "model", 7)
    before = digest(outside)
    (root / "model" / name(7)).symlink_to(outside / "model" / name(7))
    (root / "far").symlink_to(outside / "model")
    (sealed(root, "model", 1) / "data").symlink_to(outside)
    assert paths(cleaned("--yes")) == {f"model/{name(1)}": "value"}
    assert digest(outside) == before and (root / "far").exists()


@pytest.mark.parametrize("how", ["gone", "empty"])
def test_a_results_directory_that_vanished_is_refused_until_it_is_forgotten(
    how: str, root: Path, cleaned: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    other = root.parent / "other"
    store.publish(sealed(root, "model", 1), other / "b/model")
    registry.register(root, other)
    shutil.rmtree(other)
    if how == "empty":
        other.mkdir()
    before = digest(root)
    assert clean.main(["--store", str(root), "--yes"]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(other) in error and f"--forget {other}" in error
    assert digest(root) == before
    assert paths(cleaned("--forget", str(other))) == {f"model/{name(1)}": "value"}
    assert clean.main(["--store", str(root), "--forget", str(other)]) == 2


def test_a_store_that_knows_no_results_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sealed(tmp_path / "store", "model", 1)
    assert clean.main(["--store", "store"]) == 2
    assert "--results" in capsys.readouterr().err
    assert clean.main(["--store", "nowhere"]) == 3
    (tmp_path / "no/sub").mkdir(parents=True)
    (tmp_path / "no/sub/.tmp-x").write_text("of the user")
    assert clean.main(["--store", "no", "--results", "store"]) == 3


def test_a_project_that_moved_as_a_whole_is_still_known(tmp_path: Path, root: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    root.rename(moved / "store")
    (tmp_path / "results").rename(moved / "results")
    assert registry.registered(moved / "store") == [moved / "results"]
    assert shown(moved / "store", registry.registered(moved / "store")).values == {
        ("model", name(0))
    }


def test_results_of_a_store_that_moved_without_them_are_still_known(
    tmp_path: Path, root: Path, cleaned: Callable[..., Any]
) -> None:
    big = tmp_path / "big"
    (big / "results/other").mkdir(parents=True)
    (big / "results/other/x").write_text("of somebody else")
    root.rename(big / "store")
    root.symlink_to(big / "store")
    known = registry.registered(big / "store")
    assert set(known) == {big / "results", tmp_path / "results"}
    assert shown(big / "store", known).values == {("model", name(0))}
    assert registry.forget(big / "store", tmp_path / "results")
    assert registry.registered(big / "store") == []


def test_directories_are_registered_once(tmp_path: Path) -> None:
    made = tmp_path / "store"
    registry.register(made, tmp_path / "results")
    (file,) = (made / "results").iterdir()
    before = file.stat().st_mtime_ns, file.stat().st_ino
    for out in ("results/a/model", "results/a/parts/1-of-2"):
        registry.register_result(made, tmp_path / out)
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == before
    registry.register_result(made, tmp_path / "out")
    registry.register_result(made, tmp_path / "results/1/2/3/4")
    assert set(registry.registered(made)) == {tmp_path / "results", tmp_path / "out"}
    store.publish(sealed(made, "model", 1), tmp_path / "results/1/2/3/4")
    assert ("model", name(1)) in shown(made, registry.registered(made)).values


@pytest.mark.parametrize("depth", [1, 4, 5, 12])
def test_a_link_at_any_depth_is_shown(
    depth: int, root: Path, cleaned: Callable[..., dict[str, Any]]
) -> None:
    folder = root.parent.joinpath("results/a", *map(str, range(depth)))
    folder.mkdir(parents=True)
    (folder / "value").symlink_to(sealed(root, "model", 1) / "out.txt")
    (folder / "whole").symlink_to(os.path.relpath(sealed(root, "model", 2), folder))
    store.publish(sealed(root, "model", 3), folder / "share")
    (folder / "copy").mkdir()
    shutil.copy(sealed(root, "model", 4) / "manifest.json", folder / "copy")
    sealed(root, "model", 5)
    assert paths(cleaned("--yes")) == {f"model/{name(5)}": "value"}
    assert (folder / "value").read_text() == (folder / "whole/out.txt").read_text() == "value"


def test_every_step_of_a_chain_of_links_is_shown(
    root: Path, cleaned: Callable[..., dict[str, Any]]
) -> None:
    """results -> alias of the store -> payload that is a link -> another entry -> outside."""
    parent = root.parent
    (parent / "outside").write_text("x")
    first, second = sealed(root, "model", 1), sealed(root, "model", 2)
    (second / "far").symlink_to(parent / "outside")
    (first / "data").symlink_to(second)
    (parent / "alias").symlink_to(root)
    (parent / "hop").symlink_to(Path("alias/model") / name(1) / "data/far")
    (parent / "results/mine").symlink_to(parent / "hop")
    (parent / "results/round").symlink_to("round")
    keys = {("model", name(number)) for number in range(3)}
    assert shown(root, [parent / "results"]).values == keys
    assert paths(cleaned()) == {}


def test_store_and_results_that_moved_to_different_places(
    root: Path, cleaned: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A directory of the same name beside the new store does not stand for the registered one."""
    parent = root.parent
    moved, project = parent / "big/store", parent / "project"
    for folder in ("big/results/other", "project"):
        (parent / folder).mkdir(parents=True)
    (parent / "big/results/other/x").write_text("of somebody else")
    root.rename(moved)
    (parent / "results").rename(project / "results")
    assert registry.registered(moved) == [parent / "results"], "where it was last seen"
    before = digest(moved)
    for _ in range(2):
        assert clean.main(["--store", str(moved), "--yes"]) == 3
        error = capsys.readouterr().err
        assert str(parent / "results") in error and "--results" in error
        # A new project beside the store registers its own directory under the same path.
        registry.register(moved, parent / "big/results")
        assert parent / "results" in registry.registered(moved)
        assert parent / "big/results" in registry.registered(moved)
    shutil.rmtree(moved / "results")
    registry.register(moved, project / "results")
    assert registry.registered(moved) == [project / "results"]
    assert before != digest(moved) and (moved / "model" / name(0) / "out.txt").exists()
    figures = clean.main(["--store", str(moved), "--yes"])
    assert figures == 0 and (moved / "model" / name(0) / "out.txt").exists()


def test_a_moved_project_is_registered_once_where_it_is(tmp_path: Path, root: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    root.rename(moved / "store")
    (tmp_path / "results").rename(moved / "results")
    registry.register(moved / "store", moved / "results")
    (file,) = (moved / "store/results").iterdir()
    assert json.loads(file.read_bytes())["store"] == str(moved / "store")
    assert registry.registered(moved / "store") == [moved / "results"]


def test_a_value_that_is_shown_after_it_was_listed_stays(
    root: Path, cleaned: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, out = sealed(root, "model", 1), root.parent / "results/b/model"
    states = []

    def late(*arguments: Any) -> Any:
        states.append(lease.alive(entry / ".work"))
        if states[-1]:
            store.publish(entry, out)
        return shown(*arguments)

    monkeypatch.setattr(clean, "shown", late)
    assert paths(cleaned("--yes")) == {}
    assert states == [False, True], "looked for again under the lease"
    assert store.shows(out, entry) and not (entry / ".work/lease.json").exists()


def test_who_publishes_waits_for_the_lease_and_sees_what_became_of_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT", 0.02)
    entry, out = sealed(root, "model", 1), root.parent / "results/b/model"
    for removed in (False, True):
        seen: list[bool] = []

        def claim(seen: list[bool] = seen) -> None:
            with waiting.claimed_value(entry, out) as there:
                seen.append(there)

        with lease.Lease(entry / ".work") as held:
            thread = threading.Thread(target=claim)
            thread.start()
            wait_for((out / store.CLAIM).is_symlink)
            assert ("model", name(1)) in shown(root, [root.parent / "results"]).works
            time.sleep(0.1)
            assert seen == []
            if removed:
                held.settle()
                entry.rename(entry.with_name(".tmp-removed-x"))
        thread.join()
        assert seen == [not removed] and not (out / store.CLAIM).is_symlink()


def test_steps_that_publish_while_clean_removes(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the order of the two: a step shows a whole value, or learns that there is none."""
    monkeypatch.setattr(lease, "HEARTBEAT", 0.005)
    out, end = root.parent / "results/b/model", threading.Event()
    codes, found = [], []

    def again_and_again() -> None:
        while not end.is_set():
            codes.append(clean.main(["--store", str(root), "--yes"]))

    thread = threading.Thread(target=again_and_again)
    thread.start()
    for number in range(60):
        entry = root / "model" / name(1)
        if not entry.exists():
            sealed(root.parent / "made", "model", 1).rename(entry)
        time.sleep(0.002 * (number % 5))
        with waiting.claimed_value(entry, out) as there:
            found.append(there)
            if there:
                store.publish(entry, out)
        if there:
            time.sleep(0.002)
            assert store.shows(out, entry) and (out / "out.txt").read_text() == "value"
        shutil.rmtree(out, ignore_errors=True)
    end.set()
    thread.join()
    assert set(codes) == {0} and any(found)


def test_an_entry_that_is_shown_again_is_shown_at_every_moment(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = root.parent / "results"
    entry, out = root / "model" / name(0), results / "a/model"
    states = []
    for function in ("write_bytes", "remove"):
        original = getattr(filesystem, function)

        def spy(*arguments: Any, original: Any = original) -> Any:
            states.append(shown(root, [results]))
            return original(*arguments)

        monkeypatch.setattr(filesystem, function, spy)
    unlink = Path.unlink
    monkeypatch.setattr(
        Path, "unlink",
        lambda path, **k: (states.append(shown(root, [results])), unlink(path, **k))[1],
    )  # fmt: skip
    link = store._link
    monkeypatch.setattr(
        store, "_link",
        lambda *pair: (states.append(shown(root, [results])), link(*pair))[1],
    )  # fmt: skip
    with store.claimed(entry, out):
        states.clear()  # from here on the claim is set
        store.publish(entry, out)
        assert (out / store.CLAIM).is_symlink()
    assert not (out / store.CLAIM).is_symlink()
    assert len(states) > 3
    assert all(("model", name(0)) in found.works | found.values for found in states)


def test_the_claim_of_a_killed_step_goes_when_the_next_one_shows_its_work(
    root: Path, cleaned: Callable[..., dict[str, Any]]
) -> None:
    """Until then it stays, also while the result of before is taken away."""
    out = root.parent / "results/a/model"
    claimed = sealed(root, "model", 1)
    store._link(claimed, out / store.CLAIM)
    store.unpublish(out)
    assert [item.name for item in out.iterdir()] == [store.CLAIM]
    assert paths(cleaned()) == {f"model/{name(0)}": "value"}
    store.show_work(killed(root, "model", 2, time.time()), out)
    assert [item.name for item in out.iterdir()] == ["work"]
    assert set(paths(cleaned())) == {f"model/{name(0)}", f"model/{name(1)}"}
    store._link(claimed, out / store.CLAIM)
    with store.claimed(root / "model" / name(0), out):
        assert (out / store.CLAIM).resolve() == root / "model" / name(0)


def test_killed_while_it_removes(
    root: Path, cleaned: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed(root, "model", 1)
    sealed(root, "model", 2)

    def die(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "remove", die)
        with pytest.raises(KeyboardInterrupt):
            clean.main(["--store", str(root), "--yes"])
    assert [p.name for p in (root / "model").glob("[0-9a-f]*")] == [name(0)]
    left = paths(cleaned("--yes"))
    assert len(left) == 2 and set(left.values()) == {"temporary"}
    assert [p.name for p in (root / "model").iterdir()] == [name(0)]


def test_a_listing_for_people(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = sealed(root, "model", 1, "x" * 3_000_000)
    assert clean.main(["--store", str(root)]) == 0
    first, last = (" ".join(line.split()) for line in capsys.readouterr().out.splitlines())
    assert first == f"2.9 MiB value model/{entry.name} no run shows it"
    assert last == "2.9 MiB in 1 item: remove with --yes"
