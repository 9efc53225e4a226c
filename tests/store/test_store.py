"""What a store promises when nothing goes wrong: snapshots, head, rollback, retention, whose it is."""

import copy
import json
import pickle
import shutil

import pytest
import safetensors
import safetensors.torch
import torch

import normadapt as na
from models import same
from normadapt.errors import NormadaptError, SnapshotError, StoreError
from normadapt.store import Snapshot, Store
from normadapt.store.content import encode
from store.tiny import adapted, feed, model


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "a" / "store") as store:
        yield store


def commits(store, model, number, good=True):
    for _ in range(number):
        feed(model, store.generation())
        store.commit(model, "more", good=good if isinstance(good, bool) else good(store.generation()))


def files(store):
    return sorted(path.name for path in (store.path / "snapshots").iterdir())


def test_the_first_commit_keeps_the_source_too(store):
    a = adapted()
    feed(a)
    snapshot = store.commit(a, "begin", site="hall 3")
    zero, one = store.snapshots()
    assert (zero.number, one.number, one.parent) == (0, 1, 0)
    assert store.head() == snapshot == one
    assert same(store.load(1), a.snapshot())
    assert same(store.load(0), adapted().snapshot())
    assert store.history()[-1].facts["site"] == "hall 3"
    assert one.streams == ("default",)
    assert one.model_name == "Sequential"
    assert one.fingerprint == a.fingerprint.digest
    assert one.version == na.__version__
    assert one.bytes == (store.path / "snapshots" / f"{one.digest}.safetensors").stat().st_size


def test_the_source_alone(store):
    a = adapted()
    feed(a)
    zero = store.commit_source(a)
    assert store.snapshots() == (zero,) == (store.head(),)
    assert store.commit_source(a) == zero
    assert store.commit(a, "then").number == 1
    assert store.verify().ok


def test_what_is_restored_has_the_same_future(store):
    a = adapted()
    feed(a)
    with a.stream("camera 2"):
        feed(a, 1)
    store.commit(a, "kept")
    b = adapted()
    assert store.restore(b) == store.head()
    assert same(b.snapshot(), a.snapshot())
    assert torch.equal(feed(b, 5), feed(a, 5))
    store.restore(b, 0)
    assert same(b.snapshot(), adapted().snapshot())
    assert store.head().number == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_library_reads_the_file_as_it_was(store, dtype):
    a = na.adapt(model().to(dtype))
    with torch.no_grad():
        a(torch.randn(4, 1, 2, 2).to(dtype))
    kept = store.commit(a, "kept")
    path = store.path / "snapshots" / f"{kept.digest}.safetensors"
    assert same(safetensors.torch.load_file(path), a.snapshot())
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["normadapt"])
    assert header["sites"] == [{"name": "1", "kind": "BatchNorm2d", "channels": 4, "eps": 1e-5}]
    assert header["policy"] == "Domains"
    assert header["settings"]["max_weight"] == "1.0"
    assert header["profiled"] is False


def test_the_same_state_in_another_order_is_the_same_file():
    state = {"a": torch.ones(3), "b": torch.zeros((), dtype=torch.int64), "c": torch.zeros(0), "d": torch.ones(2, 2).T}
    data = encode({"x": 1, "y": 2}, state)
    assert data == encode({"y": 2, "x": 1}, dict(reversed(state.items())))
    assert same(safetensors.torch.load(data), state)


def test_identical_content_is_stored_once(store):
    a = adapted()
    first = store.commit(a, "nothing seen")
    assert first.digest == store.snapshots()[0].digest
    feed(a)
    digests = {store.commit(a, note).digest for note in "abc"}
    assert len(digests) == 1
    assert len(files(store)) == 2
    assert [s.number for s in store.snapshots()] == [0, 1, 2, 3, 4]


