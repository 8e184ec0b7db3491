"""Triton's interpreter without what takes a quarter of its time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import triton.language as tl
from triton.runtime import interpreter


@contextlib.contextmanager
def patched_once() -> Iterator[None]:
    """A function that a kernel calls finds the language as the launch has patched it.

    At each such call the interpreter looks through all of Triton's language for what is still to be patched.
    """
    patch = interpreter._patch_lang

    def patch_what_is_not(fn):
        languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        return patch(fn) if any(tl.core.is_builtin(language.load) for language in languages) else None

    interpreter._patch_lang = patch_what_is_not
    try:
        yield
    finally:
        interpreter._patch_lang = patch
