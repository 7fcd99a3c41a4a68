"""The leaderboard's arithmetic: what the ratings, their intervals, the ranks and the Elo movement are, and are not."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat.arena.ratings import OUTCOMES, POINTS, Rating, Row, bradley_terry, elo

Z = NormalDist().inv_cdf(0.975)
WINNERS = list(OUTCOMES)
MODELS = ["ada", "bo", "cy", "di", "ed", "flo"]
MIRRORED = {"model_a": "model_b", "model_b": "model_a", "tie": "tie", "both_bad": "both_bad"}

any_row = st.tuples(st.sampled_from(MODELS), st.sampled_from(MODELS), st.sampled_from(WINNERS), st.integers(1, 300))
any_rows = st.lists(any_row, max_size=40)


def by_model(rows: Iterable[Row]) -> dict[str, Rating]:
    return {rating.model: rating for rating in bradley_terry(rows)}


def rated(rows: Iterable[Row]) -> dict[str, tuple[float, float, float]]:
    """Rating, lower and upper bound of the models that have them."""
    found = {}
    for rating in bradley_terry(rows):
        if rating.rating is not None and rating.lower is not None and rating.upper is not None:
            found[rating.model] = (rating.rating, rating.lower, rating.upper)
    return found


def centres(rows: Iterable[Row]) -> dict[str, float]:
    return {model: bounds[0] for model, bounds in rated(rows).items()}


def margins(rows: Iterable[Row]) -> dict[str, float]:
    return {model: upper - rating for model, (rating, _, upper) in rated(rows).items()}


def close(numbers: dict[str, float]) -> object:
    return pytest.approx(numbers, rel=1e-8, abs=1e-6)


def league(seed: int, models: int, battles: int) -> list[Row]:
    """Random votes between models of random strength, three in ten of them a tie or both-bad."""
    rng = random.Random(seed)
    strength = {f"model-{i:02}": rng.gauss(0.0, 0.6) for i in range(models)}
    counts: Counter[tuple[str, str, str]] = Counter()
    for _ in range(battles):
        a, b = rng.sample(sorted(strength), 2)
        decisive = "model_a" if rng.random() < 1 / (1 + math.exp(strength[b] - strength[a])) else "model_b"
        counts[a, b, rng.choices([decisive, "tie", "both_bad"], [7, 2, 1])[0]] += 1
    return [(*battle, count) for battle, count in counts.items()]


# Ratings


def test_two_models_differ_by_400_times_the_logarithm_of_wins_over_losses() -> None:
    """10:1 is one power of ten, 400 points, around a mean of 1000."""
    assert centres([("ada", "bo", "model_a", 10), ("ada", "bo", "model_b", 1)]) == close({"ada": 1200.0, "bo": 800.0})


def test_ties_and_both_bad_count_half_each_way() -> None:
    """3 wins, 4 ties, 2 both-bad and 1 loss are 6 to 4."""
    ratings = by_model([("ada", "bo", word, count) for word, count in zip(WINNERS, (3, 1, 4, 2), strict=True)])
    assert ratings["ada"].rating == pytest.approx(1000 + 200 * math.log10(6 / 4))


def test_a_chain_of_three_adds_its_differences() -> None:
    """ada:bo is 10:1 and bo:cy is 10:1, so ada and cy, who never met, are 800 points apart."""
    rows = [("ada", "bo", "model_a", 10), ("ada", "bo", "model_b", 1)]
    rows += [("bo", "cy", "model_a", 10), ("bo", "cy", "model_b", 1)]
    assert centres(rows) == close({"ada": 1400.0, "bo": 1000.0, "cy": 600.0})


def surpluses(rows: list[Row]) -> dict[str, float]:
    """Score minus expected score of each rated model: all 0 where the likelihood is largest."""
    ratings = centres(rows)
    surplus = dict.fromkeys(ratings, 0.0)
    for a, b, winner, count in rows:
        if a in ratings and b in ratings:
            difference = count * (OUTCOMES[winner][0] - 1 / (1 + 10 ** ((ratings[b] - ratings[a]) / 400)))
            surplus[a] += difference
            surplus[b] -= difference
    return surplus


@given(any_rows)
def test_each_rated_model_wins_as_often_as_its_rating_expects(rows: list[Row]) -> None:
    """Over the battles between rated models."""
    assert all(abs(surplus) < 1e-8 for surplus in surpluses(rows).values())


@given(any_rows)
def test_the_mean_of_the_ratings_is_1000(rows: list[Row]) -> None:
    ratings = centres(rows)
    assert sum(ratings.values()) == pytest.approx(1000.0 * len(ratings))


@given(any_rows)
def test_two_ties_rate_as_a_win_and_a_loss(rows: list[Row]) -> None:
    doubled = [(a, b, winner, 2 * count) for a, b, winner, count in rows]
    split: list[Row] = []
    for a, b, winner, count in rows:
        words = (winner, winner) if winner in ("model_a", "model_b") else ("model_a", "model_b")
        split += [(a, b, word, count) for word in words]
    assert centres(split) == close(centres(doubled))


@given(any_rows)
def test_both_bad_rates_as_a_tie(rows: list[Row]) -> None:
    words = {"both_bad": "tie"}
    assert rated((a, b, words.get(winner, winner), count) for a, b, winner, count in rows) == rated(rows)


# What must not matter


@given(any_rows, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_changes_nothing(rows: list[Row], rng: random.Random) -> None:
    shuffled = rng.sample(rows, len(rows))
    assert bradley_terry(shuffled) == bradley_terry(rows)


@given(any_rows, st.randoms(use_true_random=False))
def test_the_sides_change_nothing(rows: list[Row], rng: random.Random) -> None:
    turned = [(b, a, MIRRORED[winner], n) if rng.random() < 0.5 else (a, b, winner, n) for a, b, winner, n in rows]
    assert bradley_terry(turned) == bradley_terry(rows)


@given(any_rows)
def test_rows_may_be_votes_or_sums_of_votes(rows: list[Row]) -> None:
    parted = [(a, b, winner, part) for a, b, winner, n in rows for part in (n // 2, n - n // 2) if part]
    assert bradley_terry(parted) == bradley_terry(rows)


@given(any_rows, st.permutations(MODELS))
def test_names_change_nothing_but_the_choice_between_equal_groups(rows: list[Row], names: list[str]) -> None:
    rows = rows + [(a, b, "tie", 1) for a, b in pairwise(MODELS)]  # one group
    renamed = dict(zip(MODELS, names, strict=True))
    before, after = rated(rows), rated((renamed[a], renamed[b], winner, count) for a, b, winner, count in rows)
    for model, bounds in before.items():
        assert after[renamed[model]] == pytest.approx(bounds, rel=1e-8)


# Intervals


def test_the_interval_of_two_models_is_the_binomial_one() -> None:
    """Log-odds of w wins in n have the variance 1 / (n p q); each model holds half of the difference."""
    wins, losses = 30, 10
    half = Z * POINTS * math.sqrt(1 / wins + 1 / losses) / 2
    assert margins([("ada", "bo", "model_a", wins), ("ada", "bo", "model_b", losses)]) == close(
        {"ada": half, "bo": half}
    )


def test_models_that_only_ever_tie_are_certainly_equal() -> None:
    """Votes without scatter leave no doubt: this is where the sandwich differs from the inverse Hessian."""
    assert rated([("ada", "bo", "tie", 3)]) == {"ada": (1000.0, 1000.0, 1000.0), "bo": (1000.0, 1000.0, 1000.0)}


@given(any_rows)
def test_twice_the_same_votes_keep_the_ratings_and_narrow_the_intervals_by_the_root_of_two(rows: list[Row]) -> None:
    assert centres(rows + rows) == close(centres(rows))
    assert margins(rows + rows) == close({model: margin / math.sqrt(2) for model, margin in margins(rows).items()})


def test_the_interval_adds_up_what_each_vote_moved() -> None:
    """The infinitesimal jackknife, taken numerically: one vote more among a million copies of all votes."""
    rows, copies = league(seed=3, models=5, battles=400), 10**6
    base = centres([(a, b, winner, copies * count) for a, b, winner, count in rows])
    variance = dict.fromkeys(base, 0.0)
    for a, b, winner, count in rows:
        moved = centres([(*row[:3], copies * row[3]) for row in rows] + [(a, b, winner, 1)])
        for model in base:
            variance[model] += count * (copies * (moved[model] - base[model])) ** 2
    expected = {model: Z * math.sqrt(square) for model, square in variance.items()}
    assert margins(rows) == pytest.approx(expected, rel=1e-4)


def test_the_interval_is_as_wide_as_a_bootstrap_says() -> None:
    """400 resamples know a standard deviation to 3.5 %; 12 % is over three times that."""
    rows, rng = league(seed=5, models=4, battles=2000), random.Random(7)
    samples: dict[str, list[float]] = {}
    for _ in range(400):
        drawn = Counter(rng.choices([row[:3] for row in rows], [row[3] for row in rows], k=2000))
        for model, rating in centres([(*battle, count) for battle, count in drawn.items()]).items():
            samples.setdefault(model, []).append(rating)
    deviations = {model: math.sqrt(sum((r - sum(rs) / 400) ** 2 for r in rs) / 399) for model, rs in samples.items()}
    assert {model: margin / Z for model, margin in margins(rows).items()} == pytest.approx(deviations, rel=0.12)


# Ranks and order


@given(any_rows)
def test_rank_is_one_more_than_the_models_certainly_above(rows: list[Row]) -> None:
    bounds, ratings = rated(rows), by_model(rows)
    for model, (_, _, upper) in bounds.items():
        assert ratings[model].rank == 1 + sum(lower > upper for _, lower, _ in bounds.values())


def test_models_with_overlapping_intervals_share_a_rank() -> None:
    rows = [("ada", "bo", "model_a", 11), ("ada", "bo", "model_b", 10)]
    rows += [(best, "cy", winner, n) for best in ("ada", "bo") for winner, n in (("model_a", 900), ("model_b", 100))]
    assert [(rating.model, rating.rank) for rating in bradley_terry(rows)] == [("ada", 1), ("bo", 1), ("cy", 3)]


@given(any_rows)
def test_the_best_come_first_and_the_unrated_last(rows: list[Row]) -> None:
    ratings = bradley_terry(rows)
    ranks = [rating.rank for rating in ratings if rating.rank is not None]
    assert ranks == sorted(ranks)
    assert all(rating.rank is None for rating in ratings[len(ranks) :])


# Who can be rated


def linked(rows: list[Row]) -> set[tuple[str, str]]:
    """Every (x, y) where x has beaten or drawn with y, directly or through others: Warshall's closure."""
    beats = {(a, b) for a, b, winner, _ in rows if winner != "model_b"}
    beats |= {(b, a) for a, b, winner, _ in rows if winner != "model_a"}
    for middle in MODELS:
        beats |= {(x, y) for x in MODELS for y in MODELS if (x, middle) in beats and (middle, y) in beats}
    return beats


