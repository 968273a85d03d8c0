import gzip
import io
import json
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv2.data.documents import Document, read_documents
from dsv2.errors import ConfigError, DataError, MissingExtra


def texts(*paths, **options):
    return [document.text for document in read_documents(paths, **options)]


def refused(*paths, **options) -> DataError:
    with pytest.raises(DataError) as caught:
        list(read_documents(paths, **options))
    return caught.value


def write_parquet(path: Path, columns: dict[str, object]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


# Formats ------------------------------------------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_documents(tmp_path, write_rows):
    zstandard = pytest.importorskip("zstandard")
    rows = [{"text": f"héllo {number}\n你好"} for number in range(5)]
    plain = write_rows(tmp_path / "a.jsonl", rows)
    write_rows(tmp_path / "a.jsonl.gz", rows)
    middle = len(plain.read_bytes()) // 2
    halves = [zstandard.compress(part) for part in (plain.read_bytes()[:middle], plain.read_bytes()[middle:])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(halves))  # two frames, cut inside a line
    write_parquet(tmp_path / "a.parquet", {"id": list(range(5)), "text": [row["text"] for row in rows]})
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        documents = list(read_documents([tmp_path / name]))
        assert [document.text for document in documents] == [row["text"] for row in rows], name
        assert {document.domain for document in documents} == {"a"}
        assert documents[3].location == ("row 4" if name == "a.parquet" else "line 4")


def test_text_files_are_one_document_each_byte_for_byte(tmp_path):
    (tmp_path / "b.md").write_bytes(b"# Title\r\n\ttab\x0c\x1b[0m\r\n")
    (tmp_path / "a.TXT").write_bytes(b"\xef\xbb\xbfwith a byte order mark")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("压缩".encode()))
    assert texts(tmp_path) == ["with a byte order mark", "# Title\r\n\ttab\x0c\x1b[0m\r\n", "压缩"]
    (document,) = read_documents([tmp_path / "b.md"])
    assert document == Document("# Title\r\n\ttab\x0c\x1b[0m\r\n", "b", str(tmp_path / "b.md"), "whole file")


def test_folders_are_read_in_sorted_order_and_what_is_left_out_is_counted(tmp_path):
    for name in ("z.txt", "b/2.txt", "b/1.txt", "a/deep/x.txt", ".hidden/h.txt", ".hidden.txt", "b/picture.png", "b/script"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "b" / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    stream = read_documents([tmp_path])
    assert [(document.text, document.domain) for document in stream] == [
        ("z.txt", tmp_path.name), ("a/deep/x.txt", "a"), ("b/1.txt", "b"), ("b/2.txt", "b")]  # fmt: skip
    assert stream.ignored_files == 3


def test_domain_comes_from_the_row_then_the_argument_then_the_name(tmp_path, write_rows):
    path = write_rows(tmp_path / "web.v2.jsonl", [{"text": "x", "domain": "en"}, {"text": "x"}, {"text": "x", "domain": None}])
    assert [document.domain for document in read_documents([path])] == ["en", "web", "web"]
    assert [document.domain for document in read_documents([path], domain="other")] == ["en", "other", "other"]
    write_parquet(tmp_path / "web.parquet", {"text": ["x", "y"], "domain": ["zh", None]})
    assert [document.domain for document in read_documents([tmp_path / "web.parquet"])] == ["zh", "web"]


@pytest.mark.parametrize(
    ("names", "domains"),
    [
        ("en.jsonl.gz zh.jsonl", "en zh"),
        ("en-00000.jsonl en-00001.jsonl zh_0.jsonl", "en en zh"),
        ("part-0.jsonl part-1.jsonl", "web web"),
        ("000_00001.jsonl 000_00002.jsonl", "web web"),
        ("train-00000-of-00002.jsonl train-00001-of-00002.jsonl x.txt", "web web web"),
        ("a.txt en.jsonl zh.v2.jsonl", "web en zh"),
        ("c4.jsonl pile.jsonl sub/0.jsonl sub/en.jsonl", "c4 pile sub sub"),
        ("en.jsonl", "web"),
    ],
)
def test_files_of_rows_in_a_folder_go_by_their_names_where_these_tell_domains(tmp_path, write_rows, names, domains):
    for name in names.split():
        (tmp_path / "web" / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(tmp_path / "web" / name, [{"text": "x"}])
    assert [document.domain for document in read_documents([tmp_path / "web"])] == domains.split()
    assert {document.domain for document in read_documents([tmp_path / "web"], domain="all")} == {"all"}


def test_parquet_strings_of_every_kind(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    for kind in (pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        write_parquet(tmp_path / "a.parquet", {"text": pyarrow.array(["x", "y", "x"], type=kind)})
        assert texts(tmp_path / "a.parquet") == ["x", "y", "x"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b'{"text": "a"}\n{"text": "b"}\n', ["a", "b"]), (b"\n\n plain\n{text}\n", ["\n\n plain\n{text}\n"])],
)
def test_stdin_is_jsonl_when_it_begins_with_a_brace(monkeypatch, data, expected):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    stream = read_documents(["-"])
    documents = list(stream)
    assert [document.text for document in documents] == expected
    assert {(document.domain, document.source) for document in documents} == {("stdin", "stdin")}
    assert stream.total_bytes is None
    assert not sys.stdin.buffer.closed


def test_empty_stdin_is_no_corpus(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"  \n")))
    assert "no document in -: 1 files read" in refused("-").message


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))), st.sampled_from([True, False]))
def test_any_text_survives_jsonl(tmp_path_factory, lines, escaped):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("".join(json.dumps({"text": line}, ensure_ascii=escaped) + "\n" for line in [*lines, "end"]), encoding="utf-8")
    assert texts(path) == [line for line in [*lines, "end"] if line and not line.isspace()]


