"""The parents of a launch: how they find each other, and hear of what happens elsewhere."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import replace

import pytest

from chatbind_cli import meeting
from chatbind_cli.errors import LaunchError, UsageError
from chatbind_cli.meeting import Member, meet

FIRST = Member(rank=0, members=3, host="node01", first=0, processes=6, step="7.0")
OTHERS = [replace(FIRST, rank=n, host=f"node{n + 1:02}", first=2 * n) for n in (1, 2)]
HOSTS = ("node01", "node02", "node03")


@pytest.fixture
def port():
    with socket.create_server(("", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture
def come(port, monkeypatch):
    """Lets members come at the same time; returns what each gets, by rank."""
    monkeypatch.setenv(meeting.PATIENCE, "1")
    met = []

    def together(*members):
        got = {}

        def enter(member):
            try:
                got[member.rank] = meet(member, "localhost", port, HOSTS)
                met.append(got[member.rank])
            except (LaunchError, UsageError) as error:
                got[member.rank] = error

        threads = [threading.Thread(target=enter, args=(member,)) for member in members]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        return got

    yield together
    for one in met:
        one.leave()


def heard(one, count=1):
    words = []
    for _ in range(20):
        words += one.exchange([])
        if len(words) >= count:
            break
        time.sleep(0.01)
    return words


def test_what_one_tells_all_others_hear_once(come):
    got = come(*OTHERS, FIRST)
    failure = {"rank": 5, "exit_code": 1, "message": "no"}
    assert got[2].exchange([failure]) == []
    assert heard(got[0]) == heard(got[1]) == [failure]
    assert got[2].exchange([failure]) == got[0].exchange([failure]) == got[2].exchange([]) == []


def test_one_that_leaves_is_not_missed_and_one_that_is_gone_is(come):
    got = come(FIRST, *OTHERS)
    got[1].leave()
    assert heard(got[0]) == []
    got[2].close()  # as when its process dies
    (lost,) = heard(got[0])
    assert lost["rank"] == 4
    assert lost["message"] == "lost machine 2 on node03: the connection to it has ended"
    assert lost["killed"]


def test_the_last_words_of_one_that_fails_are_heard(come):
    got = come(FIRST, *OTHERS)
    failure = {"rank": 2, "exit_code": 2, "message": "chatbind: error: no such file"}
    got[1].leave(failure)
    assert heard(got[0]) == heard(got[2]) == [failure]


@pytest.mark.parametrize(
    ("failed", "left", "knows"),
    [(False, True, False), (True, True, True), (False, False, False), (None, None, True)],
)
def test_the_first_one_speaks_for_the_others_as_long_as_it_knows(come, failed, left, knows):
    got = come(FIRST, *OTHERS)
    if left:
        got[0].leave({"rank": 0, "exit_code": 1, "message": "no"} if failed else None)
    elif left is False:
        got[0].close()
    heard(got[1])
    assert got[1].first_knows is knows
    assert got[0].first_knows is False


def test_the_port_is_free_after_the_meeting(come, port):
    come(FIRST, *OTHERS)
    with socket.create_server(("", port)):
        pass


def test_who_does_not_come_is_named_to_all(come):
    got = come(FIRST, OTHERS[1])
    assert "machine 1 (node02) did not answer within 1 s" in str(got[0])
    assert "machine 1 (node02) did not answer within 1 s" in str(got[2])


def test_a_first_one_that_does_not_come_is_named(come, port):
    got = come(OTHERS[0])
    assert f"machine 0 does not answer at localhost:{port} within 1 s" in str(got[1])
    assert "refused" in str(got[1])  # the system's own words


def test_tasks_that_do_not_come_are_named_by_their_machine(come):
    each = replace(FIRST, members=6, kind="process")
    tasks = [replace(each, rank=n, first=n, host=HOSTS[n // 2]) for n in (0, 1, 2, 4)]
    message = str(come(*tasks)[0])
    assert "processes 3, 5 did not answer" in message
    tasks = [replace(each, rank=n, members=4, first=n) for n in (0, 1)]
    assert "processes 2, 3 (nobody on node02, node03) did not" in str(come(*tasks)[0])


def test_strangers_do_not_take_part(come, port):
    def knock():
        for said in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"rank": 1}\n'):
            with socket.create_connection(("localhost", port)) as stranger:
                stranger.sendall(said)

    waiting = threading.Timer(0.2, knock)
    waiting.start()
    got = come(FIRST, OTHERS[0], replace(OTHERS[1], step="8.0"))
    assert "machine 2 (node03) did not answer" in str(got[0])
    assert isinstance(got[2], LaunchError)


def test_machines_with_other_numbers_of_processes_are_refused(come):
    got = come(FIRST, OTHERS[0], replace(OTHERS[1], processes=9))
    assert "machine 2 on node03 works with 9 processes on 3 machines, and machine 0" in str(got[0])
    assert "works with 9 processes" in str(got[1])