@given(any_rows)
def test_exactly_one_largest_group_of_mutually_beaten_models_is_rated(rows: list[Row]) -> None:
    beats = linked([row for row in rows if row[0] != row[1]])
    groups = [{y for y in MODELS if (x, y) in beats and (y, x) in beats} for x in MODELS]
    members = set(rated(rows))
    assert len(members) == max(map(len, groups))
    assert not members or members in groups


def test_a_model_that_only_wins_is_listed_without_a_rating() -> None:
    """Nothing says how much better it is: the likelihood grows without end. Its battles move nobody."""
    rows = [("ada", "bo", "model_a", 3), ("ada", "bo", "model_b", 2)]
    ratings = bradley_terry([*rows, ("cy", "ada", "model_a", 50)])
    assert [rating.model for rating in ratings] == ["ada", "bo", "cy"]
    assert ratings[2] == Rating("cy", None, None, None, None, 50, 50, 0, 0, 0, 1.0, False)
    assert [rating.rating for rating in ratings[:2]] == [rating.rating for rating in bradley_terry(rows)]


def test_a_tie_links_both_ways() -> None:
    assert set(rated([("ada", "bo", "model_a", 9), ("ada", "bo", "both_bad", 1)])) == {"ada", "bo"}


def test_a_ring_of_wins_is_one_group() -> None:
    ring = [("ada", "bo", "model_a", 1), ("bo", "cy", "model_a", 1), ("cy", "ada", "model_a", 1)]
    assert centres(ring) == close({"ada": 1000.0, "bo": 1000.0, "cy": 1000.0})


