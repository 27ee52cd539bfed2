"""Profile: what passes, sub-layers and rounds cost on this device.

Imported by the study and all above it.
"""
