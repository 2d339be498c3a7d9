"""How workers are counted: trials are a run's own steps, and the choice follows from the times alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from relssl.data.workers import Choice, Trial, Tuning, best, candidates

from relssl.settings.run import LoaderConfig


def tried(*figures: tuple[int, int, float]) -> list[Trial]:
    return [Trial(workers, prefetch, 1, seconds) for workers, prefetch, seconds in figures]


@pytest.mark.parametrize(
    ("cores", "counts"), [(1, [1]), (2, [2, 1]), (3, [3, 2, 1]), (4, [4, 3, 2, 1]), (16, [16, 12, 8, 4]), (200, [32, 24, 16, 8])]
)
def test_candidates(cores: int, counts: list[int]) -> None:
    assert candidates(cores) == counts


def test_the_fastest_wins_and_fewer_workers_among_equals() -> None:
    assert best(tried((16, 2, 1.0), (12, 2, 1.2), (8, 2, 1.1), (4, 2, 3.0))).workers == 16
    assert best(tried((16, 2, 1.0), (12, 2, 1.04), (8, 2, 1.03), (4, 2, 3.0))).workers == 8
    assert best(tried((8, 2, 1.03), (8, 4, 1.0))).prefetch == 2
    assert best(tried((8, 2, 1.1), (8, 4, 1.0))).prefetch == 4


class World:
    """A clock that training and loading move, and a run that is served by them."""

    def __init__(self, loading: dict[tuple[int, int], float], computing: float = 0.1) -> None:
        self.now, self.loading, self.computing, self.served = 0.0, loading, computing, 0

    def steps(self, trial: Trial, pause_at: int | None) -> Iterator[int]:
        self.now += 5.0  # workers start
        for _ in range(trial.steps):
            self.now += self.loading[trial.workers, trial.prefetch]
            yield self.served
            self.now += self.computing + (1000.0 if self.served == pause_at else 0.0)
            self.served += 1

    def run(self, tuning: Tuning, pause_at: int | None = None) -> Choice:
        seen = []
        for trial in tuning.trials():
            seen += trial.timed(self.steps(trial, pause_at), lambda: self.now)
        assert seen == list(range(self.served))
        return tuning.choice()


LOADING = {(4, 2): 0.5, (3, 2): 0.2, (2, 2): 0.205, (1, 2): 0.4, (2, 4): 0.1}


def test_each_trial_is_timed_and_the_best_two_settings_are_kept() -> None:
    found = World(LOADING).run(Tuning(LoaderConfig(), 4, 1, 10_000))
    times = {(trial.workers, trial.prefetch): trial.seconds for trial in found.trials}
    assert times == pytest.approx({setting: seconds + 0.1 for setting, seconds in LOADING.items()})
    assert (found.workers, found.prefetch) == (2, 4)
    assert str(found) == "2 loader workers x 4 batches (ms a step: 4 x 2 600, 3 x 2 300, 2 x 2 305, 1 x 2 500, 2 x 4 200)"


@pytest.mark.parametrize("pause", range(0, 120, 7))
def test_a_pause_in_one_step_does_not_decide(pause: int) -> None:
    found = World(LOADING).run(Tuning(LoaderConfig(), 4, 1, 10_000), pause)
    assert (found.workers, found.prefetch) == (2, 4)


def test_what_is_given_is_not_measured() -> None:
    found = World({(3, 2): 1.0, (3, 4): 0.5}).run(Tuning(LoaderConfig(workers=3), 8, 1, 10_000))
    assert (found.workers, found.prefetch, len(found.trials)) == (3, 4, 2)
    found = World({(2, 7): 1.0, (1, 7): 0.5}).run(Tuning(LoaderConfig(prefetch=7), 2, 1, 10_000))
    assert (found.workers, found.prefetch, len(found.trials)) == (1, 7, 2)
    for loader in (LoaderConfig(workers=3, prefetch=7), LoaderConfig(workers=0)):
        assert World({}).run(Tuning(loader, 8, 1, 10_000)) == Choice(loader.workers, loader.prefetch or 2)


@pytest.mark.parametrize(("cores", "steps"), [(2, 199), (16, 1000), (16, 0)])
def test_a_short_run_measures_nothing(cores: int, steps: int) -> None:
    found = World({}).run(Tuning(LoaderConfig(), cores, 1, steps))
    assert (found, str(found)) == (Choice(cores - 1, 2), f"{cores - 1} loader worker{'s' * (cores > 2)} x 2 batches")


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("cores", [1, 2, 7, 64])
def test_trials_take_a_quarter_of_a_run_at_most(cores: int, parts: int) -> None:
    for steps in (200, 500, 1000, 5000):
        world = World(dict.fromkeys([(workers, prefetch) for workers in range(1, 65) for prefetch in (2, 4)], 1.0))
        found = world.run(Tuning(LoaderConfig(), cores, parts, steps))
        assert 4 * world.served <= steps
        assert steps < 5000 or found.trials


def test_a_trial_may_fail_only_where_another_way_is_left() -> None:
    tuning = Tuning(LoaderConfig(), 16, 1, 10_000)
    trials, allowed = tuning.trials(), list[bool]()
    for _ in range(4):
        allowed.append(tuning.may_fail(next(trials)))
    assert allowed == [True, True, True, False]
    tuning.done[2].seconds = 1.0
    assert tuning.may_fail(tuning.done[3]) and tuning.may_fail(next(trials))
    assert str(tuning.choice()) == (
        "8 loader workers x 2 batches (ms a step: 16 x 2 failed, 12 x 2 failed, 8 x 2 1000, 4 x 2 failed, 8 x 4 failed)"
    )
    asked = Tuning(LoaderConfig(workers=3), 16, 1, 10_000)
    assert not asked.may_fail(next(asked.trials()))