def test_of_two_groups_of_one_size_the_one_with_more_battles_is_rated() -> None:
    assert set(rated([("ada", "bo", "tie", 5), ("cy", "di", "tie", 6)])) == {"cy", "di"}


def test_of_two_groups_alike_the_one_with_the_first_id_is_rated() -> None:
    assert set(rated([("cy", "di", "tie", 5), ("bo", "ed", "tie", 5)])) == {"bo", "ed"}


def test_unrated_models_stand_in_order_of_their_battles() -> None:
    rows = [("ada", "bo", "model_a", 5), ("cy", "bo", "model_a", 9)]
    assert [rating.model for rating in bradley_terry(rows)] == ["bo", "cy", "ada"]


def test_without_votes_there_is_no_leaderboard() -> None:
    assert bradley_terry([]) == []


def test_two_models_of_which_one_always_won_have_no_ratings() -> None:
    assert [(rating.model, rating.rank) for rating in bradley_terry([("ada", "bo", "model_a", 5)])] == [
        ("ada", None),
        ("bo", None),
    ]


def test_a_model_against_itself_says_nothing() -> None:
    rows = [("ada", "bo", "tie", 1)]
    assert bradley_terry([("ada", "ada", "model_a", 7), ("cy", "cy", "tie", 1), *rows]) == bradley_terry(rows)


