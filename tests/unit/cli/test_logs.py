"""`kiln logs`: order, filters, and lines that come while one looks."""

import itertools
import json

import pytest

from kiln_cli.errors import NoLogs
from kiln_cli.logs.reader import LogFilter, follow, last_lines, log_files


@pytest.fixture
def folder(tmp_path):
    def line(second, event, level="info"):
        fields = {"event": event, "level": level, "timestamp": f"2026-01-01T00:00:{second:02}.000000Z"}
        return json.dumps(fields) + "\n"

    (tmp_path / "engine.log").write_text(line(1, "a") + line(4, "d", "error") + "Traceback of d\n")
    (tmp_path / "gateway.log").write_text(line(2, "b", "warning") + line(5, "e"))
    return tmp_path


def events(lines):
    return [line.fields.get("event", line.text) for line in lines]


def test_lines_of_all_services_are_in_the_order_of_their_time(folder):
    found = last_lines(log_files(folder, ()), 10, LogFilter())
    assert events(found) == ["a", "b", "d", "Traceback of d", "e"]
    assert events(last_lines(log_files(folder, ()), 2, LogFilter())) == ["Traceback of d", "e"]


def test_lines_are_chosen_by_service_level_and_text(folder):
    assert events(last_lines(log_files(folder, ["gateway"]), 10, LogFilter())) == ["b", "e"]
    assert events(last_lines(log_files(folder, ()), 10, LogFilter(level="warning"))) == ["b", "d"]
    assert events(last_lines(log_files(folder, ()), 10, LogFilter(text="of d"))) == ["Traceback of d"]


def test_what_is_not_there_is_said(folder, tmp_path):
    with pytest.raises(NoLogs, match="no log of trainer; there are engine, gateway"):
        log_files(folder, ["engine", "trainer"])
    with pytest.raises(NoLogs, match="there are no logs in"):
        log_files(tmp_path / "elsewhere", ())


def test_new_lines_are_followed_whole_and_a_file_begun_anew_from_its_start(folder):
    files = log_files(folder, ["gateway"])
    found = follow(files, LogFilter())
    first = iter(itertools.islice(found, 2))
    with files["gateway"].open("a") as file:
        # The generator notes where the file ends when it is first asked, so ask in between.
        import threading

        threading.Timer(0.1, lambda: (file.write("half"), file.flush())).start()
        threading.Timer(0.5, lambda: (file.write(" whole\nnext\n"), file.flush())).start()
        assert events(first) == ["half whole", "next"]
    files["gateway"].write_text("anew\n")
    assert events(itertools.islice(found, 1)) == ["anew"]
