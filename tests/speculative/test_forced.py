"""Who gets forced tokens, and whose estimates learn from them: bookkeeping alone, without a model."""

from __future__ import annotations

from minfer.sampling_params import SamplingParams
from minfer.scheduler import Request, RequestStatus, ScheduledRequest
from minfer.speculative.forced import MOST_FORCED, ForcedDrafts


def request(grammar: object = "a grammar", status: RequestStatus = RequestStatus.RUNNING, computed: int = 2) -> Request:
    params = SamplingParams(structured_outputs={"choice": ["x"]} if grammar else None, grammar=grammar)
    one = Request("r", [1, 2, 3], params, 100, 0)
    one.status, one.num_computed_tokens = status, computed
    return one


def scheduled(*requests: Request) -> list[ScheduledRequest]:
    return [ScheduledRequest(one, 0, 3, True) for one in requests]


def test_only_running_requests_with_a_form_and_one_token_left() -> None:
    asked: list[Request] = []

    def forced(one: Request) -> list[int]:
        asked.append(one)
        return [7, 8]

    good, free = request(), request()
    free.params = SamplingParams()
    others = [free, request(status=RequestStatus.FINISHED), request(status=RequestStatus.WAITING), request(computed=1)]
    assert ForcedDrafts(forced).draft(scheduled(good, *others)) == {good}
    assert asked == [good]
    assert good.draft_token_ids == [7, 8]
    assert not any(other.draft_token_ids for other in others)


def test_a_long_run_is_cut_and_no_run_is_no_draft() -> None:
    runs = {"long": list(range(100)), "none": []}
    one, other = request(), request()
    one.request_id, other.request_id = "long", "none"
    assert ForcedDrafts(lambda r: runs[r.request_id]).draft(scheduled(one, other)) == {one}
    assert one.draft_token_ids == list(range(MOST_FORCED))
    assert other.draft_token_ids == []


def test_what_it_gave_is_its_own_to_count() -> None:
    drafts = ForcedDrafts(lambda r: [7, 8, 9])
    one, other = request(), request()
    drafts.draft(scheduled(one))
    assert drafts.verified(ScheduledRequest(one, 0, 4, True, [7, 8, 9], kept=[1, 2]))
    assert not drafts.verified(ScheduledRequest(other, 0, 6, True, [1, 2, 3, 4, 5], kept=[1])), "somebody else's guesses"
    assert (drafts.stats.num_runs, drafts.stats.num_tokens, drafts.stats.num_accepted_tokens) == (1, 3, 2)
    one.status = RequestStatus.FINISHED
    drafts.draft(scheduled(one))
    assert not drafts.verified(ScheduledRequest(one, 0, 4, True, [7, 8, 9], kept=[1, 2, 3])), "of an earlier step"
