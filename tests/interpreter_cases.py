"""Triton's interpreter without what it does over and over to no end, two thirds of its time; the numbers are the same.

Imported by `conftest.py` in the processes in which Triton interprets.
"""

import dataclasses
import functools
import inspect

from triton.runtime import interpreter


def _without_checks_of_nothing():
    """Do not compute whether a sum or product of integers overflows where the assertion of it is then left out."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _with_one_look_for_each_type():
    """Keep what numpy calls a type; a table of all is made for every look into it."""
    look, found = interpreter._get_np_dtype, {}

    def np_dtype(kind):
        if kind.name not in found:
            found[kind.name] = look(kind)
        return found[kind.name]

    interpreter._get_np_dtype = np_dtype


def _with_one_change_of_the_language():
    """Let `triton.language` be that of the interpreter from its first use on, not anew at every call of a function."""
    change, languages, done = interpreter._patch_lang, (interpreter.tl, interpreter.tl.core), set()

    @functools.cache
    def change_once(fn):
        seen = {value for value in fn.__globals__.values() if inspect.ismodule(value) and value in languages}
        if not seen <= done:
            change(fn)
            done.update(seen)
        return interpreter._LangPatchScope()  # of no changes: nothing is taken back

    interpreter._patch_lang = change_once


_without_checks_of_nothing()
_with_one_look_for_each_type()
_with_one_change_of_the_language()
