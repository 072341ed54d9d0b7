"""Chapter 06: a trained model on any picture, why it answers as it does, and the model as an ONNX file."""

from cifar_ft.predictions.explanations import (
    ExplanationError,
    FeatureBank,
    grad_cam,
    occlusion,
    overlay,
    sensitivity,
    variants,
)
from cifar_ft.predictions.folders import PARTIAL, count_files, is_device, predict_paths, write_csv
from cifar_ft.predictions.images import (
    MESSAGES,
    SUFFIXES,
    ImageError,
    Note,
    Picture,
    checked_fit,
    read_image,
    read_picture,
    square,
)
from cifar_ft.predictions.onnx import ExportError, export_checked, export_onnx
from cifar_ft.predictions.predictor import SHIPPED, Prediction, PredictionError, Predictor
