"""The file of how often each shape comes."""

from pathlib import Path

import pytest

from pst.errors import ConfigError
from serve.tune.traffic import read_traffic


def test_shapes_and_counts(tmp_path: Path) -> None:
    file = tmp_path / "traffic.csv"
    file.write_text("shape,count\n1x32,900\n\n8X128, 20.5\n1x32,100\n", encoding="utf-8")
    assert read_traffic(file) == {(1, 32): 1000.0, (8, 128): 20.5}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no shape"),
        ("shape,count\n", "holds no shape"),
        ("1x32\n", "Line 1 of .* has 1 cells"),
        ("1x32,3\n1x64,many\n", "Line 2 of .* has the count 'many', no number above 0"),
        ("1x32,0\n", "the count '0'"),
        ("1x32,inf\n", "the count 'inf'"),
        ("32,5\n", "'32' is not a shape"),
        ('"1x32,1x64",5\n', "'1x32,1x64' is not one shape"),
        ("1x32,\xff\n", "cannot be read as text"),
    ],
)
def test_what_is_no_traffic(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "traffic.csv"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=says):
        read_traffic(file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read as text; write one shape"):
        read_traffic(tmp_path / "none.csv")
