"""A table keeps every whole row through a kill at any byte and a full disk, and leaves other files alone."""

import json
import multiprocessing
import os

import pytest
from dgsnet.data.tables import Table, read_rows
from dgsnet.errors import UserError

SETTINGS = {"model": "a1b2", "views": 3}
ROWS = [{"path": f"{i}.png", "score": i / 7} for i in range(5)]
COLUMNS = ("path", "score")


def write(path, rows=ROWS, settings=SETTINGS, **options):
    with Table(path, settings, COLUMNS, **options) as table:
        for row in rows:
            table.add(row)
        return table.done


@pytest.fixture
def path(tmp_path):
    """A whole table, in a folder that was made for it."""
    path = tmp_path / "new" / "t.jsonl"
    write(path)
    return path


def test_a_kill_at_any_byte_costs_no_more_than_the_last_row(path):
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        with Table(path, SETTINGS, COLUMNS) as table:
            kept = max(whole[:length].count(b"\n") - 1, 0)
            assert table.done == kept and list(table.rows()) == ROWS[:kept]
            assert table.end == path.stat().st_size
            for row in ROWS[kept:]:
                table.add(row)
        assert path.read_bytes() == whole


def test_rows_are_read_up_to_where_the_table_was_opened(path):
    with Table(path, SETTINGS, COLUMNS) as table:
        table.add(ROWS[0])
        assert list(read_rows(path, COLUMNS, table.end)) == ROWS
        assert list(table.rows()) == [*ROWS, ROWS[0]] and table.done == 6
        table.remove()
    assert not path.exists()


@pytest.mark.skipif(os.name == "nt", reason="needs the limits of POSIX")
@pytest.mark.parametrize("room", [10, 60, 120, 200])
def test_a_full_disk_is_one_line_and_loses_no_row(tmp_path, room):
    """The system's limit on a file's size stands for the disk: both take a part of a row first."""
    path = tmp_path / "t.jsonl"
    answers = multiprocessing.get_context("spawn").Pool(1)
    with answers:
        message = answers.apply(_fill_up, (path, room))
    assert "t.jsonl cannot be written (File too large)" in message and "\n" not in message
    if room > 60:
        kept = (path.read_bytes().count(b"\n")) - 1
        assert kept > 0 and f"its {kept} rows are kept" in message and path.read_bytes().endswith(b"\n")
        assert list(read_rows(path, COLUMNS)) == ROWS[:kept]
    assert write(path, ROWS[1:]) >= 4


def _fill_up(path, room):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    with pytest.raises(UserError) as error:
        write(path, ROWS * 9)
    # What measures coverage writes, too, when the process ends.
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return str(error.value)


def test_two_processes_do_not_write_one_table(path):
    with (
        Table(path, SETTINGS, COLUMNS),
        pytest.raises(UserError, match="written by another process"),
    ):
        Table(path, SETTINGS, COLUMNS)
    # The end of the first writer frees the table.
    assert write(path, ()) == 5


def test_a_table_that_was_refused_is_free_again(path):
    for wrong in ({"settings": {"model": "other", "views": 3}}, {"resume": False}):
        with pytest.raises(UserError):
            write(path, (), **wrong)
        assert write(path, ()) == 5


def test_a_table_removed_meanwhile_is_not_written_to(path, monkeypatch):
    """The process that held it removes it between opening and locking: rows need a file with a name."""
    from dgsnet import files

    lock, seen = files._lock, []

    def slow(file):
        if not seen:
            seen.append(path.unlink())
        return lock(file)

    monkeypatch.setattr(files, "_lock", slow)
    assert write(path, ROWS[:2]) == 2 and seen
    assert list(read_rows(path, COLUMNS)) == ROWS[:2]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model": "a1b3", "views": 3}, "model"),
        ({"model": "a1b2", "views": 2}, "views"),
        ({"model": "", "views": 4}, "model, views"),
    ],
)
def test_other_settings_are_named(path, settings, named):
    before = path.read_bytes() + b'{"path": "5.p'
    path.write_bytes(before)
    with pytest.raises(UserError, match=rf"begun with other settings \({named}\): give the same") as error:
        write(path, (), settings)
    assert "\n" not in str(error.value) and path.read_bytes() == before


def test_rows_are_not_gone_on_with_unasked(path):
    before = path.read_bytes()
    with pytest.raises(UserError, match="holds 5 rows already: go on with --resume, or delete it"):
        write(path, (), resume=False)
    assert path.read_bytes() == before


def test_without_rows_there_is_nothing_to_keep(path):
    write(path.with_name("b"), ())
    assert write(path.with_name("b"), ROWS[:1], SETTINGS | {"views": 9}, resume=False) == 1
    assert json.loads(path.with_name("b").read_text().splitlines()[0])["views"] == 9


@pytest.mark.parametrize(
    "content",
    [
        b"path,probability\na.png,0.5\n",
        b'{"path": "a.png"}\n',
        b'{"model": "a1b2"}\n{"path": "a.png"}\n',
        b"[1]\n",
        b"no end of line",
        b'{"mode',
    ],
)
def test_another_file_is_left_alone(path, content):
    path.write_bytes(content)
    if content == b'{"mode':
        # This is the beginning of a table's own first line.
        assert write(path) == 5
        return
    with pytest.raises(UserError, match="is no table of this command and version of dgsnet") as error:
        write(path, ())
    assert "\n" not in str(error.value) and path.read_bytes() == content


@pytest.mark.parametrize(
    "damage", [b"noise\n", b"[]\n", b'{"path": 1}\n', b'{"path": 1, "score": 2, "x": 3}\n']
)
def test_a_damaged_row_is_named_by_its_line(path, damage):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], damage, *lines[3:]]))
    with (
        Table(path, SETTINGS, COLUMNS) as table,
        pytest.raises(UserError, match=r"t.jsonl: line 4 is damaged: "),
    ):
        list(table.rows())
