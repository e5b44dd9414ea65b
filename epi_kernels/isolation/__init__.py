"""Evolving isolation (EPI): who competes for protection, when the masks are chosen again, and what the refreshes report.

Nothing here depends on an optimizer's rule, on a dtype or on a backend.
"""
