"""Votes in, leaderboard out: Bradley-Terry ratings with robust intervals, and Elo for the movement of a day.

Pure arithmetic on plain lists: it knows nothing of SQL, sessions, or of a model beyond its id. The statement that
feeds it aggregates, so a million votes between 60 models arrive as 14,000 rows and take about a tenth of a second;
`benchmarks/ratings.py` compares numbers and time with evalica, choix, arena-rank and scipy.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import mul

# By the winner's word: what `model_a` scores, and what the vote is for `model_a` and for `model_b`.
OUTCOMES = {
    "model_a": (1.0, "wins", "losses"),
    "model_b": (0.0, "losses", "wins"),
    "tie": (0.5, "ties", "ties"),
    "both_bad": (0.5, "both_bad", "both_bad"),
}
MEAN = 1000.0
POINTS = 400.0 / math.log(10.0)  # rating points in one unit of log-odds: scale 400, base 10
Z = 1.959963984540054  # 95 % of a normal distribution lie between -Z and Z
PRELIMINARY = 30  # battles: below it the normal approximation behind an interval is not to be trusted
K = 4.0  # the step of FastChat's `compute_elo`: small, because one vote says little
TOLERANCE = 1e-12  # log-odds, 2e-10 points: a step this small has converged
MOST_STEPS = 1000  # real votes need about 8; 60 models in a chain, each at odds of 10^12 to the next, 407
FARTHEST = 500.0  # log-odds: exp of more could underflow, and two models would come apart

Row = tuple[str, str, str, int]  # model_a, model_b, winner, count
Pairs = dict[tuple[str, str], list[int]]  # (first, second), in order of id → [won by first, won by second, drawn]
Battles = list[tuple[int, int, int, int, int]]  # the same with indexes: first, second, won, lost, drawn
Matrix = list[list[float]]


@dataclass(frozen=True, slots=True)
class Rating:
    """A line of the leaderboard. A model that cannot be compared yet has no rating, bounds or rank."""

    model: str
    rating: float | None
    lower: float | None
    upper: float | None
    rank: int | None
    battles: int
    wins: int
    losses: int
    ties: int
    both_bad: int
    win_rate: float
    preliminary: bool
    change: float = 0.0  # points of sequential Elo won over a period, where somebody asks for that


def bradley_terry(rows: Iterable[Row]) -> list[Rating]:
    """Every model of the rows `(model_a, model_b, winner, count)`, best first, those without a rating last.

    P(a beats b) = 1 / (1 + 10^((R_b - R_a) / 400)), with the R of mean 1000 that make the votes most likely; a tie or
    both-bad is half a win each way (Bradley & Terry, Biometrika 39, 1952). Such R exist, once only, among models each
    of which has beaten each other one directly or through others (Ford, American Mathematical Monthly 64, 1957): the
    largest such group is rated, on the battles inside it. Rank is 1 + the number of models whose lower bound is above
    this upper bound. A battle of a model with itself is skipped. ValueError: an unknown winner or a count below 1.
    """
    records, pairs = _tally(rows)
    fitted = _fit(_largest_group(pairs), pairs)
    return sorted((_rating(model, records[model], fitted) for model in records), key=_place)


def elo(votes: Iterable[tuple[str, str, str]], start: Mapping[str, float] | None = None) -> dict[str, float]:
    """The Elo ratings after `votes` (`(model_a, model_b, winner)`, oldest first), K = 4, from `start` or 1000 each.

    For the movement of a day give it that day's votes and, as `start`, the Bradley-Terry ratings of the votes before:
    a model that does as well as before then stays near its start, and only the day's votes are read one by one.
    """
    ratings = dict(start or {})
    for model_a, model_b, winner in votes:
        score = _outcome(winner)[0]
        if model_a != model_b:
            a, b = ratings.get(model_a, MEAN), ratings.get(model_b, MEAN)
            change = K * (score - _chances((a - b) / POINTS)[0])
            ratings[model_a], ratings[model_b] = a + change, b - change
    return ratings


def _outcome(winner: str) -> tuple[float, str, str]:
    if winner not in OUTCOMES:
        raise ValueError(f"expected a winner among {', '.join(OUTCOMES)}, got {winner!r}")
    return OUTCOMES[winner]


def _chances(difference: float) -> tuple[float, float]:
    """P(first wins), P(second wins): each exact to its last digit, where 1 - p would lose the smaller one."""
    small = math.exp(-min(abs(difference), FARTHEST))
    likely, unlikely = 1.0 / (1.0 + small), small / (1.0 + small)
    return (likely, unlikely) if difference >= 0 else (unlikely, likely)


def _tally(rows: Iterable[Row]) -> tuple[dict[str, Counter[str]], Pairs]:
    """The counts of each model and pair; whole numbers, sorted, so that the order of the rows changes no digit."""
    records: defaultdict[str, Counter[str]] = defaultdict(Counter)
    pairs: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for model_a, model_b, winner, count in rows:
        score, of_a, of_b = _outcome(winner)
        if count < 1:
            raise ValueError(f"expected a count of at least 1, got {count}")
        if model_a == model_b:
            continue
        records[model_a][of_a] += count
        records[model_b][of_b] += count
        pair, won = ((model_a, model_b), 1.0) if model_a < model_b else ((model_b, model_a), 0.0)
        pairs[pair][2 if score == 0.5 else int(score != won)] += count
    return records, dict(sorted(pairs.items()))


def _largest_group(pairs: Pairs) -> tuple[str, ...]:
    """The largest strongly connected component of "has beaten, or drawn with"; of equals more battles, then first id.

    Empty when that is one model: a rating takes two.
    """
    beaten: dict[str, set[str]] = {model: set() for pair in pairs for model in pair}
    for (first, second), (won, lost, drawn) in pairs.items():
        beaten[first].update([second] if won + drawn else [])
        beaten[second].update([first] if lost + drawn else [])
    reached = {model: _reached(model, beaten) for model in beaten}
    groups = {tuple(sorted(other for other in reached[model] if model in reached[other])) for model in beaten}
    best = min(groups, key=lambda group: (-len(group), -_battles(group, pairs), group), default=())
    return best if len(best) > 1 else ()


def _reached(model: str, edges: dict[str, set[str]]) -> set[str]:
    reached, waiting = {model}, [model]
    while waiting:
        fresh = edges[waiting.pop()] - reached
        reached |= fresh
        waiting.extend(fresh)
    return reached


def _battles(group: tuple[str, ...], pairs: Pairs) -> int:
    members = set(group)
    return sum(sum(counts) for pair, counts in pairs.items() if members.issuperset(pair))


def _fit(group: tuple[str, ...], pairs: Pairs) -> dict[str, tuple[float, float, float]]:
    """Rating, lower and upper bound of each model of the group."""
    index = {model: i for i, model in enumerate(group)}
    inside = [(pair, counts) for pair, counts in pairs.items() if index.keys() >= set(pair)]
    battles = [(index[first], index[second], won, lost, drawn) for (first, second), (won, lost, drawn) in inside]
    strengths = _strengths(battles, len(group)) if group else []
    ratings = [MEAN + POINTS * strength for strength in strengths]
    margins = [Z * POINTS * error for error in _errors(battles, strengths)]
    return {m: (r, r - margin, r + margin) for m, r, margin in zip(group, ratings, margins, strict=True)}


def _strengths(battles: Battles, size: int) -> list[float]:
    """The most likely log-odds, mean 0, by Newton's method, damped so that it converges from anywhere.

    A step that changes no difference by more than d changes the curvature along it by at most e^d; so the part
    ln(1 + d) / d of it always gains, and all of it where d < 1.79 (Sun & Tran-Dinh, Mathematical Programming 178,
    2019, case nu = 2). Near the end the decrement, slope · step, falls by far more than half, until rounding is left.
    """
    strengths, previous = [0.0] * size, math.inf
    for _ in range(MOST_STEPS):
        slope, curvature, _ = _derivatives(battles, strengths)
        step = _solve(_eliminate(curvature), slope)
        spread, decrement = max(step) - min(step), sum(map(mul, slope, step))
        part = math.log1p(spread) / spread if spread > 1.0 else 1.0
        strengths = [strength + part * s for strength, s in zip(strengths, step, strict=True)]
        if spread < TOLERANCE or (spread < 0.1 and decrement > previous / 2):
            break
        previous = decrement if spread < 0.1 else math.inf
    mean = math.fsum(strengths) / size
    return [strength - mean for strength in strengths]


def _derivatives(battles: Battles, strengths: list[float]) -> tuple[list[float], Matrix, list[float]]:
    """The log-likelihood's slope; its curvature Σ p(1-p) per pair, row i to i+1, i+2, …; Σ (y-p)² per pair."""
    slope = [0.0] * len(strengths)
    curvature = [[0.0] * i for i in reversed(range(len(strengths)))]
    noise = []
    for a, b, won, lost, drawn in battles:
        p, q = _chances(strengths[a] - strengths[b])
        surplus = (won + drawn / 2) * q - (lost + drawn / 2) * p
        slope[a] += surplus
        slope[b] -= surplus
        curvature[a][b - a - 1] = (won + lost + drawn) * p * q
        noise.append(won * q * q + lost * p * p + drawn * (0.5 - p) ** 2)
    return slope, curvature, noise


