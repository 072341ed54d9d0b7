"""The whole course in one go, and whether this machine is ready for it."""

from cifar_ft.course.check import checks
from cifar_ft.course.execution import WIDGET_VIEW, CourseError, drop_widgets
from cifar_ft.course.runner import (
    NOTEBOOKS,
    CourseResult,
    ParameterError,
    check_parameters,
    find_notebooks,
    parameters,
    parse_parameters,
    run_course,
)

__all__ = [
    "CourseError",
    "CourseResult",
    "NOTEBOOKS",
    "ParameterError",
    "WIDGET_VIEW",
    "check_parameters",
    "checks",
    "drop_widgets",
    "find_notebooks",
    "parameters",
    "parse_parameters",
    "run_course",
]
