"""experiments/gpu_report.py: the report tells of parts that fail, are stopped or find no time."""

import sys

import gpu_report
import pytest


def python(text):
    """The command of a program."""
    return [sys.executable, "-c", text]


PRINT_TABLE = "print('| a |\\n|---|\\n| 1 |', flush=True)"
TABLE = "| a |\n|---|\n| 1 |\n"


def test_the_report_tells_of_parts_that_fail_or_find_no_time(tmp_path):
    fails = python(f"{PRINT_TABLE}; print('noise'); raise SystemExit(3)")
    parts = [
        gpu_report.Part("fails", "Fails", 50, [fails, python(PRINT_TABLE)]),
        gpu_report.Part("late", "Late", 1, [python(PRINT_TABLE)]),
    ]
    gpu_report.run_parts(parts[:1], tmp_path, 60, shared=False)
    report = (tmp_path / "report.md").read_text().partition("## ")[2]
    assert report == f"Fails\n\n{TABLE}\n- failed: exit code 3, see fails.txt\n\n{TABLE}"
    gpu_report.run_parts(parts[1:], tmp_path, 4, shared=True)
    assert "\n- stopped: no time was left for late\n" in (tmp_path / "report.md").read_text()


def test_a_part_that_is_stopped_leaves_its_lines(tmp_path):
    hangs = python(f"{PRINT_TABLE}; import time; time.sleep(60)")
    part = gpu_report.Part("hangs", "Hangs", 1, [hangs, hangs])
    text = gpu_report.run_part(part, tmp_path, 2)
    assert text == f"{TABLE}stopped: hangs took longer than 2 s\n"
    assert (tmp_path / "hangs.txt").read_text() == text


@pytest.mark.parametrize("official", [None, "checkout"])
def test_the_parts_have_eight_minutes_together(tmp_path, official):
    parts = gpu_report.all_parts(tmp_path, official, rehearse=False)
    assert sum(part.seconds for part in parts) == 8 * 60
    assert [part.name for part in gpu_report.all_parts(tmp_path, official, rehearse=True)] == [
        part.name for part in parts
    ]


def test_small_runs_that_wrote_nothing_are_left_out(tmp_path):
    row = '{"steps_per_second": 2, "audio_seconds_per_second": 9, "data_wait_share": 0.5}'
    for name, text in (("a", ""), ("b", f"{row}\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    *_, line = gpu_report.speeds(tmp_path).splitlines()
    assert line == "| b | 2.00 | 9 | 50% |"
