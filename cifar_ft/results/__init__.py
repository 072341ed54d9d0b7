"""Chapter 05: runs on disk, metrics with their uncertainty, comparisons."""

from cifar_ft.results.calibration import (
    STATED,
    fit_calibration,
    fit_scaling,
    probabilities,
    reliability,
    selective_accuracy,
    stated,
)
from cifar_ft.results.comparison import compare_runs, difference_test, paired_test
from cifar_ft.results.metrics import (
    ResultError,
    accuracy_text,
    confusion,
    energy,
    most_confident_mistakes,
    most_confused,
    per_class_accuracy,
    wilson_interval,
)
from cifar_ft.results.robustness import MEAN, accuracy_without, corrupted_accuracy, mean_interval
from cifar_ft.results.runs import (
    RECORDED,
    SHIPPED_RUN,
    Run,
    RunError,
    choose_run,
    find_runs,
    load_run,
    newest_run,
    published_log,
    test_issues,
)
from cifar_ft.results.studies import (
    ABLATIONS,
    REDRAWN,
    StudyError,
    recorded_ablations,
    recorded_redrawn,
    recorded_robustness,
    redrawn_table,
    summarize,
    variants,
)
