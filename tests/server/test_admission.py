"""The bounded queue: who gets 429, when to come back, and that every place is given back."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import pytest
from http_helpers import load, post, slow_down, wait_until_free

from minfer import AsyncLLM
from minfer.server.admission import ANYONE, MOST_SECONDS, Admission
from minfer.server.errors import ApiError

COMPLETE = "/v1/completions"
LONG: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def refusal(admission: Admission, key: str = ANYONE, seats: int = 2) -> ApiError:
    with pytest.raises(ApiError) as caught:
        admission.enter(key, seats)
    assert caught.value.status_code == 429
    return caught.value


def test_seats_and_queue_are_the_places_and_leaving_gives_them_back() -> None:
    admission = Admission(max_queue=3, per_minute=None, keys=0)
    tickets = [admission.enter(ANYONE, 2) for _ in range(5)]
    assert "3 sequences are waiting, and the limit is 3" in refusal(admission).message
    tickets[0].leave()
    admission.enter(ANYONE, 2).grow(4)  # one that is in may bring more sequences than there are places
    assert admission.in_flight == 8
    for ticket in tickets[1:3]:
        ticket.leave()
    refusal(admission)
    assert admission.refused == {"overloaded": 2, "rate_limit_exceeded": 0}


def test_an_empty_server_takes_any_request() -> None:
    admission = Admission(max_queue=0, per_minute=None, keys=0)
    ticket = admission.enter(ANYONE, 1)
    ticket.grow(64)
    ticket.leave()
    assert admission.in_flight == 0
    assert not admission.held, "nothing is remembered of a key that has nothing here"
    ticket.leave()
    assert admission.in_flight == 0


def test_retry_after_is_how_long_the_queue_has_been_taking() -> None:
    clock = Clock()
    admission = Admission(max_queue=0, per_minute=None, keys=0, clock=clock)
    ticket = admission.enter(ANYONE, 1)
    assert refusal(admission, seats=1).headers == {"retry-after": "1"}, "nothing is known yet"
    for _ in range(10):  # one ends every 4 s
        clock.now += 4
        ticket.leave()
        ticket = admission.enter(ANYONE, 1)
    assert refusal(admission, seats=1).headers == {"retry-after": "4"}
    clock.now += 1e6
    assert refusal(admission, seats=1).headers == {"retry-after": str(MOST_SECONDS)}


def test_a_flood_of_one_key_leaves_the_others_their_share() -> None:
    admission = Admission(max_queue=6, per_minute=None, keys=2)
    for _ in range(8):
        admission.enter("flood", 2)
    refusal(admission, "flood")
    for _ in range(4):
        admission.enter("other", 2)
    refusal(admission, "other")


def test_the_rate_of_a_key_is_its_own_and_comes_back_with_time() -> None:
    clock = Clock()
    admission = Admission(max_queue=100, per_minute=30, keys=2, clock=clock)
    for _ in range(5):  # 10 s worth of 30 a minute
        admission.charge("a")
    with pytest.raises(ApiError, match="more than 30 requests a minute; try again in 2 s") as caught:
        admission.charge("a")
    assert (caught.value.code, caught.value.headers) == ("rate_limit_exceeded", {"retry-after": "2"})
    admission.charge("b")
    clock.now += 2
    admission.charge("a")
    with pytest.raises(ApiError):
        admission.charge("a")
    clock.now += 3600
    for _ in range(5):
        admission.charge("a")
    with pytest.raises(ApiError):
        admission.charge("a")


def test_the_full_server_says_when_to_come_back_and_recovers(serve: Any, tiny_llama: Any) -> None:
    llm = load(tiny_llama, max_num_seqs=1)
    slow_down(llm, 0.02)
    with serve(llm, max_queue=1) as client:
        with client.stream("POST", COMPLETE, json={"prompt": "a", **LONG, "stream": True}) as running:
            lines = running.iter_lines()
            next(lines)
            queued = threading.Thread(target=post, args=(client, COMPLETE), kwargs={"prompt": "b", "max_tokens": 2})
            queued.start()
            deadline = time.monotonic() + 20
            while client.get("/health").json()["waiting"] < 1:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            refused = client.post(COMPLETE, json={"prompt": "c", "max_tokens": 2})
            assert refused.status_code == 429
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("overloaded_error", "overloaded")
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.headers["x-request-id"]
            assert client.get("/v1/models").status_code == 200, "only what occupies the engine is refused"
        queued.join()
        wait_until_free(llm)
        assert post(client, COMPLETE, prompt="c", max_tokens=2, ignore_eos=True)["usage"]["completion_tokens"] == 2
    llm.shutdown()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"prompt": "a", "max_tokens": 2}, 200),
        ({"prompt": ["a", "b"], "n": 2, "max_tokens": 2, "stream": True}, 200),
        ({"prompt": "a", "n": 0}, 400),
        ({"prompt": "a", "model": "another"}, 404),
        ({"prompt": "a", "structured_outputs": {"regex": "("}}, 400),
    ],
)
def test_every_ending_gives_the_places_back(serve: Any, llm: AsyncLLM, body: dict[str, Any], status: int) -> None:
    """`running` asserts that none is held once the server has stopped."""
    with serve(llm, max_queue=0) as client:
        for _ in range(3):
            assert client.post(COMPLETE, json=body).status_code == status


def test_the_rate_over_http(serve: Any, llm: AsyncLLM) -> None:
    with serve(llm, api_key=("one", "two"), requests_per_minute=12) as client:

        def ask(key: str) -> httpx.Response:
            return client.post(COMPLETE, json={"prompt": "a", "max_tokens": 1}, headers={"authorization": f"Bearer {key}"})

        assert [ask("one").status_code for _ in range(3)] == [200, 200, 429]
        assert ask("two").status_code == 200
        assert ask("one").json()["error"]["code"] == "rate_limit_exceeded"
