"""Timing and the CSV schema of benchmarks."""

import time

import pytest

from erlangen.bench import record


def test_quantiles_are_linear_between_neighbours():
    assert record.quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert record.quantile([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.2) == 2.0
    assert record.quantile([7.0], 0.8) == 7.0


def test_calls_are_interleaved_and_the_slower_one_is_found():
    order = []

    def call(name, seconds):
        order.append(name)
        time.sleep(seconds)

    calls = {"slow": lambda: call("slow", 0.02), "fast": lambda: call("fast", 0.002)}
    timings = record.time_interleaved(calls, "fast", rounds=4, warmup=1)
    assert len(order) == 10
    assert all(set(order[i : i + 2]) == {"slow", "fast"} for i in range(0, 10, 2)), "each round calls each once"
    assert {order[i] for i in range(0, 10, 2)} == {"slow", "fast"}, "not always the same first"
    slow, fast = timings["slow"], timings["fast"]
    assert fast.ratio == fast.ratio_q20 == fast.ratio_q80 == 1 and fast.rounds == 4
    assert 0.02 <= slow.q20 <= slow.median <= slow.q80
    assert slow.ratio > 1 and slow.ratio_q80 >= slow.ratio_q20 > 1


@pytest.mark.parametrize(
    ("options", "message"), [({"baseline": "b"}, "the baseline 'b' is not among a"), ({"rounds": 0}, "at least 1")]
)
def test_bad_requests(options, message):
    with pytest.raises(ValueError, match=message):
        record.time_interleaved({"a": lambda: None}, **{"baseline": "a", **options})


def test_rows_come_back_as_they_went(tmp_path):
    path = tmp_path / "folder" / "x.csv"
    assert record.read(path) == []
    timing = record.Timing(0.001, 0.002, 0.003, 2.0, 1.5, 2.5, 7)
    row = record.timing_row("b", "v, w", "base", timing, device="cpu", dtype="float32", config={"text": 'a "b", c'})
    record.write(path, [row])
    record.write(path, [{**row, "variant": "second"}])
    first, second = record.read(path)
    assert tuple(first) == record.FIELDS and second["variant"] == "second"
    assert first["variant"] == "v, w" and first["unit"] == "ms" and first["median"] == "2" and first["rounds"] == "7"
    assert first["config_json"] == r'{"text": "a \"b\", c"}'
    for name, value in record.provenance().items():
        assert first[name] == str(value)
    assert first["timestamp"]


def test_a_row_that_was_cut_short_costs_no_other(tmp_path):
    path = tmp_path / "x.csv"
    record.write(path, [{"variant": "whole", "config_json": '{"a": 1}'}, {"variant": "cut", "config_json": '{"a": 1}'}])
    path.write_text(path.read_text()[:-6])
    record.write(path, [{"variant": "next"}])
    assert [row["variant"] for row in record.read(path)] == ["whole", "next"]


def test_another_schema_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n")
    for call in (lambda: record.write(path, [{"variant": "v"}]), lambda: record.read(path)):
        with pytest.raises(ValueError, match="another header, a,b"):
            call()
    assert path.read_text() == "a,b\n1,2\n"
    with pytest.raises(ValueError, match="not in the schema: speed"):
        record.write(tmp_path / "y.csv", [{"speed": 1}])
    assert not (tmp_path / "y.csv").exists()
