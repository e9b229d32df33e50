"""Bytes as text, or refused with what to do."""

import gzip
import io
import zipfile

import pytest

from lmpress.corpora import check_corpus, load_corpus
from lmpress.errors import RequestError

TEXT = "First line\n\n  naïve — 日本 😀\n\n"


def _write(path, content):
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode(),
        TEXT.replace("\n", "\r\n", 1).replace("\n\n", "\n\r").encode(),
        TEXT[:11].encode("utf-8-sig") + TEXT[11:].encode("utf-8-sig"),
    ],
)
def test_marks_and_line_ends_are_no_part_of_the_text(tmp_path, content):
    assert load_corpus(_write(tmp_path / "a.txt", content)).documents == (TEXT,)


def _zipped():
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("a.txt", TEXT)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "way_out"),
    [
        ("a.jsonl.gz", gzip.compress(TEXT.encode()), "unpack it first"),
        ("a.txt", gzip.compress(TEXT.encode()), "unpack it first"),
        ("a.zip", _zipped(), "unpack it first"),
        ("a.docx", _zipped(), "plain text file"),
        ("a.xlsx", _zipped(), "as CSV"),
        ("a.pdf", b"%PDF-1.7\n", "plain text file"),
        ("a", b"%PDF-1.7\n", "plain text file"),
        ("a.parquet", b"PAR1\0\0", "JSON lines"),
        ("a.txt", b"PAR1\0\0", "JSON lines"),
        ("a.html", b"<html><p>Rain.</p>", "markup"),
        ("a.yaml", b"- text: Rain.\n", "JSON lines"),
        ("a.safetensors", b"\x10\0\0\0\0\0\0\0{}", "name a file of text"),
    ],
)
def test_what_is_no_text_is_refused_before_anything_else(tmp_path, name, content, way_out):
    for look in (check_corpus, load_corpus):
        with pytest.raises(RequestError, match=rf"{name} is no text: .*{way_out}"):
            look(_write(tmp_path / name, content))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b" \n\t\r\n", "is empty"),
        (b"\xef\xbb\xbf\n", "is empty"),
        (b"abc\xff\xfe", r"not UTF-8 text \(byte 3\): convert it"),
        (b"\xef\xbb\xbfna\xefve", r"not UTF-8 text \(byte 5\)"),
        (b"\xff\xfea\0\0", r"not UTF-16 text \(byte 4\)"),
        ("naïve\0".encode(), r"null character \(byte 6\)"),
        ("Rain.".encode("utf-16-le"), r"null character \(byte 1\): .*UTF-16"),
    ],
)
def test_the_place_of_what_cannot_be_read_is_told(tmp_path, content, reason):
    with pytest.raises(RequestError, match=reason):
        load_corpus(_write(tmp_path / "a.txt", content))


def test_a_missing_file_and_a_directory_are_refused(tmp_path):
    for look in (check_corpus, load_corpus):
        with pytest.raises(RequestError, match=r"gone\.txt': No such file"):
            look(f"file:{tmp_path}/gone.txt")
        with pytest.raises(RequestError, match="Is a directory: name the files in it"):
            look(str(tmp_path))