def test_a_big_file_is_read_in_little_memory(tmp_path, write_rows):
    row = {"text": "".join(random.Random(0).choices("abcdefgh ", k=20_000))}
    path = write_rows(tmp_path / "big.jsonl.gz", [row] * 1000)
    stream = read_documents([path])
    positions = []
    tracemalloc.start()
    for _ in stream:
        positions.append(stream.bytes_read)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(positions) == 1000
    assert peak < 2_000_000  # of 20 MB
    assert positions == sorted(positions)
    assert 0 < positions[400] < stream.total_bytes == stream.bytes_read == path.stat().st_size


# Invalid and blank text -----------------------------------------------------------------------------------------------------------------


def test_invalid_utf8_names_file_line_and_offset(tmp_path):
    (tmp_path / "a.txt").write_bytes("é".encode() + b"abc\xff and more")
    assert refused(tmp_path / "a.txt").message == f"{tmp_path / 'a.txt'}: invalid UTF-8 at byte offset 5 (byte 0xff)"
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n\n{"text": "\xc3("}\n')
    assert refused(tmp_path / "a.jsonl").message == f"{tmp_path / 'a.jsonl'}:3: invalid UTF-8 at byte offset 25 (byte 0xc3)"
    pyarrow = pytest.importorskip("pyarrow")
    buffers = [None, pyarrow.py_buffer(b"\x00\0\0\0\x01\0\0\0\x03\0\0\0"), pyarrow.py_buffer(b"x\xffy")]
    path = write_parquet(tmp_path / "a.parquet", {"text": pyarrow.Array.from_buffers(pyarrow.string(), 2, buffers)})
    assert refused(path).message == f"{path}: row 2, field text: invalid UTF-8 at byte offset 0 (byte 0xff)"
    assert texts(path, invalid_utf8="replace") == ["x", "\ufffdy"]


def test_replacement_is_counted_by_domain_and_counts_only_what_was_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xef\xbf\xbd \xff\xfe \xe4\xbd"}\n{"text": "\xff", "domain": "b"}\n{"text": "good"}\n')
    stream = read_documents([tmp_path / "a.jsonl"], invalid_utf8="replace")
    assert [document.text for document in stream] == ["\ufffd \ufffd\ufffd \ufffd", "\ufffd", "good"]
    assert stream.replaced == {"a": 3, "b": 1}


def test_lone_surrogates(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00 fine"}\n{"text": "ab\\ud800c"}\n')
    assert refused(path).message == f"{path}:2: lone surrogate \\ud800 at character 2 of the string"
    stream = read_documents([path], invalid_utf8="replace")
    assert [document.text for document in stream] == ["\U0001f600 fine", "ab\ufffdc"]
    assert stream.replaced == {"a": 1}
    path.write_text('{"text": "a", "domain": "\\udc00"}\n')
    assert "lone surrogate" in refused(path).message


def test_blank_documents_are_skipped_and_counted(tmp_path, write_rows):
    write_rows(tmp_path / "a.jsonl", [{"text": ""}, {"text": " \n\u3000"}, {"text": "x"}, {"text": "", "domain": "b"}])
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "c.jsonl").write_text("\n \n")
    stream = read_documents([tmp_path / "a.jsonl", tmp_path / "b.txt", tmp_path / "c.jsonl"])
    assert [document.text for document in stream] == ["x"]
    assert stream.skipped == {"a": 2, "b": 2}


# Damage ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "offset"),
    [
        (b"text\0more", 4),
        (b"ok" + bytes(range(1, 8)) * 9, 2),
        ("UTF-16".encode("utf-16"), 3),
    ],
)
@pytest.mark.parametrize("invalid_utf8", ["error", "replace"])
def test_binary_junk_names_file_and_offset(tmp_path, data, offset, invalid_utf8):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    message = refused(path, invalid_utf8=invalid_utf8).message
    assert message.startswith(f"{path} is not text")
    assert message.endswith(f"at byte offset {offset}")


