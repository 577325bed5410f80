"""The engine's queue: strangers in one batch, rows that leave and join, time, and what is refused."""

import threading
import time

import pytest

pytest.importorskip("prometheus_client")

from concurrent.futures import wait

from a3_hf.serving.engine import Cancelled, Engine, OutOfTime, Refused, Ticket
from a3_hf.serving.model_plans import ModelPlanner
from a3_hf.serving.schemas import CompletionRequest


class Slow:
    """Makes each pass of an engine wait for a permit."""

    def __init__(self, engine: Engine):
        self.permits = threading.Semaphore(0)
        run_pass = engine._pass

        def slow_pass(batch):
            self.permits.acquire()
            run_pass(batch)

        engine._pass = slow_pass


@pytest.fixture
def engine(served_model):
    engine = Engine(served_model)
    yield engine
    engine.close()


def plan(engine, model, tokenizer, *, seconds: float = 60.0, **fields):
    request = CompletionRequest(**{"prompt": "The dog", "max_tokens": 8, "temperature": 0.8, "seed": 1, **fields})
    return ModelPlanner(model, tokenizer, engine).completion(request, Ticket(time.monotonic() + seconds))


def mixed(number: int) -> dict:
    """Requests of all kinds."""
    kinds = [
        {"max_tokens": 5 + number % 9},
        {"suffix": " home.", "max_tokens": 1 + number % 7},
        {"suffix": " home.", "max_tokens": 6, "strategy": "groupwise", "group_size": 3, "order": "random"},
        {"suffix": " was", "max_tokens": 5, "strategy": "dynamic", "tokens_per_step": 2},
        {"suffix": " was", "max_tokens": 4, "strategy": "speculative"},
        {"suffix": " was", "max_tokens": 4, "strategy": "refine", "refine_rounds": 1},
        {"max_tokens": 6, "strategy": "groupwise", "group_size": 2},
        {"max_tokens": 6, "temperature": 0, "n": 2},
        {"suffix": " home.", "max_tokens": 5, "temperature": 0, "order": "right_to_left"},
    ]
    words = ["The dog", "One day, the", "Tom was happy, and so", "中文"]
    return {"prompt": words[number % 4], "seed": number, **kinds[number % len(kinds)]}


@pytest.mark.parametrize("join", ["pass", "batch"])
def test_strangers_get_what_they_get_alone(served_model, tokenizer, join):
    engine = Engine(served_model, join=join, max_batch=6)
    alone = []
    for number in range(40):
        (job,) = plan(engine, served_model, tokenizer, **mixed(number)).jobs
        engine.submit(job).done.result(60)
        alone.append([row.text() for row in job.rows])
    jobs = []
    for number in range(40):
        jobs += plan(engine, served_model, tokenizer, **mixed(number)).jobs
        engine.submit(jobs[-1])
        time.sleep(0.002 * (number % 3))
    assert not wait([job.done for job in jobs], 60).not_done
    assert [[row.text() for row in job.rows] for job in jobs] == alone
    rows = engine.metrics.rows.collect()[0].samples
    passes, total = (next(one.value for one in rows if one.name.endswith(end)) for end in ("_count", "_sum"))
    assert total > passes  # some passes had several rows
    engine.close()


def test_rows_join_between_passes(served_model, tokenizer):
    """The second request, which comes when the first has begun, is answered before it."""
    engine = Engine(served_model)
    slow = Slow(engine)
    (first,) = plan(engine, served_model, tokenizer, max_tokens=30, temperature=0).jobs
    (second,) = plan(engine, served_model, tokenizer, max_tokens=3, temperature=0).jobs
    engine.submit(first)
    slow.permits.release(2)
    while not first.rows[0].commits:
        time.sleep(0.001)
    engine.submit(second)
    while not second.done.done():
        slow.permits.release(1)
        time.sleep(0.01)
    assert not first.done.done()
    slow.permits.release(500)
    first.done.result(10)
    engine.close()


def test_a_full_queue_refuses(served_model, tokenizer):
    engine = Engine(served_model, max_batch=1, max_queue=2)
    slow = Slow(engine)
    jobs = [plan(engine, served_model, tokenizer, seed=seed).jobs[0] for seed in range(4)]
    engine.submit(jobs[0])
    while len(engine):
        time.sleep(0.001)
    engine.submit(jobs[1])
    engine.submit(jobs[2])
    with pytest.raises(Refused):
        engine.submit(jobs[3])
    slow.permits.release(100)
    assert not wait([job.done for job in jobs[:3]], 30).not_done
    engine.close()
    with pytest.raises(Refused):
        engine.submit(jobs[3])
    with pytest.raises(Refused):
        engine.call(lambda: None, jobs[3].ticket)


