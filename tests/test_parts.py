"""How many windows a teacher is shown at once, and what becomes of a batch on its way to the disk.

Where a GPU is asked for, others stand in: a teacher that runs out of memory above some number of
windows, and copies that arrive when they are let. What a real one does is marked `gpu`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_teacher import NumpyTeacher
from test_corpus import write_fasta
from test_extract import (
    BASES,
    KMERS,
    PART,
    TorchTeacher,
    a_recipe,
    assert_same_bytes,
    genome_letters,
    spoilt,
    told_of,
    tree,
)

from had_pipe import batches
from had_pipe.audit import audit
from had_pipe.batches import fit_batch, halved, to_numpy
from had_pipe.cache import Cache, Part, integrity
from had_pipe.errors import CacheMismatch, Interrupted, NonFiniteError, StorageError
from had_pipe.extract import extract
from had_pipe.parts import PartMaker, lease_of
from had_pipe.progress import Progress
from had_pipe.recipe import Recipe


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fasta(tmp_path_factory.mktemp("genome") / "g.fa", genome_letters())


@pytest.fixture(scope="module")
def whole(genome: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache that an undisturbed run makes on a CPU."""
    path = tmp_path_factory.mktemp("whole") / "cache"
    extract(a_recipe(genome, path), teacher=NumpyTeacher())
    return path


# --- stand-ins ------------------------------------------------------------------------------------

SAID = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 9.50 GiB of "
    "which 1.25 GiB is free. If reserved but unallocated memory is large try something else."
)


@dataclass(kw_only=True)
class Hungry(NumpyTeacher):
    """Runs out of memory above some number of windows, on a device that is asked what it has."""

    numerics: Mapping[str, str | int] = field(default_factory=lambda: {"device": "cuda:stand-in"})
    most: int = 10**6

    def embed(self, kmer_id_WT: Any, hidden_WT: Any) -> Any:
        if len(kmer_id_WT) > self.most:
            self.shapes.add(kmer_id_WT.shape)
            raise torch.OutOfMemoryError(SAID)
        return super().embed(kmer_id_WT, hidden_WT)


@dataclass
class Plenty:
    """Memory of which each window takes so much."""

    room: int = 10**9
    window: int = 1
    tried: int = 0

    def clear(self) -> None:
        self.tried += 1

    def used(self, array: Any) -> tuple[int, int]:
        return len(array) * self.window, self.room


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Plenty:
    """What stands in for CUDA's."""
    memory = Plenty()
    monkeypatch.setattr(batches, "_CudaMemory", lambda: memory)
    return memory


def batch_in_receipts(path: Path) -> set[str | int]:
    cache = Cache.open(path, incomplete=True)
    made = set(cache.plan.parts()) - set(integrity.missing_parts(path, cache.plan))
    return {cache.receipt(part).numerics["batch"] for part in made}


def assert_same_vectors(path: Path, other: Path) -> None:
    """Everything but receipts, which tell of the class of arithmetic, and the manifest, of them."""

    def rest(path: Path) -> dict[str, bytes]:
        return {k: v for k, v in tree(path).items() if not k.startswith(("parts/", "manifest"))}

    one, two = rest(path), rest(other)
    assert one.keys() == two.keys()
    assert [key for key in one if one[key] != two[key]] == []
    assert integrity.verify(path).problems == ()


# --- how many windows -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kmers", "part", "windows"),
    [
        (1, 1024, 16),
        (10, 7, 7),
        (170, 1024, 16),
        (171, 1024, 15),
        (341, 1024, 7),
        (1023, 1024, 2),
        (2047, 1024, 1),
        (9999, 1024, 1),
    ],
)
def test_on_a_cpu_the_batch_follows_from_the_length_of_windows_alone(
    kmers: int, part: int, windows: int
) -> None:
    teacher = NumpyTeacher()
    assert fit_batch(teacher, kmers=kmers, part=part) == windows
    assert teacher.batches == 0


