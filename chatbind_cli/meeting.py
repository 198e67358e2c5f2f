"""The parents of one launch, on several machines, find each other before anything heavy begins.

Each connects to the first, which answers when all are there, or names those that are missing. The
connections stay: by them everybody hears at once of a worker that failed elsewhere, and of a
machine that is gone, for which collective operations would wait for hours. The port is free again
after the meeting, so that the workers can meet there.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from chatbind_cli.errors import ChatBindError, LaunchError, UsageError
from chatbind_cli.hardware import interface_of
from chatbind_cli.numerals import whole_number

PATIENCE = "CHATBIND_MEETING_SECONDS"
_PATIENCE_S = 30
_RETRY_S = 0.2
_HELLO_S = 5.0
"""How long one that has connected may take to say who it is."""
_NAMED = 8

Word = dict[str, Any]


@dataclass(frozen=True)
class Member:
    """One of the parents.

    Attributes:
        rank: its number among them; 0 is where they meet.
        members: how many they are.
        host: its machine's name.
        first: the number of its first worker among all.
        processes: how many workers there are in all.
        step: what SLURM calls the launch; parents of another are not let in.
        kind: what messages call one: a machine, or a process where it has one worker alone.
    """

    rank: int
    members: int
    host: str
    first: int
    processes: int
    step: str = ""
    kind: str = "machine"

    @property
    def name(self) -> str:
        """How messages name it."""
        return f"{self.kind} {self.rank} on {self.host}"


class Meeting:
    """What has been a meeting, and is now a way to hear of each other.

    Args:
        me: this parent.
        peers: the others: all of them for the first, the first for all others.
        lines: the connections to them.

    Attributes:
        first_knows: the first parent is another one, and has heard what there is to say.
    """

    def __init__(self, me: Member, lines: Mapping[int, _Line], peers: Sequence[Member]) -> None:
        self._lines = dict(lines)
        self._peers = {peer.rank: peer for peer in peers}
        self._known: set[int] = set()
        self.first_knows = me.rank != 0
        addresses = [line.address for line in lines.values()]
        self._address = next((a for a in addresses if not _loops(a)), None)

    @property
    def interface(self) -> str | None:
        """The network interface by which this machine and the others reach each other.

        What gloo takes by itself is that of the host's name, which may be the loopback.
        """
        return self._address and interface_of(self._address)

    def exchange(self, failures: Sequence[Word]) -> list[Word]:
        """Tells the others how workers here have failed, and returns what they tell."""
        heard: list[Word] = []
        for rank, line in list(self._lines.items()):
            words = line.hear()
            over = any("over" in word for word in words)
            heard += [word for word in words if "rank" in word]
            if line.ended and not over:
                heard.append(_lost(self._peers[rank]))
            if line.ended or over:
                self._lines.pop(rank).close()
                # where it has left well, it knows of nothing that failed after it
                self.first_knows &= over and bool(heard or self._known)
        heard = [word for word in heard if word["rank"] not in self._known]
        new = [word for word in failures if word["rank"] not in self._known]
        for word in [*heard, *new]:
            self._known.add(word["rank"])
            for line in self._lines.values():
                line.say(word)
        return heard

    def leave(self, failure: Word | None = None) -> None:
        """Says goodbye, or of what this parent has died."""
        self.exchange([failure] if failure else [])
        for line in self._lines.values():
            line.say({"over": True})
        self.close()

    def close(self) -> None:
        """Ends the connections, without a word."""
        for line in self._lines.values():
            line.close()
        self._lines.clear()


def _lost(member: Member) -> Word:
    text = f"lost {member.name}: the connection to it has ended"
    return {"rank": member.first, "exit_code": 1, "message": text, "killed": True}


def patience_s() -> int:
    """How long to wait for others of a launch, in seconds."""
    return whole_number(os.environ.get(PATIENCE, "")) or _PATIENCE_S


def meet(me: Member, address: str, port: int, hosts: Sequence[str] = ()) -> Meeting:
    """Waits for the others.

    Args:
        me: this parent.
        address: of the first one.
        port: where that one listens.
        hosts: the names of all machines, where they are known.

    Raises:
        LaunchError: somebody did not come in time.
        UsageError: they were not started alike.
    """
    seconds = patience_s()
    until = time.monotonic() + seconds
    if me.rank == 0:
        return _receive(me, port, hosts, until, seconds)
    return _visit(me, address, port, until, seconds)


def _receive(me: Member, port: int, hosts: Sequence[str], until: float, seconds: int) -> Meeting:
    lines: dict[int, _Line] = {}
    peers: dict[int, Member] = {}
    try:
        with _listener(port, me.members) as listener:
            while len(lines) < me.members - 1:
                listener.settimeout(max(0.01, until - time.monotonic()))
                line = _Line(listener.accept()[0])
                peer = _introduced(line, until)
                if peer is None or peer.step != me.step or peer.rank in {0, *lines}:
                    line.close()
                    continue
                lines[peer.rank], peers[peer.rank] = line, peer
        refused = _unlike(me, peers.values())
    except TimeoutError:
        refused = _not_met(f"{_missing(me, peers, hosts)} did not answer within {seconds} s")
    except OSError as error:
        refused = LaunchError(
            f"port {port} of {me.host} cannot be listened at ({error.strerror})",
            hint="name another with --main-address HOST:PORT",
        )
    for line in lines.values():
        line.say({"met": asdict(me)} if refused is None else {"refused": str(refused)})
        if refused is not None:
            line.close()
    if refused is not None:
        raise refused
    return Meeting(me, lines, list(peers.values()))


def _unlike(me: Member, peers: Iterable[Member]) -> ChatBindError | None:
    """The refusal of those that were not started like this one."""
    for peer in peers:
        if _shape(peer) != _shape(me):
            text = f"{peer.name} works with {_shape(peer)}, and {me.name} with {_shape(me)}"
            return UsageError(text, hint="say --num-processes and --num-machines alike on each")
    return None


def _introduced(line: _Line, until: float) -> Member | None:
    hello = line.wait(min(time.monotonic() + _HELLO_S, until))
    try:
        return Member(**(hello or {}))
    except TypeError:  # a stranger
        return None


def _visit(me: Member, address: str, port: int, until: float, seconds: int) -> Meeting:
    cause = "no answer"
    while time.monotonic() < until:
        try:
            connection = socket.create_connection((address, port), timeout=_HELLO_S)
        except OSError as error:
            cause = error.strerror or str(error)
            time.sleep(_RETRY_S)
            continue
        line = _Line(connection)
        line.say(asdict(me))
        # the first one began to wait later than this one, perhaps, and has the last word
        answer = line.wait(time.monotonic() + seconds + _HELLO_S) or {}
        if "met" in answer:
            return Meeting(me, {0: line}, [Member(**answer["met"])])
        line.close()
        if "refused" in answer:
            raise LaunchError(answer["refused"])
        time.sleep(_RETRY_S)
    raise _not_met(f"{me.kind} 0 does not answer at {address}:{port} within {seconds} s ({cause})")


def _not_met(text: str) -> LaunchError:
    return LaunchError(
        text,
        hint=f"does the command run there, and is the port open? {PATIENCE} says how long to wait",
    )


def _missing(me: Member, peers: Mapping[int, Member], hosts: Sequence[str]) -> str:
    ranks = [rank for rank in range(1, me.members) if rank not in peers]
    known = len(hosts) == me.members
    names = [f"{rank} ({hosts[rank]})" if known else str(rank) for rank in ranks]
    plural = {"process": "processes", "machine": "machines"}
    text = f"{me.kind if len(ranks) == 1 else plural[me.kind]} {_some(names)}"
    silent = [host for host in hosts if host not in {me.host, *(p.host for p in peers.values())}]
    return text if known or not silent else f"{text} (nobody on {_some(silent)})"


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join([*names[:_NAMED], *([f"and {more} more"] if more > 0 else [])])


def _shape(member: Member) -> str:
    return f"{member.processes} processes on {member.members} machines"


def _listener(port: int, backlog: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(
                ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog
            )
    return socket.create_server(("", port), backlog=backlog)


def _loops(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


class _Line:
    """A connection that carries a JSON object a line.

    Attributes:
        ended: the other side is gone.
        address: of this side.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._text = b""
        self._words: deque[Word] = deque()
        self.ended = False
        self.address = str(connection.getsockname()[0]).removeprefix("::ffff:")
        # a machine without power says nothing: after two minutes it counts as gone
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def say(self, word: Word) -> None:
        """Sends; that the other side is gone shows when listening."""
        with suppress(OSError):
            self._connection.settimeout(_HELLO_S)
            self._connection.sendall(json.dumps(word).encode() + b"\n")

    def wait(self, until: float) -> Word | None:
        """The next word, None if none comes in time or at all."""
        while not self._words and not self.ended and time.monotonic() < until:
            self._read(max(0.01, until - time.monotonic()))
        return self._words.popleft() if self._words else None

    def hear(self) -> list[Word]:
        """What has come in since."""
        self._read(0)
        words = list(self._words)
        self._words.clear()
        return words

    def _read(self, seconds: float) -> None:
        data = b""
        try:
            self._connection.settimeout(seconds)
            data = self._connection.recv(1 << 16)
            self.ended = not data
        except (BlockingIOError, TimeoutError):
            pass  # nothing has come in yet
        except OSError:
            self.ended = True
        *lines, self._text = (self._text + data).split(b"\n")
        for line in lines:
            with suppress(ValueError):  # a stranger's
                word = json.loads(line)
                if isinstance(word, dict):
                    self._words.append(word)

    def close(self) -> None:
        """Ends it; what was said still arrives."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
        self._connection.close()
