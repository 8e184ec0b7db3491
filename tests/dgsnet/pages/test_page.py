"""Pages hold everything inside, escape what they are given and say what is missing."""

import jinja2
import pytest
from dgsnet.pages import page
from markupsafe import Markup


def test_values_are_escaped_unless_they_are_markup(tmp_path):
    (tmp_path / "t.html").write_text("{{ words }} {{ picture }}")
    text = page.render(tmp_path / "t.html", words="<b>&", picture=Markup("<svg/>"))
    assert text == "&lt;b&gt;&amp; <svg/>"


def test_a_value_that_is_missing_is_an_error(tmp_path):
    (tmp_path / "t.html").write_text("{{ words }}")
    with pytest.raises(jinja2.UndefinedError, match="words"):
        page.render(tmp_path / "t.html")
