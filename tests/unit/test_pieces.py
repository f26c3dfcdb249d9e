"""Remote files in pieces: they are read as files of here are, from anywhere in them, in the room there is."""

import gzip
import json
import os
import signal
import threading
from contextlib import ExitStack
from dataclasses import replace
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
from range_server import serving

from ftlib.data import pieces, ranges
from ftlib.data.files import read_file
from ftlib.data.pieces import Pieces, RemoteFile
from ftlib.data.rows import Start
from ftlib.errors import UserError

PIECE = 1 << 10


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """A folder of pieces."""
    monkeypatch.setattr(pieces, "PIECE", PIECE)
    monkeypatch.setattr(pieces, "BUFFER", 256)
    monkeypatch.setattr(ranges, "PAUSES", (0.01,) * 6)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    (tmp_path / "pieces").mkdir()
    return tmp_path / "pieces"


KINDS = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.csv", "a.txt", "a.parquet", "a.arrow"]


def of_kind(file, rows):
    """Rows of a text, in a file of the kind that its name says."""
    import pyarrow
    from pyarrow import feather, parquet

    text = "\n".join(json.dumps(row) for row in rows).encode()  # the last line has no end
    table = pyarrow.Table.from_pylist(rows)
    if file.name.endswith(".gz"):
        file.write_bytes(gzip.compress(text))
    elif file.name.endswith(".zst"):
        with pyarrow.CompressedOutputStream(str(file), "zstd") as out:
            out.write(text)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    elif file.suffix == ".csv":
        file.write_text("text\n" + "".join(f'"{row["text"]}"\n' for row in rows))
    elif file.suffix == ".txt":
        file.write_text("\n\n".join(row["text"] for row in rows))
    elif file.suffix == ".parquet":
        parquet.write_table(table, file, row_group_size=25)
    elif file.suffix == ".arrow":
        feather.write_feather(table, file, compression="uncompressed", chunksize=25)
    else:
        file.write_bytes(text)
    return file


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_is_read_from_elsewhere_as_from_here(tmp_path, small, name):
    rows = [{"text": f"{n} {'lorem ipsum ' * (n % 7)}".strip()} for n in range(200)]
    file = of_kind(tmp_path / name, rows)
    with serving(tmp_path) as server:
        (found,), _ = ranges.find(f"{server.address}/{name}")
        away = RemoteFile(found, "data.sources[0].path", Pieces(small, 4 * PIECE), ahead=1)
        assert [row.value for row in read_file(away)] == [row.value for row in read_file(file)] == rows
        for at, row in list(enumerate(read_file(file), 1))[::33]:  # what begins behind a row is the rest
            start = Start(at, row.line, row.end)
            assert list(read_file(away, start)) == list(read_file(file, start)) == list(read_file(file))[at:]
        server.drop, other = lambda number: True, tmp_path / "other"
        other.mkdir()
        with pytest.raises(UserError, match=f"{name} cannot be read: .*bytes came"):
            list(read_file(replace(away, pieces=Pieces(other, 4 * PIECE))))


def test_groups_of_a_parquet_file_that_were_passed_are_not_fetched(tmp_path, small, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 16 * PIECE)
    dice = np.random.default_rng(0)
    rows = [{"text": "".join(chr(97 + c) for c in dice.integers(0, 26, 3000))} for _ in range(200)]
    size = of_kind(tmp_path / "a.parquet", rows).stat().st_size
    with serving(tmp_path) as server:
        (found,), _ = ranges.find(f"{server.address}/a.parquet")
        away = RemoteFile(found, "key", Pieces(small, 64 * PIECE))
        assert [row.value for row in read_file(away, Start(rows=125))] == rows[125:]
    assert min({at for _, at in server.asked} - {0}) > 0.55 * size  # 125 of 200 rows, whole pieces


def test_what_a_killed_process_left_half_is_fetched_again_or_swept_away(tmp_path, small):
    file = of_kind(tmp_path / "a.jsonl", [{"text": f"{n} lorem ipsum dolor"} for n in range(300)])
    with serving(tmp_path) as server:
        (found,), _ = ranges.find(f"{server.address}/a.jsonl")
        away = RemoteFile(found, "key", Pieces(small, 4 * PIECE))
        for name in (away.mark(0), "of-another-run"):
            (small / f"{name}.part").write_bytes(b"\0" * PIECE)
        (small / "of-a-former-run").write_bytes(b"\0" * 9 * PIECE)
        with away.open() as opened:
            assert opened.read() == file.read_bytes()
    assert sum(piece.stat().st_size for piece in small.glob("*-*")) <= 4 * PIECE and not list(small.glob("*.part"))


