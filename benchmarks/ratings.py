"""Our ratings beside evalica, choix, arena-rank and scipy: the same numbers, and what they cost. Run by hand, in an
environment of its own (nothing else of ours is imported):

    pip install evalica choix arena-rank numpy scipy
    python benchmarks/ratings.py

A peer that is not installed is skipped with one line that says so. Exit status 1 when a rating or a bound differs from
a converged reference by 1e-6 points or more, or when there was nothing to compare with. All of it is seeded; times are
wall clock, the best of several runs on the same counts, without imports and without arena-rank's first fit (it
compiles parts of itself in each one).

Three leagues: `even` (a million votes between 60 models, every pair alike), `uneven` (the same number, traffic by
Zipf's law, strengths three times as far apart, five newcomers with some 40 battles), `young` (300 votes, 6 models).

What each peer is asked, and how its definition differs:

- scipy: `minimize` (trust-exact) on the likelihood, then `root` (MINPACK hybrj) on its slope; bounds from
  `numpy.linalg.pinv(H) @ S @ pinv(H)`. No regularisation: this is the reference.
- evalica: `bradley_terry`, Newman's iteration in Rust, a tie as half a win each way, tolerance 1e-14. Ratings only.
- choix: `ilsr_pairwise_dense`, alpha 0, tolerance 1e-13. Ratings only. Its `opt_pairwise` puts a prior on the ratings
  (alpha 1e-6) and takes one vote at a time; it is not asked.
- arena-rank: L-BFGS. `default` is what its leaderboard does: it stops where the loss per vote changes by less than
  1e-9, and adds 1e-5 x votes to the diagonal of H before inverting, which narrows its bounds. `tight` has neither: ftol
  0, gtol 1e-14, its own H and S with no ridge, inverted with `pinv` because its `inv` cannot (H is singular).

Seen (Python 3.11.7, evalica 0.4.2, choix 0.4.1, arena-rank 0.1.1, numpy 2.3.3, scipy 1.17.1; two cores, shared), the
largest differences in points, ratings / bounds; the last three columns are times in ms:

                         even              uneven             young     even  uneven  young
    ours                                                                  66      72    0.4
    scipy           2e-13 / 2e-13     8e-11 / 9e-11     1e-13 / 1e-13     19      18    1.3
    evalica         2e-13             2e-12             1e-13              7       7    0.5
    choix           2e-13             2e-10             3e-13             13      13    0.8
    arena-rank tight
                    2e-10 / 2e-10     2e-07 / 3e-07     9e-13 / 9e-13   1020     980    730
    arena-rank default
                    7e-05 / 5e-03     6e+00 / 7e+01     3e-05 / 6e-03    850     820    690

So plain Python, bounds included, costs 3 to 4 times numpy and scipy and 9 to 11 times evalica's Rust (which has no
bounds), stays under a tenth of a second for a million votes, and needs no dependency. Of ours half is Newton's method,
a third the bounds, the rest counting. Elo over the million votes one by one: 540 ms, evalica's 500 ms, 2e-13 apart.
arena-rank's default has not converged where strengths are far apart (`uneven`): 6 points.
"""

from __future__ import annotations

import math
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).parent.parent))

from chat.arena.ratings import MEAN, OUTCOMES, POINTS, Row, Z, bradley_terry, elo

T = TypeVar("T")
Vote = tuple[str, str, str]
LIMIT = 1e-6  # points: what a converged reference may differ by
RUNS = 7


@dataclass(frozen=True)
class League:
    """Votes of one kind: `spread` of the strengths in log-odds, `zipf` of the traffic, and battles of newcomers."""

    name: str
    models: int
    votes: int
    spread: float
    zipf: float = 0.0
    newcomers: int = 0

    def play(self) -> list[Vote]:
        rng = random.Random(self.name)
        names = [f"model-{i:02}" for i in range(self.models)]
        strength = {name: rng.gauss(0.0, self.spread) for name in names}
        old = names[: self.models - self.newcomers]
        traffic = list(accumulate((i + 1) ** -self.zipf for i in range(len(old))))
        guests = [(new, rng.choice(old)) for new in names[len(old) :] for _ in range(40)]
        pairs = zip(*(rng.choices(old, cum_weights=traffic, k=self.votes) for _ in "ab"), strict=True)
        return [vote(a, b, strength, rng) for a, b in [*pairs, *guests] if a != b]


