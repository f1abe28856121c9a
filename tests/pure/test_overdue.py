"""Steps that do not come back, though every worker is alive."""

from __future__ import annotations

from shoal.executor.overdue import Overdue


def test_nothing_is_late_where_nothing_was_handed_out() -> None:
    overdue = Overdue(60.0)
    assert not overdue.is_late(1e9)
    overdue.handed_out(0, 0, 0.0)
    overdue.came(0, 1.0)
    overdue.came(7, 2.0)  # of an incarnation before
    assert not overdue.is_late(1e9)


def test_a_route_that_goes_on_is_not_late_however_long_it_has_work() -> None:
    overdue = Overdue(60.0)
    overdue.handed_out(0, 0, 0.0)
    for step_id in range(1, 100):
        overdue.handed_out(step_id, 0, step_id * 50.0)
        assert not overdue.is_late(step_id * 50.0 + 9.0)
        overdue.came(step_id - 1, step_id * 50.0 + 9.0)
    assert not overdue.is_late(99 * 50.0 + 69.0)
    assert overdue.is_late(99 * 50.0 + 70.0)


def test_steps_are_late_when_none_comes() -> None:
    overdue = Overdue(60.0)
    overdue.handed_out(0, 0, 0.0)
    overdue.handed_out(1, 1, 50.0)
    assert not overdue.is_late(60.0)
    assert overdue.is_late(60.1)
    overdue.forget()
    assert not overdue.is_late(60.1)


def test_one_route_that_hangs_is_noticed_while_others_go_on() -> None:
    """A message was lost between two of its workers."""
    overdue = Overdue(60.0)
    overdue.handed_out(0, 0, 0.0)
    late_at = None
    for step_id in range(1, 100):
        now = step_id * 2.0
        overdue.handed_out(step_id, 1, now)
        if overdue.is_late(now):
            late_at = now
            break
        overdue.came(step_id, now + 1.0)
    assert late_at == 122.0, "two routes: twice as long as one"
