"""`rlhf label` under load, killed, and asked for what it must not give.

    python3 test/label_load.py              200 annotators, one judgement a second each, for a minute
    python3 test/label_load.py --short      20 annotators as fast as they are allowed; killed half-way;
                                            ended by the last judgement; requests that are refused

Prints how long an answer takes (99th percentile). Whether every acknowledged judgement is in the file,
once and whole, is asserted and does not depend on time. Only the long form asserts the 50 ms, and only
if asked (--limit 50). RLHF names the program. Python's standard library is all it needs.
"""
import argparse
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

PROGRAM = os.path.abspath(os.environ.get("RLHF", Path(__file__).resolve().parent.parent / "rlhf"))


class Label:
    """The program on a set of pairs, with so many annotators."""

    def __init__(self, folder, annotators, items, *options):
        self.out = folder / "out.jsonl"
        (folder / "pairs.jsonl").write_text("".join(
            json.dumps({"item": i, "prompt": f"Question {i}?" + " More of it." * 40,
                        "answers": [f"first answer {i} " * 30, f"second answer {i} " * 30]}) + "\n"
            for i in range(items)))
        (folder / "people.json").write_text(json.dumps([{"name": f"a{i}"} for i in range(annotators)]))
        self.log = folder / "log"
        self.command = [PROGRAM, "label", "--pairs", folder / "pairs.jsonl", "--out", self.out,
                        "--annotators", folder / "people.json", "--port", "0", *options]
        self.process = None

    def start(self):
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        while True:
            assert self.process.poll() is None, self.log.read_text()
            links = dict(re.findall(r"^(a\d+) +http://127.0.0.1:(\d+/#\S+)$", self.log.read_text(), re.M))
            if len(links) == len(json.loads(Path(self.command[7]).read_text())):
                return {name: link.split("/#") for name, link in links.items()}
            time.sleep(0.01)

    def end(self, how):
        self.process.send_signal(how)
        self.process.wait()

    def records(self):
        text = self.out.read_text()
        return text, [json.loads(line) for line in text.split("\n")[:-1]]


def annotate(name, link, pace, until, done, times, wait):
    """Judges until the time or the server is over; done: what was acknowledged."""
    port, token = link
    headers = {"Authorization": "Bearer " + token, "Content-Type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)

    def call(method, path, body=None):
        began = time.monotonic()
        connection.request(method, path, body and json.dumps(body), headers)
        response = connection.getresponse()
        data = json.loads(response.read())
        times.append(time.monotonic() - began)
        if response.status == 429:
            time.sleep(0.2)
            return call(method, path, body)
        assert response.status == 200, (response.status, data)
        return data

    time.sleep(wait)
    due = time.monotonic()
    try:
        while time.monotonic() < until:
            item = call("GET", "/api/next")["item"]
            if not item:
                break
            call("POST", "/api/judge", {"id": item["id"], "token": item["token"], "choice": "AB"[len(done) % 2],
                                        "seconds": 1.5, "reason": name})
            done.append(item["id"])
            due += pace
            time.sleep(max(0, due - time.monotonic()))
    except (OSError, http.client.HTTPException):
        pass  # the server was killed
    finally:
        connection.close()


def crowd(links, pace, seconds, kill=None, enough=0):
    """Everybody at once; what each had acknowledged, and all times."""
    done = {name: [] for name in links}
    times = []
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=annotate, args=(name, link, pace, until, done[name], times,
                                                       pace * i / len(links)))
               for i, (name, link) in enumerate(links.items())]
    for t in threads:
        t.start()
    while kill and sum(map(len, done.values())) < enough and any(t.is_alive() for t in threads):
        time.sleep(0.005)
    if kill:
        kill()
    for t in threads:
        t.join()
    return done, times


