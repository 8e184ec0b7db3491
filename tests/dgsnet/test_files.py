"""Files are on the disk whole or not at all."""

import pytest
from dgsnet.errors import UserError
from dgsnet.files import locked, replacing, write_file


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
    assert not (tmp_path / "deep").exists()  # it was made for this alone
    with locked(tmp_path):
        (tmp_path / "result").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