def test_an_unknown_winner_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a winner among model_a, model_b, tie, both_bad, got 'model_c'"):
        bradley_terry([("ada", "bo", "model_c", 1)])


@pytest.mark.parametrize("count", [0, -1])
def test_a_count_below_one_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"expected a count of at least 1, got {count}"):
        bradley_terry([("ada", "bo", "tie", count)])


# Extremes


def test_odds_of_a_million_million_are_rated_exactly() -> None:
    rows = [("ada", "bo", "model_a", 10**12), ("ada", "bo", "model_b", 1)]
    assert centres(rows) == close({"ada": 3400.0, "bo": -1400.0})


def test_a_long_chain_of_huge_odds_converges() -> None:
    """59 differences of 12 powers of ten, reached in some 400 steps."""
    names = [f"model-{i:02}" for i in range(60)]
    rows = [(a, b, w, n) for a, b in pairwise(names) for w, n in (("model_a", 10**12), ("model_b", 1))]
    ratings = centres(rows)
    assert ratings["model-00"] - ratings["model-59"] == pytest.approx(59 * 12 * 400)


def test_votes_on_which_a_plain_newton_step_overshoots_converge() -> None:
    """Undamped, the steps leave for millions of points here."""
    wins = {("ada", "bo"): 10**6, ("ada", "di"): 100, ("bo", "cy"): 10, ("cy", "ada"): 10}
    rows = [(a, b, "model_a", n) for (a, b), n in (wins | {("cy", "bo"): 10**6, ("di", "cy"): 10**6}).items()]
    assert [round(rating) for rating in sorted(centres(rows).values())] == [-1595, 405, 2405, 2786]
    assert all(abs(surplus) < 1e-6 for surplus in surpluses(rows).values())


