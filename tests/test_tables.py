"""Tables come back from a file as they were, and are refused with a reason."""

from __future__ import annotations

import csv
import math
import re
import sys

import numpy as np
import pytest
import torch

from wherefrom import ArtefactError, InputError, MissingExtraError
from wherefrom.data.tables import as_table, joined, read_table, write_table

FLOATS = [0.1, 1 / 3, -2.5e-308, 5e-324, 1.7976931348623157e308, -0.0, 1e16, math.inf, None]
TABLE = {
    "example": [3, -1, 0, 2**60, 10**15, 7, 1, 2, None],
    "score": FLOATS,
    "flag": [True, False, None, True, True, False, False, None, True],
    "text": ["plain", 'with "quotes", commas', "two\nlines", "naïve Ω", "007", " padded ", "1_000", "\r\n", None],
    "code": ["007", "01", "0", "1", "2", "3", "4", "5", "6"],
    "thousands": ["1_000", "2", "3", "4", "5", "6", "7", "8", "9"],
    "empty": ["", "1", None, "", "2", "3", "4", "5", "6"],
    "power": ["1e5", "2e5", None, "", "2", "3", "4", "5", "6"],
    "nan": ["nan", "1", "2", "inf", "2", "3", "4", "5", "6"],
    "word": ["True", "False", None, "True", "True", "True", "True", "True", "True"],
    "day": ["2020-01-01"] * 9,
    "whole": [1.0, 2.0, -0.0, 1e16, math.inf, None, 5.0, 6.0, 7.0],
    "padded": [" 1.5", "2.5 ", "3", "4", "5", "6", "7", "8", "9"],
    "signed": ["+1", "-01", "3", "4", "5", "6", "7", "8", "9"],
    "gap": [None] * 9,
}


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_comes_back_as_it_was(tmp_path, suffix):
    path = tmp_path / "new" / f"table.{suffix}"
    write_table(path, TABLE)
    found = read_table(path)
    assert found == TABLE
    assert list(found) == list(TABLE)  # the order of the columns
    assert [list(map(type, cells)) for cells in found.values()] == [list(map(type, c)) for c in TABLE.values()]
    assert math.copysign(1, found["score"][5]) == -1
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_floats_of_any_size_come_back_exactly(tmp_path, suffix):
    bits = torch.randint(-(2**63), 2**63 - 1, (500,), generator=torch.Generator().manual_seed(0))
    single = torch.randn(500, generator=torch.Generator().manual_seed(1))
    values = bits.view(torch.float64)
    path = tmp_path / f"t.{suffix}"
    write_table(path, {"double": values, "single": single})
    found = read_table(path)
    assert torch.equal(torch.tensor(found["double"], dtype=torch.float64).nan_to_num(7.0), values.nan_to_num(7.0))
    assert torch.equal(torch.tensor(found["single"]), single)


def test_the_formats_agree_with_their_own_libraries(tmp_path):
    import pyarrow.parquet

    write_table(tmp_path / "t.csv", {"a": [1, None], "b": [0.25, 1.0], "c": ["x,y", "z"]})
    assert (tmp_path / "t.csv").read_bytes() == b'"a","b","c"\n1,0.25,"x,y"\n,1.0,"z"\n'
    write_table(tmp_path / "t.parquet", {"a": [1, None], "b": [0.25, 1.0]})
    arrow = pyarrow.parquet.read_table(tmp_path / "t.parquet")
    assert [str(field.type) for field in arrow.schema] == ["int64", "double"]
    assert arrow.column("a").to_pylist() == [1, None]


def test_a_csv_of_another_program(tmp_path):
    (tmp_path / "t.csv").write_bytes("\ufeffid,x,word\r\n1,0.50,nan\r\n\r\n2,+3,n.a.\r\n".encode())
    assert read_table(tmp_path / "t.csv") == {"id": [1, 2], "x": [0.5, 3.0], "word": ["nan", "n.a."]}


