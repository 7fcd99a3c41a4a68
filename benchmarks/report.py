"""Samples to a table on the terminal and to one picture: medians, with the lowest and highest beside them."""

import json
from html import escape
from pathlib import Path
from statistics import median

FAN_OUT = [
    ("per_cpu_second", "tokens/CPU-s", 0),
    ("lost_percent", "lost %", 1),
    ("p50_ms", "p50 ms", 2),
    ("p99_ms", "p99 ms", 2),
    ("repeated", "repeated", 0),
    ("misordered", "out of order", 0),
    ("deaf", "deaf", 0),
    ("tokens_per_frame", "tokens/frame", 1),
]


def on_both(*columns: tuple[str, str, int]) -> list[tuple[str, str, int]]:
    """Columns of SQLite, and the same once more of PostgreSQL; see `on_both` in scenarios.py."""
    return [*columns, *((f"{name}_pg", f"{heading}, PostgreSQL", decimals) for name, heading, decimals in columns)]


# Per scenario: the key of a sample, its heading, decimals. The first column is the one drawn and sorted by.
COLUMNS = {
    "S1": FAN_OUT,
    "S2": FAN_OUT,
    "S3": [
        ("per_second", "tokens/s", 0),
        ("p50_ms", "p50 ms", 2),
        ("p99_ms", "p99 ms", 2),
        ("tokens_per_frame", "tokens/frame", 1),
        ("client_load", "client load", 2),
    ],
    "idle": [("p50_ms", "p50 ms", 2), ("p99_ms", "p99 ms", 2), ("max_ms", "max ms", 2), ("lost_percent", "lost %", 1)],
    "memory": [
        ("mib_per_1000_idle", "MiB/1,000 idle", 1),
        ("mib_per_blocked", "MiB/blocked reader", 2),
        ("alone_p99_ms", "p99 of a reader alone, ms", 1),
        ("beside_p99_ms", "beside blocked ones, ms", 1),
        ("base_mib", "base MiB", 1),
    ],
    "growth": [
        *((f"{n}_sockets", f"{n:,} sockets", 0) for n in (10, 50, 500, 5000)),
        *((f"{n}_sessions", f"{n:,} sessions", 0) for n in (1, 10, 100, 1000)),
    ],
    "http": [
        ("health_per_cpu_second", "health/CPU-s", 0),
        ("health_per_second", "health/s", 0),
        *on_both(
            ("sessions", "sessions/s", 0),
            ("turns", "turns/s", 0),
            ("turn_ms", "CPU-ms/turn", 2),
        ),
    ],
    "streams": [
        ("first_p50_ms", "first token p50 ms", 0),
        ("first_max_ms", "max ms", 0),
        ("complete_percent", "complete %", 1),
        ("lag_p99_ms", "lag p99 ms", 1),
        ("seconds", "seconds", 1),
        ("per_cpu_second", "tokens/CPU-s", 0),
    ],
    "turnover": [("grown_mib", "MiB grown", 1), ("memory_mib", "MiB", 1), ("complete_percent", "complete %", 1)],
    "upstream-S2": FAN_OUT,
    "upstream-streams": [
        *((f"us_{n}", f"us/token, {n}", 0) for n in (60, 100, 200)),
        *((f"core_{n}", f"core, {n}", 2) for n in (60, 100, 200)),
        *((f"first_{p}_{n}", f"first {p}, {n}", 0) for n in (60, 100, 200) for p in ("p50", "p99")),
        *((f"late_{p}_{n}", f"late {p}, {n}", 1) for n in (60, 100, 200) for p in ("p50", "p99")),
        ("complete_200", "complete %", 0),
        ("memory_mib", "MiB", 0),
    ],
    "waits": on_both(
        ("leaderboard", "leaderboard of 1M votes, ms", 0),
        ("again", "kept", 2),
        ("list", "list of 10,000 sessions", 1),
        ("search", "search in them", 1),
        ("history", "last 50 of 1,000 messages", 1),
        ("messages", "all 1,000", 1),
        ("start", "second start, s", 2),
    ),
}
LESS_IS_BETTER = {"idle", "memory", "streams", "turnover", "upstream-streams", "waits"}

