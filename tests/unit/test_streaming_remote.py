"""Text from elsewhere: in pieces, on less disk than the corpus has, past lost connections, after a restart."""

import json
import os
import threading
import time
import zipfile
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
from range_server import serving
from test_streaming import Letters, loaders, plan_of, rows_of, write

from ftlib.data import pieces, ranges, streaming
from ftlib.data.pieces import Pieces, RemoteFile
from ftlib.data.streaming import StreamLoader, open_stream
from ftlib.errors import UserError
from ftlib.sections import Data, Source
from ftlib.sections.stream import Stream

PIECE, GIB = 1 << 10, 1 << 30
ROOM = 8 * PIECE  # of the folder in most tests; a corpus has more


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pieces, "PIECE", PIECE)
    monkeypatch.setattr(pieces, "BUFFER", 256)
    monkeypatch.setattr(ranges, "PAUSES", (0.01,) * 6)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return tmp_path / "cache" / "pieces"


def stored(paths, folder):
    """The same files behind `memory://`, whose `created` changes when a file is written."""
    import fsspec

    for path in paths:
        fsspec.filesystem("memory").pipe(f"/{folder}/{path.name}", path.read_bytes())
    return f"memory://{folder}/*"


def corpus(folder, count=8, rows=60, kind="jsonl", letter="A"):
    """Files of a source, and their folder."""
    folder.mkdir()
    return [write(folder / f"{n}.{kind}", rows, f"{letter}{n}x", seed=n) for n in range(count)]


def steps_of(plan, count, workers=0):
    (loader,) = loaders(plan, workers=workers)
    found = [rows_of([loader]) for _ in range(count)]
    loader.close()
    return found


@contextmanager
def watched(folder, limit):
    """Looks at the folder all the time; at the end: the most bytes it ever had."""
    most, done = [0], threading.Event()

    def look():
        while not done.is_set():
            with pieces._turn(folder / pieces.BOOK):  # while no file comes or goes
                most.append(sum(size for _, size, _ in Pieces(folder, limit)._files()))
            time.sleep(0.001)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()
    assert PIECE < max(most) <= limit


def test_a_corpus_larger_than_the_folder_gives_the_rows_of_files_here(tmp_path, small):
    """A single large file by http and several of a file system, in processes, over more than one epoch."""
    many = corpus(tmp_path / "many", count=4, rows=100, kind="jsonl.gz")
    alone = write(tmp_path / "one.jsonl", 240, "B", seed=9)
    settings = {"names": ["many", "one"], "buffer": 16}
    wanted = steps_of(plan_of([tmp_path / "many", alone], **settings).train, 150)
    assert sum(file.stat().st_size for file in many) > 1.5 * ROOM and alone.stat().st_size > 1.5 * ROOM
    with serving(tmp_path) as server:
        sources = [stored(many, "larger"), f"{server.address}/one.jsonl"]
        plan = plan_of(sources, cache_gib=ROOM / GIB, **settings).train
        with watched(small, ROOM):
            assert steps_of(plan, 150, workers=2) == wanted
    assert server.sent > alone.stat().st_size and not list((tmp_path / "cache").glob("fetched/*"))


def test_a_piece_is_fetched_once_for_all_processes_and_kept_for_the_next(tmp_path):
    paths = corpus(tmp_path / "many", count=3, rows=40)
    with serving(tmp_path / "many") as server:
        server.slow = 0.005
        addresses = [f"{server.address}/{path.name}" for path in paths]
        plan = plan_of(addresses, cache_gib=1, buffer=16).train
        both = loaders(plan, ranks=2, workers=2)
        for _ in range(60):
            rows_of(both)
        for loader in both:
            loader.close()
        pieces_of_all = [(path.name, at) for path in paths for at in range(0, path.stat().st_size, PIECE)]
        looks = [(path.name, 0) for path in paths]  # at the first byte: are there ranges?
        assert sorted(server.asked) == sorted(pieces_of_all + looks)
        steps_of(plan_of(addresses, cache_gib=1, buffer=16).train, 30, workers=1)
        assert sorted(server.asked) == sorted(pieces_of_all + 2 * looks)


def test_pieces_are_there_before_they_are_needed(tmp_path, small):
    write(tmp_path / "a.jsonl", 400, "A")
    with serving(tmp_path) as server:
        some = plan_of([f"{server.address}/a.jsonl"], cache_gib=20 * PIECE / GIB).train
        assert some.sources[0].files[0].ahead == 9, "they and what is read take half of the folder"
        plan = plan_of([f"{server.address}/a.jsonl"], cache_gib=1, buffer=16).train
        (loader,) = loaders(plan)
        rows_of([loader])
        deadline = time.monotonic() + 20
        while len(list(small.glob("*-*"))) <= pieces.AHEAD and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(list(small.glob("*-*"))) > pieces.AHEAD
        loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_lost_connections_cost_time_and_nothing_else(tmp_path, workers):
    paths = corpus(tmp_path / "many", count=2)
    wanted = steps_of(plan_of(paths, buffer=16).train, 30)
    with serving(tmp_path / "many") as server:
        server.drop = lambda number: number % 3 == 2
        plan = plan_of([f"{server.address}/{path.name}" for path in paths], cache_gib=ROOM / GIB, buffer=16).train
        assert steps_of(plan, 30, workers) == wanted