def test_rollback_moves_the_head_and_deletes_nothing(store):
    a = adapted()
    commits(store, a, 3)
    before, kept = store.history(), files(store)
    assert store.rollback(by="Eva", reason="test").number == 2
    assert store.rollback().number == 1
    assert store.rollback().number == 0
    assert store.rollback().number == 0
    assert store.rollback(3).number == 3
    assert store.head().number == 3
    assert files(store) == kept
    assert store.history()[: len(before)] == before
    assert store.history(kinds=["rollback"])[0].facts == {"from": 3, "to": 2, "by": "Eva", "reason": "test"}
    assert store.verify().ok


def test_rollback_goes_to_the_last_good_one_that_the_head_came_from(store):
    a = adapted()
    commits(store, a, 2)
    commits(store, a, 2, good=False)
    assert store.rollback().number == 2  # over 3, which is not good
    commits(store, a, 1)  # number 5, on top of 2
    assert store.head().parent == 2
    assert store.rollback().number == 2  # not 4, and not 3: the head does not come from them
    with pytest.raises(StoreError, match="no snapshot 17"):
        store.rollback(17)
    for wrong in (True, "1", 1.0):
        with pytest.raises(ValueError, match="whole number"):
            store.rollback(wrong)
    for wrong in (-1, 2**70):
        with pytest.raises(StoreError, match="no snapshot"):
            store.rollback(wrong)
    assert store.head().number == 2


def test_retention_keeps_what_is_needed_and_says_what_went(tmp_path):
    store = Store(tmp_path, retain=3)
    a = adapted()
    commits(store, a, 2)
    commits(store, a, 4, good=False)
    # 0, the last good one (2) and the head (6)
    assert [s.number for s in store.snapshots()] == [0, 2, 6]
    assert [e.facts["number"] for e in store.history(kinds=["pruned"])] == [1, 3, 4, 5]
    assert len(files(store)) == 3
    assert store.head().parent == 2  # over those that went
    assert store.rollback().number == 2
    assert store.verify().ok
    with pytest.raises(StoreError, match="no snapshot 4 in the store, or no more"):
        store.load(4)
    commits(store, a, 1)
    assert store.head().number == 7  # numbers are not given twice
    assert store.verify().ok


def test_the_target_of_a_rollback_is_not_pruned(tmp_path):
    a = adapted()
    with Store(tmp_path) as store:
        commits(store, a, 3)
        store.rollback(1)
    store = Store(tmp_path, retain=1)
    commits(store, a, 1)  # 4, on top of 1
    assert [s.number for s in store.snapshots()] == [0, 1, 4]
    assert store.rollback().number == 1


def test_content_shared_with_a_kept_snapshot_survives_pruning(tmp_path):
    store = Store(tmp_path, retain=2)
    a = adapted()
    store.commit(a, "the source again")
    commits(store, a, 2)
    assert [s.number for s in store.snapshots()] == [0, 2, 3]
    assert same(store.load(0), adapted().snapshot())
    assert store.verify().ok


def test_another_models_store_is_refused(store):
    a = adapted()
    feed(a)
    store.commit(a, "mine")
    before = store.history()
    other = adapted(seed=1)
    for attempt in (lambda: store.commit(other, "x"), lambda: store.commit_source(other), lambda: store.restore(other)):
        with pytest.raises(SnapshotError, match="is of Sequential"):
            attempt()
    for other, words in ((adapted(policy=na.Blend()), "policy: Domains"), (adapted(profiled=False), "profile")):
        with pytest.raises(SnapshotError, match=words):
            store.commit(other, "x")
        with pytest.raises(SnapshotError, match=words):
            store.restore(other)
    assert store.history() == before


def spoil(a, value, channel=1):
    record = a._streams["default"].records[0]
    mean, variance = record.buffers
    variance = variance.clone()
    variance[channel] = value
    a._streams["default"].records[0] = record._replace(buffers=(mean, variance))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0])
def test_a_state_that_would_spoil_the_model_is_not_committed(store, value):
    a = adapted()
    feed(a)
    good = store.commit(a, "good")
    spoil(a, value)
    with pytest.raises(SnapshotError, match="finite"):
        store.commit(a, "bad")
    assert store.head() == good
    assert len(files(store)) == 2


