"""New lines of log files: ends, additions, replaced files, half lines."""

import json

from kiln_gateway.insight.log_tail import LogTail


def write(path, *lines, end="\n"):
    with path.open("a") as file:
        file.write("\n".join(lines) + end)


def event(name, at, **fields):
    return json.dumps({"event": name, "timestamp": at, "level": "info", "service": "x", **fields})


def test_lines_of_all_services_come_once_and_in_the_order_of_their_times(tmp_path):
    tail = LogTail(tmp_path)
    assert tail.read() == []
    write(tmp_path / "engine.log", event("second", "2026-01-01T00:00:02Z", slot=3))
    write(tmp_path / "gateway.log", event("first", "2026-01-01T00:00:01Z"))
    first, second = tail.read()
    assert (first["service"], first["event"], first["fields"]) == ("gateway", "first", {})
    assert (second["service"], second["event"], second["fields"]) == ("engine", "second", {"slot": "3"})
    assert tail.read() == []


def test_a_half_line_waits_for_its_end(tmp_path):
    tail, path = LogTail(tmp_path), tmp_path / "redis.log"
    write(path, "not json", "half", end="")
    assert [line["event"] for line in tail.read()] == ["not json"]
    write(path, " a line")
    assert [line["event"] for line in tail.read()] == ["half a line"]


def test_a_replaced_file_is_read_from_its_start(tmp_path):
    tail, path = LogTail(tmp_path), tmp_path / "engine.log"
    write(path, "one", "two")
    tail.read()
    path.write_text("new\n")
    assert [line["event"] for line in tail.read()] == ["new"]


def test_of_a_long_file_only_the_end_is_read_and_no_half_line(tmp_path):
    path = tmp_path / "engine.log"
    write(path, *(f"line {number:06}" for number in range(20_000)))
    events = [line["event"] for line in LogTail(tmp_path).read()]
    assert 1000 < len(events) < 5000
    assert events[-1] == "line 019999"
    assert all(len(event) == len("line 000000") for event in events)
