"""Metrics of generated images: feature distances with their floor, and what a classifier makes of the images."""

from zoo.metrics.agreement import ClassifierAgreement, classifier_agreement
from zoo.metrics.classifier import FeatureClassifier
from zoo.metrics.extractors import INCEPTION, OWN_CLASSIFIER, SHIPPED_EXTRACTORS, check_extractor, load_classifier
from zoo.metrics.feature_distance import (
    NUM_INCEPTION_SAMPLES,
    NUM_SAMPLES,
    FeatureDistance,
    FeatureDistances,
    feature_distances,
    real_data_floor,
)
from zoo.metrics.feature_network import FeatureCNN, FeatureMLP, FeatureNetwork

__all__ = [
    "INCEPTION",
    "NUM_INCEPTION_SAMPLES",
    "NUM_SAMPLES",
    "OWN_CLASSIFIER",
    "SHIPPED_EXTRACTORS",
    "ClassifierAgreement",
    "FeatureCNN",
    "FeatureClassifier",
    "FeatureDistance",
    "FeatureDistances",
    "FeatureMLP",
    "FeatureNetwork",
    "check_extractor",
    "classifier_agreement",
    "feature_distances",
    "load_classifier",
    "real_data_floor",
]