LEAGUES = [
    League("even", models=60, votes=1_017_000, spread=0.6),
    League("uneven", models=60, votes=1_060_000, spread=1.8, zipf=0.8, newcomers=5),
    League("young", models=6, votes=360, spread=0.6),
]


def vote(a: str, b: str, strength: dict[str, float], rng: random.Random) -> Vote:
    """Three votes in ten are a tie or both-bad; the others follow the model."""
    chance = rng.random()
    if chance < 0.3:
        return a, b, "tie" if chance < 0.2 else "both_bad"
    return a, b, "model_a" if rng.random() < 1 / (1 + math.exp(strength[b] - strength[a])) else "model_b"


@dataclass(frozen=True)
class Answer:
    """What one program says of a league: points by model in order of id, and the bounds if it has them."""

    ratings: list[float]
    bounds: list[float] | None  # all lower ones, then all upper ones
    seconds: float


def timed(work: Callable[[], T], runs: int = RUNS) -> tuple[T, float]:
    """The result and the best wall clock of several runs."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - started)
    return result, min(times)


def points(numpy: Any, logs: Any) -> Any:
    """Log-odds as rating points with the mean at 1000."""
    scaled = numpy.asarray(logs, dtype=float) * POINTS
    return scaled - scaled.mean() + MEAN


def around(numpy: Any, ratings: Any, covariance: Any) -> list[float]:
    """Lower, then upper bounds from the covariance of the log-odds."""
    margins = Z * POINTS * numpy.sqrt(numpy.diag(covariance))
    return [*(ratings - margins).tolist(), *(ratings + margins).tolist()]


def counted(rows: list[Row]) -> tuple[list[str], dict[tuple[int, int, float], int]]:
    """The models, and how often (first, second, score of the first) happened, by index."""
    names = sorted({name for row in rows for name in row[:2]})
    index = {name: i for i, name in enumerate(names)}
    counts: Counter[tuple[int, int, float]] = Counter()
    for a, b, winner, count in rows:
        counts[index[a], index[b], OUTCOMES[winner][0]] += count
    return names, counts


def ours(rows: list[Row]) -> Answer:
    ratings, seconds = timed(lambda: bradley_terry(rows))
    ratings.sort(key=lambda rating: rating.model)
    numbers = [[r.rating, r.lower, r.upper] for r in ratings]
    complete = [[float(number) for number in line if number is not None] for line in numbers]
    centres, lowers, uppers = (list(column) for column in zip(*complete, strict=True))
    assert len(centres) == len(ratings), "a league must be one group, or the peers do not converge"
    return Answer(centres, lowers + uppers, seconds)


class Likelihood:
    """The unregularised problem on numpy arrays, the last model held at 0."""

    def __init__(self, rows: list[Row]) -> None:
        self.numpy = import_module("numpy")
        names, counts = counted(rows)
        self.size = len(names)
        columns = zip(*((*battle, count) for battle, count in counts.items()), strict=True)
        self.a, self.b, self.score, self.count = (self.numpy.array(column) for column in columns)
        self.battles = self.both_ways(self.count, self.count)
        self.wins = self.both_ways(self.count * self.score, self.count * (1 - self.score))

    def both_ways(self, forward: Any, backward: Any) -> Any:
        matrix = self.numpy.zeros((self.size, self.size))
        self.numpy.add.at(matrix, (self.a, self.b), forward)
        self.numpy.add.at(matrix, (self.b, self.a), backward)
        return matrix

    def apart(self, free: Any) -> Any:
        logs = self.numpy.append(free, 0.0)
        return logs[:, None] - logs[None, :]

    def chances(self, free: Any) -> Any:
        return 1 / (1 + self.numpy.exp(-self.apart(free)))

    def loss(self, free: Any) -> Any:
        return (self.wins * self.numpy.logaddexp(0, -self.apart(free))).sum()

    def slope(self, free: Any) -> Any:
        return (self.battles * self.chances(free) - self.wins).sum(axis=1)[:-1]

    def laplacian(self, weights: Any) -> Any:
        return self.numpy.diag(weights.sum(axis=1)) - weights

    def hessian(self, free: Any) -> Any:
        p = self.chances(free)
        return self.laplacian(self.battles * p * (1 - p))

    def sandwich(self, free: Any) -> Any:
        squares = self.count * (self.score - self.chances(free)[self.a, self.b]) ** 2
        inverse = self.numpy.linalg.pinv(self.hessian(free), rcond=1e-14, hermitian=True)
        return inverse @ self.laplacian(self.both_ways(squares, squares)) @ inverse


def scipy(rows: list[Row]) -> Answer:
    numpy, optimize = import_module("numpy"), import_module("scipy.optimize")

    def solve() -> tuple[Any, Any]:
        problem = Likelihood(rows)

        def curvature(free: Any) -> Any:
            return problem.hessian(free)[:-1, :-1]

        free = numpy.zeros(problem.size - 1)
        free = optimize.minimize(problem.loss, free, method="trust-exact", jac=problem.slope, hess=curvature).x
        for _ in range(2):  # again from its own result: it stops a few digits before rounding does
            free = optimize.root(problem.slope, free, jac=curvature, tol=1e-15).x
        return points(numpy, numpy.append(free, 0.0)), problem.sandwich(free)

    (ratings, covariance), seconds = timed(solve)
    return Answer(ratings.tolist(), around(numpy, ratings, covariance), seconds)


def evalica(rows: list[Row]) -> Answer:
    numpy, peer = import_module("numpy"), import_module("evalica")
    words = {"model_a": peer.Winner.X, "model_b": peer.Winner.Y}
    firsts, opponents, winners, counts = (list(column) for column in zip(*rows, strict=True))
    outcomes, weights = [words.get(word, peer.Winner.Draw) for word in winners], [float(count) for count in counts]
    fit = partial(peer.bradley_terry, firsts, opponents, outcomes, weights=weights, tolerance=1e-14, limit=100_000)
    result, seconds = timed(fit)
    return Answer(points(numpy, numpy.log(result.scores.sort_index().to_numpy())).tolist(), None, seconds)


def choix(rows: list[Row]) -> Answer:
    numpy, peer = import_module("numpy"), import_module("choix")

    def solve() -> Any:
        names, counts = counted(rows)
        matrix = numpy.zeros((len(names), len(names)))
        for (a, b, score), count in counts.items():
            matrix[a, b] += count * score
            matrix[b, a] += count * (1 - score)
        return peer.ilsr_pairwise_dense(matrix, alpha=0.0, max_iter=10_000, tol=1e-13)

    result, seconds = timed(solve)
    return Answer(points(numpy, result).tolist(), None, seconds)


def arena_rank(rows: list[Row], tight: bool) -> Answer:
    numpy, jax = import_module("numpy"), import_module("jax.numpy")
    peer = import_module("arena_rank.models.bradley_terry").BradleyTerry
    names, counted_rows = counted(rows)
    keys = list(counted_rows)
    counts = jax.array([float(counted_rows[key]) for key in keys])
    data = import_module("arena_rank.utils.data_utils").PairDataset(
        competitors=names,
        pairs=jax.array([key[:2] for key in keys], dtype=jax.int32),
        outcomes=jax.array([key[2] for key in keys]),
        counts=counts,
        weights=jax.ones(len(keys)),
        opt_weights=counts,
    )

    def solve() -> tuple[Any, list[float]]:
        model = peer(len(names), **({"ftol": 0.0, "gtol": 1e-14, "hessian_reg": 0.0} if tight else {}))
        found = model.compute_ratings_and_cis(data)
        ratings = points(numpy, model.params["ratings"])
        if not tight:
            return ratings, [float(bound) for side in ("lower", "upper") for bound in found[f"rating_{side}"]]
        parts = (data.pairs, data.outcomes, data.counts, data.opt_weights, 0.0, len(names))
        bread, filling = peer.compute_hessian_and_covariance(model.params["ratings"], *parts)
        inverse = numpy.linalg.pinv(numpy.asarray(bread), rcond=1e-14, hermitian=True)
        return ratings, around(numpy, ratings, inverse @ numpy.asarray(filling) @ inverse)

    timed(solve, runs=1)
    (ratings, bounds), seconds = timed(solve, runs=3)
    return Answer(ratings.tolist(), bounds, seconds)


PEERS: dict[str, Callable[[list[Row]], Answer]] = {
    "scipy": scipy,
    "evalica": evalica,
    "choix": choix,
    "arena-rank tight": partial(arena_rank, tight=True),
    "arena-rank default": partial(arena_rank, tight=False),
}


def installed() -> Iterator[str]:
    """The peers that can be imported here; the others are named loudly."""
    for name in PEERS:
        try:
            import_module(name.split()[0].replace("-", "_"))
            import_module("numpy")
            yield name
        except ImportError as missing:
            print(f"!!! SKIPPED {name}: {missing} (pip install {name.split()[0]} numpy)", flush=True)


def farthest(mine: list[float], theirs: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(mine, theirs, strict=True))


def compare(league: League, votes: list[Vote], peers: list[str]) -> float:
    """Print the league's table; the largest difference to a converged reference."""
    rows = [(*row, count) for row, count in Counter(votes).items()]
    mine, worst = ours(rows), 0.0
    print(f"\n{league.name}: {len(votes):,} votes, {len(mine.ratings)} models, {len(rows):,} rows")
    print(f"  {'ours':20}{'':44}{mine.seconds * 1000:9.1f} ms")
    for name in peers:
        answer = PEERS[name](rows)
        apart = [farthest(mine.ratings, answer.ratings)]
        if answer.bounds and mine.bounds:
            apart.append(farthest(mine.bounds, answer.bounds))
        told = f"ratings {apart[0]:.1e}, bounds " + (f"{apart[1]:.1e} points" if apart[1:] else "none")
        print(f"  {name:20}{told:44}{answer.seconds * 1000:9.1f} ms   ours / its {mine.seconds / answer.seconds:6.2f}")
        worst = worst if "default" in name else max(worst, *apart)
    return worst


