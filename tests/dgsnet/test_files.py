"""Files are on the disk whole or not at all."""

import os

import pytest
from dgsnet.data.tables import Table
from dgsnet.errors import UserError
from dgsnet.files import locked, replace_folder, replacing, write_file
from dgsnet.pages import plots
from matplotlib.figure import Figure


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_a_file_that_is_not_completed_leaves_the_old_one_and_nothing_else(tmp_path, stop):
    path = tmp_path / "a.txt"
    write_file(path, b"old")
    with pytest.raises(stop), replacing(path, "w") as file:
        file.write("half")
        raise stop
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("a.txt", "old")]
    with replacing(path, "w", encoding="utf-8") as file:
        file.write("n\N{LATIN SMALL LETTER E WITH DIAERESIS}w")
        assert path.read_bytes() == b"old"
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("a.txt", b"n\xc3\xabw")]


def test_a_folder_in_use_names_who_uses_it(tmp_path):
    folder = tmp_path / "deep" / "er"
    with (
        locked(folder),
        pytest.raises(UserError, match=r"er is in use by process \d+ on .*: wait"),
        locked(folder),
    ):
        pass
    # The folder was made for the lock alone.
    assert not (tmp_path / "deep").exists()
    with locked(tmp_path):
        (tmp_path / "result").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def made(kind, place, victim):
    """A link as a stranger's folder may have it, to a file elsewhere."""
    victim.write_text("precious")
    place.parent.mkdir(parents=True, exist_ok=True)
    if kind == "symbolic":
        place.symlink_to(victim)
    else:
        os.link(victim, place)


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_links_in_a_folder_do_not_lead_what_is_written_elsewhere(tmp_path, kind):
    run, victim = tmp_path / "run", tmp_path / "victim"
    made(kind, run / ".lock", victim)
    with pytest.raises(UserError, match=r"\.lock is a link, .*: delete it"), locked(run):
        pass
    made(kind, run / "scores.csv.partial", tmp_path / "victim2")
    with pytest.raises(UserError, match=r"partial is a link, .*: delete it"):
        Table(run / "scores.csv.partial", {}, ["path"])
    made(kind, run / ".config.json.new", tmp_path / "victim3")
    write_file(run / "config.json", b"new")
    assert (run / "config.json").read_bytes() == b"new" and not (run / "config.json").is_symlink()
    made(kind, run / "metrics.png", tmp_path / "victim4")
    plots.save(Figure(), run / "metrics.png")
    assert not (run / "metrics.png").is_symlink()
    for name in ("victim", "victim2", "victim3", "victim4"):
        assert (tmp_path / name).read_text() == "precious"


def test_a_folder_takes_its_place_whatever_links_are_beside_it(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "run" / "best"
    for place in (outside, folder):
        place.mkdir(parents=True)
        (place / "old").touch()
    for name in (".best.new", ".best.old"):
        (folder.parent / name).symlink_to(outside)
    replace_folder(folder, lambda new: (new / "new").touch())
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert [path.name for path in outside.iterdir()] == ["old"]
    assert [path.name for path in folder.parent.iterdir()] == ["best"]
