"""Runs that differ in their seed alone are one configuration: one row, one sample.

configurations = group_configurations(runs)
paired(configurations[0], configurations[1], 'final_val_loss')     # an Estimate over the seeds they share
"""

import functools
import re
from collections import defaultdict
from dataclasses import dataclass

from comparison_audit import configuration_key
from comparison_settings import key_of
from comparison_stats import estimate, paired_difference


@dataclass(eq=False)
class Configuration:
    """Runs that differ in their seed alone. One run is a configuration too."""

    label: str
    runs: list

    @property
    def is_finished(self):
        return self.runs[0].is_finished  # a run that did not finish stands by itself

    @property
    def seeds(self):
        """[seed, ...] in the order of the runs, each once."""
        return list(dict.fromkeys(run.seed for run in self.runs))

    def by_seed(self, column):
        """{seed: value}; a seed that was run twice counts once, by its mean."""
        return self.over_seeds(lambda run: run.values.get(column))

    def over_seeds(self, value_of):
        """{seed: mean of value_of(run)}, where what is missing stays missing."""
        values = defaultdict(list)
        for run in self.runs:
            values[run.seed].append(value_of(run))
        return {seed: estimate(each).mean for seed, each in values.items()}

    def estimate(self, column):
        return estimate(self.by_seed(column).values())

    @functools.cached_property
    def model_key(self):
        return key_of(self.runs[0].model)

    @functools.cached_property
    def stream(self):
        """{seed: stream hash, or None where runs of the seed disagree}: only equal hashes are paired."""
        hashes = defaultdict(set)
        for run in self.runs:
            hashes[run.seed].add(run.values.get("stream_hash"))
        return {seed: each.copy().pop() if len(each) == 1 else None for seed, each in hashes.items()}


def group_configurations(runs):
    """[Configuration, ...] in the order in which each first appears."""
    groups = defaultdict(list)
    for run in runs:
        groups[configuration_key(run)].append(run)
    configurations = [Configuration(label_of(group), group) for group in groups.values()]
    taken = defaultdict(list)
    for configuration in configurations:
        taken[configuration.label].append(configuration)
    for same in taken.values():
        for configuration in same if len(same) > 1 else []:
            configuration.label = plain_label(configuration.runs)
    return configurations


def label_of(runs):
    """The name that the runs share once their seeds are cut out of it, else the first name and how many more."""
    if len(runs) == 1:
        return runs[0].name
    names = {without_seed(run.name, run.seed) for run in runs}
    return names.pop() if len(names) == 1 else plain_label(runs)


def plain_label(runs):
    return runs[0].name + (f" +{len(runs) - 1}" if len(runs) > 1 else "")


def without_seed(name, seed):
    """'llama-s1338' -> 'llama' when the seed is 1338; llama_seed=1338 and llama-1338-small lose theirs too.

    A number that is marked as a seed goes first: llama-1-s1 is the first seed of llama-1.
    """
    for mark in ("(s|seed)[-_=]?", ""):
        shorter, n_found = re.subn(rf"(^|[-_.]){mark}{seed}(?=$|[-_.])", "", name, count=1)
        if n_found:
            return shorter.strip("-_.") or name
    return name


def paired(first, second, column):
    """Estimate of second - first for two configurations, over seeds whose batch streams were the same."""
    same = shared_seeds(first, second)
    values = {seed: value for seed, value in first.by_seed(column).items() if seed in same}
    return paired_difference(values, second.by_seed(column))


def shared_seeds(first, second):
    """{seed, ...} at which both saw the same tokens in the same order."""
    streams, others = first.stream, second.stream
    return {seed for seed in streams if streams[seed] is not None and streams[seed] == others.get(seed)}
