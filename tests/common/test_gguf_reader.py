"""The header of a GGUF file: what the library itself reads from it, value by value; and files that end too early."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from common.errors import ModelLoadError
from common.gguf_reader import GGUFFile


@pytest.fixture
def file(tmp_path: Path) -> Path:
    writer = GGUFWriter(tmp_path / "some.gguf", "llama")
    writer.add_string("name", "a name")
    writer.add_uint32("number", 7)
    writer.add_array("words", ["", "a", "\u2581the", "\U0001f600", "x" * 300])
    writer.add_array("scores", [0.5, -1.25, 3.0])
    writer.add_array("kinds", [1, -2, 2**31 - 1])
    writer.add_array("flags", [True, False, True])
    writer.add_tensor("weights", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "some.gguf"


def test_every_value_is_what_the_library_reads(file: Path) -> None:
    ours, plain = GGUFFile(file), GGUFReader(file)
    assert set(ours.keys) == set(plain.fields)
    for key, field in plain.fields.items():
        value = ours.contents(key)
        assert value == field.contents(), key
        assert type(value) is type(field.contents()), key
    assert ours.array("words", str)[2:4] == ["\u2581the", "\U0001f600"]
    assert ours.array("scores", float) == [0.5, -1.25, 3.0]
    assert (ours.tensors["weights"].data == np.arange(64, dtype=np.float32).reshape(2, 32)).all()


def test_a_file_that_ends_too_early_is_refused_wherever_it_ends(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for size in range(0, len(whole) - 1, 7):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:size])
        with pytest.raises(ModelLoadError):
            GGUFFile(cut)