def test_a_variance_of_0_is_accepted_where_the_source_has_it(tmp_path):
    dead = model()
    dead[1].running_var[2] = 0.0
    a = na.adapt(dead, policy=na.baselines.Source())
    feed(a)
    store = Store(tmp_path)
    store.commit(a, "kept")
    store.restore(a)
    assert store.verify().ok
    spoil(a, 0.0, channel=1)
    with pytest.raises(SnapshotError, match="in 1 channels, the first are 1"):
        store.commit(a, "another channel")
    spoil(a, 1.0, channel=1)
    spoil(a, -1.0, channel=2)
    with pytest.raises(SnapshotError, match="in 1 channels, the first are 2"):
        store.commit(a, "below 0")


@pytest.mark.parametrize(
    "name", ["", " ", "a|b", "stream|0|name", "\N{SNOWMAN}", "x\0y", "../../etc", "\ud800", "n" * 5000]
)
def test_any_name_of_a_stream_is_kept(store, name):
    a = adapted()
    with a.stream(name):
        feed(a)
    store.commit(a, name, why=name)
    b = adapted()
    assert store.restore(b).streams == a.streams == b.streams
    assert store.head().note == store.history()[-1].facts["why"] == name
    assert store.verify().ok


def test_nothing_committed_yet(store):
    assert store.snapshots() == ()
    assert store.verify().ok
    for attempt in (store.head, store.rollback, lambda: store.load(0), lambda: store.restore(adapted())):
        with pytest.raises(StoreError, match="nothing was committed"):
            attempt()


def test_arguments_are_checked(tmp_path):
    for retain in (0, -1, 1.5, True, None):
        with pytest.raises(ValueError, match="retain"):
            Store(tmp_path, retain=retain)
    for timeout in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="timeout"):
            Store(tmp_path, timeout=timeout)
    with pytest.raises(StoreError, match="there is no store"):
        Store(tmp_path / "none", create=False)
    assert not (tmp_path / "none").exists()
    with Store(tmp_path) as store, pytest.raises(ValueError, match="digest, number"):
        store.commit(adapted(), "x", number=7, digest="y")
    with pytest.raises(StoreError, match="closed"):
        store.head()
    assert issubclass(StoreError, NormadaptError)


def test_a_second_opening_finds_everything(tmp_path):
    a = adapted()
    feed(a)
    with Store(tmp_path) as store:
        kept = store.commit(a, "kept")
        store.write_state("pilot", {"stage": "canary"})
        number = store.send("pause", by="Eva")
        events, generation = store.history(), store.generation()
    with Store(tmp_path, create=False) as store:
        assert store.head() == kept
        assert store.history() == events
        assert store.generation() == generation
        assert store.read_state("pilot") == {"stage": "canary"}
        assert store.take_commands()[0].number == number
        assert isinstance(kept, Snapshot)


def test_a_copy_opens_the_folder_for_itself(store):
    a = adapted()
    feed(a)
    store.commit(a, "kept")
    for other in (copy.deepcopy(store), pickle.loads(pickle.dumps(store))):
        store.close()
        assert other.head().note == "kept"
        other.close()


def test_a_transaction_is_all_or_nothing(store):
    a = adapted()
    commits(store, a, 2)
    generation, events, kept = store.generation(), store.history(), files(store)
    with pytest.raises(KeyError), store.transaction():  # noqa: PT012
        store.rollback(1)
        store.record("trip", guard="disagreement")
        store.write_state("pilot", {"stage": "rolled_back"})
        feed(a, 99)
        store.commit(a, "inside")
        store.send("promote")
        assert store.head().number == 3  # it sees its own writes
        raise KeyError
    assert (store.generation(), store.history(), store.head().number) == (generation, events, 2)
    assert store.read_state("pilot") is None
    assert store.take_commands() == ()
    with store.transaction():
        store.rollback(1)
        store.write_state("pilot", {"stage": "rolled_back"})
        with pytest.raises(ValueError, match="object"), store.transaction():  # noqa: PT012
            store.record("this goes")
            store.record("trip", guard=object())  # undone by itself, what is around it stays
    assert store.head().number == 1
    assert store.read_state("pilot") == {"stage": "rolled_back"}
    assert not store.history(kinds=["this goes"])
    assert store.verify().ok
    assert files(store) == kept  # the content that was written inside the first one went at once