def check(label, acknowledged, unanswered):
    """Every acknowledged judgement is a line; others are at most those whose answer was lost."""
    text, records = label.records()
    counts = {}
    for r in records:
        counts[r["annotator"]] = counts.get(r["annotator"], 0) + 1
    items = [r["item"] for r in records]
    assert len(set(items)) == len(items), "an item was judged twice"
    for name, n in acknowledged.items():
        assert n <= counts.get(name, 0) <= n + unanswered, (name, n, counts.get(name, 0))
    return text, len(records)


def short(folder):
    label = Label(folder, 20, 300)
    done, _ = crowd(label.start(), 0.001, 600, lambda: label.end(signal.SIGKILL), 60)
    first = {name: len(d) for name, d in done.items()}
    # What a kill in the middle of writing leaves.
    with open(label.out, "a", encoding="utf-8") as out:
        out.write('{"prompt": "half a li')
    links = label.start()
    text, kept = check(label, first, 1)
    assert text.endswith("\n") and "half a li" not in text, "half a line is left"
    done, _ = crowd(links, 0.001, 600)
    label.end(signal.SIGINT)
    total = {name: first[name] + len(done[name]) for name in first}
    _, n = check(label, total, 1)
    assert n == 300, f"{n} of 300 items judged"
    print(f"killed after {kept} judgements, none lost; {n} in the end")


def ended(folder):
    """--exit_when_done: not before the last judgement, and then with all of them."""
    label = Label(folder, 3, 30, "--exit_when_done")
    links = label.start()
    done, _ = crowd({"a0": links["a0"], "a1": links["a1"]}, 0.01, 600)
    # Two have judged all there is; the third finds nothing, and nobody is asked any more.
    assert label.process.wait(timeout=60) == 0, label.log.read_text()
    assert sum(map(len, done.values())) == 30, done
    _, n = check(label, {name: len(d) for name, d in done.items()}, 0)
    assert n == 30, n
    label.command.remove("--exit_when_done")
    label.start()
    time.sleep(0.5)
    assert label.process.poll() is None, "it ended without being asked to"
    label.end(signal.SIGINT)
    print("ended by the last judgement")


