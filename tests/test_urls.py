"""URLs are checked before they are used, and shown without what they keep secret."""

import pytest

from chatbind_cli.errors import UsageError
from chatbind_cli.urls import check_url, public_url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:pass@host:8/p?page=2", "https://host:8/p?page=2"),
        (
            "https://host/p?X-Amz-Signature=abc&id=a%20b",
            "https://host/p?X-Amz-Signature=...&id=a%20b",
        ),
        ("https://host/p?api_key=abc&empty=#part", "https://host/p?api_key=...&empty="),
        ("https://host/p?q=a+b", "https://host/p?q=a+b"),
    ],
)
def test_what_is_secret_in_a_url_is_left_out(url, shown):
    assert public_url(url) == shown


@pytest.mark.parametrize(
    "url",
    ["https://", "http:///path", "https://host:99999/", "https://ho\x1bst/", "https://h/\udc80"],
)
def test_what_is_no_url_is_said_without_its_password(url):
    with pytest.raises(UsageError, match="is no URL"):
        check_url(url)
    with pytest.raises(UsageError) as error:
        check_url("https://user:pass@:80")
    assert "pass" not in str(error.value)
    check_url("https://host:80/path")
