"""Texts that may speak of experts, but were not put in new names: these are said."""

from __future__ import annotations

import re
from typing import Final

from moeconv.quantconfig.automaton import Unsupported
from moeconv.quantconfig.match_rules import Place, Reading, ending, guesses, is_pattern
from moeconv.quantconfig.rename import Mentions
from moeconv.quantconfig.texts import Text

_EXPERTS: Final = re.compile(r"(?<!shared_)(?<!shared)experts")
_WORD: Final = re.compile(r"\w+")


def is_unsure(mentions: Mentions, said: Text) -> bool:
    """Whether a text may have meant experts, or may mean them now."""
    text = said.text
    if mentions.settled(said.place, text):
        return False
    # a word such as `experts` is no module's whole name; who takes it for an end was asked before
    if _EXPERTS.search(text) and not _WORD.fullmatch(text):
        return True
    if said.alone and not ("." in text or "*" in text):
        return False
    reader = mentions.place(said.place)
    try:
        return _may_mean(mentions, said, reader)
    except Unsupported:
        return reader.known or not said.alone


def _may_mean(mentions: Mentions, said: Text, reader: Place) -> bool:
    text = said.text
    if reader.plain(text) and not mentions.renamings.near(text):
        return False
    reading = reader.reading(text, mentions.budget)
    if reading is not None:
        # a list in a list was not looked at; a reader may know the modules by shorter names
        unseen = not mentions.seen(said.place, text) and _changes(mentions, reading)
        if unseen or _changes(mentions, reading, shorter=True):
            return True
    if is_pattern(text) and (reading is None or reader.parts):
        return any(_changes(mentions, guess) for guess in guesses(text, mentions.budget))
    if reading is not None:
        return False
    if mentions.renamings.lost(text):
        return True
    if "." not in text and reader.known:
        return False  # to its reader a class of modules, if anything
    return _changes(mentions, ending(f".{text}", mentions.budget))


def _changes(mentions: Mentions, reading: Reading, *, shorter: bool = False) -> bool:
    """Whether it means other experts after than before; shorter: of stacks by shorter names."""
    renamings = mentions.renamings
    for stack in renamings.changed:
        modules = renamings.modules(stack)
        for head in renamings.shorter[stack] if shorter else (stack,):
            old = reading.among(head, modules.old_rests)
            new = reading.among(head, modules.new_rests)
            if old != new and modules.changed(old, new):
                return True
    return False
