from pathlib import Path

import pytest

from chatbind_cli.download.requests import HubRef, is_repo_id, parse_hub_ref, requests_for
from chatbind_cli.errors import UsageError

OUT = Path("out")


@pytest.mark.parametrize(
    ("word", "ref"),
    [
        ("hf:a/b", HubRef(repo="a/b")),
        ("hf:a/b@v1", HubRef(repo="a/b", revision="v1")),
        ("hf:a/b@refs%2Fpr%2F1/x/y.bin", HubRef(repo="a/b", revision="refs/pr/1", file="x/y.bin")),
        ("hf:datasets/a/b.c/f.json", HubRef(repo="a/b.c", kind="dataset", file="f.json")),
        ("hf:models/a/b", HubRef(repo="a/b")),
    ],
)
def test_hub_words_are_read(word, ref):
    assert parse_hub_ref(word) == ref


@pytest.mark.parametrize("word", ["hf:", "hf:a", "hf:a/b/../c", "hf:../b", "hf:a/b//etc/passwd"])
def test_other_hub_words_are_refused(word):
    with pytest.raises(UsageError):
        parse_hub_ref(word)


def test_a_reference_reads_back_as_it_is_written():
    for word in ("hf:a/b", "hf:datasets/a/b@r/f.json"):
        assert str(parse_hub_ref(word)) == word


@pytest.mark.parametrize(
    ("word", "path"),
    [
        ("https://host/dir/na%20me.zip?x=1", "out/na me.zip"),
        ("hf:a/b/sub/f.bin", "out/sub/f.bin"),
        ("hf:a/b", "out/b"),
        ("imagebind-huge", "out/checkpoints/imagebind/imagebind_huge.pth"),
    ],
)
def test_words_say_where_files_go(word, path):
    assert [str(request.path) for request in requests_for([word], OUT)] == [path]


def test_an_archive_knows_what_folder_it_is_unpacked_to():
    by_name = {r.path.name: r for r in requests_for(["cc3m-595k", "coco-train2014"], OUT)}
    assert by_name["images.zip"].unpack == OUT / "data/cc3m-595k/images"
    assert by_name["train2014.zip"].unpack == OUT / "data/coco"


@pytest.mark.parametrize("word", ["https://host/", "https:///f", "https://host/%2e%2e"])
def test_a_url_without_a_safe_file_name_is_refused(word):
    with pytest.raises(UsageError):
        requests_for([word], OUT)


def test_two_sources_for_one_file_are_refused_and_one_source_twice_is_one():
    with pytest.raises(UsageError, match="would both become"):
        requests_for(["https://a/f.bin", "https://b/f.bin"], OUT)
    assert len(requests_for(["https://a/f.bin", "https://a/f.bin"], OUT)) == 1


def test_a_name_nobody_knows_brings_the_nearest():
    with pytest.raises(UsageError, match="did you mean vicuna-7b"):
        requests_for(["vicuna7b"], OUT)


def test_repository_ids_are_told_from_paths():
    assert is_repo_id("dreamerlin/chatbind-7b-delta")
    for word in ("./a/b", "/a/b", "a/b/c", "a", "../a"):
        assert not is_repo_id(word)


def test_a_url_may_say_what_hash_it_is_to_have(tmp_path):
    digest = "AB" * 32
    (request,) = requests_for([f"https://h/f.bin#sha256={digest}"], tmp_path)
    assert (request.url, request.checksum) == ("https://h/f.bin", ("sha256", digest.lower()))
    with pytest.raises(UsageError, match="is no SHA-256"):
        requests_for(["https://h/f.bin#sha256=ab"], tmp_path)
    (request,) = requests_for(["https://h/f.bin#top"], tmp_path)
    assert request.checksum is None


def test_patterns_choose_files_of_repositories_alone(tmp_path):
    words = ["hf:owner/name", "vicuna-7b"]
    named, entry = requests_for(words, tmp_path, include=["*.json"])
    assert named.include == ("*.json",)
    assert entry.include == ()
    with pytest.raises(UsageError, match="none is named"):
        requests_for(["vicuna-7b"], tmp_path, include=["*.json"])
    with pytest.raises(UsageError, match="nothing to --unpack"):
        requests_for(["https://h/f.bin"], tmp_path, unpack=True)


@pytest.mark.parametrize(
    "word",
    [
        "http://[::1",
        "http://h:99999/x",
        "http://h:0/x",
        "http://h:\u00b2/x",
        "http://",
        "https:///x",
        "http://user@/x",
        "http://h/a\nb",
        "http://h/\udcff",
    ],
)
def test_what_is_no_url_is_a_usage_error_of_one_line(word: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        requests_for([word], tmp_path)
    assert "\n" not in str(error.value)
    str(error.value).encode()