def test_what_is_in_quotes_is_text_and_so_is_what_would_come_back_changed(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('quoted,zeros,late,hex,date\n"1",01,1,0x10,2020-01-01\n"2",2,"x",0x11,2020-01-02\n')
    assert read_table(path) == {
        "quoted": ["1", "2"],
        "zeros": ["01", "2"],
        "late": ["1", "x"],
        "hex": ["0x10", "0x11"],
        "date": ["2020-01-01", "2020-01-02"],
    }
    path.write_text('gaps,empty\n,""\n,1\n"7",2\n')  # the first cell that is not empty decides
    assert read_table(path) == {"gaps": [None, None, "7"], "empty": ["", "1", "2"]}


def test_cells_may_be_longer_than_a_block_of_the_reader(tmp_path):
    table = {"a": ["x" * 3_000_000, "y"], "b": [1, 2]}
    write_table(tmp_path / "t.csv", table)
    assert read_table(tmp_path / "t.csv") == table


def test_rows_make_columns_in_the_order_in_which_they_are_met():
    rows = [{"b": np.int32(1), "a": 2}, {"a": torch.tensor(0.5), "c": "x"}]
    found = as_table(rows)
    assert found == {"b": [1, None], "a": [2.0, 0.5], "c": [None, "x"]}
    assert list(found) == ["b", "a", "c"] and type(found["b"][0]) is int
    assert type(found["a"][0]) is float
    assert list(as_table(rows, ("c", "z"))) == ["c", "z", "b", "a"]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_without_rows_keeps_its_columns(tmp_path, suffix):
    write_table(tmp_path / f"t.{suffix}", {"a": [], "b": []})
    assert read_table(tmp_path / f"t.{suffix}") == {"a": [], "b": []}


def test_a_single_column_of_gaps_keeps_its_rows(tmp_path):
    write_table(tmp_path / "t.csv", {"a": [None, None]})
    assert read_table(tmp_path / "t.csv") == {"a": [None, None]}


def test_joined_looks_values_up():
    table = {"example": [2, 0, 2], "score": [1.0, 2.0, 3.0]}
    found = joined(table, "example", {"label": torch.tensor([7, 8, 9]), "word": ("a", "b", "c")}, "the_")
    assert found == {**table, "the_label": [9, 7, 9], "the_word": ["c", "a", "c"]}
    assert list(table) == ["example", "score"]
    with pytest.raises(InputError, match="'label' must be a value for each example, got 2 values"):
        joined(table, "example", {"label": [1, 2]})
    with pytest.raises(InputError, match=r"none of example, score, got score"):
        joined(table, "example", {"score": [1, 2, 3]})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "columns of one length, got no column"),
        ([], "columns of one length, got no column"),
        ({"a": [1], "b": [1, 2]}, r"one length, got {'a': 1, 'b': 2}"),
        ({"a": [1, "x"]}, r"column 'a' must be of bool, .*\['int', 'str'\]"),
        ({"a": [True, 1]}, r"\['bool', 'int'\]"),
        ({"a": [[1, 2]]}, r"\['list'\]"),
        ({"a": torch.zeros(2, 2)}, r"\['list'\]"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, data, message):
    with pytest.raises(InputError, match=message):
        write_table(tmp_path / "t.csv", data)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "t.csv"
    write_table(path, {"a": [1]})
    with pytest.raises(InputError, match=r"the column 'a' must be of Unicode text, got '.ud800'"):
        write_table(path, {"a": ["\ud800"]})
    assert read_table(path) == {"a": [1]}
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.csv", None, "No such file"),
        ("t.csv", b"", "column"),
        ("t.csv", b"a,b\n1\n", "Expected 2 columns, got 1"),
        ("t.csv", b"a,a\n1,2\n", "each once"),
        ("t.csv", b"\xff\xfe\x00", "decode"),
        ("t.parquet", b"PAR1 and no more", ""),
        ("gone.parquet", None, ""),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtefactError, match=re.escape(name) + ".*" + message):
        read_table(tmp_path / name)


@pytest.mark.parametrize("use", [read_table, lambda path: write_table(path, {"a": [1]})])
def test_another_suffix_and_a_missing_package(tmp_path, monkeypatch, use):
    with pytest.raises(InputError, match=r"ending in \.csv or \.parquet"):
        use(tmp_path / "t.xlsx")
    write_table(tmp_path / "t.parquet", {"a": [1]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=re.escape('pip install "wherefrom[cli]"')):
        use(tmp_path / "t.parquet")
    write_table(tmp_path / "t.csv", {"a": [1]})  # writing a .csv needs nothing
    assert next(csv.reader(open(tmp_path / "t.csv"))) == ["a"]
