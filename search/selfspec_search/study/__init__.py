"""Study: Optuna over the sub-layers' choices; each trial is a replay, valued by the profile's costs.

`confirm` and the pipeline may import this package.
"""