TITLES = {
    "S1": "S1: 1 session × 500 sockets × 50 tokens/s — tokens delivered per server CPU-second",
    "S2": "S2: 200 sessions × 3 sockets × 30 tokens/s — tokens delivered per server CPU-second",
    "S3": "S3: most tokens a second delivered on one core to 500 sockets, p99 under 250 ms",
    "idle": "Idle: first token, writer to socket — p50, ms (less is better)",
    "memory": "Memory: MiB per 1,000 idle sockets (less is better)",
    "growth": "Growth: 18,000 tokens/s spread ever wider — tokens delivered per server CPU-second at 10 sockets",
    "http": "HTTP: /api/health/ answers per server CPU-second",
    "streams": "Streams: 3,000 HTTP turns posted at once — first token, median, ms (less is better)",
    "turnover": "Turnover: 100 turns a second for a minute — MiB that are not given back (less is better)",
    "upstream-S2": "S2 through a model vendor on the other core — tokens delivered per server CPU-second",
    "upstream-streams": "HTTP turns through a model vendor, 30 tokens/s each — us of CPU per token (less is better)",
    "waits": "Waits: the leaderboard of a million votes, computed, ms (less is better)",
}


def values(samples: list[dict], key: str) -> list[float]:
    return [sample[key] for sample in samples if key in sample]


def ordered(scenario: str, samples: dict[str, list[dict]]) -> list[tuple[str, list[dict]]]:
    """Best first."""
    key, sign = COLUMNS[scenario][0][0], 1 if scenario in LESS_IS_BETTER else -1
    return sorted(samples.items(), key=lambda item: sign * median(values(item[1], key) or [0]))


def cell(numbers: list[float], decimals: int) -> str:
    """The median, and the range where there is one: `245,012 (240,100–251,330)`."""
    if not numbers:
        return "–"
    text = f"{median(numbers):,.{decimals}f}"
    low, high = f"{min(numbers):,.{decimals}f}", f"{max(numbers):,.{decimals}f}"
    return text if low == high else f"{text} ({low}–{high})"


def table(scenario: str, samples: dict[str, list[dict]]) -> str:
    """A Markdown table that also reads well on a terminal."""
    rows = [[scenario, *(heading for _, heading, _ in COLUMNS[scenario])]]
    for label, taken in ordered(scenario, samples):
        rows.append([label, *(cell(values(taken, key), decimals) for key, _, decimals in COLUMNS[scenario])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    lines = (
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows
    )
    return f"\n{TITLES[scenario]}\n\n" + "\n".join(lines) + "\n"


def picture(results: Path) -> str:
    """One SVG of every scenario measured so far: a bar for the median, a line from lowest to highest."""
    parts, y = [], 10
    for scenario in COLUMNS:
        file = results / f"{scenario}.json"
        if not file.exists():
            continue
        key, _, decimals = COLUMNS[scenario][0]
        samples = json.loads(file.read_text())
        samples = {label: taken for label, taken in samples.items() if values(taken, key)}
        most = max((max(values(taken, key)) for taken in samples.values()), default=0) or 1
        y += 30
        parts.append(f'<text x="20" y="{y}" class="title">{escape(TITLES[scenario])}</text>')
        y += 12
        for label, taken in ordered(scenario, samples):
            numbers = values(taken, key)
            width, low, high = (400 * n / most for n in (median(numbers), min(numbers), max(numbers)))
            kind = "ours" if label.startswith("Parley") else "peer"
            parts += [
                f'<text x="290" y="{y + 13}" text-anchor="end">{escape(label)}</text>',
                f'<rect x="300" y="{y + 2}" width="{width:.1f}" height="14" class="{kind}"/>',
                f'<line x1="{300 + low:.1f}" x2="{300 + high:.1f}" y1="{y + 9}" y2="{y + 9}"/>',
                f'<text x="{308 + high:.1f}" y="{y + 13}">{median(numbers):,.{decimals}f}</text>',
            ]
            y += 20
    style = (
        "text{font:12px sans-serif;fill:#222}.title{font-weight:bold}.ours{fill:#2563eb}.peer{fill:#b8c0cc}"
        "line{stroke:#222}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="800" height="{y + 20}" viewBox="0 0 800 {y + 20}">\n'
        f"<style>{style}</style>\n"
        f'<rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