@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_stays_away_is_one_message(tmp_path, workers):
    write(tmp_path / "a.jsonl", 200, "A")
    with serving(tmp_path) as server:
        plan = plan_of([f"{server.address}/a.jsonl"], cache_gib=ROOM / GIB, buffer=16).train
        server.drop = lambda number: True
        count = len(server.asked)
        with pytest.raises(UserError, match=r"a\.jsonl cannot be read: .*bytes came") as caught:
            steps_of(plan, 100, workers)
        assert caught.value.where == "data.sources[0].path" and "continues the run" in caught.value.fix
        assert len(server.asked) - count > len(ranges.PAUSES)


def test_a_run_that_was_killed_goes_on_elsewhere_to_the_token(tmp_path, small):
    """Mid-file, on another number of processes, with an empty folder."""
    many = corpus(tmp_path / "many", kind="jsonl.gz")
    alone = write(tmp_path / "one.jsonl", 200, "B", seed=9)
    settings = {"names": ["many", "one"], "buffer": 8}
    wanted = steps_of(plan_of([tmp_path / "many", alone], **settings).train, 60)
    with serving(tmp_path) as server:
        settings["cache_gib"] = 2 * ROOM / GIB
        sources = [stored(many, "killed"), f"{server.address}/one.jsonl"]
        now, at = loaders(plan_of(sources, **settings).train, 1, 2), 0
        for ranks, steps in ((1, 25), (2, 15), (4, 10), (1, 10)):
            state = json.loads(json.dumps(now[0].state_dict()))
            for loader in now:
                loader.close()  # its workers are killed where they are
            for file in small.glob("*"):
                file.unlink(missing_ok=True)
            now = loaders(plan_of(sources, **settings).train, ranks, 2 if ranks < 4 else 0)
            for loader in now:
                loader.load_state_dict(state)
            for _ in range(steps):
                assert rows_of(now) == wanted[at]
                at += 1
        for loader in now:
            loader.close()


def test_files_that_were_passed_are_not_fetched_again(tmp_path, small, monkeypatch):
    address, fetched, read = stored(corpus(tmp_path / "many", count=6), "passed"), set(), ranges.read
    settings = {"cache_gib": ROOM / GIB, "buffer": 4}
    (loader,) = loaders(plan_of([address], **settings).train)
    for _ in range(60):
        rows_of([loader])
    state = loader.state_dict()
    loader.close()
    first = min(lane["marks"][0][0] for lane in state["lanes"])
    assert 2 <= first < 6, "in the midst of the epoch"
    for file in small.glob("*"):
        file.unlink(missing_ok=True)
    monkeypatch.setattr(streaming, "CHUNK", 1)  # rows that are checked
    (again,) = loaders(plan_of([address], **settings).train)
    again.load_state_dict(state)
    monkeypatch.setattr(ranges, "read", lambda file, *where: fetched.add(file.url[-7]) or read(file, *where))
    rows_of([again])
    again.close()
    assert fetched and fetched <= {str(n) for n in range(first, 6)}


def test_a_large_file_is_not_fetched_again_from_its_beginning(tmp_path, small):
    """The mark of a block in a lane's position says where in the file it begins."""
    write(tmp_path / "a.jsonl", 700, "A")
    settings = {"cache_gib": ROOM / GIB, "buffer": 16}
    wanted = steps_of(plan_of([tmp_path / "a.jsonl"], **settings).train, 85)
    with serving(tmp_path) as server:
        (loader,) = loaders(plan_of([f"{server.address}/a.jsonl"], **settings).train)
        assert [rows_of([loader]) for _ in range(80)] == wanted[:80]
        state = json.loads(json.dumps(loader.state_dict()))
        loader.close()
        for file in small.glob("*"):
            file.unlink(missing_ok=True)
        now = loaders(plan_of([f"{server.address}/a.jsonl"], **settings).train, ranks=2)
        server.asked.clear()
        for loader in now:
            loader.load_state_dict(state)
        assert [rows_of(now) for _ in range(5)] == wanted[80:]
        for loader in now:
            loader.close()
    again = {at for _, at in server.asked} - {0}  # its first bytes tell what kind of file it is
    assert min(again) > 0.3 * (tmp_path / "a.jsonl").stat().st_size


