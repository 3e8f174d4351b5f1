"""The decode benchmark's rows as a table in the terminal."""

from typing import Any

from rich.table import Table

from polarjax.bench.rows import shown_case, shown_ratio


def table(rows: list[dict[str, Any]]) -> Table:
    """What was timed, with what issue 7 wants of it."""
    made = Table(box=None)
    for column in ("model, batch, context", "policy"):
        made.add_column(column)
    several = any("sent_ms" in row for row in rows)
    columns = "ms", "tokens/s", "floor ms", "floor / time", "wanted", "x dense"
    columns += ("by floors",)
    for column in (*columns, *(("x one device", "wanted") if several else ())):
        made.add_column(column, justify="right")
    for row in rows:
        if row["kind"] not in ("decode", "transformers"):
            continue
        case = shown_case(row)
        kind = "transformers, " if row["kind"] == "transformers" else ""
        if row["ms"] is None:
            made.add_row(case, kind + row["policy"], row["error"])
            continue
        wanted, floors = (
            row.get("wanted_floor_fraction"),
            row.get("floor_over_dense"),
        )
        wanted_one = row.get("wanted_over_one_device")
        one = (
            shown_ratio(row, "over_one_device", ""),
            f"{wanted_one:.2f}" if wanted_one else "",
        )
        made.add_row(
            case,
            kind + row["policy"],
            f"{row['ms']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['floor_ms']:.3f}",
            f"{row['floor_fraction']:.3f}",
            f"{wanted:.2f}" if wanted else "",
            shown_ratio(row, "over_dense", ""),
            f"{floors:.2f}" if floors else "",
            *(one if several else ()),
        )
    return made
