"""Solvers against each other on the heads of graph bundles. Importing it loads neither torch nor a solver."""

from grace_opt.compare.index import Index, stands
from grace_opt.compare.instances import Instance, instances_of, labelled, limits_of, refusal, slack_of
from grace_opt.compare.run import Comparison, compare
from grace_opt.compare.summary import shifted_geometric_mean, summarise, with_references

__all__ = [
    "Comparison",
    "Index",
    "Instance",
    "compare",
    "instances_of",
    "labelled",
    "limits_of",
    "refusal",
    "shifted_geometric_mean",
    "slack_of",
    "stands",
    "summarise",
    "with_references",
]
