"""The scheduler against a fake model: every property of the issue that needs no tensors."""

from __future__ import annotations

import random

import pytest
from fake_model import FakeEngine, expected_output
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minfer.scheduler import Request, RequestStatus


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(50) for i in range(length)]


def guesses(tokens: list[int], right: int, count: int) -> list[int]:
    """`count` drafts after `tokens`, of which the first `right` are what the fake model will say and the next is not."""
    truth = expected_output(tokens, count)
    return [token if depth < right else (token + 1) % 50 for depth, token in enumerate(truth)]


def test_a_request_gets_its_tokens_and_leaves_nothing_behind() -> None:
    engine = FakeEngine(num_blocks=16)
    (request,) = engine.add(prompt_of(7), 5)
    engine.run()
    assert request.output_token_ids == expected_output(prompt_of(7), 5)
    assert request.finish_reason == "length"
    assert engine.scheduler.pool.num_used == 0


def test_a_long_prompt_is_cut_to_the_budget() -> None:
    engine = FakeEngine(num_blocks=64, max_num_batched_tokens=32)
    engine.add(prompt_of(100), 1)
    engine.run()
    assert [sum(step.values()) for step in engine.computed_per_step] == [32, 32, 32, 4]


def test_nobody_who_generates_misses_a_step_while_a_long_prompt_is_computed() -> None:
    """One token is kept back for each running request, also for those behind the long prompt in the order."""
    engine = FakeEngine(num_blocks=128, max_num_batched_tokens=16, max_num_seqs=4, policy="priority")
    engine.add(prompt_of(3, 1), 20, priority=1)
    engine.add(prompt_of(3, 2), 20, priority=3)
    engine.step()
    engine.add(prompt_of(100), 1, priority=2)
    engine.step()
    engine.step()
    for step in engine.computed_per_step[1:]:
        assert step == {"r0": 1, "r1": 1, "r2": 14}


def test_max_prefill_chunk_bounds_one_request() -> None:
    engine = FakeEngine(num_blocks=64, max_prefill_chunk=5)
    engine.add(prompt_of(12), 1)
    engine.run()
    assert [step["r0"] for step in engine.computed_per_step] == [5, 5, 2]


def test_max_num_seqs_is_a_limit_and_a_seat_is_refilled_in_the_next_step() -> None:
    engine = FakeEngine(num_blocks=64, max_num_seqs=2)
    engine.add(prompt_of(2, 1), 1)
    engine.add(prompt_of(2, 2), 3)
    engine.add(prompt_of(2, 3), 1)
    engine.run()
    assert list(engine.computed_per_step[0]) == ["r0", "r1"]
    assert set(engine.computed_per_step[1]) == {"r1", "r2"}


def test_a_repeated_prompt_computes_at_most_one_block_again() -> None:
    engine = FakeEngine(num_blocks=600, block_size=4, max_num_batched_tokens=2048)
    engine.add(prompt_of(1000), 2)
    engine.run()
    first = engine.scheduler.stats.num_computed_tokens
    (again,) = engine.add(prompt_of(1000), 2)
    engine.run()
    assert again.num_cached_tokens == 996
    assert engine.scheduler.stats.num_computed_tokens - first == 4 + 1
    assert engine.scheduler.stats.num_prefix_hits == 996


def test_prefix_caching_off_finds_nothing() -> None:
    engine = FakeEngine(num_blocks=64, prefix_caching=False)
    for _ in range(2):
        engine.add(prompt_of(20), 2)
        engine.run()
    assert engine.requests[1].num_cached_tokens == 0
    assert engine.scheduler.stats.num_prefix_queries == 0


def test_a_salt_keeps_prefixes_apart_and_its_tree_goes_when_it_is_evicted() -> None:
    engine = FakeEngine(num_blocks=8)
    for salt in ("a", "b", "a"):
        engine.add(prompt_of(9), 1, salt=salt)
        engine.run()
    assert [r.num_cached_tokens for r in engine.requests] == [0, 0, 8]
    engine.add(prompt_of(31, 7), 1)  # needs every block
    engine.run()
    assert set(engine.scheduler.prefix_cache._roots) <= {None}  # type: ignore[union-attr]


