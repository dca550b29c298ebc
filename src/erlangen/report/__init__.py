"""Figures, tables and self-contained HTML reports: no network, no JavaScript, the same bytes for the same data."""

from .document import Figure as Figure
from .document import Section as Section
from .document import Table as Table
from .document import page as page
from .document import write_report as write_report
from .figures import Arrows as Arrows
from .figures import IntervalRow as IntervalRow
from .figures import Series as Series
from .figures import arrows as arrows
from .figures import curves as curves
from .figures import heat_map as heat_map
from .figures import intervals as intervals
from .figures import small_multiples as small_multiples
from .statistics import Interval as Interval
from .statistics import holm as holm
from .statistics import mean_and_standard_error as mean_and_standard_error
from .statistics import paired_interval as paired_interval
from .statistics import paired_p_value as paired_p_value
from .statistics import student_t_quantile as student_t_quantile

__all__ = [
    "Arrows",
    "Figure",
    "Interval",
    "IntervalRow",
    "Section",
    "Series",
    "Table",
    "arrows",
    "curves",
    "heat_map",
    "holm",
    "intervals",
    "mean_and_standard_error",
    "page",
    "paired_interval",
    "paired_p_value",
    "small_multiples",
    "student_t_quantile",
    "write_report",
]
