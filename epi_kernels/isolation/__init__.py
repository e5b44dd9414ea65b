"""Evolving isolation (EPI): who competes for protection, when masks are chosen again, and what refreshes report.

Nothing here depends on an optimizer's rule, on a dtype or on a backend.
"""