def test_eviction_takes_the_least_recently_used_prefix() -> None:
    engine = FakeEngine(num_blocks=8, max_num_seqs=1)
    for seed in (1, 2, 1, 3):  # 2 blocks kept by each; 1 is used again before 3 needs room
        engine.add(prompt_of(9, seed), 1)
        engine.run()
    engine.add(prompt_of(13, 4), 1)
    engine.run()
    engine.add(prompt_of(9, 1), 1)
    engine.run()
    assert engine.requests[-1].num_cached_tokens == 8
    assert engine.scheduler.pool.num_evictions > 0


def test_siblings_share_the_full_blocks_of_their_prompt_and_copy_the_last() -> None:
    engine = FakeEngine(num_blocks=64, max_num_batched_tokens=64)
    engine.add(prompt_of(10), 6, n=4)
    engine.step()
    engine.step()
    first, *others = engine.requests
    for other in others:
        assert other.blocks[:2] == first.blocks[:2]
        assert other.blocks[2] != first.blocks[2]
    assert engine.scheduler.pool.references(first.blocks[0]) == 4
    assert engine.scheduler.stats.num_copied_blocks == 3
    assert engine.scheduler.stats.num_forked_tokens == 3 * 9
    engine.run()
    assert all(r.output_token_ids == expected_output(prompt_of(10), 6) for r in engine.requests)
    assert engine.scheduler.pool.num_used == 0


def test_siblings_work_where_the_first_is_long_gone() -> None:
    engine = FakeEngine(num_blocks=64, max_num_seqs=1, prefix_caching=False)
    engine.add(prompt_of(10), 3, n=3)
    engine.run()
    assert all(r.output_token_ids == expected_output(prompt_of(10), 3) for r in engine.requests)


def test_preemption_takes_the_newest_and_changes_no_output() -> None:
    engine = FakeEngine(num_blocks=10, max_num_batched_tokens=64)
    for seed in range(3):
        engine.add(prompt_of(8, seed), 20)
    engine.run()
    assert engine.scheduler.stats.num_preemptions > 0
    assert engine.requests[0].num_preemptions == 0, "the oldest is never preempted"
    for seed, request in enumerate(engine.requests):
        assert request.output_token_ids == expected_output(prompt_of(8, seed), 20)


def test_first_come_first_served_finishes_in_order_of_arrival_even_under_preemption() -> None:
    engine = FakeEngine(num_blocks=10, max_num_batched_tokens=64)
    for seed in range(5):
        engine.add(prompt_of(8, seed), 20)
    order: list[str] = []
    while engine.scheduler.has_requests:
        engine.step()
        order += [r.request_id for r in engine.requests if r.finished and r.request_id not in order]
    assert order == sorted(order)


