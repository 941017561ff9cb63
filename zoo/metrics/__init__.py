"""Metrics of what is generated: of images, feature distances with their floor and a classifier's view; of text, spelling
and calls of tools. And of recommendations: the ranks of items, areas under the curve inside of groups."""

from zoo.metrics.agreement import ClassifierAgreement, classifier_agreement, logits_agreement
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
from zoo.metrics.feature_statistics import (
    FeatureStatistics,
    FeatureStream,
    folder_batches,
    frechet_distance,
    read_statistics,
    stream_features,
    write_statistics,
)
from zoo.metrics.grouped_auc import GroupedAUC, grouped_auc
from zoo.metrics.item_table import ItemTable, TopItems
from zoo.metrics.ranking import RankingMetrics, ranking_metrics, target_ranks
from zoo.metrics.spelling import SpellingAccuracy, TextScores, english_dictionary, spelling_accuracy, text_scores, vocabulary
from zoo.metrics.streamed_distance import folder_distances, statistics_distances, streamed_distances
from zoo.metrics.tool_calls import CallMatches, ToolCallMatch, call_matches, match_calls, parse_calls

__all__ = [
    "INCEPTION",
    "NUM_INCEPTION_SAMPLES",
    "NUM_SAMPLES",
    "OWN_CLASSIFIER",
    "SHIPPED_EXTRACTORS",
    "CallMatches",
    "ClassifierAgreement",
    "FeatureCNN",
    "FeatureClassifier",
    "FeatureDistance",
    "FeatureDistances",
    "FeatureMLP",
    "FeatureNetwork",
    "FeatureStatistics",
    "FeatureStream",
    "GroupedAUC",
    "ItemTable",
    "RankingMetrics",
    "SpellingAccuracy",
    "TextScores",
    "ToolCallMatch",
    "TopItems",
    "call_matches",
    "check_extractor",
    "classifier_agreement",
    "english_dictionary",
    "feature_distances",
    "folder_batches",
    "folder_distances",
    "frechet_distance",
    "grouped_auc",
    "load_classifier",
    "logits_agreement",
    "match_calls",
    "parse_calls",
    "ranking_metrics",
    "read_statistics",
    "real_data_floor",
    "spelling_accuracy",
    "statistics_distances",
    "stream_features",
    "streamed_distances",
    "target_ranks",
    "text_scores",
    "vocabulary",
    "write_statistics",
]
