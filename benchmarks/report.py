"""Measured figures as Markdown."""

from collections.abc import Iterable, Iterator

from ddpm_diffusers.hub import table

__all__ = ["grouped", "precision_name", "table", "thousands", "with_quartiles"]


def thousands(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def with_quartiles(result: dict | None, form: str = ".2f") -> str:
    """ "median (first quartile to third)"; empty if it was not measured."""
    if result is None:
        return ""
    first, third = result["quartiles"]
    return f"{result['median']:{form}} ({first:{form}} to {third:{form}})"


def precision_name(precision: str) -> str:
    """A precision as accelerate calls it, in words: its "no" is float32."""
    return "float32" if precision == "no" else precision


def grouped(rows: Iterable[dict], *keys: str) -> Iterator[tuple[str, list[dict]]]:
    """Groups of rows with equal `keys`, in order of appearance, each after a title made of these."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        values = (precision_name(row[key]) if key == "precision" else row[key] for key in keys)
        groups.setdefault(tuple(values), []).append(row)
    for values, members in groups.items():
        yield ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in zip(keys, values, strict=True)), members