def test_priority_admits_the_urgent_first_and_displaces_the_less_urgent() -> None:
    engine = FakeEngine(num_blocks=64, policy="priority", max_num_seqs=1)
    slow, *_ = engine.add(prompt_of(4, 1), 30, priority=5)
    engine.step()
    engine.add(prompt_of(4, 2), 3, priority=5)
    urgent, *_ = engine.add(prompt_of(4, 3), 3, priority=0)
    engine.step()
    assert urgent.status is RequestStatus.RUNNING
    assert slow.status is RequestStatus.WAITING
    engine.run()
    assert urgent.num_preemptions == 0
    for seed, request in ((1, slow), (3, urgent)):
        assert request.output_token_ids == expected_output(prompt_of(4, seed), len(request.output_token_ids))


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
def test_the_queue_is_told_in_the_order_in_which_it_is_admitted(policy: str) -> None:
    engine = FakeEngine(num_blocks=64, policy=policy, max_num_seqs=1)
    for number in range(8):
        engine.add(prompt_of(4, number), 3, priority=number * 5 % 7, tenant=str(number // 3))
    gone = engine.requests[3]
    engine.scheduler.finish(gone, "abort")
    told = engine.scheduler.first_waiting(100)
    assert len(told) == engine.scheduler.num_waiting == 7
    assert engine.scheduler.first_waiting(2) == told[:2]
    admitted: list[Request] = []
    while engine.scheduler.has_requests:
        engine.step()
        admitted += [request for request in engine.scheduler.running if request not in admitted]
    assert admitted == told


def test_equal_priority_never_displaces() -> None:
    engine = FakeEngine(num_blocks=64, policy="priority", max_num_seqs=1)
    engine.add(prompt_of(4, 1), 10, priority=1)
    engine.step()
    engine.add(prompt_of(4, 2), 10, priority=1)
    engine.run()
    assert engine.scheduler.stats.num_preemptions == 0


@pytest.mark.parametrize("when", ["waiting", "computing the prompt", "generating", "preempted"])
def test_abort_frees_everything_at_once(when: str) -> None:
    engine = FakeEngine(num_blocks=12, max_num_batched_tokens=8)
    older, *_ = engine.add(prompt_of(8, 1), 30)
    for _ in range(3):
        engine.step()
    victim, *_ = engine.add(prompt_of(12, 2), 20)
    if when == "computing the prompt":
        engine.step()
        assert 0 < victim.num_computed_tokens < 12
    elif when == "generating":
        while not victim.output_token_ids:
            engine.step()
    elif when == "preempted":
        while victim.num_preemptions == 0:
            engine.step()
        assert victim.status is RequestStatus.WAITING
    engine.scheduler.finish(victim, "abort")
    assert victim.blocks == []
    engine.scheduler.check_integrity()
    engine.run()
    assert older.output_token_ids == expected_output(prompt_of(8, 1), 30)
    assert engine.scheduler.num_waiting == 0
    assert engine.scheduler.pool.num_used == 0


def test_a_pool_that_is_exactly_full_still_works() -> None:
    engine = FakeEngine(num_blocks=5, block_size=4)
    (request,) = engine.add(prompt_of(1), 19)  # 20 tokens, 5 blocks
    engine.run()
    assert request.output_token_ids == expected_output(prompt_of(1), 19)


actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 30), st.integers(1, 12), st.integers(1, 3), st.integers(0, 3), st.integers(0, 2)),
        st.tuples(st.just("step"), st.integers(1, 4)),
        st.tuples(st.just("abort"), st.integers(0, 30)),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    script=actions,
    num_blocks=st.integers(12, 40),
    block_size=st.sampled_from([1, 4, 16]),
    budget=st.integers(8, 40),
    seats=st.integers(1, 8),
    chunk=st.one_of(st.none(), st.integers(1, 10)),
    policy=st.sampled_from(["fcfs", "priority", "fair"]),
    prefix_caching=st.booleans(),
    right=st.sampled_from([None, 0, 2, 9]),
    overlap=st.booleans(),
    eos=st.sampled_from([-1, 7]),
)
def test_any_sequence_of_add_step_abort_keeps_every_invariant(
    script: list[tuple[object, ...]],
    num_blocks: int,
    block_size: int,
    budget: int,
    seats: int,
    chunk: int | None,
    policy: str,
    prefix_caching: bool,
    right: int | None,
    overlap: bool,
    eos: int,
) -> None:
    """Prompts come from few families, so that prefixes, forks and eviction all occur; `FakeEngine.step` checks what is read.

    Nine drafts a step, the first `right` of them right, or none at all. With `eos` some end before their time, which with `overlap` is
    known only when their next step has run.
    """
    num_blocks = max(num_blocks, -(-42 // block_size))
    engine = FakeEngine(
        num_blocks=num_blocks,
        block_size=block_size,
        policy=policy,
        max_num_seqs=seats,
        max_num_batched_tokens=max(budget, seats),
        max_prefill_chunk=chunk,
        prefix_caching=prefix_caching,
        overlap=overlap,
        eos=eos,
    )
    if right is not None:
        engine.drafts = lambda tokens: guesses(tokens, right, 9)
    aborted = set()
    for action in script:
        if action[0] == "add":
            _, length, max_tokens, n, priority, family = action
            engine.add(
                prompt_of(length, family), max_tokens, n=n, priority=priority, tenant=str(priority), salt="s" if family == 2 else None
            )  # type: ignore[arg-type]
        elif action[0] == "step":
            for _ in range(action[1]):  # type: ignore[call-overload]
                engine.step()
        elif engine.requests:
            victim = engine.requests[action[1] % len(engine.requests)]  # type: ignore[operator]
            if not victim.finished:
                engine.scheduler.finish(victim, "abort")
                aborted.add(victim)
    engine.run()
    for request in engine.requests:
        assert request.finished
        if request not in aborted:
            assert request.output_token_ids == expected_output(request.prompt_token_ids, request.params.max_tokens or 0, eos)
    pool = engine.scheduler.pool
    assert pool.num_used == 0
    assert all(pool.references(block) == 0 for block in range(pool.num_blocks))


@pytest.mark.parametrize(("right", "steps"), [(0, 12), (1, 7), (3, 4), (4, 4)])
def test_right_drafts_save_steps_and_wrong_ones_cost_none(right: int, steps: int) -> None:
    """The first of 12 tokens comes with the prompt; each later step gives one token and what was guessed right."""
    engine = FakeEngine(num_blocks=64)
    engine.drafts = lambda tokens: guesses(tokens, right, 4)
    (request,) = engine.add(prompt_of(7), 12)
    engine.run()
    assert request.output_token_ids == expected_output(prompt_of(7), 12)
    assert engine.scheduler.stats.num_steps == steps
    assert request.draft_token_ids == [] or request.finished


def test_blocks_that_only_rejected_drafts_were_in_are_free_after_the_step() -> None:
    engine = FakeEngine(num_blocks=64, block_size=1)
    engine.drafts = lambda tokens: guesses(tokens, 2, 20)
    engine.add(prompt_of(3), 40)
    engine.step()
    engine.step()
    assert engine.scheduler.pool.num_used == 7  # 3 of the prompt, 1 + 2 + 1 of the output; the last is not computed yet
    assert engine.computed_per_step[-1] == {"r0": 21}


def test_drafts_take_neither_budget_nor_blocks_that_others_need() -> None:
    engine = FakeEngine(num_blocks=12, block_size=4, max_num_batched_tokens=12)
    engine.drafts = lambda tokens: guesses(tokens, 0, 30)
    for seed in range(3):
        engine.add(prompt_of(4, seed), 9)
    engine.run()
    assert engine.scheduler.stats.num_preemptions == 0
    assert all(sum(step.values()) <= 12 and len(step) == 3 for step in engine.computed_per_step)


def test_drafts_end_where_the_request_ends() -> None:
    engine = FakeEngine(num_blocks=64)
    engine.drafts = lambda tokens: guesses(tokens, 30, 30)
    (request,) = engine.add(prompt_of(7), 6)
    engine.run()
    assert len(request.output_token_ids) == 6
    assert [step["r0"] for step in engine.computed_per_step] == [7, 5]


def test_fair_tenants_take_turns_by_tokens() -> None:
    """A flood of one tenant comes first; the other's few requests don't wait behind it."""
    engine = FakeEngine(num_blocks=64, policy="fair", max_num_seqs=1)
    flood = [engine.add([1] * 8, 4, tenant="flood")[0] for _ in range(10)]
    few = [engine.add([2] * 8, 4, tenant="few")[0] for _ in range(3)]
    order = finishing_order(engine)
    assert [order.index(r) for r in few] == [1, 3, 5]
    assert [r for r in order if r in flood] == flood, "within a tenant, by arrival"


def test_fair_counts_tokens_and_not_requests() -> None:
    engine = FakeEngine(num_blocks=64, policy="fair", max_num_seqs=1)
    for n in range(6):
        engine.add([1 + n] * 36, 4, tenant="long")
        engine.add([1 + n] * 6, 4, tenant="short")
    order = finishing_order(engine)
    assert [r.tenant for r in order[:6]].count("short") >= 4


def test_fair_settles_what_was_used() -> None:
    """Outputs aren't known in advance; over time each tenant has got the same tokens all the same."""
    engine = FakeEngine(num_blocks=256, policy="fair", max_num_seqs=1, prefix_caching=False)
    for n in range(120):
        engine.add([n % 50] * 4, 4, tenant="brief")
    for n in range(20):
        engine.add([n % 50] * 4, 60, tenant="verbose")
    used = {"brief": 0, "verbose": 0}
    while used["verbose"] < 400:
        assert engine.step()
        used = {tenant: sum(r.num_tokens for r in engine.requests if r.tenant == tenant and r.output_token_ids) for tenant in used}
    assert 0.7 < used["brief"] / used["verbose"] < 1.4


def test_fair_gives_back_what_was_not_used() -> None:
    """Requests that were aborted in the queue don't put their tenant's next one behind everybody."""
    engine = FakeEngine(num_blocks=64, policy="fair", max_num_seqs=1)
    for n in range(10):
        engine.add([n] * 8, 4, tenant="steady")
    for request in [engine.add([20] * 8, 4, tenant="hasty")[0] for _ in range(8)]:
        engine.scheduler.finish(request, "abort")
    (again,) = engine.add([21] * 8, 4, tenant="hasty")
    order = [r for r in finishing_order(engine) if r.finish_reason != "abort"]
    assert order.index(again) <= 1


def test_fair_lets_nobody_save_up_turns() -> None:
    """Who was silent for long comes next, and then takes turns; it has no credit for its silence."""
    engine = FakeEngine(num_blocks=64, policy="fair", max_num_seqs=1)
    engine.add([3] * 8, 4, tenant="late")
    for _ in range(20):
        engine.add([1] * 8, 4, tenant="busy")
    for _ in range(60):
        engine.step()
    already = sum(r.finished for r in engine.requests)
    for _ in range(5):
        engine.add([2] * 8, 4, tenant="late")
    order = [r.tenant for r in finishing_order(engine)][:6]
    assert already > 8
    assert order.count("late") <= 4


def finishing_order(engine: FakeEngine) -> list[Request]:
    order: list[Request] = []
    while engine.step():
        order += [r for r in engine.requests if r.finished and r not in order]
    order += [r for r in engine.requests if r.finished and r not in order]
    return order


def test_steps_overlap_without_one_more_step_than_there_are_tokens() -> None:
    """A request that ends by its length is not scheduled beyond it, so only a token that ends it costs a row for nothing."""
    engine = FakeEngine(num_blocks=64, overlap=True)
    (request,) = engine.add(prompt_of(7), 12)
    engine.run()
    assert request.output_token_ids == expected_output(prompt_of(7), 12)
    assert [step["r0"] for step in engine.computed_per_step] == [7] + [1] * 11
    assert engine.ahead is None


def test_a_request_that_ended_while_its_next_step_ran_leaves_nothing_and_counts_nothing() -> None:
    plain, ahead = FakeEngine(num_blocks=64, eos=7), FakeEngine(num_blocks=64, eos=7, overlap=True)
    prompt = next(p for p in (prompt_of(6, seed) for seed in range(1000)) if 2 < len(expected_output(p, 20, 7)) < 20)
    for engine in (plain, ahead):
        (request,) = engine.add(prompt, 30)
        while engine.step():
            pass
        assert request.output_token_ids == expected_output(prompt, 30, 7)
        assert engine.scheduler.pool.num_used == 0
    assert ahead.scheduler.stats.num_computed_tokens == plain.scheduler.stats.num_computed_tokens
    assert ahead.scheduler.stats.num_steps == plain.scheduler.stats.num_steps + 1


def test_a_request_that_is_preempted_while_its_token_is_drawn_gets_the_token() -> None:
    engine = FakeEngine(num_blocks=8, overlap=True)
    requests = [*engine.add(prompt_of(7, 1), 20), *engine.add(prompt_of(7, 2), 20)]
    engine.run()
    assert requests[1].num_preemptions
    assert [request.output_token_ids for request in requests] == [expected_output(prompt_of(7, seed), 20) for seed in (1, 2)]
