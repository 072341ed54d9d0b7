"""Chapter 03: backbones and their ImageNet weights, a new stem, a new head, frozen parts; and the logits of a split."""

from cifar_ft.models.backbones import BACKBONES, SurgeryError, create_backbone, head, stages
from cifar_ft.models.evaluation import (
    DeviceError,
    EvaluationError,
    choose_device,
    evaluating,
    in_batches,
    is_out_of_memory,
    predict_logits,
)
from cifar_ft.models.freezing import freeze, is_frozen_batchnorm, refresh_batchnorm
from cifar_ft.models.surgery import (
    build_model,
    compare,
    cut,
    features,
    replace_head,
    replace_stem,
    resample_kernel,
    summarize,
)
from cifar_ft.models.weights import WEIGHTS_MB, fetch_weights, resolve_backbone