def _eliminate(curvature: Matrix) -> list[tuple[float, list[float]]]:
    """L·D·Lᵀ of the Hessian, the Laplacian of these weights: for each model but the last, D and -L below it.

    Taking a model out ties its neighbours to each other with weight w_i·w_j / Σw (the star-mesh transform). This is
    Cholesky's arithmetic without its subtractions: a pair with 10^12 battles does not drown one with 2.
    """
    rows, factor = list(curvature), []
    for k in range(len(rows) - 1):
        pivot = sum(rows[k])
        shares = [weight / pivot for weight in rows[k]]
        for i, share in enumerate(shares, 1):
            if share:
                rows[k + i] = [w + share * v for w, v in zip(rows[k + i], rows[k][i:], strict=True)]
        factor.append((pivot, shares))
    return factor


def _solve(factor: list[tuple[float, list[float]]], right: list[float]) -> list[float]:
    """x of Hessian · x = right, for a `right` that sums to 0. The last entry is held at 0: only differences count."""
    flow = list(right)
    for k, (_, shares) in enumerate(factor):
        for i, share in enumerate(shares, k + 1):
            flow[i] += share * flow[k]
    solution = [0.0]
    for (pivot, shares), value in zip(reversed(factor), reversed(flow[:-1]), strict=True):
        solution.insert(0, value / pivot + sum(map(mul, shares, solution)))
    return solution


