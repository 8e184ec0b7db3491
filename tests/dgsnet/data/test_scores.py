"""Tables of other programs' scores: what is read, and what is wrong with one, in one line."""

import tracemalloc

import pytest
from dgsnet.data.scores import Scored, read_scores
from dgsnet.errors import UserError


def table(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode(encoding))
    return str(path)


def test_rows_have_what_the_table_says(tmp_path):
    path = table(
        tmp_path,
        "category,score,path,more,label,generator,source\n"
        "night,-1e300,a.png,x,real,,press\n"
        ',"0.1","b, c.png",y,1,sd,\n'
        "\n"
        ",'-3,'=d.png,,,,\n",
        "utf-8-sig",
    )
    assert list(read_scores(path)) == [
        Scored(2, "a.png", -1e300, 0, "", "press", "night"),
        Scored(3, "b, c.png", 0.1, 1, "sd", "", ""),
        Scored(5, "=d.png", -3.0, None, "", "", ""),
    ]
    # A name that is no UTF-8 is read as the bytes it is; PowerShell writes UTF-16.
    (tmp_path / "t.csv").write_bytes(b"path,score\n\xff.png,7\n")
    assert [row.path for row in read_scores(path)] == ["\udcff.png"]
    assert next(read_scores(table(tmp_path, "path,score\né.png,7\n", "utf-16"))).path == "é.png"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "its first line names no column path and no score"),
        ("path,probability\na,1\n", "its first line names no column score"),
        ("path,score,score\na,1,2\n", "names a column twice"),
        ("path,score\na,1\nb,nan\n", "line 3: score 'nan' is no finite number"),
        ("path,score\na,inf\n", "line 2: score 'inf'"),
        ("path,score\na,1e999\n", "line 2: score '1e999'"),
        ("path,score\na,high\n", "line 2: score 'high'"),
        ("path,score\na,\n", "line 2: score ''"),
        ("path,score\na\n", "line 2: not as many cells as"),
        ("path,score\na,1,2\n", "line 2: not as many cells as"),
        ("path,score\n,1\n", "line 2: path is missing"),
        ('path,score\n"a\nb",1\na,1\na,2\n', "line 5: a comes twice"),
        ("path,score,label\na,1,fake\nb,1,maybe\n", "line 3: label 'maybe' is unknown"),
        ('path,score\n"a,1\n', "not readable as CSV"),
        (f"path,score\n{'a' * 200_000},1\n", "not readable as CSV"),
        (f"path,score,category\na,1,{'n' * 201}\n", "line 2: category is no text"),
    ],
)
def test_a_bad_table_is_one_line(tmp_path, text, why):
    with pytest.raises(UserError, match=why) as error:
        list(read_scores(table(tmp_path, text)))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_no_table_is_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(UserError, match="cannot be read"):
            list(read_scores(str(path)))


def test_it_is_read_a_row_at_a_time(tmp_path):
    """Of what has been read only hashes are held: a few bytes for each row, whatever its length."""
    rows = 20_000
    path = table(tmp_path, "path,score\n" + "".join(f"{'folder/' * 30}{i},1\n" for i in range(rows)))
    next(read_scores(path))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_scores(path)) == rows
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < rows * 200
