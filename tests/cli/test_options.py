"""Flags, keywords and options agree: a flag that the library does not know fails here."""

from __future__ import annotations

import inspect
from dataclasses import fields

import moeconv
from moeconv.api.options import (
    ConvertKeywords,
    ReadKeywords,
    ReadOptions,
    WriteKeywords,
    WriteOptions,
)
from moeconv.cli.options import (
    ExcludeFlags,
    RecordedFlags,
    RestoreFlags,
    ShardFlags,
    SourceFlags,
    VerifyFlags,
    WorkFlags,
    WriteFlags,
)


def flags(*groups: type) -> set[str]:
    return {name for group in groups for name in group.__annotations__}


def parameters(function: object) -> set[str]:
    assert callable(function)
    return set(inspect.signature(function).parameters)


def test_flags_of_writing_commands_are_the_options():
    options = {f.name for f in fields(WriteOptions)} - {"progress"}
    assert flags(ExcludeFlags, WriteFlags, WorkFlags, SourceFlags, RestoreFlags) == options


def test_keywords_are_the_options():
    options = {f.name for f in fields(WriteOptions)}
    assert set(ConvertKeywords.__annotations__) == options - {"unchecked"}
    assert set(WriteKeywords.__annotations__) == options - {
        "unchecked", "recipe", "from_layout", "only_index"
    }  # fmt: skip
    assert set(ReadKeywords.__annotations__) == {f.name for f in fields(ReadOptions)}


def test_flags_of_reading_commands_are_the_options():
    options = {f.name for f in fields(ReadOptions)} - {"progress"}
    assert flags(ExcludeFlags, WorkFlags, SourceFlags) == options


def test_flags_of_one_command_are_parameters_of_its_function():
    assert flags(ShardFlags) < parameters(moeconv.shard)
    assert flags(VerifyFlags) < parameters(moeconv.verify)
    assert flags(RestoreFlags) < parameters(moeconv.unfuse) & parameters(moeconv.merge)
    assert flags(RecordedFlags) < parameters(moeconv.diff) & parameters(moeconv.fingerprint)