@settings(deadline=None)
@given(part=st.integers(1, 5000), windows=st.integers(1, 5000))
def test_half_a_batch_is_at_most_half_and_divides_a_part_almost_evenly(
    part: int, windows: int
) -> None:
    half = halved(windows, part)
    assert 1 <= half <= max(1, windows // 2)
    count = -(-part // half)
    # As few batches as half the windows would take, and hardly a window shown in vain.
    assert count == -(-part // max(1, min(part, windows // 2)))
    assert count * half - part < count


@pytest.mark.parametrize(
    ("most", "windows"), [(1024, 1024), (1023, 512), (100, 64), (64, 64), (1, 1)]
)
def test_windows_are_halved_until_they_fit(most: int, windows: int) -> None:
    teacher, memory = Hungry(most=most), Plenty()
    assert fit_batch(teacher, kmers=4, part=1024, memory=memory) == windows
    tried = [1024 >> n for n in range(11) if 1024 >> n >= windows]
    assert teacher.shapes == {(n, 4) for n in tried}
    assert memory.tried == len(tried)
    assert teacher.batches == 1  # of those that were tried, one ran


def test_a_batch_leaves_a_tenth_of_the_memory_for_what_follows() -> None:
    for room, windows in ((1000, 512), (1024, 512), (1138, 1024), (1137, 512)):
        memory = Plenty(room=room)
        assert fit_batch(Hungry(), kmers=4, part=1024, memory=memory) == windows


def test_the_first_batch_keeps_a_gpu_busy_and_divides_a_part() -> None:
    assert fit_batch(Hungry(), kmers=170, part=1024, memory=Plenty()) == 171  # 6 of them, not 5.3
    assert fit_batch(Hungry(), kmers=341, part=1024, memory=Plenty()) == 94
    assert fit_batch(Hungry(), kmers=2047, part=1024, memory=Plenty()) == 16
    assert fit_batch(Hungry(), kmers=170, part=20, memory=Plenty()) == 20


def test_where_not_one_window_fits_it_is_told_how_much_memory_there_was() -> None:
    with pytest.raises(StorageError) as told:
        fit_batch(Hungry(most=0), kmers=170, part=8, memory=Plenty())
    assert "table: not even one window of 170 k-mers" in str(told.value)
    assert "of which 1.25 GiB is free)" in str(told.value)
    assert "shorter windows" in str(told.value)
    with pytest.raises(StorageError, match=r"3\.00 GB are needed, 2\.00 GB could be had"):
        fit_batch(Hungry(), kmers=170, part=8, memory=Plenty(room=2 * 10**9, window=3 * 10**9))


def test_what_is_no_lack_of_memory_is_not_taken_for_it() -> None:
    class Broken(Hungry):
        def embed(self, kmer_id_WT: Any, hidden_WT: Any) -> Any:
            raise RuntimeError("an illegal instruction")

    with pytest.raises(RuntimeError, match="illegal"):
        fit_batch(Broken(), kmers=4, part=8, memory=Plenty())


# --- one batch for one cache ----------------------------------------------------------------------


def test_a_process_tries_once_and_every_receipt_tells_the_outcome(
    genome: Path, whole: Path, tmp_path: Path, memory: Plenty
) -> None:
    teacher = Hungry(most=6)
    extract(a_recipe(genome, tmp_path / "cache"), teacher=teacher)
    assert teacher.shapes == {(20, KMERS), (10, KMERS), (5, KMERS)}
    assert memory.tried == 3
    assert batch_in_receipts(tmp_path / "cache") == {5}
    assert_same_vectors(tmp_path / "cache", whole)


def begun(genome: Path, path: Path, teacher: Hungry, *, parts: int) -> None:
    """A cache of some parts, whose maker was asked to stop."""
    enough = threading.Event()

    def count(progress: Progress) -> None:
        if progress.what == "extracting" and progress.done > (parts - 1) * PART:
            enough.set()

    if not parts:
        enough.set()
    with pytest.raises(Interrupted):
        extract(a_recipe(genome, path), teacher=teacher, report=count, stopping=enough.is_set)


@pytest.mark.parametrize("parts", [0, 2])
def test_whoever_comes_later_takes_the_batch_over_from_note_or_receipts(
    genome: Path, whole: Path, tmp_path: Path, memory: Plenty, parts: int
) -> None:
    path = tmp_path / "cache"
    begun(genome, path, Hungry(most=5), parts=parts)
    memory.tried = 0
    larger = Hungry()
    extract(a_recipe(genome, path), teacher=larger)
    assert memory.tried == 0
    assert larger.shapes == {(5, KMERS)}
    assert batch_in_receipts(path) == {5}
    assert_same_vectors(path, whole)


def test_a_class_that_differs_in_more_than_its_batch_is_still_refused(
    genome: Path, tmp_path: Path, memory: Plenty
) -> None:
    path = tmp_path / "cache"
    begun(genome, path, Hungry(most=5), parts=2)
    with pytest.raises(CacheMismatch, match=r"\(device: there 'cuda:stand-in', here 'numpy'\)"):
        extract(a_recipe(genome, path), teacher=NumpyTeacher())


def test_a_receipt_whose_batch_cannot_be_is_refused(
    genome: Path, tmp_path: Path, memory: Plenty
) -> None:
    path = tmp_path / "cache"
    begun(genome, path, Hungry(most=5), parts=2)
    for receipt in path.glob("parts/*/*/*.json"):
        text = receipt.read_text()
        assert '"batch":5' in text
        receipt.write_text(text.replace('"batch":5', '"batch":500000000'))
    with pytest.raises(CacheMismatch, match="batch: there 500000000, here 1 to 20"):
        extract(a_recipe(genome, path), teacher=Hungry())


def test_an_audit_embeds_in_the_batch_of_the_receipts(
    genome: Path, tmp_path: Path, memory: Plenty
) -> None:
    """Another batch would be another class of arithmetic, and no bytes could be expected."""
    path = tmp_path / "cache"
    extract(a_recipe(genome, path, cache={"codec": "exact"}), teacher=Hungry(most=6))
    memory.tried = 0
    larger = Hungry()
    found = audit(path, larger, windows=12)
    assert larger.shapes == {(5, KMERS)}
    assert (found.passed, found.bytes_expected, found.here["batch"]) == (True, True, 5)
    other = NumpyTeacher()
    found = audit(path, other, windows=12)
    assert other.shapes == {(16, KMERS)}
    assert (found.passed, found.bytes_expected) == (True, False)
    assert memory.tried == 0


def test_an_audit_that_does_not_fit_says_so(genome: Path, tmp_path: Path, memory: Plenty) -> None:
    path = tmp_path / "cache"
    extract(a_recipe(genome, path), teacher=Hungry())
    with pytest.raises(StorageError, match=r"auditing in batches of 20 windows: .*1\.25 GiB"):
        audit(path, Hungry(most=19), windows=4)


def test_what_is_told_beforehand_is_the_batch_that_will_be(
    genome: Path, tmp_path: Path, memory: Plenty
) -> None:
    path = tmp_path / "cache"
    recipe = a_recipe(genome, path)
    assert told_of(recipe, Hungry(most=10)).batch == 10
    assert not path.exists()
    begun(genome, path, Hungry(most=5), parts=2)
    assert told_of(recipe, Hungry(most=10)).batch == 5


def test_calibrating_again_is_done_in_the_batch_of_the_parts(
    genome: Path, whole: Path, tmp_path: Path, memory: Plenty
) -> None:
    """On a GPU another batch may give other bits, and so another plan than the one to be mended."""
    path = tmp_path / "cache"
    extract(a_recipe(genome, path), teacher=Hungry(most=6))
    table = path / "windows.parquet"
    table.write_bytes(table.read_bytes()[:-1])
    larger = Hungry()
    extract(a_recipe(genome, path), teacher=larger, repair=True)
    assert larger.shapes == {(5, KMERS)}
    assert_same_vectors(path, whole)


# --- out of memory at work ------------------------------------------------------------------------


def shrinking(teacher: Hungry, *, after: int, to: int) -> Callable[[Progress], None]:
    """A reporter that leaves a teacher less memory once so many windows of parts are embedded."""

    def look(progress: Progress) -> None:
        if progress.what == "extracting" and progress.done >= after:
            teacher.most = min(teacher.most, to)

    return look


def test_out_of_memory_in_the_first_part_it_begins_again_in_half_the_batch(
    genome: Path, whole: Path, tmp_path: Path, memory: Plenty
) -> None:
    path, teacher, told = tmp_path / "cache", Hungry(most=6), []
    shrink = shrinking(teacher, after=1, to=3)

    def report(progress: Progress) -> None:
        if progress.what == "extracting":
            told.append(progress.done)
        shrink(progress)

    extract(a_recipe(genome, path), teacher=teacher, report=report)
    assert told[:3] == [5, 0, 2]
    assert told[-1] == sum(map(Cache.open(path).plan.part_windows, Cache.open(path).plan.parts()))
    assert batch_in_receipts(path) == {2}
    assert not (path / ".work").exists()
    assert_same_vectors(path, whole)


def test_out_of_memory_while_planning_the_next_attempt_tries_what_fits_then(
    genome: Path, whole: Path, tmp_path: Path, memory: Plenty, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, teacher = tmp_path / "cache", Hungry()

    def shrink(array: Any) -> tuple[int, int]:
        teacher.most = 6
        return 0, 1

    monkeypatch.setattr(memory, "used", shrink)
    with pytest.raises(StorageError, match="calibrating in batches of 20 windows"):
        extract(a_recipe(genome, path), teacher=teacher)
    extract(a_recipe(genome, path), teacher=teacher)
    assert batch_in_receipts(path) == {5}
    assert_same_vectors(path, whole)


def test_out_of_memory_again_and_again_it_ends_at_one_window(
    genome: Path, tmp_path: Path, memory: Plenty
) -> None:
    path, teacher = tmp_path / "cache", Hungry(most=6)
    with pytest.raises(StorageError, match=r"in batches of 1 \(CUDA"):
        extract(a_recipe(genome, path), teacher=teacher, report=shrinking(teacher, after=1, to=0))
    assert (1, KMERS) in teacher.shapes
    assert batch_in_receipts(path) == set()
    assert not list((path / ".work").glob("*.tmp"))
    assert not list((path / ".work" / "leases").iterdir())


def test_out_of_memory_while_others_are_at_work_it_stops_and_the_batch_stays(
    genome: Path, whole: Path, tmp_path: Path, memory: Plenty
) -> None:
    path, teacher = tmp_path / "cache", Hungry(most=6)
    begun(genome, path, teacher, parts=0)
    other = lease_of(path, Part("valid", 0, 1))
    assert other.take()
    with pytest.raises(StorageError, match=r"in batches of 5 \(.*so they stay"):
        extract(a_recipe(genome, path), teacher=teacher, report=shrinking(teacher, after=1, to=3))
    other.release()
    assert batch_in_receipts(path) == set()
    extract(a_recipe(genome, path), teacher=Hungry())
    assert batch_in_receipts(path) == {5}
    assert_same_vectors(path, whole)


def test_out_of_memory_later_it_stops_loses_nothing_and_goes_on(
    genome: Path, whole: Path, tmp_path: Path, memory: Plenty
) -> None:
    path, teacher = tmp_path / "cache", Hungry(most=6)
    with pytest.raises(StorageError) as told:
        extract(
            a_recipe(genome, path),
            teacher=teacher,
            report=shrinking(teacher, after=2 * PART + 5, to=4),
        )
    assert "out of memory at train/0/00002, in batches of 5 (CUDA" in str(told.value)
    assert "1.25 GiB is free" in str(told.value)
    assert "run the same command again" in str(told.value)
    plan = Cache.open(whole).plan
    left = integrity.missing_parts(path, plan)
    assert left == list(plan.parts())[2:]
    assert not list((path / ".work").glob("*.tmp"))
    assert not list((path / ".work" / "leases").iterdir())
    made = extract(a_recipe(genome, path), teacher=Hungry(most=5))
    assert made.parts_made == len(left)
    assert batch_in_receipts(path) == {5}
    assert_same_vectors(path, whole)


def test_out_of_memory_and_the_part_lost_to_another_the_batch_stays(
    genome: Path, whole: Path, tmp_path: Path, memory: Plenty
) -> None:
    path, teacher = tmp_path / "cache", Hungry(most=6)
    begun(genome, path, teacher, parts=0)
    part = Part("train", 0, 0)
    lease, other = lease_of(path, part), lease_of(path, part)
    assert lease.take()

    def taken_over(_: int) -> None:
        lease.path.unlink()
        assert other.take()
        teacher.most = 3

    with PartMaker(path, teacher) as maker:
        with pytest.raises(StorageError, match="so they stay"):
            maker.make(part, lease, taken_over)
        assert maker.numerics["batch"] == 5
    assert not other.lost
    other.release()
    extract(a_recipe(genome, path), teacher=Hungry())
    assert batch_in_receipts(path) == {5}
    assert_same_vectors(path, whole)


def test_whoever_has_not_begun_follows_when_another_halves_the_batch(
    genome: Path, whole: Path, tmp_path: Path, memory: Plenty
) -> None:
    path, hungry = tmp_path / "cache", Hungry(most=6)
    begun(genome, path, Hungry(most=6), parts=0)
    first, second, *_ = Cache.open(path, incomplete=True).plan.parts()

    def making(maker: PartMaker, part: Part, tick: Callable[[int], None] = lambda _: None) -> None:
        lease = lease_of(path, part)
        assert lease.take()
        maker.make(part, lease, tick).result()

    def shrink(_: int) -> None:
        hungry.most = 3

    with PartMaker(path, Hungry()) as late, PartMaker(path, hungry) as maker:
        assert (late.numerics["batch"], maker.numerics["batch"]) == (5, 5)
        making(maker, first, shrink)
        making(late, second)
    assert batch_in_receipts(path) == {2}
    extract(a_recipe(genome, path), teacher=Hungry())
    assert_same_vectors(path, whole)


# --- on the way to the host -----------------------------------------------------------------------


class Travelling:
    """A side stream whose copies fill their arrays only once `let` returns, told their number."""

    def __init__(self, let: Callable[[int], None]) -> None:
        self._let = let
        self._sending = threading.Condition()
        self.sent = 0
        self.threads: set[str] = set()

    def send(self, arrays: Sequence[Any]) -> batches.Arrival:
        there = [to_numpy(array) for array in arrays]
        here = [np.zeros_like(array) for array in there]
        with self._sending:
            number, self.sent = self.sent, self.sent + 1
            self._sending.notify_all()

        def arrival() -> list[npt.NDArray[Any]]:
            self.threads.add(threading.current_thread().name)
            self._let(number)
            for array, final in zip(here, there, strict=True):
                array[...] = final
            return here

        return arrival

    def wait_for(self, sent: int) -> None:
        with self._sending:
            assert self._sending.wait_for(lambda: self.sent >= sent, timeout=60)


@pytest.fixture
def travelling(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Travelling]]:
    def begin(let: Callable[[int], None] = lambda _: None) -> Travelling:
        side = Travelling(let)
        monkeypatch.setattr("had_pipe.parts.side_stream", lambda _: side)
        return side

    return begin


@pytest.mark.timeout(120)
def test_whoever_embeds_goes_on_while_batches_are_on_their_way(
    genome: Path, whole: Path, tmp_path: Path, travelling: Callable[..., Travelling]
) -> None:
    def let(number: int) -> None:
        if number == 0:
            side.wait_for(4)  # would wait for ever, did anybody wait for it

    side = travelling(let)
    extract(a_recipe(genome, tmp_path / "cache"), teacher=TorchTeacher())
    assert_same_bytes(tmp_path / "cache", whole)
    assert all(name.startswith("had-pipe writer") for name in side.threads)


def test_batches_that_arrive_late_are_written_in_their_order(
    genome: Path, tmp_path: Path, travelling: Callable[..., Travelling], memory: Plenty
) -> None:
    """Many batches a part, as many as may wait, each let go only when the queue is full."""
    recipe = a_recipe(genome, tmp_path / "one", cache={"part": 40})
    extract(recipe, teacher=Hungry(most=5))
    parts = list(Cache.open(tmp_path / "one").plan.parts())
    first = -(-Cache.open(tmp_path / "one").plan.part_windows(parts[0]) // 5)

    def let(number: int) -> None:
        side.wait_for(min(first, number + 5))

    side = travelling(let)
    recipe = a_recipe(genome, tmp_path / "two", cache={"part": 40})
    extract(recipe, teacher=Hungry(most=5))
    assert_same_bytes(tmp_path / "two", tmp_path / "one")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # a GPU casts NaN without a word
@pytest.mark.timeout(120)
def test_nan_found_on_the_host_names_its_window_and_leaves_its_part_unmade(
    genome: Path, whole: Path, tmp_path: Path, travelling: Callable[..., Travelling]
) -> None:
    path, part = tmp_path / "cache", Part("valid", 0, 0)
    plan = Cache.open(whole).plan
    *earlier, before_last, _ = plan.parts()
    assert before_last == part
    travelling()
    _, mask, _ = Cache.open(whole).seen(part)
    row = next(r for r in range(16, PART) if not mask[r, -1])  # in the second batch of its part
    with pytest.raises(NonFiniteError) as told:
        extract(a_recipe(genome, path), teacher=spoilt(whole, part, row))
    locus = Cache.open(whole).locus("valid", row)
    assert f"g held_out:{locus.start}-{locus.start + BASES} " in str(told.value)
    assert f"window {row} of valid, view 0" in str(told.value)
    assert set(integrity.missing_parts(path, plan)) <= {part, Part("valid", 0, 1)}
    assert part in integrity.missing_parts(path, plan)
    assert all((path / one.receipt_key).exists() for one in earlier)
    assert not list((path / ".work").glob("*.tmp"))
    assert not list((path / ".work" / "leases").iterdir())
    extract(a_recipe(genome, path), teacher=NumpyTeacher())
    assert_same_bytes(path, whole)


@pytest.mark.timeout(120)
def test_a_signal_while_batches_are_on_their_way_drops_their_part_and_nothing_else(
    genome: Path, whole: Path, tmp_path: Path, travelling: Callable[..., Travelling]
) -> None:
    path, struck = tmp_path / "cache", threading.Event()

    def let(number: int) -> None:
        if number == 3:  # of the second part, two batches each
            assert struck.wait(60)

    side = travelling(let)

    def strike(progress: Progress) -> None:
        if progress.what == "extracting" and progress.done > 2 * PART:
            struck.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(a_recipe(genome, path), teacher=TorchTeacher(), report=strike)
    assert side.sent == 5
    plan = Cache.open(whole).plan
    assert integrity.missing_parts(path, plan) == list(plan.parts())[2:]
    assert not list((path / ".work").glob("*.tmp"))
    assert not list((path / ".work" / "leases").iterdir())
    extract(a_recipe(genome, path), teacher=NumpyTeacher())
    assert_same_bytes(path, whole)


# --- a real GPU -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_a_gpu(tmp_path_factory: pytest.TempPathFactory, genome: Path) -> Any:
    """A random NT-v2 on the device, and a recipe for a cache at a path."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    from had_pipe.teachers.ntv2 import NTv2Config, random_model
    from had_pipe.teachers.ntv2_checkpoint import save_checkpoint
    from had_pipe.teachers.teacher import load_teacher

    config = NTv2Config(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=128,
    )
    folder = tmp_path_factory.mktemp("ntv2")
    save_checkpoint(random_model(config, seed=5, head="language"), folder)
    teacher = load_teacher(str(folder), revision=None, layer=-1, device="cuda")

    def recipe(path: Path, codec: str) -> Recipe:
        return a_recipe(genome, path, teacher={"unchecked": True}, cache={"codec": codec})

    return teacher, recipe


class Waiting:
    """Copies that everybody waits for."""

    def send(self, arrays: Sequence[Any]) -> batches.Arrival:
        torch.cuda.synchronize()
        here = [to_numpy(array) for array in arrays]
        return lambda: here


@pytest.mark.gpu
@pytest.mark.parametrize("codec", ["int8", "exact", "compact", "tiny"])
def test_on_a_gpu_copies_beside_the_work_give_the_bytes_of_copies_that_are_waited_for(
    on_a_gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    teacher, recipe = on_a_gpu
    extract(recipe(tmp_path / "beside", codec), teacher=teacher)
    monkeypatch.setattr("had_pipe.parts.side_stream", lambda _: Waiting())
    extract(recipe(tmp_path / "waited", codec), teacher=teacher)
    assert_same_bytes(tmp_path / "beside", tmp_path / "waited")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("codec", ["int8", "exact"])
def test_on_a_gpu_whoever_embeds_never_waits_for_the_device(
    on_a_gpu: Any, tmp_path: Path, codec: str
) -> None:
    teacher, recipe = on_a_gpu
    path = tmp_path / "cache"
    extract(recipe(path, codec), teacher=teacher)
    plan = Cache.open(path).plan
    integrity.forget(path, plan.parts())
    first, *rest = plan.parts()
    with PartMaker(path, teacher) as maker:
        maker.make(first).result()  # statistics go up, and pinned memory is taken
        torch.cuda.set_sync_debug_mode("error")
        try:
            written = [maker.make(part) for part in rest]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(one.result() is not None for one in written)
    assert integrity.missing_parts(path, plan) == []


@pytest.mark.gpu
def test_on_a_gpu_a_batch_that_does_not_fit_is_halved(on_a_gpu: Any) -> None:
    teacher, _ = on_a_gpu
    full = fit_batch(teacher, kmers=100, part=4096)
    assert full == 316  # 13 batches of at most 327
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    teacher.embed(np.zeros((full, 100), np.uint16), np.zeros((full, 100), np.bool_))
    needed = torch.cuda.max_memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    with contextlib.ExitStack() as after:
        after.callback(torch.cuda.set_per_process_memory_fraction, 1.0)
        torch.cuda.set_per_process_memory_fraction(0.7 * needed / total)
        assert fit_batch(teacher, kmers=100, part=4096) < full