def test_a_copy_of_a_store_that_was_deleted_does_not_make_an_empty_one(store):
    copied = pickle.dumps(store)
    store.close()
    shutil.rmtree(store.path)
    for attempt in (lambda: pickle.loads(copied), lambda: copy.deepcopy(store)):
        with pytest.raises(StoreError, match="there is no store at"):
            attempt()
        assert not store.path.exists()


def test_pruning_in_a_transaction_that_fails_takes_no_file(tmp_path):
    store = Store(tmp_path, retain=2)
    a = adapted()
    commits(store, a, 3)
    with pytest.raises(KeyError), store.transaction():  # noqa: PT012
        commits(store, a, 1)
        raise KeyError
    assert store.verify().ok
    store.record("later")  # must not act on what the failed one meant to prune
    commits(store, a, 1)
    assert store.verify().ok


def test_a_callers_own_error_leaves_a_transaction_as_it_is(store):
    with pytest.raises(FileNotFoundError, match="mine"), store.transaction():  # noqa: PT012
        store.record("undone")
        raise FileNotFoundError("mine")
    assert not store.history(kinds=["undone"])


def test_an_earlier_state_can_be_committed(store):
    a = adapted()
    feed(a)
    earlier = a.snapshot()
    feed(a, 1)
    number = store.commit(a, "earlier", state=earlier).number
    assert same(store.load(number), earlier)
    assert not same(earlier, a.snapshot())
    with pytest.raises(SnapshotError, match="no snapshot"):
        store.commit(a, "nothing", state={})
    wrong = adapted(seed=1).snapshot()
    with pytest.raises(SnapshotError):
        store.commit(a, "another's", state=wrong)


def test_commands_are_given_out_once_and_in_order(store):
    assert store.take_commands() == ()
    before = store.generation()
    numbers = [store.send("promote", by="Eva"), store.send("pause", by="Ben", until=float("nan"))]
    assert store.generation() == before + 2
    first, second = store.take_commands()
    assert [first.number, second.number] == numbers
    assert (first.command, first.facts) == ("promote", {"by": "Eva"})
    assert second.facts == {"by": "Ben", "until": None}
    assert store.take_commands() == ()
    assert [e.facts["command"] for e in store.history(kinds=["command"])] == ["promote", "pause"]


def test_states_return_exactly(store):
    assert store.read_state("pilot") is None
    value = {
        "wealth": [0.1 + 0.2, float("inf"), -1e-320],
        "text": "\ud800\N{SNOWMAN}",
        "none": None,
        "deep": {"a": [1]},
    }
    store.write_state("pilot", value)
    store.write_state("other", {})
    assert store.read_state("pilot") == value
    store.write_state("pilot", {"again": True})
    assert store.read_state("pilot") == {"again": True}
    with pytest.raises(ValueError, match="JSON"):
        store.write_state("pilot", {"a": object()})
    assert store.read_state("pilot") == {"again": True}


def test_changes_is_another_number_after_anything_was_written_by_anybody(store):
    seen = [store.changes()]
    assert store.changes() == seen[0]
    with Store(store.path) as other:
        for write in (
            lambda: store.record("x"),
            lambda: other.record("x"),
            lambda: other.write_state("x", {}),
            lambda: store.write_state("x", {"a": 1}),
            lambda: other.send("pause"),
            lambda: store.take_commands(),
        ):
            write()
            seen.append(store.changes())
            assert seen[-1] != seen[-2]
            store.history()
            assert store.changes() == seen[-1]


def test_the_generation_grows_with_what_others_must_notice(store):
    a = adapted()
    feed(a)
    seen = [store.generation()]
    for action in (lambda: store.commit(a, "x"), store.rollback, lambda: store.send("pause")):
        action()
        seen.append(store.generation())
    assert seen == sorted(set(seen))
    store.record("x")
    store.write_state("x", {})
    store.take_commands()
    assert store.generation() == seen[-1]
