"""Figures that others published, from published.csv: data with its source, never measured here."""

from __future__ import annotations

import csv
import dataclasses
import functools
from pathlib import Path

__all__ = ["FILE", "Figure", "Figures", "read"]

FILE = Path(__file__).with_name("published.csv")


@dataclasses.dataclass(frozen=True)
class Figure:
    """What was published, and where."""

    value: str
    source: str


class Figures:
    """subject and quantity -> figure.

    Subjects are workloads, and names of systems that were left out. Quantities: top1 (ImageNet-1k,
    per cent), gmacs (1e9 multiply-adds of one image), mmacs (1e6, of ten layers),
    paper_gpu_images_per_s (RTX 2080 Ti, batch 32), paper_cpu_ms (i9-9900X, one thread, batch 1),
    paper_arm_ms (Cortex-A72, one thread, batch 1); left_out (the reason), published.
    """

    def __init__(self, figures: dict[tuple[str, str], Figure]):
        self.figures = figures

    def get(self, subject: str, quantity: str) -> Figure | None:
        return self.figures.get((subject, quantity))

    def number(self, subject: str, quantity: str) -> float | None:
        """The value as a number; None if it was not published."""
        figure = self.get(subject, quantity)
        return None if figure is None else float(figure.value)

    def subjects(self, quantity: str) -> list[str]:
        """Those for which a quantity was published, in the order of the file."""
        return [subject for subject, name in self.figures if name == quantity]


@functools.cache
def read(path: Path = FILE) -> Figures:
    """The figures of a file with the columns subject, quantity, value, source."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return Figures(
        {(row["subject"], row["quantity"]): Figure(row["value"], row["source"]) for row in rows}
    )
