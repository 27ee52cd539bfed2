"""Drafters: layer skipping, prompt lookup, a draft model, and the cascade of prompt lookup and another drafter.

Imported by the policy and every package above the policy. `selfspec.decoding.drafter` defines the protocol.
"""
