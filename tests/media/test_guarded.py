"""What a server reads for strangers: public addresses, files below its root, and nothing else.

Real servers listen on two addresses of this machine. One plays the public internet: the rule that
says what is public is a value, and so is DNS.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import which
from typing import Any

import pytest

from chatbind_cli.errors import MediaError
from chatbind_cli.media.fetch import Limits
from chatbind_cli.media.public import Address, is_public
from chatbind_cli.media.root import MediaRoot
from chatbind_cli.media.source import open_source

PUBLIC, PRIVATE = "127.0.0.2", "127.0.0.1"
REFUSED = "is at no public address"


class Handler(BaseHTTPRequestHandler):
    """`/to/URL` redirects there; anything else says what it was asked as."""

    def do_GET(self) -> None:
        server: Any = self.server
        server.asked.append(self.path)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        if self.path == "/slow":
            time.sleep(1)
        body = b"x" * 2000 if self.path == "/long" else self.headers["Host"].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Attributes: asked: the paths that were asked for."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(address, Handler)
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *args: object) -> None:
        pass

    def end(self) -> None:
        self.shutdown()
        self.server_close()


@pytest.fixture
def servers() -> Iterator[tuple[Server, Server]]:
    """One at the address that counts as public, and one at another, on the same port."""
    while True:
        public = Server((PUBLIC, 0))
        try:
            private = Server((PRIVATE, public.server_port))
            break
        except OSError:  # somebody has it there
            public.end()
    yield public, private
    public.end()
    private.end()


class Dns:
    """Says in turn what is planned for a name; then the last again.

    Attributes:
        asked: the names that it was asked for.
    """

    def __init__(self, **plan: list[list[str]]) -> None:
        self.plan = {name.replace("_", "."): list(says) for name, says in plan.items()}
        self.asked: list[str] = []

    async def resolve(self, host: str) -> list[str]:
        self.asked.append(host)
        says = self.plan.get(host)
        if says is None:
            return [host]
        return list(says.pop(0) if len(says) > 1 else says[0])


def is_ours(address: Address) -> bool:
    return str(address) == PUBLIC


def limits(dns: Dns, seconds: float = 2.0) -> Limits:
    return Limits(1000, seconds, is_ours, dns.resolve)


def fetched(url: str, limits: Limits) -> bytes | None:
    return open_source(url, limits=limits).data


def test_the_connection_goes_to_the_address_that_was_checked(
    servers: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    public, private = servers
    port = public.server_port
    # a proxy would connect to whatever it likes
    monkeypatch.setenv("http_proxy", f"http://{PRIVATE}:{port}")
    dns = Dns(rebinds_example=[[PUBLIC], [PRIVATE]])
    url = f"http://rebinds.example:{port}/a"
    assert fetched(url, limits(dns)) == f"rebinds.example:{port}".encode()
    assert dns.asked == ["rebinds.example"]
    with pytest.raises(MediaError, match=REFUSED):
        fetched(url, limits(dns))
    assert private.asked == []


def test_redirects_are_asked_of_dns_and_checked_again(servers: tuple[Server, Server]) -> None:
    public, private = servers
    port = public.server_port
    dns = Dns(
        rebinds_example=[[PUBLIC], [PRIVATE]],
        good_example=[[PUBLIC]],
        inside_example=[[PRIVATE]],
    )
    good = f"http://good.example:{port}"
    assert fetched(f"{good}/to/{good}/end", limits(dns)) == f"good.example:{port}".encode()
    for target in (
        f"http://{PRIVATE}:{port}/",
        f"http://localhost:{port}/",
        f"http://inside.example:{port}/",
        f"http://2130706433:{port}/",
        f"http://[::ffff:{PRIVATE}]:{port}/",
        f"//{PRIVATE}:{port}/",
    ):
        with pytest.raises(MediaError, match=f"{REFUSED}|cannot be fetched"):
            fetched(f"{good}/to/{target}", limits(dns))
    with pytest.raises(MediaError, match=REFUSED):  # the same name, a moment later
        fetched(f"http://rebinds.example:{port}/to//end", limits(dns))
    assert private.asked == []


def test_one_address_that_is_not_public_refuses_its_host(servers: tuple[Server, Server]) -> None:
    public, private = servers
    port = public.server_port
    for both in ([PUBLIC, PRIVATE], [PRIVATE, PUBLIC], [PUBLIC, "::1"], []):
        with pytest.raises(MediaError, match=REFUSED) as caught:
            fetched(f"http://a.example:{port}/", limits(Dns(a_example=[both])))
        assert PRIVATE not in str(caught.value)  # what names mean inside is not told
    assert private.asked == [] and public.asked == []


def test_the_next_address_is_tried_where_nobody_listens(servers: tuple[Server, Server]) -> None:
    port = servers[0].server_port
    rule = replace(
        limits(Dns(a_example=[["127.0.0.3", PUBLIC]])),
        allowed=lambda address: str(address) != PRIVATE,
    )
    assert fetched(f"http://a.example:{port}/", rule) == f"a.example:{port}".encode()
    nobody = replace(rule, resolve=Dns(a_example=[["127.0.0.3", "127.0.0.4"]]).resolve)
    with pytest.raises(MediaError, match="cannot be fetched"):
        fetched(f"http://a.example:{port}/", nobody)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "0",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[64:ff9b::7f00:1]",
        "example.org@127.0.0.1",
        "example.org:80@127.0.0.1",
        "127.0.0.1#@example.org",
        "127.0.0.1%2f@example.org@127.0.0.1",
        "\u2460\u2461\u2466.\uff10.\uff10.\u2460",
        "",
    ],
)
def test_no_spelling_of_this_machine_is_public(servers: tuple[Server, Server], host: str) -> None:
    """With the rule and the DNS of a real server."""
    _, private = servers
    root = MediaRoot.guarded(None, remote=True, most_bytes=1000, seconds=2.0)
    suffix = "" if "#" in host else f":{private.server_port}"
    with pytest.raises(MediaError) as caught:
        root.open(f"http://{host}{suffix}/secret")
    assert "\n" not in str(caught.value)
    assert private.asked == []


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("64:ff9b::808:808", True),
        ("::ffff:8.8.8.8", True),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("100.100.100.200", False),
        ("127.0.0.1", False),
        ("168.63.129.16", False),
        ("169.254.169.254", False),
        ("172.31.0.1", False),
        ("192.0.0.192", False),
        ("192.0.2.1", False),
        ("192.168.1.1", False),
        ("198.18.0.1", False),
        ("224.0.0.1", False),
        ("239.255.255.250", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::7f00:1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:0:127.0.0.1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b:1::808:808", False),
        ("100::1", False),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", False),
        ("2001:db8::1", False),
        ("2002:7f00:1::", False),
        ("2002:a9fe:a9fe::1", False),
        ("fc00::1", False),
        ("fd00:ec2::254", False),
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("2606:4700:4700::1111%eth0", False),
    ],
)
def test_what_is_public(text: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(text)) is public


def test_a_body_and_its_time_are_bounded(servers: tuple[Server, Server]) -> None:
    port = servers[0].server_port
    dns = Dns(a_example=[[PUBLIC]])
    with pytest.raises(MediaError, match="larger"):
        fetched(f"http://a.example:{port}/long", limits(dns))
    began = time.monotonic()
    with pytest.raises(MediaError, match=r"after 0\.2 s"):
        fetched(f"http://a.example:{port}/slow", limits(dns, 0.2))
    assert time.monotonic() - began < 0.9
    with pytest.raises(MediaError, match="larger"):
        fetched("data:;base64," + "A" * 2000, limits(dns))


def test_the_time_holds_while_dns_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: done.wait(5) and [])
    began = time.monotonic()
    with pytest.raises(MediaError, match=r"after 0\.2 s"):
        fetched("http://a.example/", Limits(seconds=0.2, allowed=is_public))
    assert time.monotonic() - began < 2
    done.set()


def test_an_address_of_version_six_is_connected_to(servers: tuple[Server, Server]) -> None:
    class Six(Server):
        address_family = socket.AF_INET6

    try:
        six = Six(("::1", 0))
    except OSError:
        pytest.skip("needs IPv6")
    port = six.server_port
    rule = replace(limits(Dns(six_example=[["::1"]])), allowed=lambda a: str(a) == "::1")
    try:
        assert fetched(f"http://six.example:{port}/", rule) == f"six.example:{port}".encode()
    finally:
        six.end()


def test_the_certificate_is_that_of_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if which("openssl") is None:
        pytest.skip("needs openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "1", "-subj", "/CN=good.example"),
            *("-addext", "subjectAltName=DNS:good.example", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    names: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.sni_callback = lambda socket, name, context: names.append(name)
    server = Server((PUBLIC, 0))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    rule = limits(Dns(good_example=[[PUBLIC]], bad_example=[[PUBLIC]]))
    try:
        port = server.server_port
        good = fetched(f"https://good.example:{port}/", rule)
        assert good == f"good.example:{port}".encode()
        with pytest.raises(MediaError, match="cannot be fetched"):
            fetched(f"https://bad.example:{port}/", rule)
        with pytest.raises(MediaError, match="cannot be fetched"):
            fetched(f"https://{PUBLIC}:{port}/", rule)
    finally:
        server.end()
    assert names[:2] == ["good.example", "bad.example"]


def guarded(folder: Path | None, *, remote: bool = False) -> MediaRoot:
    return MediaRoot.guarded(folder, remote=remote, most_bytes=1000, seconds=1.0)


def test_without_a_root_no_file_is_read_and_without_leave_no_address(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    for name in ("a.png", str(tmp_path / "a.png"), f"file://{tmp_path}/a.png", "-", "/dev/zero"):
        with pytest.raises(MediaError, match="files are not read here"):
            guarded(None).open(name)
        with pytest.raises(MediaError, match="files are not read here"):
            guarded(None).open(Path(name))
    for name in ("http://8.8.8.8/", "HTTPS://8.8.8.8/"):
        with pytest.raises(MediaError, match="addresses are not read here"):
            guarded(tmp_path).open(name)
    for name in ("ftp://8.8.8.8/x", "gopher://8.8.8.8/x"):
        with pytest.raises(MediaError):
            guarded(tmp_path).open(name)
    assert guarded(None).open("data:,x").data == b"x"
    assert guarded(None).open(b"x").data == b"x"


def test_files_are_read_inside_the_root_alone_which_nobody_hears_of(tmp_path: Path) -> None:
    root = tmp_path / "secret-place" / "media"
    (root / "a b").mkdir(parents=True)
    (root / "a b" / "c.png").write_bytes(b"x")
    (root / "empty.png").touch()
    outside = tmp_path / "outside.png"
    outside.write_bytes(b"x")
    (root / "link.png").symlink_to(outside)
    for name in (
        "a b/c.png",
        f"file://{root}/a%20b/c.png",
        f"FILE:{root}/a%20b/c.png",
        "file:a b/c.png",
    ):
        source = guarded(root).open(name)
        assert source.path == root / "a b" / "c.png" and source.ref == name
    for name in (
        str(outside),
        "../outside.png",
        "link.png",
        "missing.png",
        "empty.png",
        "a b",
        "\0",
        f"file://{outside}",
        f"file://{root}/../../outside.png",
        f"file://{root}/%2e%2e/%2e%2e/outside.png",
        "file:///etc/passwd",
        "file://localhost/etc/passwd",
        "file://[",
        "file:",
        str(root / "a b" / "c.png"),
    ):
        with pytest.raises(MediaError) as caught:
            guarded(root).open(name)
        assert "secret-place" in name or "secret-place" not in str(caught.value)


def test_nobody_else_is_refused_anything(servers: tuple[Server, Server]) -> None:
    port = servers[0].server_port
    assert MediaRoot().open(f"http://{PRIVATE}:{port}/").data == f"{PRIVATE}:{port}".encode()


def test_a_name_that_does_not_resolve_is_one_line() -> None:
    async def nowhere(host: str) -> list[str]:
        raise socket.gaierror(-2, "Name or service not known")

    with pytest.raises(MediaError, match="Name or service not known") as caught:
        fetched("http://a.example/", Limits(allowed=is_public, resolve=nowhere))
    assert "\n" not in str(caught.value)
