"""The arena planner against an independent checker, over random partial orders."""

import random

import pytest

from graphnet.lowering.plan.memory import (
    ALIGN,
    Life,
    assign,
    overlaid,
    precedes,
    reachability,
    round_up,
)  # fmt: skip


def random_dag(seed):
    """(edges, lives) of a random program: each buffer has a writer (or two) and later readers."""
    rng = random.Random(seed)
    count = rng.randint(2, 24)
    lives, edges = {}, set()
    for k in range(rng.randint(1, 20)):
        at = rng.randrange(count)
        writers = [at]
        if rng.random() < 0.2 and at + 1 < count:
            writers.append(rng.randrange(at + 1, count))
            edges.add((writers[0], writers[1]))
        later = range(writers[-1] + 1, count)
        readers = rng.sample(later, min(len(later), rng.randint(0, 3)))
        edges.update((w, r) for w in writers for r in readers)
        size = rng.choice([1, 255, 256, 257, 1000, 4096])
        lives[f"b{k}"] = Life(size, tuple(writers), tuple(readers))
    for _ in range(rng.randint(0, count)):
        a, b = sorted(rng.sample(range(count), 2))
        edges.add((a, b))
    return count, sorted(edges), lives


def closure(count, edges):
    """(a, b) for every b that must come after a, by Warshall: not the planner's algorithm."""
    after = [[False] * count for _ in range(count)]
    for a, b in edges:
        after[a][b] = True
    for k in range(count):
        for i in range(count):
            if after[i][k]:
                for j in range(count):
                    after[i][j] |= after[k][j]
    return after


def some_orders(count, edges, rng, n=12):
    """Random legal orders of the steps."""
    for _ in range(n):
        done, left = [], set(range(count))
        while left:
            ready = [k for k in left if not any(b == k and a in left for a, b in edges)]
            done.append(rng.choice(ready))
            left.remove(done[-1])
        yield done


@pytest.mark.parametrize("seed", range(60))
def test_buffers_that_share_memory_never_live_together(seed):
    count, edges, lives = random_dag(seed)
    slots, size = assign(lives, reachability(count, edges))
    after = closure(count, edges)
    assert set(slots) == set(lives)
    assert max(s.end for s in slots.values()) == size
    for name, slot in slots.items():
        assert slot.offset % ALIGN == 0 and slot.size >= lives[name].size
    names = sorted(lives)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if slots[a].offset >= slots[b].end or slots[b].offset >= slots[a].end:
                continue
            uses = {n: (*lives[n].writers, *lives[n].readers) for n in (a, b)}
            a_first = all(after[u][w] for u in uses[a] for w in lives[b].writers)
            b_first = all(after[u][w] for u in uses[b] for w in lives[a].writers)
            assert a_first or b_first, (a, b)


@pytest.mark.parametrize("seed", range(20))
def test_no_read_sees_another_buffer_on_any_legal_order(seed):
    """Runs the program on real bytes: a write that lands on a living buffer is found."""
    count, edges, lives = random_dag(seed)
    slots, size = assign(lives, reachability(count, edges))
    for order in some_orders(count, edges, random.Random(seed)):
        memory = [None] * (size // ALIGN)
        for step in order:
            for name, life in lives.items():
                if step in life.readers:
                    s = slots[name]
                    assert set(memory[s.offset // ALIGN : s.end // ALIGN]) == {name}
            for name, life in lives.items():
                if step in life.writers:
                    s = slots[name]
                    memory[s.offset // ALIGN : s.end // ALIGN] = [name] * (s.size // ALIGN)


def test_a_chain_needs_two_buffers():
    lives = {f"v{k}": Life(1024, (k,), (k + 1,)) for k in range(10)}
    reach = reachability(11, [(k, k + 1) for k in range(10)])
    assert assign(lives, reach)[1] == 2048


def test_branches_do_not_share_though_the_listing_has_them_one_after_the_other():
    # 0 -> 1 -> 2 and 0 -> 3 -> 4: the order 0 1 2 3 4 is one of many.
    edges = [(0, 1), (1, 2), (0, 3), (3, 4)]
    reach = reachability(5, edges)
    left, right = Life(256, (1,), (2,)), Life(256, (3,), (4,))
    assert not precedes(left, right, reach) and not precedes(right, left, reach)
    assert assign({"l": left, "r": right}, reach)[1] == 512


def test_an_unread_buffer_still_has_its_place_while_it_is_written():
    lives = {"a": Life(256, (0,)), "b": Life(256, (0,), (1,))}
    assert assign(lives, reachability(2, [(0, 1)]))[1] == 512


def test_sizes_are_rounded_up():
    assert [round_up(n) for n in (0, 1, 256, 257)] == [256, 256, 256, 512]


# ---- a result in its operand's place ---------------------------------------------------------


def test_a_result_replaces_an_operand_that_dies():
    lives = {"a": Life(256, (0,), (1, 2)), "b": Life(256, (2,), (3,)), "c": Life(256, (3,))}
    reach = reachability(4, [(0, 1), (1, 2), (2, 3)])
    merged, home = overlaid(lives, [(2, "a", "b"), (3, "b", "c")], reach)
    assert home == {"b": "a", "c": "a"} and merged == {"a": Life(256, (0, 2, 3), (1, 2, 3))}


@pytest.mark.parametrize(
    "lives, edges",
    [
        # the operand is read later
        ({"a": Life(256, (0,), (1, 2)), "b": Life(256, (1,))}, [(0, 1), (1, 2)]),
        # ... or beside the step, on another branch
        ({"a": Life(256, (0,), (1, 2)), "b": Life(256, (1,))}, [(0, 1), (0, 2)]),
        # something else writes the result too
        ({"a": Life(256, (0,), (1,)), "b": Life(256, (1, 2))}, [(0, 1), (1, 2)]),
        ({"a": Life(256, (0,), (1,)), "b": Life(512, (1,))}, [(0, 1), (1, 2)]),
    ],
)
def test_it_stays_beside_one_that_lives(lives, edges):
    assert overlaid(lives, [(1, "a", "b")], reachability(3, edges)) == (lives, {})


def test_of_two_results_one_replaces_the_operand():
    lives = {"a": Life(256, (0,), (1,)), "b": Life(256, (1,)), "c": Life(256, (1,))}
    merged, home = overlaid(lives, [(1, "a", "b"), (1, "a", "c")], reachability(2, [(0, 1)]))
    assert home == {"b": "a"} and set(merged) == {"a", "c"}


def test_packing_again_finds_the_room_that_the_first_order_wasted():
    """a and c never meet, b lives beside both; largest first would leave a gap above a."""
    lives = {"a": Life(512, (0,), (1,)), "b": Life(256, (1,), (3,)), "c": Life(768, (2,), (3,))}
    reach = reachability(4, [(0, 1), (1, 2), (2, 3)])
    assert assign(lives, reach)[1] == 1024