def test_mostly_invalid_text_is_junk_even_where_replacing_is_allowed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"ab " + bytes(range(0xA0, 0xE0)))
    message = refused(path, invalid_utf8="replace").message
    assert message.startswith(f"{path} is not UTF-8 text")
    assert message.endswith("the first at byte offset 3")


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ('{"text": "cut off', "invalid JSON, Unterminated string starting at at column 10"),
        ("[1, 2]", "expected a JSON object, found list"),
        ('{"content": "x", "id": 1}', "no field \"text\"; fields seen: 'content', 'id'"),
        ("{}", 'no field "text"; fields seen: none'),
        ('{"text": null}', 'the field "text" holds NoneType, not a string'),
        ('{"text": "x", "domain": 3}', 'the field "domain" holds int, not a string'),
        ('{"text": "x", "n": ' + "9" * 5000 + "}", "unreadable JSON"),
        ("[" * 200_000, "unreadable JSON"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path, line, wrong):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    assert refused(path).message.startswith(f"{path}:2: {wrong}")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_damaged_compressed_files_name_the_file(tmp_path, suffix, damage):
    zstandard = pytest.importorskip("zstandard")
    text = json.dumps({"text": "".join(random.Random(1).choices("abcdefgh", k=3000))}).encode()
    good = gzip.compress(text) if suffix == ".gz" else zstandard.ZstdCompressor(write_checksum=True).compress(text)
    middle = len(good) // 2
    data = {
        "cut": good[:-5],
        "flipped": good[:middle] + bytes([good[middle] ^ 4]) + good[middle + 1 :],
        "empty": b"",
        "foreign": b"not compressed at all",
    }[damage]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(data)
    assert refused(path).message.startswith(f"{path} is damaged or cut off: ")


@pytest.mark.parametrize("keep", [0, 4, 0.5, 0.97])
def test_damaged_parquet_names_the_file(tmp_path, keep):
    path = write_parquet(tmp_path / "a.parquet", {"text": [f"document {number}" for number in range(100)]})
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))] if isinstance(keep, float) else data[:keep])
    assert refused(path).message.startswith(f"{path} is damaged or cut off: ")


def test_parquet_without_strings_to_read(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"content": ["x"]})
    assert refused(path).message == f"{path}: no column \"text\"; columns seen: 'content'"
    path = write_parquet(tmp_path / "a.parquet", {"text": [1]})
    assert refused(path).message == f'{path}: the column "text" holds int64, not strings'
    path = write_parquet(tmp_path / "a.parquet", {"text": ["x", None]})
    assert refused(path).message == f'{path}: row 2: the field "text" holds NoneType, not a string'


def test_missing_and_unreadable_paths(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no such file or folder"):
        read_documents([tmp_path / "nothing.txt"])
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(DataError, match=r"cannot read files of this kind \(\.pdf\)"):
        read_documents([tmp_path / "a.pdf"])
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot read files of this kind \(\.gz\)"):
        read_documents([tmp_path / "a.parquet.gz"])
    path = tmp_path / "a.txt"
    path.write_text("x")
    stream = read_documents([path])
    path.unlink()
    with pytest.raises(DataError, match="cannot read .*a.txt: No such file"):
        list(stream)

    def scandir(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match="cannot read the folder .*: Permission denied"):
        read_documents([tmp_path])


def test_a_corpus_without_a_document(tmp_path):
    (tmp_path / "a.txt").write_text(" ")
    (tmp_path / "b.png").write_bytes(b"")
    message = refused(tmp_path).message
    assert message == f"no document in {tmp_path}: 1 files read, 1 blank documents skipped, 1 files of other kinds ignored"
    (tmp_path / "empty").mkdir()
    assert f"no document in {tmp_path / 'empty'}: 0 files read" in refused(tmp_path / "empty").message
    assert "no document" in refused().message


def test_unknown_choice_for_invalid_utf8(tmp_path):
    with pytest.raises(ConfigError, match="invalid_utf8 = 'ignore'"):
        read_documents([tmp_path], invalid_utf8="ignore")


@pytest.mark.parametrize(("package", "name"), [("zstandard", "a.jsonl.zst"), ("pyarrow", "a.parquet")])
def test_optional_packages_are_asked_for_only_when_needed(tmp_path, monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.txt").write_text("x")
    assert texts(tmp_path / "a.txt") == ["x"]
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(MissingExtra, match=rf"needs {package}[\s\S]*dsv2\[data\]"):
        texts(tmp_path / name)


def test_torch_free_modules_stay_so():
    modules = ("documents", "shards", "packing", "prepare")
    code = "import sys;" + "".join(f"import dsv2.data.{name};" for name in modules)
    code += "print([name for name in ('torch', 'pyarrow', 'zstandard', 'transformers') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