def compare_elo(votes: list[Vote]) -> float:
    """Sequential Elo over every vote, with evalica's (Rust) beside it."""
    peer = import_module("evalica")
    words = {"model_a": peer.Winner.X, "model_b": peer.Winner.Y}
    a, b, winners = (list(column) for column in zip(*votes, strict=True))
    outcomes = [words.get(word, peer.Winner.Draw) for word in winners]
    mine, our_time = timed(lambda: elo(votes), runs=3)
    theirs, its_time = timed(lambda: peer.elo(a, b, outcomes, k=4.0), runs=3)
    apart = max(abs(rating - theirs.scores[model]) for model, rating in mine.items())
    print(f"\nelo: {len(votes):,} votes one by one")
    print(f"  {'ours':64}{our_time * 1000:9.1f} ms")
    print(f"  {'evalica':20}{f'ratings {apart:.1e} points':44}{its_time * 1000:9.1f} ms", end="")
    print(f"   ours / its {our_time / its_time:6.2f}")
    return float(apart)


def main() -> int:
    print(f"Python {platform.python_version()}; differences are the largest of any model, in rating points")
    peers = list(installed())
    worst = 0.0
    for league in LEAGUES:
        votes = league.play()
        worst = max(worst, compare(league, votes, peers))
        if league.name == "even" and "evalica" in peers:
            worst = max(worst, compare_elo(votes))
    if not peers:
        print("\n!!! NOTHING COMPARED: no peer is installed")
        return 1
    print(f"\nlargest difference to a converged reference: {worst:.1e} points (limit {LIMIT:.0e})")
    return int(worst >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