def test_who_finds_no_room_waits_for_those_who_are_fetching(tmp_path, small):
    of_kind(tmp_path / "a.jsonl", [{"text": "lorem"}])
    with serving(tmp_path) as server, ExitStack() as others:
        (found,), _ = ranges.find(f"{server.address}/a.jsonl")
        away = RemoteFile(found, "key", Pieces(small, 4 * PIECE))
        for number in range(4):
            own = others.enter_context(pieces._turn(small / f"{number}.part"))
            os.truncate(own, PIECE)
        (small / pieces.BOOK).write_bytes(b"%d" % (4 * PIECE))
        rows = []
        reader = threading.Thread(target=lambda: rows.extend(read_file(away)), daemon=True)
        reader.start()
        reader.join(0.3)
        assert reader.is_alive() and sum(file.stat().st_size for file in small.glob("*.part")) == 4 * PIECE
        others.close()
        reader.join(20)
        assert [row.value for row in rows] == [{"text": "lorem"}]


def test_a_piece_that_was_cut_off_is_not_the_end_of_its_file(tmp_path, small):
    rows = [{"text": f"{n} lorem ipsum dolor"} for n in range(300)]
    of_kind(tmp_path / "a.jsonl", rows)
    with serving(tmp_path) as server:
        (found,), _ = ranges.find(f"{server.address}/a.jsonl")
        away = RemoteFile(found, "key", Pieces(small, 64 * PIECE))
        for size in (0, PIECE // 2):
            assert [row.value for row in read_file(away)] == rows
            os.truncate(small / away.mark(2), size)
        assert [row.value for row in read_file(away)] == rows
    assert [at for _, at in server.asked].count(2 * PIECE) == 3


@pytest.mark.parametrize("book", [None, b"\0" * 32], ids=["none", "zeros"])
def test_a_folder_whose_book_is_lost_is_counted(tmp_path, small, book):
    """As a machine may leave it that loses its power."""
    of_kind(tmp_path / "a.jsonl", [{"text": f"{n} lorem ipsum dolor"} for n in range(300)])
    for number in range(4):
        (small / f"of-a-former-run-{number}").write_bytes(b"\0" * PIECE)
    if book is not None:
        (small / pieces.BOOK).write_bytes(book)
    with serving(tmp_path) as server:
        (found,), _ = ranges.find(f"{server.address}/a.jsonl")
        away = RemoteFile(found, "key", Pieces(small, 4 * PIECE))
        for _ in read_file(away):
            assert sum(file.stat().st_size for file in small.glob("*-*")) <= 4 * PIECE


def test_readers_of_what_was_left_half_do_not_wait_for_each_other(tmp_path, small, monkeypatch):
    """The folder was larger when their processes were killed."""
    make_room, all_of_them = Pieces._make_room, threading.Barrier(6)
    monkeypatch.setattr(Pieces, "_make_room", lambda *given: (all_of_them.wait(20), make_room(*given)))
    file = of_kind(tmp_path / "a.jsonl", [{"text": f"{n} lorem ipsum dolor"} for n in range(300)])
    with serving(tmp_path) as server:
        (found,), _ = ranges.find(f"{server.address}/a.jsonl")
        away, read = RemoteFile(found, "key", Pieces(small, 4 * PIECE)), {}
        for number in range(6):
            (small / f"{away.mark(number)}.part").write_bytes(b"\0" * PIECE)
        (small / pieces.BOOK).write_bytes(b"%d" % (6 * PIECE))

        def reader(number):
            read[number] = away.pieces.read(away, number * PIECE, 9)

        threads = [threading.Thread(target=reader, args=(number,), daemon=True) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
    assert read == {n: file.read_bytes()[n * PIECE :][:9] for n in range(6)}


@pytest.mark.parametrize(
    ("module", "name", "words"),
    [(pieces.fcntl, "flock", "without locks: No locks available"), (os, "open", "written to: No locks available")],
    ids=["locks", "writing"],
)
def test_a_folder_that_cannot_serve_is_told(small, monkeypatch, module, name, words):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(module, name, none)
    with pytest.raises(UserError, match=words) as caught:
        Pieces(small, 4 * PIECE).room()
    assert caught.value.where == "FTLIB_CACHE"


def test_a_folder_without_locks_is_told(small, monkeypatch):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(pieces.fcntl, "flock", none)
    with pytest.raises(UserError, match="without locks: No locks available") as caught:
        Pieces(small, 4 * PIECE).room()
    assert caught.value.where == "FTLIB_CACHE"


def test_files_begin_anywhere_where_a_row_ends(tmp_path):
    """Behind a broken one, blank lines, a mark of byte order, Windows line ends, the last row."""
    text = '\ufeff\r\n{"text": "a"}\r\n\r\n{"text": 5\r\n{"text": "ä"}\r\n[]\n{"text": "b"}'.encode()
    for name in ("a.jsonl", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
        rows = list(read_file(tmp_path / name))
        assert [row.line for row in rows] == [2, 4, 5, 6, 7] and rows[-1].end == len(text)
        for at, row in enumerate(rows, 1):
            rest = read_file(tmp_path / name, Start(at, row.line, row.end))
            assert [(r.line, str(r.value), r.end) for r in rest] == [(r.line, str(r.value), r.end) for r in rows[at:]]


def test_what_was_needed_last_stays(tmp_path, small):
    of_kind(tmp_path / "a.jsonl", [{"text": f"{n} lorem ipsum dolor"} for n in range(300)])
    with serving(tmp_path) as server:
        (found,), _ = ranges.find(f"{server.address}/a.jsonl")
        away = RemoteFile(found, "key", Pieces(small, 4 * PIECE))
        for number in (0, 1, 2, 3, 0, 4, 0):
            away.pieces.read(away, number * PIECE, 9)
    assert [at // PIECE for _, at in server.asked[1:]] == [0, 1, 2, 3, 4]


def test_pieces_of_a_file_that_changed_are_not_those_of_the_new_one(tmp_path, small):
    with serving(tmp_path) as server:
        for number, text in enumerate(("lorem", "ipsum")):  # as long
            rows = [{"text": text}] * 200
            os.utime(of_kind(tmp_path / "a.jsonl", rows), ns=(number, number))
            (found,), _ = ranges.find(f"{server.address}/a.jsonl")
            assert [row.value for row in read_file(RemoteFile(found, "key", Pieces(small, 64 * PIECE)))] == rows


def test_what_is_fetched_ahead_is_of_files_that_have_it(tmp_path, small):
    """Behind the last full piece the next file begins; who fetches ahead ends with its reader."""
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" + b" " * (2 * PIECE - 4) + b"\n")
    (tmp_path / "b.jsonl").write_bytes(b"{}\n")
    with serving(tmp_path) as server:
        found = [ranges.find(f"{server.address}/{name}.jsonl")[0][0] for name in "ab"]
        first, last = pieces.in_order([RemoteFile(file, "key", Pieces(small, 64 * PIECE)) for file in found], ahead=3)
        assert list(pieces._behind(first, 0)) == [(first, 1), (last, 0)]
        before = threading.enumerate()
        list(read_file(first))
        for thread in threading.enumerate():
            if "_fetch_ahead" in thread.name and thread not in before:
                thread.join(10)
                assert not thread.is_alive()


def test_a_turn_ends_though_a_process_forked_meanwhile_lives(small):
    with pieces._turn(small / pieces.BOOK):
        child = os.fork()
        if not child:
            signal.pause()
    try:
        with pieces._turn(small / pieces.BOOK, wait=False) as own:
            assert own is not None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_connection_that_is_lost_within_an_object_over_several_lines_is_no_bad_row(tmp_path, small):
    (tmp_path / "a.json").write_text('{\n"text": "' + 5 * PIECE * "x" + '"\n}')
    with serving(tmp_path) as server:
        (found,), _ = ranges.find(f"{server.address}/a.json")
        away = RemoteFile(found, "key", Pieces(small, 8 * PIECE))
        rows = read_file(away)
        server.drop = lambda number: number > 2
        with pytest.raises(UserError, match="cannot be read"):  # a bad row would be left out where the config says so
            next(rows)


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (HTTPError("", 404, "", {}, None), 1),
        (HTTPError("", 403, "", {}, None), 1),
        (HTTPError("", 429, "", {}, None), 3),
        (HTTPError("", 503, "", {}, None), 3),
        (URLError("lost"), 3),
        (FileNotFoundError(), 1),
    ],
)
def test_only_what_may_pass_is_tried_again(error, tries):
    asked = []

    def get():
        asked.append(error)
        raise error

    with pytest.raises(type(error)):
        ranges.patiently(get, (0, 0))
    assert len(asked) == tries


@pytest.mark.parametrize("fault", ["wrong", "no", "shorter"])
def test_ranges_that_are_not_those_asked_for_are_not_read(tmp_path, monkeypatch, fault):
    """Of other bytes, of the whole file, or of one that has become shorter; an address may have a key in it."""
    monkeypatch.setattr(ranges, "PAUSES", ())
    of_kind(tmp_path / "a.jsonl", [{"text": "lorem ipsum dolor"}] * 100)
    with serving(tmp_path) as server:
        (found,), _ = ranges.find(f"{server.address}/a.jsonl?key=secret")
        server.fault = fault
        away = RemoteFile(found, "key", Pieces(tmp_path / "pieces", 4 * PIECE))
        words = {"wrong": "bytes 0-.* came, bytes 1024-", "no": "gives no ranges", "shorter": "changed since"}
        with pytest.raises(UserError, match=words[fault]) as caught:
            away.fetch(PIECE, PIECE)
    assert "secret" not in str(caught.value)
