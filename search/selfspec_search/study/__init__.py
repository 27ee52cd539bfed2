"""Study: Optuna over the sub-layers' choices; each trial is a replay at the profile's prices.

Imported by confirm and the pipeline.
"""
