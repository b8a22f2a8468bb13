"""Which tensor goes into which file, in which order, at which offset, under which header."""

from __future__ import annotations

import json

import pytest

from moeconv.checkpoint.header import StoredTensor
from moeconv.errors import NameCollision
from moeconv.plan.model import OutputFile
from moeconv.plan.pack import Packing, header_bytes, index_bytes, pack, placed
from moeconv.plan.tensors import PlannedTensor, copied

PAGE = 4096
LARGE = Packing(10**9)
SIZES = {"U8": 1, "BF16": 2, "F32": 4}


def tensor(name: str, nbytes: int, dtype: str = "U8") -> PlannedTensor:
    return copied(StoredTensor(name, dtype, (nbytes // SIZES[dtype],), 0, 0, nbytes))


def names(files: tuple[OutputFile, ...]) -> list[list[str]]:
    return [[t.name for t in file.tensors] for file in files]


def test_page_multiples_come_first_then_larger_dtypes_then_natural_names() -> None:
    some = [
        *(tensor("t10", 7), tensor("t9", 5), tensor("b", 6, "BF16"), tensor("f", 8, "F32")),
        *(tensor("page10", PAGE), tensor("page9", PAGE, "F32"), tensor("page2", 2 * PAGE)),
    ]
    wanted = ["page9", "page2", "page10", "f", "b", "t9", "t10"]
    assert names(pack(some, LARGE)) == [wanted]
    assert names(pack(some[::-1], LARGE)) == [wanted]


def test_files_are_cut_by_natural_order() -> None:
    some = [tensor(f"t{n}", 3000) for n in (10, 2, 1, 9)]
    files = pack(some, Packing(PAGE + 2 * 3000 + 1000))
    assert names(files) == [["t1", "t2"], ["t9", "t10"]]
    assert [f.name for f in files] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]


def test_a_tensor_that_is_too_large_has_a_file_of_its_own() -> None:
    files = pack([tensor("a", 10), tensor("b", 10**6), tensor("c", 10)], Packing(20_000))
    assert names(files) == [["a"], ["b"], ["c"]]


def test_a_file_is_not_larger_than_it_may_be() -> None:
    some = [tensor(f"a.rather.long.name.of.a.tensor.{n}", 100 + n) for n in range(300)]
    for size in (10_000, 30_000, 50_000):
        assert max(f.size for f in pack(some, Packing(size))) <= size


def test_nothing_at_all_is_one_file() -> None:
    (file,) = pack([], LARGE)
    assert (file.tensors, file.tiles, file.size) == ((), (), PAGE)


def test_of_a_rank() -> None:
    (file,) = pack([tensor("a", 1)], LARGE, prefix="rank-1-of-2", rank=1)
    assert (file.name, file.rank) == ("rank-1-of-2-00001-of-00001.safetensors", 1)


def test_two_tensors_of_one_name() -> None:
    with pytest.raises(NameCollision, match="`a`"):
        pack([tensor("a", 1), tensor("b", 1), tensor("a", 2)], LARGE)


@pytest.mark.parametrize("phase", [0, 8, 4088, 2048])
def test_a_header_and_what_it_says(phase: int) -> None:
    some = [tensor("ä", 6, "BF16"), tensor("b", 0), tensor("c", 3)]
    file = placed(some, "x", phase=phase)
    length = int.from_bytes(file.header[:8], "little")
    assert len(file.header) == 8 + length
    assert len(file.header) % PAGE == phase
    doc = json.loads(file.header[8:])
    assert doc.pop("__metadata__") == {"format": "pt"}
    assert doc == {
        "ä": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]},
        "b": {"dtype": "U8", "shape": [0], "data_offsets": [6, 6]},
        "c": {"dtype": "U8", "shape": [3], "data_offsets": [6, 9]},
    }
    assert [t.offset - len(file.header) for t in file.tensors] == [0, 6, 6]
    assert file.size == len(file.header) + 9
    assert [(t.start - len(file.header), t.nbytes) for t in file.tiles] == [(0, 6), (6, 3)]


def test_a_header_is_the_same_however_many_are_written_at_once() -> None:
    some = [tensor(f"t{n}", n) for n in range(2500)]
    doc = json.loads(header_bytes(some)[8:])
    assert list(doc) == ["__metadata__", *(t.name for t in some)]
    assert doc["t2499"]["data_offsets"] == [2498 * 2499 // 2, 2499 * 2500 // 2]


def test_an_index_has_the_size_of_all_data() -> None:
    files = pack([tensor("a", 3000), tensor("b", 3000)], Packing(8000))
    doc = json.loads(index_bytes(files))
    assert doc == {
        "metadata": {"total_size": 6000},
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        },
    }