def test_a_file_that_changed_is_named(tmp_path, small):
    paths = corpus(tmp_path / "many", count=2, rows=100)
    with serving(tmp_path / "many") as server:
        addresses = [f"{server.address}/{path.name}" for path in paths]
        settings = {"cache_gib": ROOM / GIB, "buffer": 8}
        (loader,) = loaders(plan_of(addresses, **settings).train)
        for _ in range(3):
            rows_of([loader])
        state = json.loads(json.dumps(loader.state_dict()))
        loader.close()
        (same,) = loaders(plan_of(addresses, **settings).train)
        same.load_state_dict(state)
        os.utime(paths[1], ns=(1, 1))  # as long as before
        (again,) = loaders(plan_of(addresses, **settings).train)
        with pytest.raises(UserError, match=r"a file changed since the run began\. .*/1\.jsonl is another") as caught:
            again.load_state_dict(state)
        assert caught.value.where == "data.sources[1].path"
        with pytest.raises(UserError, match=r"a file changed since the run began\. .*/1\.jsonl: ") as caught:
            for _ in range(100):  # while it is read
                rows_of([same])
        assert caught.value.where == "data.sources[1].path"
        same.close()


def test_processes_that_found_different_files_do_not_start(tmp_path):
    plan = plan_of([stored(corpus(tmp_path / "many", count=2), "differing")], cache_gib=ROOM / GIB).train
    mine = [source.versions for source in plan.sources]
    for theirs in (mine, [mine[0][::-1]]):
        told = [[0, mine], [1, theirs]]
        gather = iter([told, [[0, [1.0] * 3], [1, [1.0] * 3]]])
        loader = StreamLoader(plan, micro_rows=1, pad_id=0, workers=0, ranks=2, gather=partial(next, gather))
        if theirs == mine:
            assert next(loader).tokens == 2
        else:
            with pytest.raises(UserError, match="different files elsewhere"):
                next(loader)
        loader.close()


def test_held_out_rows_are_those_of_files_here(tmp_path, small):
    paths = [write(tmp_path / f"{n}.jsonl", 60, n.upper(), seed=i) for i, n in enumerate("ab")]
    near = plan_of(paths, eval=5, rows=1)
    with serving(tmp_path) as server:
        away = plan_of([f"{server.address}/{path.name}" for path in paths], eval=5, rows=1, cache_gib=ROOM / GIB)
        assert steps_of(away.train, 20) == steps_of(near.train, 20)
        assert all(line in "".join(away.report.lines()) for line in ("1 file elsewhere", "read while training"))
        data = Data(sources=(Source(path=str(paths[0])),), eval=(Source(path=f"{server.address}/b.jsonl", name="b"),))
        named = open_stream(data, Stream(cache_gib=ROOM / GIB), Letters(), rows=1, seed=3, vocab=1000)
    assert {k: [d.input_ids.tolist() for d in v] for k, v in away.eval.items()} == {
        k: [d.input_ids.tolist() for d in v] for k, v in near.eval.items()
    }
    assert len(named.eval["b"]) == 60


def test_a_folder_that_is_too_small_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", 200, "A")
    source = Source(path="s3://bucket/a.jsonl", name="a")
    with pytest.raises(UserError, match=r"too small for 2 remote sources") as caught:
        streaming.check(Data(sources=(source, source)), Stream(cache_gib=7 * PIECE / GIB), 5)
    assert caught.value.where == "stream.cache_gib"
    streaming.check(Data(sources=(source, source)), Stream(cache_gib=8 * PIECE / GIB), 5)
    monkeypatch.setattr(pieces.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2 * PIECE))
    with serving(tmp_path) as server:
        with pytest.raises(UserError, match=r"has room for 0\.00") as caught:
            plan_of([f"{server.address}/a.jsonl"])
        assert caught.value.where == "stream.cache_gib" and "FTLIB_CACHE" in caught.value.fix
        plan_of([f"{server.address}/a.jsonl"], cache_gib=2 * PIECE / GIB)
        monkeypatch.setenv("FTLIB_CACHE", str(tmp_path / "a.jsonl"))
        with pytest.raises(UserError, match="pieces cannot be made: Not a directory") as caught:
            plan_of([f"{server.address}/a.jsonl"])
        assert caught.value.where == "FTLIB_CACHE"


def test_a_run_says_which_commit_of_the_hub_it_reads(small):
    found = ranges.Found(f"hf://datasets/org/rows@{'0a' * 20}/train.jsonl", GIB, "1")
    file = RemoteFile(found, "key", Pieces(small, ROOM))
    (line,) = streaming._Opened("rows", "org/rows", "text", "why", [file], 1.0).lines()
    assert f"1 file elsewhere (1.00 GiB, at commit {'0a' * 20})" in line


