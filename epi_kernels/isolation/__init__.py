"""Evolving isolation (EPI): who competes for protection, when it is chosen again, and what is known of it afterwards.

It knows no rule, no dtype and no backend.
"""
