from __future__ import annotations

import io

import numpy as np
import pytest

from chatbind_cli.errors import MediaError
from chatbind_cli.media.maps import read_npy, read_npy_header
from chatbind_cli.media.source import open_source


def with_header(text: str, body: bytes = b"", version: int = 1) -> bytes:
    header = (text + "\n").encode()
    length = len(header).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + body


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "<i4", ">f4", "<f8", "f2", "?"])
def test_numbers_of_every_type_and_order_come_back(dtype: str) -> None:
    values = (np.arange(12).reshape(3, 4) % 2).astype(dtype)
    for array in (values, np.asfortranarray(values)):
        buffer = io.BytesIO()
        np.save(buffer, array)
        found = read_npy(open_source(buffer.getvalue()), 10**6)
        assert found.dtype.isnative
        np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (with_header("{'descr':'<f8','fortran_order':False,'shape':(10**9,10**9)}"), "readable"),
        (
            with_header("{'descr':'<f8','fortran_order':False,'shape':(1000000000000,)}"),
            "cut short",
        ),
        (
            with_header("{'descr':'<f8','fortran_order':False,'shape':(-1,4)}", bytes(64)),
            "readable",
        ),
        (with_header("{'descr':'|O','fortran_order':False,'shape':(1,)}", b"x" * 99), "object"),
        (with_header("{'descr':'<c16','fortran_order':False,'shape':(1,)}", bytes(16)), "complex"),
        (with_header("{'descr':'<U9','fortran_order':False,'shape':(1,)}", bytes(36)), "str"),
        (with_header("__import__('os')"), "readable"),
        (with_header("[" * 5000), "readable"),
        (b"\x93NUMPY", "readable"),
        (b"\x93NUMPY\x01\x00\xff\xff", "readable"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(100), "readable"),
        (b"\x93NUMPY\x09\x00" + bytes(100), "readable"),
        (with_header("{'descr':'<f8','fortran_order':False,'shape':(0,4)}"), "no numbers"),
    ],
)
def test_broken_and_lying_headers_are_one_line(data: bytes, what: str) -> None:
    with pytest.raises(MediaError, match=what) as caught:
        read_npy(open_source(data), 10**6)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_never_opened() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(MediaError, match="holds object, not numbers"):
        read_npy_header(open_source(buffer.getvalue()))


def test_the_limit_holds() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(1000))
    with pytest.raises(MediaError, match="is larger than"):
        read_npy(open_source(buffer.getvalue()), 7999)
