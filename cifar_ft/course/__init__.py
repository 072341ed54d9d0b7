"""The whole course in one go, and whether this machine is ready for it."""

from cifar_ft.course.check import checks
from cifar_ft.course.runner import (
    NOTEBOOKS,
    WIDGET_VIEW,
    CourseError,
    CourseResult,
    ParameterError,
    drop_widgets,
    find_notebooks,
    read_parameters,
    run_course,
)
