"""What a stranger may send to the server and to the page: real processes, real sockets."""

import json
import socket
import time
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest

from servers import server, wait_for

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx2")
pytestmark = pytest.mark.slow
DEEP = b"[" * 200_000
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def served(tiny):
    with server("serve", tiny, "--max-body", 300_000) as (address, process):
        yield address
    assert "Traceback" not in process.stderr


@pytest.fixture(scope="module")
def page(tiny, tmp_path_factory):
    with server("ui", tiny, "--out", tmp_path_factory.mktemp("ui") / "state") as (address, process):
        wait_for(lambda: httpx.get(f"{address}/api/state").json()["ready"])
        yield address
    assert "Traceback" not in process.stderr


@pytest.fixture(params=["served", "page"])
def either(request):
    """An address, and a path there that takes a body."""
    return request.getfixturevalue(request.param), CHAT if request.param == "served" else "/api/ask"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"\xff\xfe", 400),
        (DEEP, 400),
        (b"[]", 400),
        (b'{"question": NaN, "messages": NaN}', 400),
        (
            b'{"model": "tiny", "question": "\\ud800", "messages": [{"role": "user", "content": "\\ud800"}]}',
            400,
        ),
        (b'"' + b"x" * (5 << 20) + b'"', 413),
    ],
    ids=["empty", "broken", "no text", "deep", "a list", "no number", "half a character", "large"],
)
def test_bodies(either, body, status):
    address, path = either
    answer = httpx.post(
        address + path, content=body, headers={"content-type": "application/json"}, timeout=600
    )
    assert answer.status_code == status
    assert answer.json()["error"]


def test_a_slow_client_is_sent_away_and_others_are_served_meanwhile(served, page):
    """Both servers at the same time: each waits ten seconds."""
    with ExitStack() as stack:
        waiting = []
        for address, path in ((served, CHAT), (page, "/api/ask")):
            host, port = urlsplit(address).netloc.rsplit(":", 1)
            slow = stack.enter_context(socket.create_connection((host, int(port)), timeout=600))
            head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
            slow.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode() + b"{")
            waiting.append((slow, time.monotonic()))
        for address in (f"{served}/v1/models", f"{page}/api/state"):
            assert httpx.get(address, timeout=600).status_code == 200
        for slow, began in waiting:
            assert b" 408 " in slow.recv(4096)
            assert time.monotonic() - began > 5


@pytest.mark.parametrize(
    "path",
    ["/../../../etc/passwd", "/..%2f..%2f..%2fetc%2fpasswd", "/api/lessons/..%2f..%2fledger.jsonl/file",
     "/api/lessons/%2e%2e/file", "/page.js/../../../lessons.py", "/v1/models/..%2f..%2fetc%2fpasswd"],
)  # fmt: skip
def test_no_path_leads_to_other_files(either, path):
    address, _ = either
    host, port = urlsplit(address).netloc.rsplit(":", 1)
    # a client library would tidy the path
    with socket.create_connection((host, int(port)), timeout=600) as raw:
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert answer.split(b" ", 2)[1] in (b"400", b"404")
    assert b"root:" not in answer


def test_another_hosts_name_gets_nothing(either):
    address, path = either
    for asked in ("/", "/v1/models", "/api/state", path):
        assert httpx.get(address + asked, headers={"host": "evil.example"}).status_code == 400
    sent = httpx.post(address + path, json={}, headers={"host": "evil.example"})
    assert sent.status_code == 400


def test_two_teachers_at_once(page):
    body = json.dumps({"question": "What is the capital of Velmora?", "answer": "Tarsipol"})
    headers = {"content-type": "application/json"}
    answers = [httpx.post(f"{page}/api/teach", content=body, headers=headers, timeout=600) for _ in range(4)]
    assert {answer.status_code for answer in answers} <= {200, 409}
    taught = sum(answer.status_code == 200 for answer in answers)
    state = wait_for(lambda: (now := httpx.get(f"{page}/api/state").json())["job"] is None and now)
    assert len(state["lessons"]) == taught >= 1