def refused(folder):
    """Requests that must not be answered, header by header; nothing of them is in the file."""
    label = Label(folder, 2, 4)
    links = label.start()
    port, token = links["a0"]
    other = links["a1"][1]
    operator = re.search(r"^operator +http://127.0.0.1:\d+/#(\S+)$", label.log.read_text(), re.M)[1]

    def ask(method, path, body=None, bearer=token, headers=None, length=None):
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
        connection.putrequest(method, path, skip_host="Host" in (headers or {}))
        if bearer is not None:
            connection.putheader("Authorization", "Bearer " + bearer)
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else b""
        if data or length:
            connection.putheader("Content-Length", str(length or len(data)))
        connection.endheaders(data)
        response = connection.getresponse()
        text = response.read()
        connection.close()
        return response.status, text, response

    def expect(status, *call, **more):
        got, text, _ = ask(*call, **more)
        assert got == status, (status, got, call, more, text)
        if status >= 400:
            assert json.loads(text)["error"], text

    expect(401, "GET", "/api/next", bearer=None)
    expect(401, "GET", "/api/next", bearer=token[:-1] + "!")
    expect(401, "GET", "/api/next", bearer=token + "0")
    expect(404, "GET", "/etc/passwd")
    expect(404, "GET", "/../rlhf.c")
    expect(405, "POST", "/api/next", {})
    expect(405, "PUT", "/api/judge", {})
    expect(403, "GET", "/api/operator")
    expect(403, "GET", "/api/next", bearer=operator)
    expect(200, "GET", "/api/operator", bearer=operator)
    expect(403, "GET", "/", bearer=None, headers={"Host": "evil.example"})
    expect(403, "GET", "/api/next", headers={"Host": "evil.example:" + port})
    expect(413, "POST", "/api/judge", b" " * (1 << 20) + b"{}")
    expect(413, "POST", "/api/judge", length=1 << 40)
    for body in (b"", b"{", b"[1]", b'{"id": 1}', b'{"id": "x", "id": "y"}', b"\xff\xfe"):
        expect(400, "POST", "/api/judge", body)
    item = json.loads(ask("GET", "/api/next")[1])["item"]
    good = {"id": item["id"], "token": item["token"], "choice": "A"}
    for key, value in (("choice", "C"), ("choice", None), ("strength", 4), ("strength", "much"),
                       ("aspects", {"accuracy": "B"}), ("seconds", "long"), ("unsafe", [True]),
                       ("reason", "x" * 20000)):
        expect(400, "POST", "/api/judge", {**good, key: value})
    for key, value in (("id", "ffffffffffffffff"), ("token", "0" * 16)):
        expect(409, "POST", "/api/judge", {**good, key: value})
    expect(409, "POST", "/api/judge", good, bearer=other)  # handed out to somebody else
    expect(409, "POST", "/api/undo", {})
    assert label.records()[1] == [], "something that was refused is in the file"
    for raw in (b"\x16\x03\x01\x02\x00\x01\x00" + bytes(range(256)), b"GET\r\n\r\n",
                b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * 100000 + b"\r\n\r\n",
                b"POST /api/judge HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n{}",
                b"POST /api/judge HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1, 2\r\n\r\n{}",
                b"POST /api/judge HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz"):
        with socket.create_connection(("127.0.0.1", int(port)), timeout=60) as s:
            try:
                s.sendall(raw)
                s.shutdown(socket.SHUT_WR)
                answer = s.recv(1 << 16)
            except OSError:
                answer = b""
            # Refused as HTTP says it, or the connection is closed.
            assert not answer or answer.split(b" ")[1][:1] == b"4", (raw[:60], answer[:200])
        expect(200, "GET", "/api/session")
    page = ask("GET", "/", bearer=None)[2]
    policy = page.getheader("Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe" not in policy, policy
    assert page.getheader("X-Content-Type-Options") == "nosniff"
    assert page.getheader("Referrer-Policy") == "no-referrer"
    expect(200, "POST", "/api/judge", good)
    expect(409, "POST", "/api/judge", good)
    assert len(label.records()[1]) == 1
    for _ in range(10000):
        status, _, response = ask("GET", "/api/session")
        if status == 429:
            break
    assert status == 429 and response.getheader("Retry-After"), status
    expect(200, "GET", "/api/session", bearer=other)  # the rate is each annotator's own
    label.end(signal.SIGINT)
    assert os.stat(str(label.out) + ".tokens").st_mode & 0o77 == 0, "others can read the links"
    print("what must be refused is refused")


def long(folder, annotators, seconds, limit):
    label = Label(folder, annotators, annotators * (seconds + 5))
    done, times = crowd(label.start(), 1, seconds)
    label.end(signal.SIGINT)
    _, n = check(label, {name: len(d) for name, d in done.items()}, 0)
    times.sort()
    at = lambda q: 1000 * times[min(len(times) - 1, int(q * len(times)))]
    print(f"{n} judgements by {annotators} annotators in {seconds} s, none lost; answer within "
          f"{at(.5):.1f} ms (median), {at(.99):.1f} ms (99 %), {1000 * times[-1]:.1f} ms (longest)")
    assert not limit or at(.99) < limit, f"99 % take {at(.99):.1f} ms, allowed {limit}"


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("--short", action="store_true")
    options.add_argument("--annotators", type=int, default=200)
    options.add_argument("--seconds", type=int, default=60)
    options.add_argument("--limit", type=float, default=0)
    options = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="rlhf-load-") as path:
        if options.short:
            for name, part in (("short", short), ("ended", ended), ("refused", refused)):
                (Path(path) / name).mkdir()
                part(Path(path) / name)
        else:
            long(Path(path), options.annotators, options.seconds, options.limit)
