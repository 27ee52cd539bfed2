"""Profile: measure what passes, sub-layers and rounds cost on this device.

The study and the packages above the study may import this package.
"""
