"""selfspec_search: find the plan that decodes fastest, without decoding.

The target writes text once; replay computes what any draft would have got accepted on it; a profile measured on this
device turns that into tokens per second; a study looks for the best skip set; decoding confirms it.
"""

from selfspec_search.confirm import Confirmed
from selfspec_search.result import SearchResult
from selfspec_search.run import search
from selfspec_search.settings import OnProgress, Progress, SearchSettings

__all__ = ["Confirmed", "OnProgress", "Progress", "SearchResult", "SearchSettings", "search"]