def _errors(battles: Battles, strengths: list[float]) -> list[float]:
    """The standard errors of the strengths: the roots of the diagonal of the sandwich H⁺ S H⁺.

    With u = e_a - e_b, y the score of a (1, 0 or ½) and p = P(a beats b), summed over all votes (n equal votes count
    n times): H = Σ p(1-p)·u·uᵀ, minus the Hessian of the log-likelihood; S = Σ (y-p)²·u·uᵀ, the covariance of its
    slope. Unlike H⁺ alone it holds where votes scatter less than the model says, as ties do (Huber 1967; White,
    Econometrica 50, 1982; Chiang et al., "Chatbot Arena", arXiv:2403.04132; `compute_hessian_and_covariance` in
    lmarena/arena-rank, which inverts H plus a small ridge). Strengths are free up to a constant, which mean 0 takes
    away: H⁺ is the inverse on vectors that sum to 0. Row i of H⁺ is an x with H·x = e_i - 1/size, so one vote moves
    strength i by (y-p)·(x_a - x_b), and the variance is the sum of these squares.
    """
    _, curvature, noise = _derivatives(battles, strengths)
    factor, ends = _eliminate(curvature), [(a, b, scatter) for (a, b, *_), scatter in zip(battles, noise, strict=True)]
    errors = []
    for i in range(len(strengths)):
        x = _solve(factor, [(i == j) - 1.0 / len(strengths) for j in range(len(strengths))])
        errors.append(math.sqrt(sum([scatter * (apart := x[a] - x[b]) * apart for a, b, scatter in ends])))
    return errors


def _rating(model: str, record: Counter[str], fitted: dict[str, tuple[float, float, float]]) -> Rating:
    rating, lower, upper = fitted.get(model, (None, None, None))
    rank = None if upper is None else 1 + sum(other > upper for _, other, _ in fitted.values())
    battles, halves = record.total(), record["ties"] + record["both_bad"]
    wins, losses, ties, both_bad = record["wins"], record["losses"], record["ties"], record["both_bad"]
    win_rate, preliminary = (wins + halves / 2) / battles, battles < PRELIMINARY
    return Rating(model, rating, lower, upper, rank, battles, wins, losses, ties, both_bad, win_rate, preliminary)


def _place(rating: Rating) -> tuple[float, float, int, str]:
    """The sort key of a rating: by rank, then rating; without these by battles."""
    if rating.rank is None or rating.rating is None:
        return math.inf, 0.0, -rating.battles, rating.model
    return rating.rank, -rating.rating, -rating.battles, rating.model
