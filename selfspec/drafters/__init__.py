"""Drafters: who proposes the tokens of a round.

Imported by the policy and all above it. The protocol stands in `selfspec.decoding.drafter`.
"""