def test_a_missing_file_is_told_at_once(tmp_path, monkeypatch):
    import fsspec

    with serving(tmp_path) as server:
        for path in (f"{server.address}/none.jsonl", "memory://none/*.jsonl", "nothing://x/y", "memory://none"):
            start = time.monotonic()
            with pytest.raises(UserError) as caught:
                plan_of([path])
            assert caught.value.where == "data.sources[0].path" and time.monotonic() - start < 5
    asked = []

    def refuse(*given):
        asked.append(given)
        raise ConnectionError("nobody is there")

    monkeypatch.setattr(ranges, "_of_hub", refuse)
    with pytest.raises(UserError, match="org/rows cannot be fetched"):
        plan_of(["org/rows"])
    assert len(asked) == 1, "that library has its own patience"
    fsspec.filesystem("memory").pipe("/page/README.md", b"# hello")
    with pytest.raises(UserError, match="without data files"):
        plan_of(["memory://page"])


def test_what_cannot_be_addressed_file_by_file_is_fetched_whole(tmp_path):
    """A file of an archive; what lies on a host that its driver takes out of the address."""
    import fsspec

    file, archive = write(tmp_path / "a.jsonl", 40, "A"), tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.write(file, "a.jsonl")

    class Hosted(fsspec.AbstractFileSystem):
        protocol = "hosted"

        def __init__(self, host, **options):
            super().__init__(**options)

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.partition("://")[2].partition("/")[2] if "://" in path else path

        @staticmethod
        def _get_kwargs_from_urls(url):
            host = url.partition("://")[2].partition("/")[0]
            return {"host": host} if host else {}

        def info(self, path, **options):
            return {"name": path, "size": file.stat().st_size, "type": "file", "mtime": 1}

        def ls(self, path, detail=True, **options):
            raise NotADirectoryError(path)

        def _open(self, path, mode="rb", **options):
            return open(tmp_path / path.strip("/"), mode)

    fsspec.register_implementation("hosted", Hosted, clobber=True)
    wanted = steps_of(plan_of([file], buffer=16).train, 5)
    for address in (f"zip://a.jsonl::file://{archive}", "hosted://there/a.jsonl"):
        assert steps_of(plan_of([address], cache_gib=ROOM / GIB, buffer=16).train, 5) == wanted


@pytest.mark.parametrize("fault", ["no", "unsized"])
def test_a_file_that_only_comes_whole_has_the_room_of_all_pieces_at_most(tmp_path, fault):
    """Whether or not its server says beforehand how long it is; what is refused leaves nothing on the disk."""
    file = write(tmp_path / "a.jsonl", 200, "A")
    size = file.stat().st_size
    with serving(tmp_path) as server:
        server.fault = fault
        address = f"{server.address}/a.jsonl"
        with pytest.raises(UserError, match="cannot be read in pieces, and the whole has more than") as caught:
            plan_of([address], cache_gib=(size - 1) / GIB)
        assert caught.value.where == "stream.cache_gib" and "fetch the file yourself" in caught.value.fix
        assert not [found for found in (tmp_path / "cache" / "fetched").rglob("*") if found.is_file()]
        made = plan_of([address], cache_gib=size / GIB, buffer=16)
    assert "fetched whole (0.00 GiB beside stream.cache_gib)" in made.report.lines()[0]
    assert steps_of(made.train, 5) == steps_of(plan_of([file], buffer=16).train, 5)


def test_files_without_rows_and_hidden_ones_are_passed_over(tmp_path):
    import fsspec

    paths = [*corpus(tmp_path / "many", count=1, rows=30), tmp_path / "many" / "1.jsonl"]
    paths[1].touch()
    wanted = steps_of(plan_of([tmp_path / "many"], buffer=8).train, 12)
    stored(paths, "hidden")
    fsspec.filesystem("memory").pipe("/hidden/.half/2.jsonl", b"{}\n")
    plan = plan_of(["memory://hidden"], cache_gib=ROOM / GIB, buffer=8).train
    assert [file.name for file in plan.sources[0].files] == ["0.jsonl", "1.jsonl"]
    assert steps_of(plan, 12) == wanted


def test_a_source_that_is_here_now_is_not_what_the_run_began_with(tmp_path):
    paths = corpus(tmp_path / "many", count=2)
    plan = plan_of([stored(paths, "moved")], names=["many"], cache_gib=ROOM / GIB).train
    state = loaders(plan)[0].state_dict()
    for other, now, then in ((plan_of([tmp_path / "many"], names=["many"]).train, 0, 2), (plan, 2, 0)):
        state["files"] = [plan.sources[0].versions[:then]]
        with pytest.raises(UserError, match=f"'many' has {now} files elsewhere, it had {then}"):
            loaders(other)[0].load_state_dict(state)