def test_a_pair_with_few_votes_is_not_drowned_by_pairs_with_many() -> None:
    """Two groups of equals with 10^16 votes inside and 11 between: the 11 alone set the distance."""
    rows = [("ada", "bo", "tie", 10**16), ("cy", "di", "tie", 10**16)]
    rows += [("bo", "cy", "model_a", 10), ("bo", "cy", "model_b", 1)]
    assert centres(rows) == close({"ada": 1200.0, "bo": 1200.0, "cy": 800.0, "di": 800.0})


def test_a_million_votes_between_60_models_take_less_than_a_second() -> None:
    """About 0.1 s; the limit leaves room for a busy machine."""
    rng = random.Random(1)
    names = [f"model-{i:02}" for i in range(60)]
    rows = [(a, b, winner, rng.randint(1, 140)) for a in names for b in names if a != b for winner in WINNERS]
    started = time.process_time()
    assert len(rated(rows)) == 60
    assert time.process_time() - started < 1.0


# Counts


def test_counts_are_over_all_battles_on_either_side() -> None:
    rows = [
        ("ada", "bo", "model_a", 4),
        ("bo", "ada", "model_a", 3),
        ("ada", "cy", "tie", 2),
        ("cy", "ada", "both_bad", 1),
    ]
    ada = by_model(rows)["ada"]
    assert (ada.battles, ada.wins, ada.losses, ada.ties, ada.both_bad) == (10, 4, 3, 2, 1)
    assert ada.win_rate == pytest.approx(0.55)


@pytest.mark.parametrize(("battles", "preliminary"), [(29, True), (30, False)])
def test_a_rating_is_preliminary_under_30_battles(battles: int, preliminary: bool) -> None:
    assert {rating.preliminary for rating in bradley_terry([("ada", "bo", "tie", battles)])} == {preliminary}


@given(any_rows)
def test_every_battle_is_counted_once_for_each_of_its_models(rows: list[Row]) -> None:
    ratings = bradley_terry(rows)
    assert sum(rating.battles for rating in ratings) == 2 * sum(row[3] for row in rows if row[0] != row[1])
    assert sum(rating.wins for rating in ratings) == sum(rating.losses for rating in ratings)


# Elo


def test_the_first_win_between_equals_moves_two_points() -> None:
    assert elo([("ada", "bo", "model_a")]) == {"ada": 1002.0, "bo": 998.0}


def test_a_second_win_moves_less() -> None:
    expected = 1002 + 4 * (1 - 1 / (1 + 10 ** (-4 / 400)))
    assert elo([("ada", "bo", "model_a"), ("bo", "ada", "model_b")])["ada"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("winner", ["tie", "both_bad"])
def test_a_draw_moves_unequal_models_together(winner: str) -> None:
    ratings = elo([("ada", "bo", winner)], start={"ada": 1400.0})
    assert ratings["ada"] == pytest.approx(1400 + 4 * (0.5 - 10 / 11))
    assert ratings["bo"] == pytest.approx(1000 - 4 * (0.5 - 10 / 11))


def test_elo_begins_where_it_is_told_and_leaves_that_alone() -> None:
    start = {"ada": 1200.0, "cy": 900.0}
    assert elo([], start) == start
    assert elo([("ada", "bo", "model_a")], start)["cy"] == 900.0
    assert start == {"ada": 1200.0, "cy": 900.0}


@given(st.lists(any_row.map(lambda row: row[:3])), st.integers(0, 20))
def test_elo_goes_on_from_where_it_stopped(votes: list[tuple[str, str, str]], cut: int) -> None:
    assert elo(votes[cut:], elo(votes[:cut])) == elo(votes)


@given(st.lists(any_row.map(lambda row: row[:3])))
def test_elo_takes_from_one_what_it_gives_to_the_other(votes: list[tuple[str, str, str]]) -> None:
    ratings = elo(votes)
    assert sum(ratings.values()) == pytest.approx(1000.0 * len(ratings))


def test_elo_skips_a_model_against_itself_and_refuses_an_unknown_winner() -> None:
    assert elo([("ada", "ada", "model_a")]) == {}
    with pytest.raises(ValueError, match="expected a winner"):
        elo([("ada", "bo", "bo")])