def test_time_is_over_with_what_was_written(engine, served_model, tokenizer):
    slow = Slow(engine)
    (job,) = plan(engine, served_model, tokenizer, max_tokens=40, temperature=0, seconds=2).jobs
    engine.submit(job)
    slow.permits.release(4)
    time.sleep(2.1)
    slow.permits.release(1)
    with pytest.raises(OutOfTime):
        job.done.result(10)
    assert 1 <= len(job.rows[0].commits) < 40
    (late,) = plan(engine, served_model, tokenizer, seconds=-1).jobs
    with pytest.raises(OutOfTime):
        engine.submit(late).done.result(10)


def test_a_client_that_goes_away_frees_its_place(served_model, tokenizer):
    engine = Engine(served_model, max_batch=1)
    slow = Slow(engine)
    (first,) = plan(engine, served_model, tokenizer, max_tokens=100).jobs
    (second,) = plan(engine, served_model, tokenizer, max_tokens=2).jobs
    engine.submit(first)
    engine.submit(second)
    slow.permits.release(2)
    while not first.rows[0].commits:
        time.sleep(0.001)
    first.ticket.is_cancelled = True
    slow.permits.release(10)
    second.done.result(10)
    with pytest.raises(Cancelled):
        first.done.result(10)
    assert len(first.rows[0].commits) <= 4
    while not engine.is_idle:
        time.sleep(0.001)
    engine.close()


def test_a_job_that_fails_harms_no_other(engine, served_model, tokenizer, caplog):
    (bad,) = plan(engine, served_model, tokenizer).jobs
    bad.begin = lambda: 1 / 0
    (good,) = plan(engine, served_model, tokenizer).jobs
    engine.submit(bad)
    engine.submit(good)
    with pytest.raises(ZeroDivisionError):
        bad.done.result(10)
    good.done.result(10)
    (runs,) = plan(engine, served_model, tokenizer, max_tokens=40).jobs
    engine.submit(runs)
    while not runs.rows[0].commits:
        time.sleep(0.001)
    (worse,) = plan(engine, served_model, tokenizer).jobs
    begin = worse.begin

    def begun():
        filling = begin()
        filling.step = lambda: 1 / 0
        return filling

    worse.begin = begun
    with pytest.raises(ZeroDivisionError):
        engine.submit(worse).done.result(10)
    assert "a pass failed" in caplog.text
    runs.done.result(10)  # the batch that the other would have joined
    (after,) = plan(engine, served_model, tokenizer).jobs
    engine.submit(after).done.result(10)


def test_memory_bounds_what_runs_together(served_model, tokenizer):
    """Three rows of 40 columns fit into 100 tokens two at a time; the one that waits is not overtaken."""
    engine = Engine(served_model, max_tokens=100)
    slow = Slow(engine)
    jobs = [plan(engine, served_model, tokenizer, max_tokens=40 - 4, seed=seed).jobs[0] for seed in range(3)]
    (small,) = plan(engine, served_model, tokenizer, max_tokens=2).jobs
    assert all(30 < job.num_columns <= 50 for job in jobs)
    engine.submit(jobs[0])
    while len(engine):
        time.sleep(0.001)
    for job in (*jobs[1:], small):
        engine.submit(job)
    slow.permits.release(2)
    while len(engine) > 2:
        time.sleep(0.001)
    assert not jobs[2].rows[0].commits and not small.rows[0].commits
    slow.permits.release(500)
    assert not wait([job.done for job in (*jobs, small)], 30).not_done
    engine.close()


@pytest.mark.parametrize(
    "settings", [{"max_batch": 0}, {"max_queue": 0}, {"max_tokens": -1}, {"join": "never"}], ids=str
)
def test_settings_are_checked(served_model, settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name}=.*: expected"):
        Engine(served_model, **settings)


def test_calls_run_in_the_engines_thread(engine):
    ticket = Ticket(time.monotonic() + 60)
    assert engine.call(lambda: threading.current_thread().name, ticket).result(10) == "a3-engine"
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 / 0, ticket).result(10)
    with pytest.raises(OutOfTime):
        engine.call(lambda: None, Ticket(time.monotonic() - 1)).result(10)
